"""The lanes of the relay: which kinds of work there are, what their items carry, and what settling them writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from redis.asyncio import Redis

from relay.domain.call import RecordingStatus
from relay.domain.json import Json
from relay.queue.lane import Lane
from relay.queue.process import Process
from relay.store.deliveries import DeliveryState
from relay.store.documents import pack
from relay.store.keys import FALLBACK_TTL_S
from relay.store.scripts import lane_hooks


class LaneName(StrEnum):
    POLL = "poll"
    ENRICH = "enrich"
    CONTACTS = "contacts"
    RECORD = "record"
    DELIVER = "deliver"


Lanes = Mapping[LaneName, Lane]


_HOOKS = {LaneName.POLL: "poll_lane", LaneName.DELIVER: "deliver_lane"}
_NOT_FETCHED = pack({"status": RecordingStatus.UNAVAILABLE.value})


def open_lane(redis: Redis, name: LaneName, process: Process | None = None, *, events_ttl_s: int = 0) -> Lane:
    """Open a lane for a process (default: one of its own); `events_ttl_s` is how long a settled delivery keeps its
    event."""
    hooks = lane_hooks(_HOOKS.get(name, "call_lanes"))
    argument = _NOT_FETCHED if name is LaneName.RECORD else events_ttl_s + FALLBACK_TTL_S
    return Lane(redis, name, process, hooks=hooks, hook_argument=argument)


def open_lanes(redis: Redis, process: Process, *, events_ttl_s: int) -> Lanes:
    return {name: open_lane(redis, name, process, events_ttl_s=events_ttl_s) for name in LaneName}


@dataclass(frozen=True, slots=True)
class DeliveryUpdate:
    """What a settlement of the deliver lane writes: the event that was attempted and how its delivery stands (None:
    as before). A dead letter is attempted no more; what is filtered is no delivery at all."""

    event_id: str
    state: DeliveryState | None = None
    dead_letter: bool = False
    filtered: bool = False

    def fields(self) -> dict[str, str | bytes]:
        fields: dict[str, str | bytes] = {"event": self.event_id}
        if self.state is not None:
            fields["state"] = self.state.write()
        if self.dead_letter:
            fields["dead_letter"] = "1"
        if self.filtered:
            fields["filtered"] = "1"
        return fields


@dataclass(frozen=True, slots=True)
class ContactWanted:
    """The contact of the call is to be looked up: the call is put into the contacts lane, unless it is there."""

    def fields(self) -> dict[str, str | bytes]:
        return {"contact_wanted": "1"}


@dataclass(frozen=True, slots=True)
class ContactFound:
    """The contact of a call is published; the call is then due in the enrich lane, should it have changed meanwhile."""

    def fields(self) -> dict[str, str | bytes]:
        return {"contact_found": "1"}


@dataclass(frozen=True, slots=True)
class LookupProgress:
    """How far the attempts to look up a contact have come."""

    lookup: Json

    def fields(self) -> dict[str, str | bytes]:
        return {"lookup": pack(self.lookup)}


@dataclass(frozen=True, slots=True)
class RecordingStored:
    """The final recording part of a call, audio or not; the call is then due in the enrich lane."""

    recording: Json

    def fields(self) -> dict[str, str | bytes]:
        return {"recording": pack(self.recording)}


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far the attempts to fetch a recording have come."""

    fetch: Json

    def fields(self) -> dict[str, str | bytes]:
        return {"fetch": pack(self.fetch)}
