"""A call, whatever the provider: what a row of a provider's call list is parsed into.

Times are aware UTC. `Record.content()` has the field names of the payload's `call` object (relay/events/payload.py),
so nothing is renamed on the way from the provider to the subscriber.
"""

import hashlib
import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import orjson

from relay.domain.json import Json
from relay.domain.time import iso


class Direction(StrEnum):
    INBOUND = "inbound"
    OUTBOUND = "outbound"
    INTERNAL = "internal"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    ANSWERED = "answered"
    NO_ANSWER = "no_answer"
    BUSY = "busy"
    DECLINED = "declined"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    VOICEMAIL = "voicemail"
    FAILED = "failed"
    UNKNOWN = "unknown"


class NumberType(StrEnum):
    E164 = "e164"
    EXTENSION = "extension"
    SHORT = "short"
    EMERGENCY = "emergency"
    CONFERENCE = "conference"
    ANONYMOUS = "anonymous"
    SIP = "sip"
    UNKNOWN = "unknown"


class RecordingStatus(StrEnum):
    """What is known of a call's recording."""

    PENDING = "pending"
    AVAILABLE = "available"
    NONE = "none"
    UNAVAILABLE = "unavailable"
    UNSUPPORTED = "unsupported"


class LookupStatus(StrEnum):
    """What came of looking up a call's contact."""

    MATCHED = "matched"
    NONE = "none"
    UNAVAILABLE = "unavailable"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Party:
    """One side of a call. `number` is E.164 or None, never a guess; `raw` is what the provider wrote."""

    number: str | None = None
    raw: str | None = None
    type: NumberType = NumberType.UNKNOWN
    extension: str | None = None
    name: str | None = None
    country: str | None = None
    internal: bool = False
    user_id: str | None = None

    def content(self) -> Json:
        # Spelled out, and checked against the payload model by a test: this runs for every row of every poll.
        return {
            "number": self.number,
            "raw": self.raw,
            "type": self.type.value,
            "extension": self.extension,
            "name": self.name,
            "country": self.country,
            "internal": self.internal,
            "user_id": self.user_id,
        }


def numbered_key(key: str, number: int) -> str:
    """Return the key of the second, third … call that has the same id at the provider."""
    return f"{key}~{number}"


def provider_key(key: str) -> str:
    """Return the provider's id of a call, without the number of `numbered_key`."""
    return re.sub(r"~[0-9]+$", "", key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row of a provider's call list, normalised.

    `key` is the provider's id of the row and must never change: the ids of the call and its events derive from it.
    `local_date` is the date of the row's raw start in the provider's calendar, under which `seen` files the row.
    `finished` is False while the call is in progress; it is published once it is finished. `audio` says whether a
    recording may exist. `raw` is the row as received, for `include_raw`; it is not part of the content.
    """

    key: str
    started_at: datetime
    local_date: str
    direction: Direction = Direction.UNKNOWN
    outcome: Outcome = Outcome.UNKNOWN
    kind: str = "call"
    finished: bool = True
    audio: bool = False
    status_raw: str | None = None
    end_reason: str | None = None
    ended_by: str | None = None
    caller: Party = field(default_factory=Party)
    callee: Party = field(default_factory=Party)
    external: Party | None = None
    internal: Party | None = None
    answered_at: datetime | None = None
    ended_at: datetime | None = None
    duration_seconds: float | None = None
    derived: tuple[str, ...] = ()
    transcription: Json | None = None
    transfers: tuple[Json, ...] = ()
    participants: tuple[Json, ...] = ()
    custom: Json = field(default_factory=dict)
    raw: Json = field(default_factory=dict)

    @property
    def missed(self) -> bool:
        return self.direction is Direction.INBOUND and self.outcome not in (
            Outcome.ANSWERED,
            Outcome.VOICEMAIL,
            Outcome.UNKNOWN,
        )

    def content(self) -> Json:
        external, internal = self.external, self.internal
        return {
            "provider_call_id": self.key,
            "kind": self.kind,
            "direction": self.direction.value,
            "outcome": self.outcome.value,
            "missed": self.missed,
            "status_raw": self.status_raw,
            "end_reason": self.end_reason,
            "ended_by": self.ended_by,
            "from": self.caller.content(),
            "to": self.callee.content(),
            "external_number": external.number if external else None,
            "internal_number": internal.number if internal else None,
            "extension": internal.extension if internal else None,
            "started_at": iso(self.started_at),
            "answered_at": iso(self.answered_at),
            "ended_at": iso(self.ended_at),
            "duration_seconds": self.duration_seconds,
            "derived": list(self.derived),
            "transcription": self.transcription,
            "transfers": list(self.transfers),
            "participants": list(self.participants),
            "custom": self.custom,
        }

    def source_hash(self) -> str:
        """Hash what comes from the provider word for word: 8 hex digits.

        It differs when the provider's row did, and not because the mapping or an option, such as the zone, changed.
        """
        words = [
            self.finished,
            self.status_raw,
            self.duration_seconds,
            *(value for party in (self.caller, self.callee) for value in (party.raw, party.name)),
            self.transcription is not None,
        ]
        return hashlib.sha256(orjson.dumps(words)).hexdigest()[:8]

    def content_hash(self) -> str:
        """Hash what subscribers can see of the record, without `raw`: 16 hex digits."""
        canonical = orjson.dumps([self.finished, self.content()], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(canonical).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that failed validation and is quarantined: the reason, its id, and an excerpt without phone numbers.

    `local_date` is that of its start, as in `Record`, where it can be read.
    """

    reason: str
    key: str | None = None
    excerpt: str = ""
    local_date: str | None = None


@dataclass(frozen=True, slots=True)
class Contact:
    """An entry of the provider's address book."""

    id: str
    external_id: str | None = None
    name: str | None = None
    organization: str | None = None
    email: str | None = None
