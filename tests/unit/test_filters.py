"""What a subscription hears and what it does not, with the reason."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.filters import wants
from relay.domain.call import Direction, Outcome
from relay.events.types import EVENT_TYPES


@dataclass(frozen=True)
class Wish:
    """A subscription's filters, all open unless said."""

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
    ("wish", "event", "reason"),
    [
        (Wish(), call_event(), None),
        (Wish(), call_event("call.recording.completed"), None),
        (Wish(events=("*",)), call_event(), None),
        (Wish(events=("call.completed", "call.updated")), call_event(), None),
        (Wish(events=("call.updated",)), call_event(), "type=call.completed is not among call.updated"),
        (Wish(events=()), call_event(), "type=call.completed is not among nothing"),
        (Wish(sources=("office", "shop")), call_event(), None),
        (Wish(sources=("shop",)), call_event(), "source=office is not among shop"),
        (Wish(sources=()), call_event(), None),
        (Wish(direction=("inbound",)), call_event(), None),
        (Wish(direction=(Direction.INBOUND,)), call_event(), None),
        (Wish(direction=("outbound",)), call_event(), "direction=inbound is not among outbound"),
        (
            Wish(outcome=(Outcome.NO_ANSWER, Outcome.BUSY)),
            call_event(),
            "outcome=answered is not among busy, no_answer",
        ),
        (Wish(outcome=("no_answer",)), call_event(outcome="no_answer"), None),
        (Wish(extensions=("3203",)), call_event(), None),
        (Wish(extensions=("17",)), call_event(), "extension=3203 is not among 17"),
        (Wish(extensions=("17",)), call_event(to={"extension": "17"}), None),
        (
            Wish(extensions=("17",)),
            call_event(extension=None, to={"extension": None}),
            "extension=none is not among 17",
        ),
        (Wish(min_duration_s=61), call_event(), None),
        (Wish(min_duration_s=62), call_event(), "duration=61 s is shorter than 62 s"),
        (Wish(min_duration_s=0.5), call_event(duration_seconds=0), "duration=0 s is shorter than 0.5 s"),
        (Wish(min_duration_s=62), call_event(duration_seconds=None), None),
        (
            Wish(sources=("shop",), direction=("outbound",)),
            call_event(),
            "source=office is not among shop",
        ),
    ],
)
def test_a_call_is_filtered_with_a_reason(wish: Wish, event: dict[str, Any], reason: str | None) -> None:
    assert wants(wish, event) == reason


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
def test_operations_are_told_only_to_whoever_names_them(event: dict[str, Any]) -> None:
    family = event["type"].partition(".")[0]

    for unnamed in (("call.*",), ("*",), ("*.*",), ("*.error", "*.failing", "*.test", "*.disabled", "*.recovered")):
        assert wants(Wish(events=unnamed), event) is not None
    for named in ((event["type"],), (f"{family}.*",), ("call.*", event["type"])):
        assert wants(Wish(events=named), event) is None


def test_a_subscription_is_not_told_about_itself() -> None:
    wish = Wish(events=("subscription.*",))

    assert wants(wish, about_subscription(), subscription_id="crm") == "subscription=crm is not told about itself"
    assert wants(wish, about_subscription(), subscription_id="other") is None


def test_events_about_a_source_follow_the_filter_on_sources_and_no_filter_on_calls() -> None:
    named = ("source.*",)

    assert wants(Wish(events=named, sources=("shop",)), about_source()) == "source=office is not among shop"
    assert wants(Wish(events=named, sources=("office",), direction=("outbound",)), about_source()) is None


@given(
    patterns=st.lists(st.sampled_from([*EVENT_TYPES, "*", "call.*", "source.*", "call.recording.*"]), max_size=4),
    event_type=st.sampled_from([name for name in EVENT_TYPES if name.startswith("call.")]),
)
def test_more_patterns_never_mean_less(patterns: list[str], event_type: str) -> None:
    few = wants(Wish(events=tuple(patterns)), call_event(event_type))
    more = wants(Wish(events=(*patterns, "call.*")), call_event(event_type))

    assert more is None
    assert (few is None) == any(
        pattern in (event_type, "*", "call.*") or (pattern == "call.recording.*" and ".recording." in event_type)
        for pattern in patterns
    )
