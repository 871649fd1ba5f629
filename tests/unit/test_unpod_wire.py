"""Unpod rows and pages: any JSON value is a record or an invalid row, and only the last page ends the list."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.domain.call import Direction, InvalidRow, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import Window
from relay.providers.parsing import ErrorResponse
from relay.providers.unpod import wire
from relay.providers.unpod.wire import UnpodCallList, UnpodPaging

SEEN_AT = datetime(2025, 11, 18, 12, tzinfo=UTC)
INVALID_TIME = "creation_time is not a valid time; expected the form 2025-07-01 20:54:53"
BASE = "https://unpod.dev/api/v2/platform"

DOCUMENTED: Json = {
    "id": "call_abc123def456",
    "source_number": "+919876543210",
    "destination_number": "+911234567890",
    "call_type": "outbound",
    "call_status": "completed",
    "creation_time": "2025-11-18T10:30:00.000Z",
    "start_time": "2025-11-18T10:30:05.000Z",
    "end_time": "2025-11-18T10:35:30.000Z",
    "call_duration": "0:05:25",
    "end_reason": "customer-ended-call",
    "bridge": 1,
}
NEWER: Json = {
    "source_number": "+919876543210",
    "destination_number": "+911234567890",
    "call_type": "inbound",
    "call_status": "missed",
    "creation_time": "2025-11-18T10:30:00.000Z",
    "start_time": None,
    "end_time": None,
    "call_duration": 0,
    "end_reason": "no_answer",
}


def parse(row: object, *, natural: bool = False, seen_at: datetime = SEEN_AT, org: str = "acme") -> Record | InvalidRow:
    return wire.parse_row(row, org=org, region="IN", natural=natural, seen_at=seen_at)


def record(base: Json = DOCUMENTED, **changes: Any) -> Record:
    parsed = parse({**base, **changes})
    assert isinstance(parsed, Record), parsed
    return parsed


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_column_of_the_documented_row_is_parsed() -> None:
    inside = Party("+919876543210", "+919876543210", NumberType.E164, country="IN", internal=True)
    outside = Party("+911234567890", "+911234567890", NumberType.E164, country="IN")

    assert parse(DOCUMENTED) == Record(
        key="call_abc123def456",
        started_at=datetime(2025, 11, 18, 10, 30, tzinfo=UTC),
        local_date="2025-11-18",
        direction=Direction.OUTBOUND,
        outcome=Outcome.ANSWERED,
        finished=True,
        audio=False,
        status_raw="completed",
        end_reason="customer-ended-call",
        caller=inside,
        callee=outside,
        external=outside,
        internal=inside,
        answered_at=datetime(2025, 11, 18, 10, 30, 5, tzinfo=UTC),
        ended_at=datetime(2025, 11, 18, 10, 35, 30, tzinfo=UTC),
        duration_seconds=325,
        custom={"bridge": "1"},
        raw=DOCUMENTED,
    )


def test_the_hash_of_the_documented_row_never_changes() -> None:
    """A changed hash would publish every known call again; then MAPPING_VERSION must rise."""
    assert record().content_hash() == "03e0bd520acf73b2"
    assert wire.MAPPING_VERSION == 1


def test_a_missed_call_of_the_newer_document() -> None:
    missed = record(NEWER)

    assert (missed.direction, missed.outcome, missed.missed) == (Direction.INBOUND, Outcome.NO_ANSWER, True)
    assert (missed.answered_at, missed.ended_at, missed.duration_seconds) == (None, None, 0)
    assert missed.finished


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("0:05:25", 325),
        ("00:05:25", 325),
        ("1:00:00", 3600),
        ("1 day, 2:03:04", 93_784),
        (207, 207),
        (207.0, 207),
        (207.5, 207.5),
        ("207.25", 207.25),
        ("soon", None),
        (-5, None),
        (True, None),
        ([], None),
    ],
)
def test_a_duration_is_read_however_it_is_written(written: object, seconds: float | None) -> None:
    assert record(call_duration=written, start_time=None).duration_seconds == seconds


def test_a_duration_that_the_server_does_not_know_is_derived() -> None:
    derived = record(call_duration=0)

    assert (derived.duration_seconds, derived.derived) == (325, ("duration_seconds",))


@pytest.mark.parametrize(
    ("written", "outcome"),
    [
        ("completed", Outcome.ANSWERED),
        ("success", Outcome.ANSWERED),
        ("ANSWERED", Outcome.ANSWERED),
        ("missed", Outcome.NO_ANSWER),
        ("failed", Outcome.FAILED),
        ("FAILURE", Outcome.FAILED),
        ("REJECTED", Outcome.FAILED),
        ("from-mars", Outcome.UNKNOWN),
    ],
)
def test_a_status_is_an_outcome_and_is_kept_as_written(written: str, outcome: Outcome) -> None:
    assert (record(call_status=written).outcome, record(call_status=written).status_raw) == (outcome, written)


def test_both_is_an_unknown_direction() -> None:
    both = record(call_type="both")

    assert (both.direction, both.external, both.internal, both.missed) == (Direction.UNKNOWN, None, None, False)
    assert both.caller.number == "+919876543210"


@pytest.mark.parametrize("status", ["in-progress", "ringing", None])
def test_a_call_in_progress_is_finished_when_it_ends_or_after_a_day(status: str | None) -> None:
    row = {**NEWER, "call_status": status}

    young, old = parse(row), parse(row, seen_at=SEEN_AT + timedelta(days=2))

    assert isinstance(young, Record)
    assert isinstance(old, Record)
    assert (young.finished, old.finished) == (False, True)


def test_a_row_without_an_id_has_a_key_of_its_own() -> None:
    """Who called whom at which moment: the same call has the same key for ever, another one has another."""
    key = record(NEWER).key

    assert key == "01b3e68ea990fa2f54afb76fa850d7da"
    assert record(NEWER, call_status="failed", call_duration=7).key == key
    assert record(NEWER, creation_time="2025-11-18T11:30:00+01:00").key == key
    assert record(NEWER, creation_time="2025-11-18T10:30:00.001Z").key != key
    assert record(NEWER, destination_number="+911234567891").key != key
    other = parse(NEWER, org="others")
    assert isinstance(other, Record)
    assert other.key != key


def test_calls_that_share_time_and_numbers_have_keys_of_their_own() -> None:
    """Rows without an id, whose natural keys are equal: both calls are ingested, the same way in each reading, whatever
    their order. A repeated row, one in progress and one with an id keep their keys."""
    first, second = record({**NEWER, "end_reason": "a"}), record({**NEWER, "end_reason": "b"})
    named = record({**NEWER, "id": "call_1"})
    going = record({**NEWER, "call_status": "in-progress"})

    def keys(*pages: Sequence[Record]) -> list[dict[str | None, str]]:
        assigned: dict[str, dict[str, str]] = {}
        listed = [wire.number_calls(page, assigned, natural=False) for page in pages]
        return [{row.end_reason: row.key for row in rows if isinstance(row, Record)} for rows in listed]

    [together] = keys([first, second, first])
    assert sorted(together.values()) == [first.key, f"{first.key}~2"]
    assert keys([second, first]) == [together]
    assert {key for page in keys([first], [second]) for key in page.values()} == set(together.values())
    assert [row.key for row in wire.number_calls([named, going, first], {}, natural=False)] == [
        "call_1",
        first.key,
        first.key,
    ]
    assert not going.finished


def test_the_natural_key_can_be_configured() -> None:
    natural = parse({**NEWER, "id": "call_1"}, natural=True)

    assert isinstance(natural, Record)
    assert natural.key == record(NEWER).key


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"creation_time": None}, INVALID_TIME),
        ({"creation_time": "2025-02-30T25:61:00Z"}, INVALID_TIME),
        ({"creation_time": "2025-02-28T24:00:00Z"}, INVALID_TIME),
        ({"creation_time": "0001-01-01T00:00:00+14:00"}, "creation_time is not in this century"),
        ({"creation_time": "1970-01-01T00:00:00Z"}, "creation_time is not in this century"),
        ({"id": None, "source_number": None, "destination_number": ""}, "the row has neither an id nor a number"),
    ],
)  # fmt: skip
def test_an_invalid_row_has_a_reason(change: Json, reason: str) -> None:
    parsed = parse({**DOCUMENTED, **change})

    assert isinstance(parsed, InvalidRow)
    assert parsed.reason == reason
    assert "9876543210" not in parsed.excerpt


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(json_values, st.dictionaries(st.sampled_from(sorted(DOCUMENTED)), json_values))
def test_no_row_makes_the_parser_raise(row: object, changes: Json) -> None:
    for each in (row, {**DOCUMENTED, **changes}, changes):
        parsed = parse(each)
        assert isinstance(parsed, Record | InvalidRow)
        if isinstance(parsed, Record):
            assert parsed.content_hash()
            assert parsed.key


# -- requests and pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "form", "start", "end"),
    [
        (1, "date", "2025-11-17", "2025-11-20"),
        (0, "date", "2025-11-18", "2025-11-19"),
        (2, "datetime", "2025-11-16T00%3A00%3A00Z", "2025-11-21T00%3A00%3A00Z"),
    ],
)
def test_the_filter_is_wider_than_the_window(
    margin: int, form: Literal["date", "datetime"], start: str, end: str
) -> None:
    window = Window(datetime(2025, 11, 18, 0, 30, tzinfo=UTC), datetime(2025, 11, 18, 23, 59, tzinfo=UTC))

    path = wire.list_path(window, page=3, page_size=100, margin_days=margin, form=form)

    assert path == f"/call-logs/?page=3&page_size=100&start_date={start}&end_date={end}"


@pytest.mark.parametrize(
    ("link", "path"),
    [
        (f"{BASE}/call-logs/?page=2", "/call-logs/?page=2"),
        ("/api/v2/platform/call-logs/?cursor=abc", "/call-logs/?cursor=abc"),
        ("https://elsewhere.example/api/v2/platform/call-logs/?page=2", None),
        ("http://unpod.dev/api/v2/platform/call-logs/?page=2", None),
        ("https://unpod.dev:8443/api/v2/platform/call-logs/?page=2", None),
        ("https://user@unpod.dev/api/v2/platform/call-logs/?page=2", None),
        ("//elsewhere.example/api/v2/platform/call-logs/", None),
        ("https://unpod.dev/login", None),
        (f"{BASE}/../secrets", None),
        (f"{BASE}/call-logs/?page=1", None),
        ("https://[broken", None),
        ("", None),
        (None, None),
    ],
)
def test_next_is_followed_at_the_same_server_only_and_never_in_a_circle(link: str | None, path: str | None) -> None:
    assert wire.next_path(link, base_url=BASE, seen={"/call-logs/?page=1"}) == path


def progress(counts: list[int | None], pages: list[int], *, page_size: int = 10) -> UnpodPaging:
    """Read pages of so many rows, with these counts, all inside the window."""
    paging = UnpodPaging(since=SEEN_AT - timedelta(days=9), page_size=page_size)
    for count, rows in zip(counts, pages, strict=True):
        paging.add(UnpodCallList(count=count, data=[None] * rows), [])
    return paging


@pytest.mark.parametrize(
    ("counts", "pages", "complete"),
    [
        ([0], [0], True),
        ([3], [3], True),
        ([25, 25], [10, 10], False),
        ([25, 25, 25], [10, 10, 5], True),
        ([20, 20], [10, 10], True),
        ([10], [10], False),  # the count may be that of the page
        ([25], [7], False),  # the server gives fewer than asked for
        ([None], [10], False),
        ([None, None], [10, 4], True),
        ([None, None], [7, 7], True),
        ([25, 25, 25], [10, 10, 0], True),
    ],
)
def test_when_the_list_is_complete(counts: list[int | None], pages: list[int], complete: bool) -> None:
    assert progress(counts, pages).complete is complete


@pytest.mark.parametrize(
    ("counts", "pages", "early"),
    [
        ([25], [10], True),
        ([25, 25], [10, 10], False),
        ([11], [10], False),
        ([None], [10], False),
        ([40, 40], [10, 10], True),
    ],
)
def test_an_end_before_an_announced_page_is_early(counts: list[int | None], pages: list[int], early: bool) -> None:
    """A row or two less than announced were deleted meanwhile; a whole page less was not read."""
    assert progress(counts, pages).ended_early is early


def test_older_rows_end_the_list_only_where_it_is_in_order() -> None:
    def row(hours: int) -> Record:
        return record(creation_time=(SEEN_AT - timedelta(hours=hours)).isoformat())

    ordered = UnpodPaging(since=SEEN_AT - timedelta(hours=3), page_size=3)
    ordered.add(UnpodCallList(data=[1, 2, 3]), [row(1), row(2), row(5)])
    mixed = UnpodPaging(since=SEEN_AT - timedelta(hours=3), page_size=3)
    mixed.add(UnpodCallList(data=[1, 2, 3]), [row(5), row(2), row(6)])

    assert (ordered.past_the_window, mixed.past_the_window) == (True, False)


@pytest.mark.parametrize(
    ("status", "page", "end"),
    [(400, 2, True), (404, 7, True), (400, 1, False), (404, 1, False), (500, 2, False), (403, 2, False)],
)
def test_an_error_ends_the_list_only_past_the_first_page(status: int, page: int, end: bool) -> None:
    assert wire.past_the_end(status, page) is end


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"data": None},
        {"data": {}},
        {"data": [], "status_code": 500},
        {"data": [], "count": -1},
        {"data": [], "count": "many"},
    ],
)
def test_a_response_that_contradicts_itself_is_rejected(answer: object) -> None:
    with pytest.raises(UnexpectedResponse):
        wire.read_list(answer)


def test_a_next_link_that_is_not_text_is_ignored() -> None:
    assert wire.read_list({"data": [], "next": {"page": 2}}).next is None
    assert wire.read_list({"data": [], "next": f"{BASE}/?{'x' * 500}"}).next == f"{BASE}/?{'x' * 500}"


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (206, b'{"message":"Org-Handle is required"}', UnexpectedResponse, "Check org_handle"),
        (400, b'{"message":"Organization not found"}', UnexpectedResponse, "Check org_handle"),
        (400, b"{}", UnexpectedResponse, "status 400"),
        (401, b"", Unauthorized, "rejected the token"),
        (403, b"", Unauthorized, "rejected the token"),
        (429, b"", RateLimited, "too many requests"),
        (500, b"", Unavailable, "failed to return"),
        (302, b"", UnexpectedResponse, "redirected"),
        (206, b"", UnexpectedResponse, "206"),
    ],
)
def test_every_error_response_has_its_error(status: int, body: bytes, error: type[Exception], message: str) -> None:
    named = wire.error_of(ErrorResponse(status, {}, body, "the call list", "unpod.dev", SEEN_AT))

    assert type(named) is error
    assert message in str(named)


def test_an_invalid_character_hides_no_other_row() -> None:
    body = b'{"count": 2, "data": [{"id": "a\xff"}, {"id": "b"}]}'

    assert len(wire.read_list(parsing.load_json(body, name=wire.NAME)).data) == 2
