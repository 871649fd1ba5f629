"""Decide which events are due for a call: a pure function of what was published, what is known, and the time.

    decide(call, now_ms, rules) -> Publish | Wait

* Nothing is published while the call is in progress, or while it is held for a contact or a recording.
* The first event is `call.completed`; it has the latest content, changes during the hold included.
* After that each difference is published once: `call.updated` (content or contact), `call.recording.completed` and
  `.failed`, `call.transcript.completed`.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import orjson

from relay.domain import ids
from relay.domain.call import LookupStatus, Outcome, RecordingStatus
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.domain.time import from_ms, iso
from relay.events.payload import API_VERSION, CALL_FIELDS, CONTACT_FIELDS, NO_CONTACT, NO_RECORDING, RECORDING_FIELDS
from relay.store.calls import StoredCall

_SETTLED: Final = frozenset({LookupStatus.MATCHED, LookupStatus.NONE, LookupStatus.SKIPPED})
_NOTHING_PUBLISHED: Final[Json] = {"content": None, "revision": 0, "audio": None, "transcript": False}


@dataclass(frozen=True, slots=True)
class EventDraft:
    """An event that is due: its id and its document in the full form."""

    id: str
    type: str
    document: Json


@dataclass(frozen=True, slots=True)
class Publish:
    """The events that are due now, in order (perhaps none), and what will be published then; None when unchanged."""

    events: tuple[EventDraft, ...]
    published: Json | None


@dataclass(frozen=True, slots=True)
class Wait:
    """The call is held: decide again in `wait_ms` at the latest."""

    wait_ms: int


def decide(call: StoredCall, *, now_ms: int, rules: SourceRules, wall_ms: int | None = None) -> Publish | Wait:
    """Decide what is due for a call at `now_ms`, the relay's clock; events carry `wall_ms` (default: the same)."""
    if not call.finished:
        return Publish((), None)
    if call.published is None:
        hold_ms = _hold_left_ms(call, now_ms, rules)
        if hold_ms > 0:
            return Wait(hold_ms)
    return _publish(call, now_ms if wall_ms is None else wall_ms, rules)


def contact_settled(call: StoredCall) -> bool:
    """Whether the contact is final for the number that the call has now; a provider may correct the number later."""
    part = call.contact
    if part is None or part["lookup_status"] not in _SETTLED:
        return False
    number = call.record.get("external_number")
    return bool(part.get("number", number) == number)


def number_to_look_up(call: StoredCall) -> str | None:
    """Return the other side's number; extensions and hidden numbers are never looked up."""
    number = call.record.get("external_number")
    return number if isinstance(number, str) else None


def wants_contact(call: StoredCall, rules: SourceRules) -> bool:
    """Whether a look-up may still bring the contact of a call: there is none yet, and the retries are not exhausted."""
    number = number_to_look_up(call)
    if not rules.contacts or not call.finished or number is None or contact_settled(call):
        return False
    return call.lookup is None or call.lookup.get("exhausted_for") != number


def contact_hold_left_ms(call: StoredCall, *, now_ms: int, rules: SourceRules) -> int:
    """Return for how long the call may still be held for its contact, ms; 0 when it may not."""
    if not rules.contacts or contact_settled(call):
        return 0
    return _left_ms(call, rules.hold_for_contact_ms, now_ms)


def _hold_left_ms(call: StoredCall, now_ms: int, rules: SourceRules) -> int:
    left_ms = contact_hold_left_ms(call, now_ms=now_ms, rules=rules)
    if expects_recording(call, rules) and recording_of(call, rules)["status"] == RecordingStatus.PENDING:
        left_ms = max(left_ms, _left_ms(call, rules.hold_for_recording_ms, now_ms))
    return left_ms


def _left_ms(call: StoredCall, hold_ms: int, now_ms: int) -> int:
    # At most the hold: a store that was restored on another machine may have an earlier time than the call.
    return min(max(call.ready_ms + hold_ms - now_ms, 0), hold_ms)


def expects_recording(call: StoredCall, rules: SourceRules) -> bool:
    """Whether a recording may come: the source has recordings, and the call was answered."""
    return rules.recordings and bool(call.record["outcome"] == Outcome.ANSWERED)


def recording_of(call: StoredCall, rules: SourceRules) -> Json:
    """Return the recording as events have it, from what is known of it so far."""
    if call.recording is not None:
        return {name: call.recording.get(name) for name in RECORDING_FIELDS}
    if not rules.recordings:
        return NO_RECORDING
    status = RecordingStatus.PENDING if expects_recording(call, rules) else RecordingStatus.NONE
    return NO_RECORDING | {"status": status.value}


def _contact_of(call: StoredCall, rules: SourceRules) -> Json:
    if call.contact is not None and contact_settled(call):
        return {name: call.contact.get(name) for name in CONTACT_FIELDS}
    status = LookupStatus.UNAVAILABLE if rules.contacts else LookupStatus.SKIPPED
    return NO_CONTACT | {"lookup_status": status.value}


@dataclass(frozen=True, slots=True)
class _Due:
    """An event that is due. `id_parts` tell it from others of its type about the same call."""

    type: str
    id_parts: tuple[str, ...] = ()
    changes: Json | None = None


def _publish(call: StoredCall, wall_ms: int, rules: SourceRules) -> Publish:
    before = call.published or _NOTHING_PUBLISHED
    content = {**call.record, "contact": _contact_of(call, rules)}
    recording = recording_of(call, rules)
    transcript = before["transcript"] or _has_transcript(call.record)
    revision, audio = before["revision"], before["audio"]

    due: list[_Due] = []
    if before["content"] is None:
        revision = 1
        due.append(_Due("call.completed"))
    elif changes := _changes_to_publish(before, content):
        revision += 1
        due.append(_Due("call.updated", (str(revision), _digest(content)), changes))
    if recording["status"] == RecordingStatus.AVAILABLE and audio != "completed":
        audio = "completed"
        due.append(_Due("call.recording.completed"))
    elif recording["status"] == RecordingStatus.UNAVAILABLE and audio is None:
        audio = "failed"
        due.append(_Due("call.recording.failed"))
    if transcript and not before["transcript"]:
        due.append(_Due("call.transcript.completed"))

    after = {"content": content, "revision": revision, "audio": audio, "transcript": transcript}
    call_payload = _call_payload(call, content, revision, recording, rules) if due else {}
    events = tuple(_draft(call, event, call_payload, wall_ms, rules) for event in due)
    return Publish(events, None if after == call.published else after)


def _changes_to_publish(before: Json, content: Json) -> Json:
    changes = _changes(before["content"], content)
    if changes.get("contact.lookup_status") == [LookupStatus.UNAVAILABLE, LookupStatus.NONE]:
        del changes["contact.lookup_status"]  # there was no contact before and there is none now: no news
    if _has_transcript(content) and not before["transcript"]:
        # A new transcript has an event of its own, so it is not an update of the call as well.
        changes = {field: pair for field, pair in changes.items() if not field.startswith("transcription")}
    return changes


def _call_payload(call: StoredCall, content: Json, revision: int, recording: Json, rules: SourceRules) -> Json:
    values = {
        **content,
        "id": call.id,
        "provider": rules.provider,
        "provider_call_id": call.key,
        "source_id": call.source_id,
        "revision": revision,
        "recording": recording,
    }
    # `get`: a record that an older version stored lacks the fields that were added since.
    return {name: values.get(name) for name in CALL_FIELDS}


def _draft(call: StoredCall, event: _Due, call_payload: Json, wall_ms: int, rules: SourceRules) -> EventDraft:
    event_id = ids.event_id(call.source_id, call.key, event.type, *event.id_parts)
    base = rules.public_url
    document: Json = {
        "id": event_id,
        "type": event.type,
        "timestamp": iso(from_ms(wall_ms)),
        "api_version": API_VERSION,
        "data": {"call": call_payload} if event.changes is None else {"call": call_payload, "changes": event.changes},
        "context": {
            "via": call.via,
            "observed_at": iso(from_ms(call.first_seen_ms)),
            "timezone_assumed": rules.timezone,
        },
        "links": {
            "call": f"{base}/v1/calls/{call.id}" if base else None,
            "recording": f"{base}/v1/calls/{call.id}/recording" if base else None,
        },
    }
    return EventDraft(event_id, event.type, document)


def _has_transcript(record: Json) -> bool:
    transcription = record.get("transcription")
    return bool(transcription and transcription.get("available"))


def _digest(content: Json) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _changes(old: Json, new: Json) -> dict[str, list[Any]]:
    """Name what differs: `{"outcome": ["no_answer", "answered"], "contact.name": [None, "Jo"]}`."""
    changes: dict[str, list[Any]] = {}
    for field in sorted(old.keys() | new.keys()):
        before, after = old.get(field), new.get(field)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            for name, pair in _changes(before, after).items():
                changes[f"{field}.{name}"] = pair
        else:
            changes[field] = [before, after]
    return changes
