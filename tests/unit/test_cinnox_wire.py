"""CINNOX rows: numbers stay exact, lists become one row a call, and any JSON value is a record or a bad row."""

from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from relay.domain.call import Direction, InvalidRow, Outcome, Record
from relay.domain.json import Json
from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.cinnox import wire
from relay.providers.cinnox.options import CinnoxOptions
from relay.providers.parsing import ErrorResponse

SEEN_AT = datetime(2022, 11, 7, 12, tzinfo=UTC)

LOG: Json = {
    "hid": "h-1",
    "roomID": "r-1",
    "type": "call",
    "status": "Call Ended",
    "inquiryID": "i-1",
    "displayCaseNumber": "#7",
    "callID": "c-1",
    "callDuration": 65,
    "callDate": "2022-11-07T00:00:00.000Z",
    "callEndTime": "2022-11-07T00:01:05.000Z",
    "byeReason": "Hang-up",
    "releaseParty": "Callee",
    "virtualNumber": 85230001000,
    "mediaType": "audio",
    "callerInfo": {"countryCode": "HK", "displayName": "Ada", "isStaff": False, "phoneNumber": 85298765432},
    "calleeInfo": {"displayName": "Ben", "eid": "e-7", "isStaff": True},
}
DETAIL: Json = {
    "hid": "h-1",
    "callID": "c-1",
    "callDirection": "inbound",
    "caller": 85298765432,
    "callee": 85230001000,
    "status": "Call Ended",
    "callDate": "2022-11-07T00:00:00.000Z",
}


def parse(row: object, seen_at: datetime = SEEN_AT) -> Record | InvalidRow:
    return wire.parse_row(row, region="HK", seen_at=seen_at)


def record(base: Json = LOG, **changes: Any) -> Record:
    parsed = parse({**base, **changes})
    assert isinstance(parsed, Record), parsed
    return parsed


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("85298765432", 85298765432),
        ("123456789012345", 123456789012345),
        ("12345678901234567", 12345678901234567),
        ("123456789012345678901", 123456789012345678901),
        ("8.5298765432e10", 85298765432),
        ("1.23456789012345678E17", 123456789012345678),
        ("12.50", 12.5),
        ("65.0", 65),
        ("1e999999999", None),
        ("1e-999999999", 0.0),
        ("9" * 5000, None),
        ("NaN", None),
        ("-Infinity", None),
    ],
)
def test_a_number_is_read_without_a_float(written: str, read: object) -> None:
    """A phone number of 17 digits would come out of a float as another one."""
    assert wire.load_json(f'{{"n": {written}}}'.encode()) == {"n": read}


def test_a_body_that_is_not_json_is_unexpected() -> None:
    for body in (b"<html>", b"", b'{"result": [', b"[" * 100_000):
        with pytest.raises(UnexpectedResponse):
            wire.load_json(body)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (85298765432, "+85298765432"),
        ("85298765432", "+85298765432"),
        ("+85298765432", "+85298765432"),
        (0, None),
        (-1, None),
        (True, None),
        (None, None),
        (12.5, None),
        ("1001", "1001"),
        ("anonymous", "anonymous"),
    ],
)
def test_a_phone_number_gets_its_plus_back(value: object, number: str | None) -> None:
    assert wire.phone(value) == number


def test_a_number_too_long_for_a_phone_is_kept_as_it_is() -> None:
    caller = record(callerInfo={"phoneNumber": 123456789012345678, "isStaff": False}).caller

    assert (caller.number, caller.raw) == (None, "+123456789012345678")


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_column_of_the_documented_row_is_parsed() -> None:
    read = record()

    assert (read.key, read.direction, read.outcome, read.finished) == ("h-1", Direction.INBOUND, Outcome.ANSWERED, True)
    assert (read.caller.number, read.caller.name, read.caller.internal) == ("+85298765432", "Ada", False)
    assert (read.callee.number, read.callee.name, read.callee.user_id) == ("+85230001000", "Ben", "e-7")
    assert (read.external, read.internal) == (read.caller, read.callee)
    assert read.started_at == datetime(2022, 11, 7, tzinfo=UTC)
    assert read.ended_at == datetime(2022, 11, 7, 0, 1, 5, tzinfo=UTC)
    assert (read.duration_seconds, read.end_reason, read.ended_by) == (65, "hangup", "callee")
    assert read.custom == {
        "call_id": "c-1",
        "room_id": "r-1",
        "inquiry_id": "i-1",
        "case_number": "#7",
        "media": "audio",
    }
    assert read.audio
    assert read.raw == LOG


def test_the_hash_of_the_documented_row_never_changes() -> None:
    """A changed hash would publish every known call again; then MAPPING_VERSION must rise."""
    assert record().content_hash() == "90a6f8bc1475e162"
    assert wire.MAPPING_VERSION == 1


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("Call Ended", Outcome.ANSWERED),
        ("Declined", Outcome.DECLINED),
        ("Busy", Outcome.BUSY),
        ("Not Answered", Outcome.NO_ANSWER),
        ("Cancelled", Outcome.CANCELLED),
        ("Abandoned", Outcome.ABANDONED),
        ("Unreachable", Outcome.FAILED),
        ("Call Failed", Outcome.FAILED),
        ("call-ended", Outcome.ANSWERED),
        ("Beamed Up", Outcome.UNKNOWN),
    ],
)
def test_every_status_is_an_outcome_and_is_kept_as_written(status: str, outcome: Outcome) -> None:
    read = record(status=status)

    assert (read.outcome, read.status_raw, read.finished) == (outcome, status, True)
    assert read.audio is (outcome is Outcome.ANSWERED)


@pytest.mark.parametrize(
    ("reason", "kept", "outcome"),
    [
        ("Hang up", "hangup", Outcome.UNKNOWN),
        ("Congestion", "congestion", Outcome.FAILED),
        ("Barred", "barred", Outcome.FAILED),
        ("Bearer capability not available", "bearer_capability", Outcome.FAILED),
        ("Q.850 cause 31", "Q.850 cause 31", Outcome.UNKNOWN),
        (None, None, Outcome.UNKNOWN),
    ],
)
def test_a_bye_reason_is_mapped_or_kept(reason: str | None, kept: str | None, outcome: Outcome) -> None:
    read = record(byeReason=reason, status="Beamed Up")

    assert (read.end_reason, read.outcome) == (kept, outcome)
    assert record(byeReason=reason).outcome is Outcome.ANSWERED


@pytest.mark.parametrize(
    ("named", "caller", "callee", "direction"),
    [
        ("outbound", False, True, Direction.OUTBOUND),
        (None, True, True, Direction.INTERNAL),
        (None, True, False, Direction.OUTBOUND),
        (None, False, True, Direction.INBOUND),
        (None, False, False, Direction.INBOUND),
        (None, None, None, Direction.UNKNOWN),
        ("sideways", True, False, Direction.OUTBOUND),
    ],
)
def test_the_direction_is_stated_or_derived_from_who_is_staff(
    named: str | None, caller: bool | None, callee: bool | None, direction: Direction
) -> None:
    read = record(callDirection=named, callerInfo={"isStaff": caller}, calleeInfo={"isStaff": callee})

    assert read.direction is direction


def test_a_call_in_progress_is_finished_when_it_ends_or_after_a_day() -> None:
    row = {**LOG, "status": None, "callEndTime": None, "callDuration": 0}

    young, old = parse(row), parse(row, SEEN_AT + timedelta(days=2))

    assert isinstance(young, Record)
    assert isinstance(old, Record)
    assert (young.finished, old.finished) == (False, True)


def test_a_row_without_hid_goes_by_its_call_id() -> None:
    assert record(hid=None).key == "c-1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"callDate": None}, "callDate is not a valid time; expected the form 2025-07-01 20:54:53"),
        ({"callDate": "1970-01-01T00:00:00Z"}, "callDate is not in this century"),
        ({"hid": None, "callID": None}, "the row has neither hid nor callID"),
        ({"hid": "", "callID": []}, "the row has neither hid nor callID"),
    ],
)
def test_an_invalid_row_has_a_reason(change: Json, reason: str) -> None:
    parsed = parse({**LOG, **change})

    assert isinstance(parsed, InvalidRow)
    assert parsed.reason == reason
    assert "98765432" not in parsed.excerpt


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
changed_rows = st.dictionaries(st.sampled_from([*sorted(LOG), "callConferenceList", "caller"]), json_values)


@settings(max_examples=150, deadline=None)
@given(json_values, changed_rows, st.lists(changed_rows, max_size=3))
def test_no_row_makes_the_parser_raise(row: object, changes: Json, others: list[Json]) -> None:
    rows = [row, {**LOG, **changes}, changes]
    merged = wire.merge(rows, [DETAIL, *others], [{**LOG, "type": "conference", **each} for each in others])
    for each in (*rows, *merged):
        parsed = parse(each)
        assert isinstance(parsed, Record | InvalidRow)
        if isinstance(parsed, Record):
            assert parsed.content_hash()
            assert orjson.dumps(parsed.content())


# -- merging ----------------------------------------------------------------------------------------------------------


def test_two_lists_become_one_row_a_call() -> None:
    other = {**DETAIL, "hid": "h-2", "callID": "c-2"}

    merged = wire.merge([DETAIL, other], [LOG], [])

    assert len(merged) == 2
    assert merged[0] == {**LOG, **DETAIL}
    assert record(merged[0]).ended_by == "callee"
    assert merged[1] == other


def test_a_row_of_the_other_list_alone_is_a_call_too() -> None:
    assert wire.merge([], [LOG], []) == [LOG]


def test_rows_without_hid_are_merged_by_their_call_id() -> None:
    merged = wire.merge([{**DETAIL, "hid": None}], [LOG], [])

    assert [record(row).key for row in merged] == ["h-1"]  # type: ignore[arg-type]


def test_rows_of_one_call_id_with_different_hids_stay_apart() -> None:
    """A transferred call has a record a leg."""
    assert len(wire.merge([DETAIL, {**DETAIL, "hid": "h-2"}], [LOG, {**LOG, "hid": "h-2"}], [])) == 2


def test_a_conference_is_one_call_with_its_participants() -> None:
    leg = {"hid": "h-2", "displayName": "Cem", "phoneNumber": 85290000001, "isStaff": False, "byeReason": "Hang-up"}
    conference = {**LOG, "type": "conference"}
    own_row = {**LOG, "hid": "h-2", "callID": "c-2", "type": "conference"}
    details = [{"hid": "h-1", "callConferenceList": [leg, "noise", {"hid": "h-3", "callDuration": 5}]}]

    merged = wire.merge([], [conference, own_row], details)

    [only] = [record(row) for row in merged]  # type: ignore[arg-type]
    assert (only.key, only.kind, only.audio) == ("h-1", "conference", False)
    assert [one["id"] for one in only.participants] == ["h-2", "h-3"]
    assert only.participants[0] == {
        "id": "h-2",
        "number": "+85290000001",
        "raw": "+85290000001",
        "name": "Cem",
        "user_id": None,
        "internal": False,
        "started_at": None,
        "ended_at": None,
        "duration_seconds": None,
        "end_reason": "hangup",
    }


def test_an_ordinary_call_takes_no_participants() -> None:
    assert wire.merge([LOG], [], [{"hid": "h-1", "callConferenceList": [{"hid": "h-9"}]}]) == [LOG]


# -- asking and answers -----------------------------------------------------------------------------------------------


def test_a_page_has_both_ends_of_the_range() -> None:
    first, last = datetime(2022, 11, 7, tzinfo=UTC), datetime(2022, 11, 8, tzinfo=UTC)

    path = wire.list_path("call-detail", "app 1", first=first, last=last, offset=500, limit=500)

    assert path == (
        "/v1/api/apps/app%201/data/call-detail?startAt=2022-11-07T00%3A00%3A00.000Z"
        "&endAt=2022-11-08T00%3A00%3A00.000Z&offset=500&limit=500"
    )


def test_halves_overlap_and_end_somewhere() -> None:
    first = datetime(2022, 11, 7, tzinfo=UTC)

    halves = wire.halves(first, first + timedelta(hours=2))

    assert halves is not None
    assert (halves[0][0], halves[1][1]) == (first, first + timedelta(hours=2))
    assert halves[1][0] < halves[0][1]
    assert wire.halves(first, first + timedelta(minutes=2)) is None


@pytest.mark.parametrize("answer", [None, [], {}, {"code": "x", "result": []}, {"code": 0}, {"code": 0, "result": {}}])
def test_an_invalid_response_is_rejected(answer: object) -> None:
    with pytest.raises(UnexpectedResponse):
        wire.read_list(answer, what="the call list", host="h")


def test_no_calls_at_all_may_be_written_as_null() -> None:
    assert wire.read_list({"code": 0, "result": None}, what="the call list", host="h") == []


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"code":6451010,"message":"Too many requests"}', RateLimited),
        (429, b"", RateLimited),
        (400, b'{"code":6451000,"message":"endAt is prior to startAt"}', wire.CinnoxBadParameter),
        (400, b'{"code":6451001,"message":"bad response"}', Unavailable),
        (400, b'{"code":6450001,"message":"method not found"}', UnexpectedResponse),
        (400, b"not json", UnexpectedResponse),
        (401, b"", Unauthorized),
        (403, b'{"code":6451010}', Unauthorized),
        (500, b'{"code":6451000}', Unavailable),
        (500, b'{"code":6451010}', RateLimited),
        (206, b"", UnexpectedResponse),
        (302, b"", UnexpectedResponse),
    ],
)
def test_every_error_response_has_its_error(status: int, body: bytes, error: type[Exception]) -> None:
    assert type(wire.error_of(ErrorResponse(status, {}, body, "the call list", "h", SEEN_AT))) is error


def test_too_many_requests_keeps_its_retry_after() -> None:
    response = ErrorResponse(400, {"Retry-After": "7"}, b'{"code":6451010}', "the call list", "h", SEEN_AT)

    error = wire.error_of(response)

    assert isinstance(error, RateLimited)
    assert (error.retry_after_s, error.bucket) == (7, "key")


def test_a_message_is_masked_before_it_is_shown() -> None:
    error = wire.error_of_code(6451000, "invalid callID 85298765432", what="the call list", host="h")

    assert "85298765432" not in str(error)
    assert "invalid callID" in str(error)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recordings": True}, "needs recording_path"),
        ({"recording_path": "/rec?callID={id}"}, "must contain {call_id}"),
        ({"recording_path": "/rec/{call_id}/{other}"}, "{app_id} and {call_id} only"),
        ({"recording_path": "https://elsewhere/{call_id}"}, "must begin with /"),
        ({"recording_path": "//elsewhere/{call_id}"}, "must begin with /"),
        ({"token_file": "/run/secret"}, "exactly one"),
        ({"token": None}, "exactly one"),
        ({"page_size": 501}, "less than or equal to 500"),
        ({"app_id": "../admin"}, "pattern"),
        ({"base_url": None}, "base_url"),
    ],
)
def test_an_invalid_option_names_what_to_set(changes: Json, message: str) -> None:
    given_options = {"app_id": "app-1", "token": "secret-token", "base_url": "https://tenant.example.com", **changes}

    with pytest.raises(ValidationError) as caught:
        CinnoxOptions.model_validate({name: value for name, value in given_options.items() if value is not None})
    assert message in str(caught.value)
    assert "secret-token" not in str(caught.value)


def test_a_recording_is_requested_at_the_configured_path() -> None:
    template = "/v1/api/apps/{app_id}/data/recording?callID={call_id}"

    path = wire.recording_path(template, app_id="app-1", call_id="a/b&c")

    assert path == "/v1/api/apps/app-1/data/recording?callID=a%2Fb%26c"
