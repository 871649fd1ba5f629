"""Whether a subscription receives an event, and if not, why: pure, so that `explain` can show the reason."""

from collections.abc import Collection
from typing import Protocol

from relay.domain.json import Json
from relay.events import types


class SubscriptionFilter(Protocol):
    """What a subscription selects. Of the last five, None or an empty one selects everything."""

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


def text(selected: SubscriptionFilter) -> str:
    """Write filters down, so that two texts differ when the filters do."""
    chosen = (selected.events, selected.sources, selected.direction, selected.outcome, selected.extensions)
    return repr([*(sorted(values or ()) for values in chosen), selected.min_duration_s])


def mismatch(selected: SubscriptionFilter, event: Json, *, subscription_id: str | None = None) -> str | None:
    """Return why the event is filtered out, as `direction=inbound does not match outbound`; None when it is delivered.

    A call without a duration passes `min_duration_s`: a filter never drops what it cannot decide.
    """
    event_type = event["type"]
    if not types.matches(_patterns_for(selected.events, event_type), event_type):
        return _no_match("type", event_type, selected.events)
    data = event["data"]
    if subscription_id is not None and data.get("subscription", {}).get("id") == subscription_id:
        # A failing subscription would be sent the news of its own failure, and fail at that as well.
        return f"subscription={subscription_id} does not receive events about itself"
    call = data.get("call")
    if call is None:
        source_id = data.get("source", {}).get("id")
        return _unless(selected.sources, "source", source_id) if source_id is not None else None
    return (
        _unless(selected.sources, "source", call["source_id"])
        or _unless(selected.direction, "direction", call["direction"])
        or _unless(selected.outcome, "outcome", call["outcome"])
        or _unless_extension(selected.extensions, call)
        or _unless_long(selected.min_duration_s, call["duration_seconds"])
    )


def _patterns_for(patterns: Collection[str], event_type: str) -> Collection[str]:
    """Return the patterns that may select a type: `*` and `*.error` are not meant for events about the relay itself."""
    for family in types.OPERATIONAL_FAMILIES:
        if event_type.startswith(family):
            return [pattern for pattern in patterns if pattern.startswith(family)]
    return patterns


def _unless(selected: Collection[str] | None, name: str, value: str) -> str | None:
    return _no_match(name, value, selected) if selected and value not in selected else None


def _unless_extension(selected: Collection[str] | None, call: Json) -> str | None:
    if not selected:
        return None
    extensions = [
        extension
        for extension in dict.fromkeys((call["extension"], call["from"]["extension"], call["to"]["extension"]))
        if extension is not None
    ]
    if any(extension in selected for extension in extensions):
        return None
    return _no_match("extension", ",".join(extensions) or "none", selected)


def _unless_long(min_duration_s: float | None, duration_s: float | None) -> str | None:
    if min_duration_s is None or duration_s is None or duration_s >= min_duration_s:
        return None
    return f"duration={duration_s:g} s is shorter than {min_duration_s:g} s"


def _no_match(name: str, value: str, selected: Collection[str]) -> str:
    return f"{name}={value} does not match {', '.join(sorted(selected)) or 'nothing'}"
