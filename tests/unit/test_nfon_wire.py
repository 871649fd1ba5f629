"""NFON on the wire: both versions of the document, times without a unit, and streams cut anywhere."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from relay.domain.call import Direction, InvalidRow, NumberType, Outcome, Record
from relay.domain.json import Json
from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.nfon import wire
from relay.providers.nfon.options import NfonOptions
from relay.providers.parsing import ErrorResponse

SINCE = datetime(2025, 6, 3, 10, 0, 0, 500_000, tzinfo=UTC)
ALICE: Json = {"name": "Alice", "number": "1001", "context": "K9999"}
BOB: Json = {"name": "Bob", "number": "4989123456789", "context": "global"}
ROW: Json = {
    "uuid": "110e8400-e29b-41d4-a716-446655440011",
    "duration": 30,
    "direction": "outbound",
    "caller": ALICE,
    "callee": BOB,
    "status": "answered",
    "created": "2025-06-03T10:12:34Z",
    "trunk_code": "07",
    "transcription": {"available": False},
}


def read(**changes: Any) -> Record:
    record = wire.parse_row({**ROW, **changes}, region="US")
    assert isinstance(record, Record)
    return record


def bad(row: object) -> InvalidRow:
    found = wire.parse_row(row, region="US")
    assert isinstance(found, InvalidRow)
    return found


# -- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "number"), [("seconds", "1748944799"), ("milliseconds", "1748944799000")])
def test_the_lower_bound_is_a_second_early_in_either_unit(unit: wire.Unit, number: str) -> None:
    path = wire.list_path(wire.Scope(), SINCE, unit, limit=500, offset=499)

    assert path == f"/records?from={number}&sort=asc&limit=500&offset=499"


def test_an_upper_bound_is_never_sent() -> None:
    """`to` in the wrong unit would return nothing, unnoticed."""
    assert "to=" not in wire.list_path(wire.Scope("K1", "10"), SINCE, "milliseconds", limit=1)


def test_an_administrator_requests_one_extension() -> None:
    scope = wire.Scope("K9999", "1001")

    assert wire.stream_path(scope) == "/records?customer=K9999&extension=1001"
    assert wire.stream_path(wire.Scope()) == "/records"
    assert wire.newest_path(scope) == "/records?sort=desc&limit=1&customer=K9999&extension=1001"


def test_a_key_cannot_lead_elsewhere() -> None:
    assert wire.details_path("../x?y") == "/records/..%2Fx%3Fy?complete=true"


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_documents_first_example_becomes_a_record() -> None:
    record = read()

    assert (record.key, record.direction, record.outcome) == (ROW["uuid"], Direction.OUTBOUND, Outcome.ANSWERED)
    assert record.started_at == datetime(2025, 6, 3, 10, 12, 34, tzinfo=UTC)
    assert (record.local_date, record.duration_seconds, record.derived) == ("2025-06-03", 30, ("ended_at",))
    assert record.ended_at == record.started_at + timedelta(seconds=30)
    assert (record.caller.extension, record.caller.type, record.caller.internal) == (
        "1001",
        NumberType.EXTENSION,
        True,
    )
    assert (record.callee.number, record.callee.raw, record.callee.country) == (
        "+4989123456789",
        "4989123456789",
        "DE",
    )
    assert record.external == record.callee
    assert record.internal == record.caller
    assert record.transcription == {"available": False}
    assert record.custom == {"trunk_code": "07"}
    assert record.raw == ROW
    assert not record.audio


@pytest.mark.parametrize(
    ("status", "outcome", "missed"),
    [
        ("answered", Outcome.ANSWERED, False),
        ("missed", Outcome.NO_ANSWER, True),
        ("cancelled", Outcome.CANCELLED, True),
        ("unknown", Outcome.UNKNOWN, False),
        ("beamed-up", Outcome.UNKNOWN, False),
        (None, Outcome.UNKNOWN, False),
        (["answered"], Outcome.UNKNOWN, False),
    ],
)
def test_statuses_are_mapped_and_new_ones_kept(status: Any, outcome: Outcome, missed: bool) -> None:
    record = read(status=status, direction="inbound", caller=BOB, callee=ALICE)

    assert (record.outcome, record.missed) == (outcome, missed)
    assert record.status_raw == (status if isinstance(status, str) else None)


@pytest.mark.parametrize(
    ("side", "kind", "number", "extension"),
    [
        (BOB, NumberType.E164, "+4989123456789", None),
        ({"number": "+4989123456789", "context": "global"}, NumberType.E164, "+4989123456789", None),
        ({"number": "1003", "context": "K9999"}, NumberType.EXTENSION, None, "1003"),
        ({"number": "1003", "context": "a context of tomorrow"}, NumberType.EXTENSION, None, "1003"),
        ({"number": "112", "context": "emergency"}, NumberType.EMERGENCY, None, None),
        ({"number": "115", "context": "short"}, NumberType.SHORT, None, None),
        ({"number": "8001", "context": "conference"}, NumberType.CONFERENCE, None, None),
        ({"number": "anonymous", "context": "global"}, NumberType.ANONYMOUS, None, None),
        ({"name": "Withheld"}, NumberType.ANONYMOUS, None, None),
        ({"number": "49", "context": "global"}, NumberType.UNKNOWN, None, None),
        (None, NumberType.UNKNOWN, None, None),
        ("text", NumberType.UNKNOWN, None, None),
    ],
)
def test_the_context_of_a_number_decides_its_type(
    side: Any, kind: NumberType, number: str | None, extension: str | None
) -> None:
    callee = read(callee=side).callee

    assert (callee.type, callee.number, callee.extension) == (kind, number, extension)


@pytest.mark.parametrize(
    ("direction", "caller", "callee", "seen", "external", "internal"),
    [
        ("outbound", ALICE, BOB, Direction.OUTBOUND, "Bob", "Alice"),
        ("inbound", BOB, ALICE, Direction.INBOUND, "Bob", "Alice"),
        ("inbound", {**ALICE, "name": "Charlie"}, ALICE, Direction.INTERNAL, None, "Alice"),
        ("outbound", ALICE, {**ALICE, "name": "Charlie"}, Direction.INTERNAL, None, "Alice"),
        ("sideways", BOB, ALICE, Direction.UNKNOWN, "Bob", "Alice"),
        (None, ALICE, BOB, Direction.UNKNOWN, "Bob", "Alice"),
        (None, BOB, BOB, Direction.UNKNOWN, None, None),
    ],
)
def test_direction_is_seen_from_the_owner_of_the_record(
    direction: str | None,
    caller: Json,
    callee: Json,
    seen: Direction,
    external: str | None,
    internal: str | None,
) -> None:
    record = read(direction=direction, caller=caller, callee=callee)

    assert record.direction is seen
    assert (record.external.name if record.external else None) == external
    assert (record.internal.name if record.internal else None) == internal


def test_both_versions_of_the_document_are_read() -> None:
    group = {"name": "Test Group", "number": "10", "context": "K9999"}
    at = "2025-06-03T10:25:26Z"
    older = {
        "history": [{"callee": {**group, "service": "group"}, "updated": at}],
        "custom_data": {"crm": {"id": 7}},
    }
    newer = {
        "history": [{"callee": {**group, "destination_type": "group"}, "updated": at}],
        "crm": {"id": 7},
        "call_id": "c-1",
        "customer": "K9999",
        "extension": "1001",
        "user_uuid": "u-1",
    }

    first, second = read(**older), read(**newer)

    assert first.transfers == second.transfers
    assert first.transfers == (
        {
            "at": "2025-06-03T10:25:26Z",
            "to": {
                "number": None,
                "raw": "10",
                "extension": "10",
                "name": "Test Group",
                "destination_type": "group",
            },
        },
    )
    assert first.custom["crm"] == second.custom["crm"] == {"id": 7}
    assert {name: second.custom[name] for name in ("call_id", "customer", "extension", "user_uuid")} == {
        "call_id": "c-1",
        "customer": "K9999",
        "extension": "1001",
        "user_uuid": "u-1",
    }
    assert second.caller.user_id == "u-1"
    assert second.callee.user_id is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({name: value for name, value in ROW.items() if name != "uuid"}, "uuid is missing"),
        ({**ROW, "uuid": None}, "uuid is not a short text"),
        ({**ROW, "uuid": 17}, "uuid is not a short text"),
        ({**ROW, "uuid": "x" * 129}, "uuid is not a short text"),
        ({**ROW, "uuid": " "}, "uuid is not a short text"),
        ({**ROW, "created": None}, "created is not a valid time; expected the form 2025-07-01 20:54:53"),
        ({**ROW, "created": 1748945554}, "created is not a valid time; expected the form 2025-07-01 20:54:53"),
        (
            {**ROW, "created": "2025-06-03T24:00:00Z"},
            "created is not a valid time; expected the form 2025-07-01 20:54:53",
        ),
        (
            {**ROW, "created": "2025-02-30T10:12:34Z"},
            "created is not a valid time; expected the form 2025-07-01 20:54:53",
        ),
        ({**ROW, "created": "0001-01-01T00:00:00+14:00"}, "created is not in this century"),
        ({**ROW, "created": "1999-01-01T00:00:00Z"}, "created is not in this century"),
        ("text", "the row is not a JSON object"),
        (None, "the row is not a JSON object"),
        ([], "the row is not a JSON object"),
    ],
)
def test_a_row_without_a_uuid_or_a_time_is_invalid(row: object, reason: str) -> None:
    assert bad(row).reason == reason


def test_a_quarantined_row_shows_no_number() -> None:
    assert "4989123456789" not in bad({**ROW, "created": None}).excerpt


@given(
    st.dictionaries(
        st.sampled_from([*ROW, "history", "crm", "custom_data", "customer", "extension", "user_uuid", "updated"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["name", "number", "context", "callee", "available", "crm"]), inner, max_size=3
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_no_row_can_make_reading_fail(changes: Json) -> None:
    result = wire.parse_row({**ROW, **changes}, "US")

    assert isinstance(result, Record | InvalidRow)
    if isinstance(result, Record):
        assert len(result.content_hash()) == 16


def test_updated_alone_is_not_a_change() -> None:
    """A record that is sent again with another `updated` and nothing else makes no event."""
    assert read(updated="2025-06-03T10:15:00Z").content_hash() == read().content_hash()


# -- which unit, which form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("created", "found"),
    [
        (["2025-06-03T10:00:00Z"], None),
        (["2025-06-03T09:59:59Z"], None),
        (["2025-06-03T09:00:00Z", "2024-01-01T00:00:00Z"], datetime(2024, 1, 1, tzinfo=UTC)),
        ([None, "nonsense"], None),
        ([], None),
    ],
)
def test_a_row_well_before_the_requested_time_is_detected(created: list[Any], found: datetime | None) -> None:
    assert wire.before([{"created": each} for each in created], SINCE) == found


def test_an_older_form_of_a_row_does_not_come_back() -> None:
    newest = wire.NewestRevisions()
    first = {**ROW, "updated": "2025-06-03T10:13:00Z"}
    second = {**ROW, "updated": "2025-06-03T10:14:00Z", "status": "missed"}

    assert [newest.of(row) for row in (ROW, first, second, first, ROW)] == [ROW, first, second, second, second]


def test_a_transcript_does_not_become_unavailable() -> None:
    newest = wire.NewestRevisions()
    ready = {**ROW, "transcription": {"available": True}}

    assert [newest.of(row) for row in (ROW, ready, ROW)] == [ROW, ready, ready]


def test_what_is_remembered_is_bounded() -> None:
    newest = wire.NewestRevisions(max_rows=2)
    rows = [{**ROW, "uuid": str(n), "updated": "2025-06-03T10:13:00Z"} for n in range(3)]
    for row in rows:
        newest.of(row)

    older = [{**row, "updated": "2025-06-03T10:12:59Z"} for row in rows]

    assert newest.of(older[2]) == rows[2]
    assert newest.of(older[0]) == older[0]
    assert newest.of("no row") == "no row"


# -- transcripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("details", "transcript"),
    [
        ({"transcript": "Hello."}, "Hello."),
        ({"transcript": [{"speaker": "Alice", "text": "Hello."}, {"text": "Hi."}]}, "Alice: Hello.\nHi."),
        ({"entries": [{"name": "Bob", "content": "Yes."}, "No.", 7, {}]}, "Bob: Yes.\nNo."),
        ({"transcript": {"segments": [{"text": "Well."}]}}, "Well."),
        ({"transcript": "a\x00b\nc"}, "ab\nc"),
        ({"something": "else"}, None),
        ({}, None),
    ],
)
def test_transcripts_are_read_in_any_likely_shape(details: Json, transcript: str | None) -> None:
    record = read(transcription={"available": True})
    completed = wire.with_transcript(
        record, {**ROW, "transcription": {"available": True, "summary": "Short.", **details}}
    )

    assert completed.transcription == {
        "available": True,
        "summary": "Short.",
        "transcript": transcript,
        "truncated": False,
    }
    assert completed.content_hash() == record.content_hash()


@pytest.mark.parametrize("answer", [None, [], "text", {}, {"transcription": None}, {"transcription": "x"}])
def test_details_without_a_transcript_leave_it_empty(answer: object) -> None:
    completed = wire.with_transcript(read(transcription={"available": True}), answer)

    assert completed.transcription == {"available": True, "summary": None, "transcript": None, "truncated": False}


def test_a_long_transcript_is_cut_and_marked_as_truncated() -> None:
    completed = wire.with_transcript(
        read(transcription={"available": True}),
        {"transcription": {"summary": "s" * 5_000, "transcript": [{"text": "w" * 100}] * 500}},
    )

    assert completed.transcription is not None
    assert len(completed.transcription["transcript"]) == wire.MAX_TRANSCRIPT_CHARS
    assert len(completed.transcription["summary"]) == wire.MAX_SUMMARY_CHARS
    assert completed.transcription["truncated"] is True


def test_a_transcript_that_was_unavailable_is_a_change_later() -> None:
    record = read(transcription={"available": True})

    assert wire.without_transcript(record).content_hash() == read().content_hash() != record.content_hash()


# -- tokens, errors, options ------------------------------------------------------------------------------------------


def test_a_token_response_is_parsed() -> None:
    granted = wire.read_grant({"access_token": "a", "refresh_token": "r", "expires_in": "300", "scope": "x"})

    assert (granted.access_token, granted.refresh_token, granted.expires_in) == ("a", "r", 300)
    assert wire.read_grant({"access_token": "a"}).refresh_token is None


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"access_token": ""}, {"access_token": 7}, {"access_token": "a\r\nb"}, {"error": "x"}]
)
def test_an_invalid_token_response_is_rejected(answer: object) -> None:
    with pytest.raises(UnexpectedResponse):
        wire.read_grant(answer)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, UnexpectedResponse),
        (401, Unauthorized),
        (403, Unauthorized),
        (429, RateLimited),
        (302, UnexpectedResponse),
        (404, UnexpectedResponse),
        (500, Unavailable),
        (503, Unavailable),
    ],
)
def test_every_error_response_has_its_error(status: int, error: type[Exception]) -> None:
    named = wire.error_of(ErrorResponse(status, {}, b"", "the call list", "api.nfon.com", SINCE))

    assert type(named) is error
    assert "NFON" in str(named)


OAUTH: Json = {"client_id": "relay", "refresh_token": "first", "token_url": "https://login.example.com/token"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "exactly one"),
        ({"token": "t", "oauth": OAUTH}, "exactly one"),
        ({"token": "t", "token_file": "/t"}, "exactly one"),
        ({"token": "two words"}, "single word"),
        ({"token": "t", "base_url": "ftp://x"}, "base_url must look like"),
        ({"token": "t", "base_url": "https://u:p@x"}, "use token instead"),
        ({"token": "t", "customer": "K 1"}, "pattern"),
        ({"token": "t", "page_size": 1}, "greater than or equal to 2"),
        ({"token": "t", "time_unit": "minutes"}, "seconds"),
        ({"oauth": {**OAUTH, "refresh_token": None}}, "refresh_token and refresh_token_file"),
        ({"oauth": {**OAUTH, "client_secret": "s", "client_secret_file": "/s"}}, "not both"),
        ({"oauth": {**OAUTH, "token_url": "login"}}, "token_url must look like"),
        ({"oauth": {**OAUTH, "token_url": "http://login.example.com/token"}}, "must both be https"),
    ],
)
def test_an_invalid_option_names_what_to_set(given: Json, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence) as refused:
        NfonOptions(**given)

    assert "two words" not in str(refused.value)
    assert "first" not in str(refused.value)


def test_credentials_are_never_shown() -> None:
    options = NfonOptions.model_validate({"oauth": {**OAUTH, "client_secret": "hush"}})

    assert "hush" not in repr(options)
    assert "'first'" not in repr(options)
    assert options.credential() == NfonOptions.model_validate({"oauth": {**OAUTH, "client_secret": "x"}}).credential()
    assert options.credential() != NfonOptions.model_validate({"oauth": {**OAUTH, "client_id": "x"}}).credential()
