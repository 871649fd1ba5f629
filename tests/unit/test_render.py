"""The body of an event in its three shapes: stable, signed as it is sent, never over 20 KB, and not to be blown up."""

import contextlib
import copy
import threading
import time
import tracemalloc
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.events.payload import FLAT_FIELDS
from relay.events.render import MAX_BODY_BYTES, MAX_RESULT_BYTES, MapTooCostly, check_map, render

EXPIRES_AT = datetime(2025, 7, 8, 20, 57, 10, tzinfo=UTC)
LINK = ("https://relay.example/recordings/call_x?expires=1752008230&signature=abc", EXPIRES_AT)


def party(number: str | None, **also: Any) -> dict[str, Any]:
    return {
        "number": number,
        "raw": number,
        "type": "e164",
        "extension": None,
        "name": None,
        "country": "US",
        "internal": False,
        "user_id": None,
    } | also


def event(**about: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "id": "call_abc",
        "provider": "webfones",
        "provider_call_id": "211159",
        "source_id": "office",
        "kind": "call",
        "revision": 1,
        "direction": "outbound",
        "outcome": "answered",
        "missed": False,
        "status_raw": "ANSWERED",
        "end_reason": None,
        "ended_by": None,
        "from": party("+12025550111", extension="3203", internal=True),
        "to": party("+12025550122", name="B WHITTAKER"),
        "external_number": "+12025550122",
        "internal_number": "+12025550111",
        "extension": "3203",
        "started_at": "2025-07-01T20:54:53Z",
        "answered_at": None,
        "ended_at": None,
        "duration_seconds": None,
        "derived": [],
        "recording": {
            "status": "available",
            "url": None,
            "expires_at": None,
            "content_type": "audio/wav",
            "size_bytes": 1000,
            "duration_seconds": None,
            "sha256": "ab" * 32,
        },
        "contact": {
            "lookup_status": "matched",
            "count": 2,
            "id": "123e",
            "external_id": "CRM-12345",
            "name": "John Doe",
            "organization": "Acme Corp",
            "email": "john@example.com",
            "others": [{"id": "124e", "name": "Jane"}],
        },
        "transcription": None,
        "transfers": [],
        "participants": [],
        "custom": {},
    }
    return {
        "id": "evt_abc",
        "type": "call.completed",
        "timestamp": "2025-07-01T20:57:10Z",
        "api_version": "2025-07-01",
        "data": {"call": call | about},
        "context": {"via": "poll", "observed_at": "2025-07-01T20:57:09Z", "timezone_assumed": "UTC"},
        "links": {
            "call": "https://relay.example/v1/calls/call_abc",
            "recording": "https://relay.example/v1/calls/call_abc/recording",
        },
    }


OPERATIONS: dict[str, Any] = {
    "id": "evt_op",
    "type": "source.error",
    "timestamp": "2025-07-01T20:57:10Z",
    "api_version": "2025-07-01",
    "data": {"source": {"id": "office"}, "message": "the provider refuses the key"},
}


# --- full


def test_full_is_the_event_as_it_is() -> None:
    assert render(event()) == orjson.dumps(event())
    assert render(OPERATIONS) == orjson.dumps(OPERATIONS)


def test_the_recording_link_is_put_in_when_it_is_sent_and_only_it_differs() -> None:
    """Every attempt has the same bytes but for the link, which is minted anew."""
    canonical = event()
    before = copy.deepcopy(canonical)

    first = orjson.loads(render(canonical, recording_link=LINK))
    second = orjson.loads(render(canonical, recording_link=("https://relay.example/other", EXPIRES_AT)))

    recording = first["data"]["call"]["recording"]
    assert (recording["url"], recording["expires_at"]) == (LINK[0], "2025-07-08T20:57:10Z")
    assert list(recording) == list(before["data"]["call"]["recording"])
    second["data"]["call"]["recording"]["url"] = LINK[0]
    assert first == second
    assert canonical == before


def test_an_event_without_a_call_takes_no_link() -> None:
    assert render(OPERATIONS, recording_link=LINK) == orjson.dumps(OPERATIONS)


def test_the_providers_row_is_sent_only_where_asked_for() -> None:
    raw = {"rid": 211159, "cidname_outside": "B WHITTAKER"}

    assert render(event(), raw=raw) == orjson.dumps(event())
    assert orjson.loads(render(event(), raw=raw, include_raw=True)) == event(raw=raw)
    assert render(event(), include_raw=True) == orjson.dumps(event())
    assert render(OPERATIONS, raw=raw, include_raw=True) == orjson.dumps(OPERATIONS)


# --- flat


def test_flat_has_the_documented_keys_in_their_order_for_every_event() -> None:
    for one in (event(), OPERATIONS, event(contact=None, recording=None, transcription={"transcript": "hello"})):
        flattened = orjson.loads(render(one, payload="flat"))

        assert tuple(flattened) == FLAT_FIELDS
        assert not [name for name, value in flattened.items() if isinstance(value, dict | list)]
    assert len(set(FLAT_FIELDS)) == len(FLAT_FIELDS)
    assert all(name == name.lower() and name.replace("_", "").isalnum() for name in FLAT_FIELDS)


def test_flat_has_what_no_code_tools_map() -> None:
    one = event(transcription={"available": True, "transcript": "hello", "summary": "greeting"})
    one["data"]["changes"] = {"outcome": ["no_answer", "answered"], "contact.name": [None, "John Doe"]}

    flattened = orjson.loads(render(one, payload="flat", recording_link=LINK))

    expected = {
        "id": "evt_abc",
        "event_id": "evt_abc",
        "event_type": "call.completed",
        "call_id": "call_abc",
        "contact_name": "John Doe",
        "from_number": "+12025550111",
        "from_internal": True,
        "to_name": "B WHITTAKER",
        "recording_url": LINK[0],
        "recording_expires_at": "2025-07-08T20:57:10Z",
        "transcription_text": "hello",
        "changed_fields": "outcome,contact.name",
        "observed_via": "poll",
        "message": None,
    }
    assert expected.items() <= flattened.items()


def test_flat_covers_operational_events_too() -> None:
    flattened = orjson.loads(render(OPERATIONS, payload="flat"))

    assert (flattened["id"], flattened["source_id"]) == ("evt_op", "office")
    assert flattened["message"] == "the provider refuses the key"
    assert flattened["call_id"] is None


# --- 20 KB

BIG_LIST = [{"name": "x" * 500} for _ in range(60)]
BIG_TEXT = "ü" * 15_000


@pytest.mark.parametrize(
    ("about", "raw", "truncated"),
    [
        ({}, {"row": BIG_LIST}, ["raw"]),
        ({"participants": BIG_LIST}, None, ["participants"]),
        ({"participants": BIG_LIST}, {"a": 1}, ["raw", "participants"]),
        ({"transfers": BIG_LIST}, None, ["transfers"]),
        ({"contact": event()["data"]["call"]["contact"] | {"others": BIG_LIST}}, None, ["contact.others"]),
        ({"custom": {"a": BIG_LIST}}, None, ["contact.others", "custom"]),
        (
            {"transcription": {"available": True, "transcript": BIG_TEXT}},
            None,
            ["contact.others", "transcription.text"],
        ),
        ({"status_raw": BIG_TEXT}, None, ["contact.others", "long strings"]),
        (
            {"participants": BIG_LIST, "transfers": BIG_LIST, "custom": {"a": BIG_TEXT}, "end_reason": BIG_TEXT},
            {"a": 1},
            ["raw", "participants", "transfers", "contact.others", "custom", "long strings"],
        ),
        ({"derived": ["x"] * 30_000}, None, ["contact.others", "details"]),
    ],
)
def test_optional_parts_go_in_the_stated_order_until_it_fits_and_the_event_says_so(
    about: dict[str, Any], raw: dict[str, Any] | None, truncated: list[str]
) -> None:
    canonical = event(**about)
    before = copy.deepcopy(canonical)

    body = render(canonical, raw=raw, include_raw=True, recording_link=LINK)

    sent = orjson.loads(body)
    assert len(body) <= MAX_BODY_BYTES
    assert sent["truncated"] == truncated
    assert sent["data"]["call"]["id"] == "call_abc"
    assert canonical == before
    if "details" not in truncated:
        assert sent["data"]["call"]["recording"]["url"] == LINK[0]
        assert list(sent["data"]["call"])[:5] == list(before["data"]["call"])[:5]
    assert render(canonical, raw=raw, include_raw=True, recording_link=LINK) == body


def test_big_changes_lose_their_values_and_keep_their_names() -> None:
    one = event()
    one["data"]["changes"] = {"participants": [BIG_LIST, []], "outcome": ["busy", "answered"]}

    sent = orjson.loads(render(one))

    assert sent["data"]["changes"] == {"participants": None, "outcome": None}
    assert sent["truncated"] == ["contact.others", "changes"]


def test_a_flat_body_that_is_too_large_is_cut() -> None:
    body = render(event(transcription={"transcript": BIG_TEXT}), payload="flat")

    sent = orjson.loads(body)
    assert len(body) <= MAX_BODY_BYTES
    assert sent["truncated"] == ["long strings"]
    assert sent["transcription_text"].startswith("üüü")
    assert sent["transcription_text"].endswith("…")


def test_a_flat_body_of_nothing_but_long_strings_keeps_what_identifies_the_call() -> None:
    escaped = "\x01" * 200
    call: dict[str, Any] = {name: dict.fromkeys(party(None), escaped) for name in ("from", "to")}
    contact = dict.fromkeys(event()["data"]["call"]["contact"], escaped)
    recording = dict.fromkeys(event()["data"]["call"]["recording"], escaped)

    call |= dict.fromkeys(("status_raw", "end_reason", "ended_by", "answered_at", "external_number"), escaped)

    body = render(event(**call, contact=contact, recording=recording), payload="flat")

    sent = orjson.loads(body)
    assert len(body) <= MAX_BODY_BYTES
    assert sent["truncated"] == ["long strings", "details"]
    assert (sent["id"], sent["call_id"], sent["outcome"]) == ("evt_abc", "call_abc", "answered")
    assert sent["contact_name"] is None
    assert tuple(sent) == (*FLAT_FIELDS, "truncated")


def test_a_body_of_20_000_bytes_is_whole_and_one_of_20_001_is_cut() -> None:
    """The limit that the documentation names."""
    rest_bytes = len(render(event(status_raw="")))

    whole, cut = (render(event(status_raw="x" * (size_bytes - rest_bytes))) for size_bytes in (20_000, 20_001))

    assert (len(whole), "truncated" in orjson.loads(whole)) == (20_000, False)
    assert len(cut) < 20_000
    assert "long strings" in orjson.loads(cut)["truncated"]


def test_an_address_is_never_cut_since_it_would_not_work_any_more() -> None:
    """A presigned link to a recording has hundreds of characters; other text around it is cut."""
    url = "https://store.example.com/call.wav?signature=" + "s" * 700

    recording = {**event()["data"]["call"]["recording"], "url": url}
    body = render(event(recording=recording, status_raw="x" * 25_000))

    call = orjson.loads(body)["data"]["call"]
    assert call["recording"]["url"] == url
    assert len(call["status_raw"]) == 500


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcurl", max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(
    values=st.dictionaries(
        st.sampled_from(list(event()["data"]["call"])).filter(lambda name: name != "id"), anything, max_size=6
    ),
    times=st.sampled_from([1, 500, 20_000]),
    place=st.sampled_from(["custom", "status_raw", "derived", "end_reason", "transcription"]),
    shape=st.sampled_from(["full", "flat"]),
)
@settings(max_examples=60, deadline=None)
def test_no_event_makes_a_body_over_20_kb(values: dict[str, Any], times: int, place: str, shape: Any) -> None:
    large = {"custom": {"k" * times: "v\x01" * times}, "derived": ["\x02"] * times}.get(place, "\x03" * times)

    body = render(event(**(values | {place: large})), payload=shape)

    assert len(body) <= 20_000
    assert orjson.loads(body)["id"] == "evt_abc"


# --- maps


def mapped(mapping: Mapping[str, str], one: dict[str, Any] | None = None, **options: Any) -> Any:
    body = render(one or event(), payload=mapping, **options)
    assert len(body) <= MAX_RESULT_BYTES
    return orjson.loads(body)


def test_a_map_builds_the_subscribers_own_body() -> None:
    mapping = {
        "Subject": "join(' ', ['Call with', data.call.contact.name])",
        "Phone": "data.call.external_number",
        "Minutes": "data.call.duration_seconds",
        "People": "data.call.contact.others[].name",
        "Link": "data.call.recording.url",
        "Nested": "{id: data.call.id, missed: data.call.missed}",
        "Raw": "data.call.raw.rid",
    }

    assert check_map(mapping, event()) == []
    assert mapped(mapping, recording_link=LINK, raw={"rid": 7}, include_raw=True) == {
        "Subject": "Call with John Doe",
        "Phone": "+12025550122",
        "Minutes": None,
        "People": ["Jane"],
        "Link": LINK[0],
        "Nested": {"id": "call_abc", "missed": False},
        "Raw": 7,
    }


def test_a_field_that_fails_for_one_event_is_null_and_the_others_are_sent() -> None:
    mapping = {"who": "join(', ', [data.call.contact.name])", "id": "data.call.id"}
    unmatched = event(contact={"lookup_status": "none", "name": None})

    assert check_map(mapping, event()) == []
    assert mapped(mapping, unmatched) == {"who": None, "id": "call_abc"}
    assert mapped(mapping, OPERATIONS) == {"who": None, "id": None}


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "must be text"),
        ("   ", "must be text"),
        (7, "must be text"),
        ("data.call.", "not a valid JMESPath expression"),
        ("data..call", "not a valid JMESPath expression"),
        ("foo(", "not a valid JMESPath expression"),
        ("'unclosed", "not a valid JMESPath expression"),
        ("`{not json`", "not a valid JMESPath expression"),
        ("`deprecated`", "not a valid JMESPath expression"),
        ("data.call-id", "not a valid JMESPath expression"),
        ("nosuch(@)", "Unknown function: nosuch"),
        ("length(data.call.missed)", "invalid type"),
        ("length(data, data)", "1 argument"),
        ("&foo", "its result is not JSON"),
        ("to_number('99999999999999999999999')", "its result is not JSON"),
        ('`"\\ud800"`', "its result is not JSON"),
        ("a" * 513, "at most 512 characters"),
        ("[" * 21 + "a" + "]" * 21, "at most 20 levels"),
        ("!" * 500 + "a", "at most 20 levels"),
        ("a" + ".b" * 20 + " || !!!!!!!!!!!!!!!!!!!!!!!!a", "at most 20 levels"),
        ("data.call.derived[0:10:0]", "its result is not JSON: slice step"),
    ],
)
def test_a_wrong_expression_is_named_with_its_field_when_it_is_saved(expression: Any, reason: str) -> None:
    [error] = check_map({"good": "data.call.id", "Contact": expression}, event(derived=[[1]]))

    assert error.startswith("Contact: ")
    assert reason in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ({}, "the map has no fields"),
        ({f"f{number}": "id" for number in range(101)}, "101 fields; at most 100"),
        ({"": "id"}, "an output field must be text"),
        ({"x" * 101: "id"}, "an output field must be text"),
        ({"a\nb": "id"}, "an output field must be text"),
        ({"all": "@", "again": "@"}, "the result has"),
    ],
)
def test_a_wrong_map_is_refused_in_a_sentence(mapping: dict[str, str], reason: str) -> None:
    [error] = check_map(mapping, event(custom={"a": "x" * 9000}))

    assert reason in error


@pytest.mark.parametrize(
    "expression",
    [
        " | ".join(["`1`", *["[@, @]"] * 18]),
        " | ".join(["@", *["[@, @, @, @]"] * 18]),
        "[@, @][] | [@, @, @, @, @, @, @, @][] | [@, @, @, @, @, @, @, @][]",
        "{a: @, b: @} | {a: @, b: @} | {a: @, b: @} | length(keys(@))",
        "length(data.call.derived[?@ == `0` || contains(to_string(`[1]`), '2')])",
    ],
)
def test_a_map_with_an_expression_that_blows_up_is_stopped_in_time(expression: str) -> None:
    """A few characters that double what they are given, again and again, cost neither memory nor time."""
    one = event(derived=["x" * 2] * 20_000, end_reason="y" * 1000)
    started_s = time.thread_time()

    errors = check_map({"bomb": expression}, one)
    with contextlib.suppress(MapTooCostly):
        assert mapped({"bomb": expression, "id": "data.call.id"}, one) == {"bomb": None, "id": "call_abc"}

    assert "more than 20 ms" in errors[-1] or "too large" in errors[-1]
    assert time.thread_time() - started_s < 0.2


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (" | ".join(["[@]", *["[@, @][]"] * 10, "[]", *["[@, @][]"] * 8]), "20 levels"),
        ("length(join(data.call.end_reason, map(&'', data.call.derived)))", "too large"),
        ("map(&@, data.call.derived)", "bytes; at most"),
    ],
)
def test_an_expression_that_builds_too_much_leaves_the_other_fields(expression: str, reason: str) -> None:
    one = event(derived=["x" * 2] * 6_000, end_reason="y" * 1000)

    [error] = check_map({"bomb": expression}, one)

    assert reason in error
    assert mapped({"bomb": expression, "id": "data.call.id"}, one) == {"bomb": None, "id": "call_abc"}


def test_a_join_that_would_be_too_large_is_not_built() -> None:
    """Its result can be the product of its arguments; the limit holds before that is in memory."""
    one = event(derived=["x"] * 200, end_reason="y" * 50_000)
    expression = "length(join(data.call.end_reason, data.call.derived))"

    tracemalloc.start()
    body = mapped({"joined": expression, "id": "data.call.id"}, one)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert body == {"joined": None, "id": "call_abc"}
    assert peak_bytes < 2_000_000


def test_the_time_budget_is_that_of_the_whole_map() -> None:
    """Thirty fields that each stay within it exceed it together: on 0.1.0 they took half a minute."""
    costly = "length(data.call.derived[?@ == `0` || contains(to_string(`[1]`), '2')])"
    one = event(derived=["x"] * 300)
    assert check_map({"one": costly}, one) == []

    errors = check_map({f"field_{number}": costly for number in range(30)}, one)

    assert errors == ["the map takes more than 20 ms to evaluate; simplify its expressions"]
    with pytest.raises(MapTooCostly):
        mapped({f"field_{number}": costly for number in range(30)}, one)


def test_a_busy_machine_makes_no_map_costly() -> None:
    """The budget is processor time of the evaluation, not time of the clock."""
    mapping = {f"field_{number}": "data.call.derived[?@ == `0`]" for number in range(3)}
    one = event(derived=["x"] * 100)
    end_s = time.monotonic() + 0.5

    def burn() -> None:
        while time.monotonic() < end_s:
            pass

    threads = [threading.Thread(target=burn) for _ in range(8)]
    for thread in threads:
        thread.start()
    errors = [error for _ in range(5) for error in check_map(mapping, one)]
    for thread in threads:
        thread.join()

    assert errors == []


def test_a_result_over_16_kib_loses_its_largest_fields_and_says_which() -> None:
    mapping = {"small": "data.call.id", "text": "data.call.status_raw", "list": "data.call.derived", "x": "id"}
    one = event(status_raw="y" * 9000, derived=["z" * 50] * 200)

    sent = mapped(mapping, one)

    assert sent == {"truncated": ["list"], "small": "call_abc", "text": "y" * 9000, "list": None, "x": "evt_abc"}


grammar = st.text("abd.[]{}()|&@!=<>'`\"*?:,0127 -", max_size=40)


@given(expression=grammar | st.sampled_from(["sort_by", "max_by", "merge", "to_array", "reverse"]).map("{}(@)".format))
@settings(deadline=None)
def test_no_expression_whatever_breaks_the_check_or_the_body(expression: str) -> None:
    errors = check_map({"field": expression}, event())

    sent = mapped({"field": expression, "id": "id"})
    assert sent["id"] == "evt_abc"
    if errors:
        assert sent["field"] is None
