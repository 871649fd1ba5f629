"""What to say: pure. From what was said of a call and what is known now, the events that are still owed.

    decide(call, now_ms, rules) -> Publish | Wait

* Nothing is said of a call that is not finished, or while a hold runs (a contact or the audio may still come).
* First `call.completed`, with the latest content; whatever changed while it was held is folded in.
* Then each difference once: `call.updated` (content or contact), `call.recording.completed` / `.failed`,
  `call.transcript.completed`.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

from relay.domain import ids
from relay.domain.json import Json
from relay.domain.time import from_ms, iso
from relay.events.payload import API_VERSION, CALL_FIELDS, CONTACT_FIELDS, NO_CONTACT, NO_RECORDING, RECORDING_FIELDS
from relay.store.calls import StoredCall

_LOOKUP = "contact.lookup_status"
SETTLED_CONTACT = frozenset({"matched", "none", "skipped"})


@dataclass(frozen=True, slots=True)
class SourceRules:
    """What the call's source wants: whether the extras exist there, and how long they may hold an event, ms."""

    provider: str
    timezone: str
    contacts: bool
    recordings: bool
    hold_for_contact_ms: int
    hold_for_recording_ms: int
    public_url: str | None = None


@dataclass(frozen=True, slots=True)
class EventDraft:
    """An event that is owed: its id and canonical document."""

    id: str
    type: str
    document: Json


@dataclass(frozen=True, slots=True)
class Publish:
    """What is to be said now, in order (perhaps nothing), and what will have been said then."""

    events: tuple[EventDraft, ...]
    said: Json | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet: look again in `wait_ms` at the latest."""

    wait_ms: int


def decide(call: StoredCall, *, now_ms: int, rules: SourceRules) -> Publish | Wait:
    """Decide what is owed for a call as it is known at `now_ms` (the store's clock)."""
    if not call.finished:
        return Publish((), None)
    said = call.said
    if said is None:
        wait_ms = _hold_left_ms(call, now_ms, rules)
        if wait_ms > 0:
            return Wait(wait_ms)
    return _differences(call, said, now_ms, rules)


def contact_settled(call: StoredCall) -> bool:
    """Whether the contact is known for the number that the call has now; a provider may correct the number."""
    part = call.contact
    if part is None or part["lookup_status"] not in SETTLED_CONTACT:
        return False
    number = call.record.get("external_number")
    return bool(part.get("number", number) == number)


def contact_hold_left_ms(call: StoredCall, *, now_ms: int, rules: SourceRules) -> int:
    """How long the contact may still hold this call up, ms; 0 when it may not."""
    if not rules.contacts or contact_settled(call):
        return 0
    return max(call.ready_ms + rules.hold_for_contact_ms - now_ms, 0)


def _hold_left_ms(call: StoredCall, now_ms: int, rules: SourceRules) -> int:
    left = contact_hold_left_ms(call, now_ms=now_ms, rules=rules)
    if expects_audio(call, rules) and recording_of(call, rules)["status"] == "pending":
        left = max(left, call.ready_ms + rules.hold_for_recording_ms - now_ms)
    return left


def expects_audio(call: StoredCall, rules: SourceRules) -> bool:
    """Whether a recording may come for this call: answered, and the source wants and has recordings."""
    return rules.recordings and call.record["outcome"] == "answered"


def recording_of(call: StoredCall, rules: SourceRules) -> Json:
    """The published part of what is known of the recording."""
    if call.recording is not None:
        return {name: call.recording.get(name) for name in RECORDING_FIELDS}
    if not rules.recordings:
        return NO_RECORDING
    return NO_RECORDING | {"status": "pending" if call.record["outcome"] == "answered" else "none"}


def _differences(call: StoredCall, said: Json | None, now_ms: int, rules: SourceRules) -> Publish:
    contact = NO_CONTACT | {"lookup_status": "unavailable" if rules.contacts else "skipped"}
    if contact_settled(call):
        contact = {name: (call.contact or {}).get(name) for name in CONTACT_FIELDS}
    content = {**call.record, "contact": contact}
    recording = recording_of(call, rules)
    known: Json = said or {"content": None, "revision": 0, "audio": None, "transcript": False}
    revision = known["revision"]
    events: list[EventDraft] = []

    def draft(event_type: str, *also: str, changes: Json | None = None) -> None:
        eid = ids.event_id(call.source_id, call.key, event_type, *also)
        document = _document(call, eid, event_type, revision, content, recording, changes, now_ms, rules)
        events.append(EventDraft(eid, event_type, document))

    transcript = _has_transcript(call.record)
    if known["content"] is None:
        revision = 1
        draft("call.completed")
    else:
        changes = _changes(known["content"], content)
        if changes.get(_LOOKUP) == ["unavailable", "none"]:
            del changes[_LOOKUP]  # nobody was named before and nobody is now
        if transcript and not known["transcript"]:
            # The transcript has an event of its own; its coming is no update of the call as well.
            changes = {field: pair for field, pair in changes.items() if not field.startswith("transcription")}
        if changes:
            revision += 1
            draft("call.updated", str(revision), _digest(content), changes=changes)
    audio = known["audio"]
    if audio is None and recording["status"] == "available":
        audio = "completed"
        draft("call.recording.completed")
    elif audio is None and recording["status"] == "unavailable":
        audio = "failed"
        draft("call.recording.failed")
    elif audio == "failed" and recording["status"] == "available":
        audio = "completed"
        draft("call.recording.completed")
    if transcript and not known["transcript"]:
        draft("call.transcript.completed")
    now_said = {
        "content": content,
        "revision": revision,
        "audio": audio,
        "transcript": transcript or known["transcript"],
    }
    return Publish(tuple(events), None if now_said == said else now_said)


def _document(
    call: StoredCall,
    eid: str,
    event_type: str,
    revision: int,
    content: Json,
    recording: Json,
    changes: Json | None,
    now_ms: int,
    rules: SourceRules,
) -> Json:
    values = {
        **content,
        "id": call.id,
        "provider": rules.provider,
        "provider_call_id": call.key,
        "source_id": call.source_id,
        "revision": revision,
        "recording": recording,
    }
    # `get`: a record stored by an older version lacks the fields that were added since.
    data: Json = {"call": {name: values.get(name) for name in CALL_FIELDS}}
    if changes is not None:
        data["changes"] = changes
    base = rules.public_url
    return {
        "id": eid,
        "type": event_type,
        "timestamp": iso(from_ms(now_ms)),
        "api_version": API_VERSION,
        "data": data,
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
