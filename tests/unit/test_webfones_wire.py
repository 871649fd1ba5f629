"""WebFones rows: any JSON value is a record or an invalid row, and a record is the same each time."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from relay.domain.call import Contact, Direction, InvalidRow, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import ContactChanges, NoRecordingYet, NoSuchCall
from relay.providers.parsing import ErrorResponse
from relay.providers.webfones import wire

UTC_ZONE = ZoneInfo("UTC")
NEW_YORK = ZoneInfo("America/New_York")
SEEN_AT = datetime(2025, 7, 1, 21, 0, tzinfo=UTC)

DOCUMENTED: Json = {
    "rid": 211159,
    "call_timestamp": "2025-07-01 20:54:53",
    "cidname_outside": "B WHITTAKER",
    "cidext_inside": "3203",
    "direction": "OUTGOING",
    "cidnumber_outside": "(111) 111-1111",
    "cidnumber_inside": "(111) 111-1111, x3203",
    "disposition": "ANSWERED",
}


def parse(row: object, zone: ZoneInfo = UTC_ZONE, seen_at: datetime = SEEN_AT) -> Record | InvalidRow:
    return wire.parse_row(row, zone=zone, region="US", seen_at=seen_at)


def record(zone: ZoneInfo = UTC_ZONE, seen_at: datetime = SEEN_AT, **changes: Any) -> Record:
    parsed = parse({**DOCUMENTED, **changes}, zone, seen_at)
    assert isinstance(parsed, Record), parsed
    return parsed


def bad(row: object) -> tuple[str, str | None]:
    parsed = parse(row)
    assert isinstance(parsed, InvalidRow), parsed
    return parsed.reason, parsed.key


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_column_of_the_documented_row_is_parsed() -> None:
    inside = Party("+11111111111", "(111) 111-1111, x3203", NumberType.E164, "3203", None, "US", internal=True)
    outside = Party("+11111111111", "(111) 111-1111", NumberType.E164, None, "B WHITTAKER", "US")

    assert parse(DOCUMENTED) == Record(
        key="211159",
        started_at=datetime(2025, 7, 1, 20, 54, 53, tzinfo=UTC),
        local_date="2025-07-01",
        direction=Direction.OUTBOUND,
        outcome=Outcome.ANSWERED,
        finished=True,
        audio=True,
        status_raw="ANSWERED",
        caller=inside,
        callee=outside,
        external=outside,
        internal=inside,
        raw=DOCUMENTED,
    )


def test_the_hash_of_the_documented_row_never_changes() -> None:
    """A changed hash would publish every known call again; then MAPPING_VERSION must rise."""
    assert record().content_hash() == "e553e23d106df0b4"
    assert wire.MAPPING_VERSION == 1


@pytest.mark.parametrize(
    ("written", "direction", "caller", "callee"),
    [
        ("INCOMING", Direction.INBOUND, "outside", "inside"),
        ("inbound", Direction.INBOUND, "outside", "inside"),
        ("OUTGOING", Direction.OUTBOUND, "inside", "outside"),
        (" Outbound ", Direction.OUTBOUND, "inside", "outside"),
        ("INTERNAL", Direction.INTERNAL, "inside", "outside"),
        ("SIDEWAYS", Direction.UNKNOWN, "outside", "inside"),
        (None, Direction.UNKNOWN, "outside", "inside"),
        (7, Direction.UNKNOWN, "outside", "inside"),
    ],
)
def test_the_direction_decides_who_called_whom(written: object, direction: Direction, caller: str, callee: str) -> None:
    numbers = {"outside": "+12125550001", "inside": "+12125550002"}

    parsed = record(direction=written, cidnumber_outside="2125550001", cidnumber_inside="2125550002")

    assert parsed.direction is direction
    assert (parsed.caller.number, parsed.callee.number) == (numbers[caller], numbers[callee])


def test_an_internal_call_has_no_outside() -> None:
    parsed = record(direction="INTERNAL", cidnumber_outside="3301")

    assert parsed.external is None
    assert (parsed.callee.type, parsed.callee.extension) == (NumberType.EXTENSION, "3301")


@pytest.mark.parametrize(
    ("written", "outcome"),
    [
        ("ANSWERED", Outcome.ANSWERED),
        ("answered", Outcome.ANSWERED),
        ("NO ANSWER", Outcome.NO_ANSWER),
        ("NOANSWER", Outcome.NO_ANSWER),
        ("no_answer", Outcome.NO_ANSWER),
        ("MISSED", Outcome.NO_ANSWER),
        ("BUSY", Outcome.BUSY),
        ("FAILED", Outcome.FAILED),
        ("CONGESTION", Outcome.FAILED),
        ("CANCEL", Outcome.CANCELLED),
        ("Cancelled", Outcome.CANCELLED),
        ("VOICEMAIL", Outcome.VOICEMAIL),
        ("DECLINED", Outcome.DECLINED),
        ("REJECTED", Outcome.DECLINED),
        ("ABANDONED", Outcome.ABANDONED),
        ("PARKED ON MARS", Outcome.UNKNOWN),
        ("☎", Outcome.UNKNOWN),
    ],
)
def test_every_disposition_is_an_outcome_of_a_finished_call(written: str, outcome: Outcome) -> None:
    parsed = record(disposition=written)

    assert (parsed.outcome, parsed.finished, parsed.status_raw) == (outcome, True, written)
    assert parsed.audio is (outcome is Outcome.ANSWERED)


@pytest.mark.parametrize("written", [None, "", "  ", "RINGING", "in progress", "IN-PROGRESS", "UP", "Dialing"])
def test_a_call_in_progress_is_not_finished(written: str | None) -> None:
    parsed = record(disposition=written)

    assert (parsed.finished, parsed.outcome, parsed.audio) == (False, Outcome.UNKNOWN, False)


@pytest.mark.parametrize("sign", [{"end_time": "2025-07-01 20:56:00"}, {"duration": 67}])
def test_a_call_that_has_ended_is_finished_without_a_disposition(sign: Json) -> None:
    assert record(disposition=None, **sign).finished


@pytest.mark.parametrize("written", [None, "RINGING"])
def test_a_call_without_a_disposition_is_published_after_a_day(written: str | None) -> None:
    """Otherwise such a row would be waited for until it is out of sight, and the call would be missed."""
    started_at = record().started_at

    before = record(disposition=written, seen_at=started_at + timedelta(hours=24) - timedelta(seconds=1))
    after = record(disposition=written, seen_at=started_at + timedelta(hours=24))

    assert (before.finished, after.finished) == (False, True)
    assert (after.outcome, after.audio) == (Outcome.UNKNOWN, False)


@pytest.mark.parametrize(
    ("rid", "key"), [(211159, "211159"), ("211159", "211159"), (" 0211159 ", "211159"), (2**63 - 1, str(2**63 - 1))]
)
def test_a_record_id_has_one_spelling(rid: object, key: str) -> None:
    assert record(rid=rid).key == key


@pytest.mark.parametrize(
    "rid", [None, True, False, 0, -1, 1.5, 211159.0, "", "12a", "-5", "٣٤", "1" * 21, 2**63, [], {}, "../health"]
)
def test_a_row_without_a_usable_id_is_invalid(rid: object) -> None:
    assert bad({**DOCUMENTED, "rid": rid}) == ("rid is not a positive whole number", None)


def test_a_row_without_id_or_time_is_invalid_with_the_reason() -> None:
    no_rid = bad({name: value for name, value in DOCUMENTED.items() if name != "rid"})
    no_time = bad({name: value for name, value in DOCUMENTED.items() if name != "call_timestamp"})

    assert no_rid == ("rid is missing", None)
    assert no_time == ("call_timestamp is missing", "211159")


@pytest.mark.parametrize(
    "stamp",
    [
        "0000-00-00 00:00:00",
        "2025-02-30 10:00:00",
        "2025-07-01 24:00:00",
        "2025-07-01 20:54:61",
        "1999-12-31 23:59:59",
        "9999-12-31 23:59:59",
        "2025-07-01",
        "20250701T205453",
        "yesterday",
        "２０２５-07-01 20:54:53",
        "2025-07-01 20:54:53+99:00",
        1751403293,
        None,
        True,
        [],
    ],
)
def test_an_impossible_time_makes_an_invalid_row_that_keeps_its_key(stamp: object) -> None:
    parsed = parse({**DOCUMENTED, "call_timestamp": stamp})

    assert isinstance(parsed, InvalidRow)
    assert parsed.key == "211159"
    assert "call_timestamp" in parsed.reason


@pytest.mark.parametrize("row", [None, 7, "row", [DOCUMENTED], True, 1.5, "\ud800\x00"])
def test_a_row_that_is_not_an_object_is_invalid(row: object) -> None:
    parsed = parse(row)

    assert isinstance(parsed, InvalidRow)
    assert parsed.reason == "the row is not a JSON object"
    parsed.excerpt.encode()


def test_the_excerpt_of_an_invalid_row_hides_its_numbers() -> None:
    parsed = parse({"rid": None, "cidnumber_outside": "2125551234"})

    assert isinstance(parsed, InvalidRow)
    assert "cidnumber_outside" in parsed.excerpt
    assert "2125551234" not in parsed.excerpt
    assert "555" not in parsed.excerpt


def test_long_text_and_control_characters_are_cut() -> None:
    parsed = record(cidname_outside="👩‍👩‍👧 Łódź\x00\ud800 " + "x" * 100_000, status_raw=None)

    name = parsed.callee.name
    assert name is not None
    assert name.startswith("👩‍👩‍👧 Łódź")
    assert len(name) == parsing.MAX_TEXT_CHARS
    assert not set("\x00\ud800") & set(name)
    assert len(orjson.dumps(parsed.content())) < 4096
    assert len(orjson.dumps(parsed.raw)) <= 8192


@pytest.mark.parametrize("written", [2125551234, 2125551234.0, "2125551234"])
def test_a_number_may_come_as_a_number(written: object) -> None:
    assert record(cidnumber_outside=written).callee.number == "+12125551234"


@pytest.mark.parametrize("written", [None, True, [], {}, 1.5, float("nan"), float("inf"), 10**400, ""])
def test_an_invalid_number_leaves_the_rest_of_the_row_valid(written: object) -> None:
    parsed = record(cidnumber_outside=written)

    assert parsed.callee == Party(name="B WHITTAKER")
    orjson.dumps(parsed.raw)


def test_an_extension_stands_in_for_a_missing_inside_number() -> None:
    parsed = record(cidnumber_inside=None, cidext_inside=3203)

    assert parsed.internal == Party(raw="3203", type=NumberType.EXTENSION, extension="3203", internal=True)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (207, 207),
        ("207", 207),
        (207.0, 207),
        (207.25, 207.25),
        ("207.5", 207.5),
        ("0:03:27", 207),
        ("3:27", 207),
        (0, 0),
        (-1, None),
        (10**9, None),
        (float("nan"), None),
        ("soon", None),
        (True, None),
        ([], None),
    ],
)
@pytest.mark.parametrize("name", ["duration", "call_duration", "billsec"])
def test_a_duration_is_read_where_the_row_has_one(name: str, written: object, seconds: float | None) -> None:
    changes: Json = {name: written}

    assert record(**changes).duration_seconds == seconds


def test_answer_and_end_are_read_where_the_row_has_them() -> None:
    parsed = record(NEW_YORK, answer_time="2025-07-01 20:55:00", end_time="2025-07-01 20:56:00")
    without_times = record(answer_time="2025-07-01 20:00:00", end_time="never")

    assert parsed.answered_at == datetime(2025, 7, 2, 0, 55, tzinfo=UTC)
    assert parsed.ended_at == datetime(2025, 7, 2, 0, 56, tzinfo=UTC)
    assert (without_times.answered_at, without_times.ended_at) == (None, None)


def test_unknown_fields_are_kept_raw_and_are_not_content() -> None:
    parsed = record(colour="green")

    assert parsed.raw["colour"] == "green"
    assert parsed.content_hash() == record().content_hash()


# -- time -------------------------------------------------------------------------------------------------------------


def test_the_time_of_a_row_is_in_the_sources_zone_and_its_date_the_providers() -> None:
    parsed = record(NEW_YORK, call_timestamp="2025-07-01 23:30:00")

    assert parsed.started_at == datetime(2025, 7, 2, 3, 30, tzinfo=UTC)
    assert parsed.local_date == "2025-07-01"


@pytest.mark.parametrize("stamp", ["2025-07-01T20:54:53Z", "2025-07-01 16:54:53-04:00", "2025-07-01T20:54:53.000Z"])
def test_a_time_with_a_zone_overrides_the_configured_zone(stamp: str) -> None:
    assert record(NEW_YORK, call_timestamp=stamp).started_at == datetime(2025, 7, 1, 20, 54, 53, tzinfo=UTC)


FIRST_0130 = datetime(2025, 11, 2, 5, 30, tzinfo=UTC)
SECOND_0130 = datetime(2025, 11, 2, 6, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seen_at", "started_at"),
    [
        (FIRST_0130 + timedelta(minutes=1), FIRST_0130),
        (FIRST_0130 + timedelta(minutes=50), FIRST_0130),
        (SECOND_0130 - timedelta(minutes=4), SECOND_0130),
        (SECOND_0130 + timedelta(minutes=1), SECOND_0130),
        (SECOND_0130 + timedelta(hours=20), SECOND_0130),
    ],
)
def test_in_the_hour_shown_twice_the_latest_time_that_has_come_is_taken(
    seen_at: datetime, started_at: datetime
) -> None:
    assert record(NEW_YORK, seen_at, call_timestamp="2025-11-02 01:30:00").started_at == started_at


@pytest.mark.parametrize("changes", [{}, {"disposition": None}, {"end_time": "2025-11-02 01:50:00"}])
def test_parsing_the_hour_shown_twice_again_is_not_a_change(changes: Json) -> None:
    row = {"call_timestamp": "2025-11-02 01:30:00", **changes}

    first = record(NEW_YORK, FIRST_0130 + timedelta(minutes=1), **row)
    second = record(NEW_YORK, SECOND_0130 + timedelta(minutes=1), **row)

    assert first.started_at != second.started_at
    assert first.content_hash() == second.content_hash()


def test_a_real_change_in_the_hour_shown_twice_is_a_change() -> None:
    seen_at = SECOND_0130 + timedelta(hours=1)

    answered = record(NEW_YORK, seen_at, call_timestamp="2025-11-02 01:30:00")
    busy = record(NEW_YORK, seen_at, call_timestamp="2025-11-02 01:30:00", disposition="BUSY")
    under_way = record(NEW_YORK, seen_at, call_timestamp="2025-11-02 01:30:00", disposition=None)

    assert len({one.content_hash() for one in (answered, busy, under_way)}) == 3


def test_a_time_that_the_clock_skips_is_still_a_time() -> None:
    parsed = record(NEW_YORK, call_timestamp="2025-03-09 02:30:00")

    assert parsed.started_at == datetime(2025, 3, 9, 7, 30, tzinfo=UTC)
    assert parsed.local_date == "2025-03-09"


def test_the_lower_bound_is_a_second_early_in_the_sources_zone() -> None:
    assert wire.query_time(datetime(2025, 7, 1, 20, 54, 53, tzinfo=UTC), NEW_YORK) == "2025-07-01 16:54:52"
    assert (
        wire.records_path(datetime(2025, 7, 1, 14, 53, 44, tzinfo=UTC), UTC_ZONE)
        == "/call_log/records_after_timestamp?timestamp=2025-07-01%2014%3A53%3A43"
    )


@settings(deadline=None)
@given(
    since=st.datetimes(datetime(2025, 11, 1), datetime(2025, 11, 3), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis wants naive bounds
    | st.datetimes(datetime(2024, 1, 1), datetime(2026, 12, 31), timezones=st.just(UTC)),  # noqa: DTZ001
    later_s=st.integers(0, 6 * 3600),
    zone=st.sampled_from(["UTC", "America/New_York", "Europe/Dublin", "Australia/Lord_Howe", "Africa/Casablanca"]),
)
def test_no_call_at_or_after_the_bound_is_written_at_or_before_it(since: datetime, later_s: int, zone: str) -> None:
    """The server compares text: a clock put back must not hide the calls of the hour it shows again."""
    started_at = since + timedelta(seconds=later_s)
    as_row = started_at.astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M:%S")

    bound = wire.query_time(since, ZoneInfo(zone))

    assert bound < as_row
    assert wire.query_time(since, UTC_ZONE) >= (since - timedelta(seconds=2)).strftime("%Y-%m-%d %H:%M:%S")


# -- any row ----------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=300) | st.sampled_from(
    ["\x00", "\ud800", "👩‍👩‍👧", "2125551234", "x3203", "RINGING", "INCOMING"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=12)
rows = values | st.fixed_dictionaries(
    {},
    optional={
        "rid": st.integers(1, 10**6) | values,
        "call_timestamp": st.datetimes(
            datetime(2025, 11, 1),  # noqa: DTZ001 - naive, as the provider writes it
            datetime(2025, 11, 3),  # noqa: DTZ001
        ).map(lambda moment: moment.strftime("%Y-%m-%d %H:%M:%S"))
        | values,
        **{
            name: values
            for name in (*DOCUMENTED, "duration", "answer_time", "end_time", "extra")
            if name not in ("rid", "call_timestamp")
        },
    },
)


@settings(deadline=None)
@given(row=rows)
def test_any_json_value_is_a_record_or_an_invalid_row(row: object) -> None:
    parsed = parse(row, NEW_YORK)
    again = parse(row, NEW_YORK)
    looked_up = wire.parse_row(row, zone=NEW_YORK, region="US", seen_at=SEEN_AT)

    if isinstance(parsed, Record):
        assert isinstance(again, Record)
        assert isinstance(looked_up, Record)
        body = orjson.dumps(parsed.content())
        assert len(body) < 20_000
        assert json.loads(body) == parsed.content()
        assert len(orjson.dumps(parsed.raw)) <= 16_384
        assert parsed.content_hash() == again.content_hash() == looked_up.content_hash()
        assert parsed.started_at.utcoffset() == timedelta(0)
        assert parsed.key.isdecimal()
    else:
        assert isinstance(parsed, InvalidRow)
        assert parsed == again
        assert len(parsed.excerpt) <= 120
        orjson.dumps([parsed.reason, parsed.excerpt])


@pytest.mark.parametrize("depth", [5, 300, 900])
def test_a_deeply_nested_field_costs_only_itself(depth: int) -> None:
    nested: Any = "deep"
    for _ in range(depth):
        nested = [nested]

    parsed = record(extra=nested)
    orjson.dumps(parsed.raw)

    assert parsed.content_hash() == record().content_hash()


def test_a_row_is_looked_up_once_it_was_read_but_a_changed_one_is_not() -> None:
    def read(row: Json) -> Record | InvalidRow:
        return wire.parse_row(row, zone=NEW_YORK, region="US", seen_at=SEEN_AT)

    first = read(dict(DOCUMENTED))

    assert read(dict(DOCUMENTED)) is first
    assert read({**DOCUMENTED, "disposition": "BUSY"}) != first
    assert wire.parse_row(dict(DOCUMENTED), zone=UTC_ZONE, region="US", seen_at=SEEN_AT) != first


def test_an_unfinished_row_is_judged_anew_each_time() -> None:
    row = {**DOCUMENTED, "disposition": ""}
    started_at = record().started_at

    def finished(seen_at: datetime) -> bool:
        parsed = wire.parse_row(row, zone=UTC_ZONE, region="US", seen_at=seen_at)
        return isinstance(parsed, Record) and parsed.finished

    assert [finished(started_at), finished(started_at + timedelta(days=2))] == [False, True]


# -- the whole answer -------------------------------------------------------------------------------------------------


def test_a_response_with_rows_returns_them_unchanged() -> None:
    assert wire.read_call_list({"success": True, "count": 2, "records": [DOCUMENTED, None]}) == [DOCUMENTED, None]
    assert wire.read_call_list({"success": True, "count": 0, "records": []}) == []
    assert wire.read_call_list({"records": []}) == []


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "ok",
        {},
        {"success": True, "count": 0},
        {"success": True, "count": 0, "records": None},
        {"success": True, "count": 1, "records": {"rid": 1}},
        {"success": True, "count": 2, "records": [DOCUMENTED]},
        {"success": True, "count": 0, "records": [DOCUMENTED]},
        {"success": False, "count": 0, "records": []},
        {"success": None, "count": 0, "records": []},
        {"error": "Missing timestamp in query"},
    ],
)
def test_a_response_that_contradicts_itself_is_rejected(answer: object) -> None:
    with pytest.raises(UnexpectedResponse, match="WebFones"):
        wire.read_call_list(answer)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"records": [', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b",}"])
def test_a_body_that_is_not_json_is_unexpected(body: bytes) -> None:
    with pytest.raises(UnexpectedResponse, match="not JSON"):
        parsing.load_json(body, name=wire.NAME)


@pytest.mark.parametrize(
    "body",
    [
        rb'{"records": [{"name": "half \ud800"}, {"rid": 1}]}',
        b'{"records": [{"name": "caf\xe9"}, {"rid": 1}]}',
        b'{"records": [{"name": NaN}, {"rid": 1}]}',
        b'\xef\xbb\xbf{"records": [{}, {"rid": 1}]}',
    ],
)
def test_one_broken_character_does_not_hide_the_other_rows(body: bytes) -> None:
    answer = parsing.load_json(body, name=wire.NAME)

    assert wire.read_call_list(answer)[1] == {"rid": 1}


# -- contacts ---------------------------------------------------------------------------------------------------------

JOHN = {"uuid": "123e", "firstname": "John", "lastname": "Doe", "mobile_phone": "2125551234", "email": "j@example.com"}


def test_only_whole_numbers_are_looked_up() -> None:
    assert wire.lookup_digits(["+12125551234", "3203", "x12", "+442079460000", "anonymous"], "US") == {
        "+12125551234": "2125551234",
        "+442079460000": "442079460000",
    }


def test_contacts_are_returned_under_the_requested_number() -> None:
    acme = {"uuid": "9", "organization": "Acme Corp", "external_id": "CRM-1", "api_key": "echoed-secret"}
    answer = {"(212) 555-1234": [acme, JOHN], "+1 416 555 1234": []}

    contacts = wire.read_contacts(answer, {"+12125551234": "2125551234", "+14165551234": "4165551234"})

    assert contacts == {
        "+12125551234": [
            Contact(id="123e", name="John Doe", email="j@example.com"),
            Contact(id="9", external_id="CRM-1", organization="Acme Corp"),
        ],
        "+14165551234": [],
    }
    assert "echoed-secret" not in repr(contacts)


def test_a_broken_contact_is_left_out_and_its_neighbours_are_not() -> None:
    broken: list[object] = [None, 7, [], {}, {"uuid": None}, {"uuid": "  "}, {"uuid": True}]
    odd_fields = {"uuid": "77", "firstname": {"a": 1}, "lastname": "Ng", "email": ["x"]}

    contacts = wire.read_contacts({"2125551234": [*broken, odd_fields]}, {"+12125551234": "2125551234"})

    assert contacts == {"+12125551234": [Contact(id="77", name="Ng")]}


def test_two_numbers_that_differ_by_a_leading_one_are_not_confused() -> None:
    """+49 15112345678 is stored with its leading 1 gone; a number without it is another person's."""
    asked = {"+4915112345678": "15112345678", "+495112345678": "5112345678"}

    exact = wire.read_contacts({"15112345678": [JOHN], "5112345678": []}, asked)
    stripped = wire.read_contacts({"5112345678": [JOHN]}, asked)

    assert [len(exact[number]) for number in asked] == [1, 0]
    assert [len(stripped[number]) for number in asked] == [0, 1]


@pytest.mark.parametrize("found", [None, []])
def test_a_number_without_a_contact_has_no_contacts(found: object) -> None:
    assert wire.read_contacts({"2125551234": found}, {"+12125551234": "2125551234"}) == {"+12125551234": []}
    assert wire.read_contacts({}, {"+12125551234": "2125551234"}) == {"+12125551234": []}


@pytest.mark.parametrize("answer", [None, [], "x", {"error": "no"}, {"2125551234": "John"}, {"2125551234": 7}])
def test_a_contact_search_of_another_shape_is_unexpected(answer: object) -> None:
    with pytest.raises(UnexpectedResponse, match="contact search"):
        wire.read_contacts(answer, {"+12125551234": "2125551234"})


@pytest.mark.parametrize(
    ("answer", "changes"),
    [
        ({"updated": [{"uuid": "a", "version": 5}], "deleted": [{"uuid": "b", "version": 6}]}, ContactChanges(6, True)),
        ({"updated": [{"version": "5"}]}, ContactChanges(5, True)),
        ({"updated": [], "deleted": []}, ContactChanges(4, False)),
        ({"updated": [{"version": 4}], "deleted": []}, ContactChanges(4, False)),
    ],
)
def test_the_newest_version_is_that_of_all_changes(answer: object, changes: ContactChanges) -> None:
    assert wire.read_changes(answer, 4) == changes


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"updated": {}},
        {"updated": [{}]},
        {"updated": [{"version": "new"}]},
        {"updated": [{"version": -1}]},
    ],
)
def test_changes_without_versions_are_unexpected(answer: object) -> None:
    with pytest.raises(UnexpectedResponse, match="contact changes"):
        wire.read_changes(answer, 4)


# -- errors and headers -----------------------------------------------------------------------------------------------


def response(status: int, text: str = "", **headers: str) -> ErrorResponse:
    named = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return ErrorResponse(status, named, text.encode(), "the call list", "api.example", SEEN_AT)


def refusal(status: int, text: str = "", **headers: str) -> Exception:
    return wire.error_of(response(status, text, **headers))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UnexpectedResponse),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, UnexpectedResponse),
        (204, UnexpectedResponse),
        (206, UnexpectedResponse),
        (302, UnexpectedResponse),
        (429, RateLimited),
        (500, Unavailable),
        (502, Unavailable),
        (503, Unavailable),
    ],
)
def test_every_status_has_its_error(status: int, kind: type[Exception]) -> None:
    error = refusal(status)

    assert type(error) is kind
    assert "the call list" in str(error)
    assert "api.example" in str(error)


@pytest.mark.parametrize(
    ("text", "bucket"),
    [
        ('{"error":"Too many requests for this API key, please try again later."}', "key"),
        ('{"error":"Too many requests from this IP, please try again later."}', "ip"),
        ("", "key"),
        ("<html>slow down</html>", "key"),
    ],
)
def test_the_text_of_a_429_names_the_bucket(text: str, bucket: str) -> None:
    error = refusal(429, text)

    assert isinstance(error, RateLimited)
    assert (error.bucket, error.retry_after_s) == (bucket, None)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": "0"}, 1),
        ({"Retry-After": "999999"}, 86_400),
        ({"Retry-After": "Tue, 01 Jul 2025 21:02:00 GMT"}, 120),
        ({"Retry-After": "Tue, 01 Jul 2025 20:00:00 GMT"}, 1),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"RateLimit-Reset": "300"}, 300),
        ({"RateLimit": "limit=1000, remaining=0, reset=50"}, 50),
        ({"RateLimit": '"1000-in-15min"; r=0; t=51'}, 51),
        ({"X-RateLimit-Reset": str(int(SEEN_AT.timestamp()) + 90)}, 90),
        ({"X-RateLimit-Reset": "45"}, 45),
        ({"X-RateLimit-Reset": "١٢"}, None),
        ({"Retry-After": "soon", "RateLimit-Reset": "7"}, 7),
    ],
)
def test_the_wait_is_read_from_whatever_header_there_is(headers: dict[str, str], wait_s: float | None) -> None:
    assert parsing.rate_limit_reset_s(CIMultiDict(headers), SEEN_AT) == wait_s


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["Retry-After", "RateLimit", "X-RateLimit-Reset", "Date"]), st.text()))
def test_no_header_can_raise_or_make_the_wait_absurd(headers: dict[str, str]) -> None:
    wait_s = parsing.rate_limit_reset_s(CIMultiDict(headers), SEEN_AT)

    assert wait_s is None or 1 <= wait_s <= 86_400
    assert parsing.server_time(CIMultiDict(headers)) is None or "Date" in headers


def test_the_servers_time_is_its_date() -> None:
    assert parsing.server_time({"Date": "Tue, 01 Jul 2025 21:00:00 GMT"}) == SEEN_AT
    assert parsing.server_time({"Date": "today"}) is None


@pytest.mark.parametrize(
    ("status", "text", "meaning"),
    [
        (404, '{"error":"No recording available"}', NoRecordingYet()),
        (404, '{"error":"Recording not found"}', NoSuchCall()),
        (400, '{"error":"Invalid record ID"}', NoSuchCall()),
        (404, "<html>nginx</html>", None),
        (200, "No recording available", None),
    ],
)
def test_a_missing_recording_differs_from_a_missing_call(
    status: int, text: str, meaning: NoRecordingYet | NoSuchCall | None
) -> None:
    assert wire.missing_recording(response(status, text)) == meaning


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("audio/wav", "audio/wav"),
        ("Audio/MPEG; codecs=mp3", "audio/mpeg"),
        ("audio/x-wav", "audio/x-wav"),
        ("application/octet-stream", "application/octet-stream"),
        (None, "application/octet-stream"),
        ("audio/<script>", "application/octet-stream"),
        ("image/png", "application/octet-stream"),
        ("application/json", None),
        ("application/problem+json; charset=utf-8", None),
        ("text/html", None),
        ("text/plain", None),
    ],
)
def test_only_audio_or_plain_bytes_count_as_a_recording(written: str | None, kind: str | None) -> None:
    assert parsing.audio_type(written) == kind


def test_health_is_reported_in_one_line() -> None:
    healthy = {"status": "healthy", "services": ["contacts", "sms", "call_logs"]}
    online = {"status": "ok", "services": {"contacts": {"status": "online", "endpoint": "inner.example:4044/api"}}}
    offline = {"status": "ok", "services": {"contacts": {"status": "offline"}}}

    assert wire.health_line(healthy) == (True, "gateway: healthy (contacts, sms, call_logs)")
    assert wire.status_line(online) == (True, "key accepted; services: contacts online")
    assert wire.status_line(offline) == (False, "key accepted; services: contacts offline")
    assert not wire.health_line([])[0]
    assert not wire.status_line({"services": 7})[0]
