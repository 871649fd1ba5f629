"""Does a subscription want an event, and if not, why not: pure, so that a person can ask for the reason."""

from collections.abc import Collection
from typing import Any, Protocol

from relay.events import types


class SubscriptionFilter(Protocol):
    """What a subscription says it wants to hear; none, or an empty one, of the last five wants all."""

    @property
    def events(self) -> Collection[str]: ...

    @property
    def sources(self) -> Collection[str] | None: ...

    @property
    def direction(self) -> Collection[str] | None: ...

    @property
    def outcome(self) -> Collection[str] | None: ...

    @property
    def extensions(self) -> Collection[str] | None: ...

    @property
    def min_duration_s(self) -> float | None: ...


def wants(wishes: SubscriptionFilter, event: dict[str, Any], *, subscription_id: str | None = None) -> str | None:
    """Say why the event is filtered, as `direction=inbound is not among outbound`, or None when it is wanted.

    A call whose duration the provider did not tell passes `min_duration_s`: a filter never loses what it cannot judge.
    """
    event_type = event["type"]
    patterns = _explicit(wishes.events, event_type)
    if not types.matches(patterns, event_type):
        return _not_among("type", event_type, wishes.events)
    data = event["data"]
    if subscription_id is not None and data.get("subscription", {}).get("id") == subscription_id:
        return f"subscription={subscription_id} is not told about itself"
    call = data.get("call")
    if call is None:
        source_id = data.get("source", {}).get("id")
        return _unless(wishes.sources, "source", source_id) if source_id is not None else None
    return (
        _unless(wishes.sources, "source", call["source_id"])
        or _unless(wishes.direction, "direction", call["direction"])
        or _unless(wishes.outcome, "outcome", call["outcome"])
        or _unless_extension(wishes.extensions, call)
        or _unless_long(wishes.min_duration_s, call["duration_seconds"])
    )


def _explicit(patterns: Collection[str], event_type: str) -> Collection[str]:
    for family in types.OPERATIONAL_FAMILIES:
        if event_type.startswith(family):
            return [pattern for pattern in patterns if pattern.startswith(family)]
    return patterns


def _unless(wanted: Collection[str] | None, name: str, value: str) -> str | None:
    return _not_among(name, value, wanted) if wanted and value not in wanted else None


def _unless_extension(wanted: Collection[str] | None, call: dict[str, Any]) -> str | None:
    if not wanted:
        return None
    taking_part = [
        extension
        for extension in dict.fromkeys((call["extension"], call["from"]["extension"], call["to"]["extension"]))
        if extension is not None
    ]
    if any(extension in wanted for extension in taking_part):
        return None
    return _not_among("extension", ",".join(taking_part) or "none", wanted)


def _unless_long(min_duration_s: float | None, duration_s: float | None) -> str | None:
    if min_duration_s is None or duration_s is None or duration_s >= min_duration_s:
        return None
    return f"duration={duration_s:g} s is shorter than {min_duration_s:g} s"


def _not_among(name: str, value: str, wanted: Collection[str]) -> str:
    return f"{name}={value} is not among {', '.join(sorted(wanted)) or 'nothing'}"
