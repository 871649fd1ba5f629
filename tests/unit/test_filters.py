"""What a subscription receives and what it does not, with the reason."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.filters import mismatch
from relay.domain.call import Direction, Outcome
from relay.events.types import EVENT_TYPES


@dataclass(frozen=True)
class Filters:
    """A subscription's filters, all open unless set."""

    events: tuple[str, ...] = ("call.*",)
    sources: tuple[str, ...] | None = None
    direction: tuple[str, ...] | None = None
    outcome: tuple[str, ...] | None = None
    extensions: tuple[str, ...] | None = None
    min_duration_s: float | None = None


def call_event(event_type: str = "call.completed", **about: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "source_id": "office",
        "direction": "inbound",
        "outcome": "answered",
        "extension": "3203",
        "from": {"extension": None},
        "to": {"extension": "3203"},
        "duration_seconds": 61.0,
    }
    return {"id": "evt_1", "type": event_type, "data": {"call": call | about}}


def about_source(event_type: str = "source.error") -> dict[str, Any]:
    return {"id": "evt_2", "type": event_type, "data": {"source": {"id": "office"}, "message": "no answer"}}


def about_subscription(event_type: str = "subscription.failing") -> dict[str, Any]:
    return {"id": "evt_3", "type": event_type, "data": {"subscription": {"id": "crm"}}}


@pytest.mark.parametrize(
    ("filters", "event", "reason"),
    [
        (Filters(), call_event(), None),
        (Filters(), call_event("call.recording.completed"), None),
        (Filters(events=("*",)), call_event(), None),
        (Filters(events=("call.completed", "call.updated")), call_event(), None),
        (Filters(events=("call.updated",)), call_event(), "type=call.completed does not match call.updated"),
        (Filters(events=()), call_event(), "type=call.completed does not match nothing"),
        (Filters(sources=("office", "shop")), call_event(), None),
        (Filters(sources=("shop",)), call_event(), "source=office does not match shop"),
        (Filters(sources=()), call_event(), None),
        (Filters(direction=("inbound",)), call_event(), None),
        (Filters(direction=(Direction.INBOUND,)), call_event(), None),
        (Filters(direction=("outbound",)), call_event(), "direction=inbound does not match outbound"),
        (
            Filters(outcome=(Outcome.NO_ANSWER, Outcome.BUSY)),
            call_event(),
            "outcome=answered does not match busy, no_answer",
        ),
        (Filters(outcome=("no_answer",)), call_event(outcome="no_answer"), None),
        (Filters(extensions=("3203",)), call_event(), None),
        (Filters(extensions=("17",)), call_event(), "extension=3203 does not match 17"),
        (Filters(extensions=("17",)), call_event(to={"extension": "17"}), None),
        (
            Filters(extensions=("17",)),
            call_event(extension=None, to={"extension": None}),
            "extension=none does not match 17",
        ),
        (Filters(min_duration_s=61), call_event(), None),
        (Filters(min_duration_s=62), call_event(), "duration=61 s is shorter than 62 s"),
        (Filters(min_duration_s=0.5), call_event(duration_seconds=0), "duration=0 s is shorter than 0.5 s"),
        (Filters(min_duration_s=62), call_event(duration_seconds=None), None),
        (
            Filters(sources=("shop",), direction=("outbound",)),
            call_event(),
            "source=office does not match shop",
        ),
    ],
)
def test_a_call_is_filtered_with_a_reason(filters: Filters, event: dict[str, Any], reason: str | None) -> None:
    assert mismatch(filters, event) == reason


@pytest.mark.parametrize(
    "event",
    [
        about_source(),
        about_source("source.recovered"),
        about_subscription(),
        about_subscription("subscription.disabled"),
        {"id": "evt_4", "type": "webhook.test", "data": {}},
    ],
    ids=lambda event: event["type"],
)
def test_operational_events_are_received_only_where_events_names_them(event: dict[str, Any]) -> None:
    family = event["type"].partition(".")[0]

    for unnamed in (("call.*",), ("*",), ("*.*",), ("*.error", "*.failing", "*.test", "*.disabled", "*.recovered")):
        assert mismatch(Filters(events=unnamed), event) is not None
    for named in ((event["type"],), (f"{family}.*",), ("call.*", event["type"])):
        assert mismatch(Filters(events=named), event) is None


def test_a_subscription_does_not_receive_events_about_itself() -> None:
    filters = Filters(events=("subscription.*",))

    assert (
        mismatch(filters, about_subscription(), subscription_id="crm")
        == "subscription=crm does not receive events about itself"
    )
    assert mismatch(filters, about_subscription(), subscription_id="other") is None


def test_events_about_a_source_follow_the_filter_on_sources_and_no_filter_on_calls() -> None:
    named = ("source.*",)

    assert mismatch(Filters(events=named, sources=("shop",)), about_source()) == "source=office does not match shop"
    assert mismatch(Filters(events=named, sources=("office",), direction=("outbound",)), about_source()) is None


@given(
    patterns=st.lists(st.sampled_from([*EVENT_TYPES, "*", "call.*", "source.*", "call.recording.*"]), max_size=4),
    event_type=st.sampled_from([name for name in EVENT_TYPES if name.startswith("call.")]),
)
def test_more_patterns_never_select_less(patterns: list[str], event_type: str) -> None:
    few = mismatch(Filters(events=tuple(patterns)), call_event(event_type))
    more = mismatch(Filters(events=(*patterns, "call.*")), call_event(event_type))

    assert more is None
    assert (few is None) == any(
        pattern in (event_type, "*", "call.*") or (pattern == "call.recording.*" and ".recording." in event_type)
        for pattern in patterns
    )
