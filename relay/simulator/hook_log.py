"""What one hook of the verifying subscriber has received, and what of it must never happen. Pure: no I/O.

A delivery is *received* when its POST arrived whole and its signature holds. It is *accepted* when the subscriber acted
on it: it answered 2xx, or acted and then never answered. A duplicate is an event that was accepted more than once; one
that is sent again after a refusal is a retry, and correct.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import orjson

_MAX_LISTED = 200


@dataclass(frozen=True, slots=True)
class Arrival:
    """One received delivery, refused ones included. `monotonic_s` is comparable between processes of one machine."""

    event_id: str
    type: str
    call_id: str | None
    provider_call_id: str | None
    revision: int | None
    accepted: bool
    monotonic_s: float
    at: datetime


@dataclass(frozen=True, slots=True)
class HookReport:
    """What one hook has received. Long lists keep their first 200 entries; the counts are complete.

    `changed_ids` are (call id, type, revision) for which more than one event id came. `overtaken` are deliveries that
    arrived while an earlier event of their call was still refused: correct only when that one's schedule had ended.
    """

    name: str
    received: int
    accepted: int
    events: int
    retries: int
    duplicates: Mapping[str, int]
    types: Mapping[str, int]
    signature_failures: int
    signature_reasons: Mapping[str, int]
    order_violations: tuple[str, ...]
    overtaken: tuple[str, ...]
    changed_ids: tuple[str, ...]
    changed_bodies: tuple[str, ...]
    mismatched_ids: tuple[str, ...]
    unreadable: int
    in_flight_peak: int
    completed: frozenset[str]

    def lost(self, expected: Iterable[str]) -> tuple[str, ...]:
        """The expected provider call ids whose `call.completed` was never accepted, in order."""
        return tuple(sorted(set(expected) - self.completed))

    def problems(self) -> tuple[str, ...]:
        """Everything that must not happen, a sentence each; not duplicates, which a crash may excuse."""
        sentences = {
            f"{self.signature_failures} signatures did not verify": self.signature_failures,
            f"order per call was broken: {'; '.join(self.order_violations[:5])}": self.order_violations,
            f"ids changed: {', '.join(self.changed_ids[:5])}": self.changed_ids,
            f"bodies changed between deliveries: {', '.join(self.changed_bodies[:5])}": self.changed_bodies,
            f"webhook-id and body differ: {', '.join(self.mismatched_ids[:5])}": self.mismatched_ids,
            f"{self.unreadable} bodies were not readable": self.unreadable,
        }
        return tuple(sentence for sentence, wrong in sentences.items() if wrong)


@dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """What the subscriber reads of a body in any format; `digest` leaves out what may differ between attempts."""

    id: str
    type: str
    call_id: str | None
    provider_call_id: str | None
    revision: int | None
    digest: bytes


@dataclass(slots=True)
class EventLog:
    digest: bytes
    received: int = 0
    accepted: int = 0


@dataclass(slots=True)
class CallLog:
    """One call at one hook: the newest accepted revision, the events refused so far, those being answered now."""

    has_completed: bool = False
    revision: int = 0
    refused: set[str] = field(default_factory=set)
    answering: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class HookLog:
    name: str
    posts: int = 0
    received: int = 0
    accepted: int = 0
    in_flight: int = 0
    in_flight_peak: int = 0
    unreadable: int = 0
    events: dict[str, EventLog] = field(default_factory=dict)
    calls: dict[str, CallLog] = field(default_factory=dict)
    ids: dict[tuple[str, str, int | None], str] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    completed: set[str] = field(default_factory=set)
    signature_reasons: Counter[str] = field(default_factory=Counter)
    order_violations: list[str] = field(default_factory=list)
    overtaken: list[str] = field(default_factory=list)
    changed_ids: list[str] = field(default_factory=list)
    changed_bodies: list[str] = field(default_factory=list)
    mismatched_ids: list[str] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    bodies: dict[str, bytes] = field(default_factory=dict)

    def record(
        self, event: ReceivedEvent, event_id: str, body: bytes, *, accepted: bool, keep_body: bool, keep_arrival: bool
    ) -> CallLog:
        if event_id != event.id:
            _append(self.mismatched_ids, f"{event_id} carries {event.id}")
        call = self.calls.setdefault(event.call_id or event_id, CallLog())
        log = self.events.get(event_id)
        if log is None:
            log = self.events[event_id] = EventLog(event.digest)
            self.types[event.type] += 1
            self._check_first_delivery(call, event, event_id)
            if keep_body:
                self.bodies[event_id] = body
        elif log.digest != event.digest:
            _append(self.changed_bodies, event_id)
        call.has_completed |= event.type == "call.completed"
        log.received += 1
        self.received += 1
        if accepted:
            log.accepted += 1
            self.accepted += 1
            call.refused.discard(event_id)
            call.revision = max(call.revision, event.revision or 0)
            if event.type == "call.completed" and event.provider_call_id is not None:
                self.completed.add(event.provider_call_id)
        elif not log.accepted:
            call.refused.add(event_id)
        if keep_arrival:
            self.arrivals.append(_arrival(event, event_id, accepted=accepted))
        return call

    def _check_first_delivery(self, call: CallLog, event: ReceivedEvent, event_id: str) -> None:
        """Check order and one id for ever, when an event id is new to this hook."""
        if event.call_id is None:
            return
        what = f"{event.call_id} {event.type} revision {event.revision}"
        if event.type != "call.completed" and not call.has_completed:
            _append(self.order_violations, f"{what} came before call.completed")
        if event.revision is not None and event.revision < call.revision:
            _append(self.order_violations, f"{what} came after revision {call.revision}")
        if event.type == "call.completed" and call.revision and not call.has_completed:
            _append(self.order_violations, f"{what} came after later events")
        if any(count > 0 for other_id, count in call.answering.items() if other_id != event_id):
            _append(self.order_violations, f"{what} came while another event of the call was being answered")
        if call.refused:
            _append(self.overtaken, f"{what} came while {', '.join(sorted(call.refused))} was refused")
        first_id = self.ids.setdefault((event.call_id, event.type, event.revision), event_id)
        if first_id != event_id:
            _append(self.changed_ids, f"{what}: {first_id}, then {event_id}")

    def report(self) -> HookReport:
        return HookReport(
            name=self.name,
            received=self.received,
            accepted=self.accepted,
            events=len(self.events),
            retries=sum(event.received - max(1, event.accepted) for event in self.events.values()),
            duplicates={event_id: log.accepted - 1 for event_id, log in self.events.items() if log.accepted > 1},
            types=dict(self.types),
            signature_failures=self.signature_reasons.total(),
            signature_reasons=dict(self.signature_reasons),
            order_violations=tuple(self.order_violations),
            overtaken=tuple(self.overtaken),
            changed_ids=tuple(self.changed_ids),
            changed_bodies=tuple(self.changed_bodies),
            mismatched_ids=tuple(self.mismatched_ids),
            unreadable=self.unreadable,
            in_flight_peak=self.in_flight_peak,
            completed=frozenset(self.completed),
        )


def read_event(body: bytes) -> ReceivedEvent | None:
    """Read a full, flat or mapped body; None when it is not a JSON object."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    data = document.get("data")
    call = data.get("call") if isinstance(data, dict) else None
    if not isinstance(call, dict):
        flat = {"id": "call_id", "provider_call_id": "provider_call_id", "revision": "revision"}
        call = {name: document.get(flat_name) for name, flat_name in flat.items()}
    # Links are signed anew for each attempt, so they do not count as a changed body.
    recording = call.get("recording")
    if isinstance(recording, dict):
        recording.pop("url", None)
        recording.pop("expires_at", None)
    document.pop("recording_url", None)
    document.pop("recording_expires_at", None)
    revision = call.get("revision")
    return ReceivedEvent(
        id=str(document.get("id") or document.get("event_id") or ""),
        type=str(document.get("type") or document.get("event_type") or ""),
        call_id=_text(call.get("id")),
        provider_call_id=_text(call.get("provider_call_id")),
        revision=revision if isinstance(revision, int) else None,
        digest=hashlib.blake2b(orjson.dumps(document), digest_size=12).digest(),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _append(items: list[str], item: str) -> None:
    if len(items) < _MAX_LISTED:
        items.append(item)


def _arrival(event: ReceivedEvent, event_id: str, *, accepted: bool) -> Arrival:
    return Arrival(
        event_id=event_id,
        type=event.type,
        call_id=event.call_id,
        provider_call_id=event.provider_call_id,
        revision=event.revision,
        accepted=accepted,
        monotonic_s=time.monotonic(),
        at=datetime.now(UTC),
    )
