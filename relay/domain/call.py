"""The words of the domain as values: what a provider's row becomes, whatever the provider.

Times are aware UTC. `Record.content()` is the very shape that the `call` object of a payload has, so nothing is
renamed between the provider's edge and the subscriber's.
"""

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import orjson

from relay.domain.json import Json
from relay.domain.time import iso


class Direction(StrEnum):
    """Seen from the account."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"
    INTERNAL = "internal"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """How the call ended; a missed call is an inbound one that nobody and nothing took."""

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
    """What kind of thing `raw` is."""

    E164 = "e164"
    EXTENSION = "extension"
    SHORT = "short"
    EMERGENCY = "emergency"
    CONFERENCE = "conference"
    ANONYMOUS = "anonymous"
    SIP = "sip"
    UNKNOWN = "unknown"


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
        """Build one side of the payload's `call` object; spelled out because it runs for every row of every poll."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row of a provider, normalised.

    `key` is the provider's identity of the row, stable for ever: ids are made of it. `local_date` is the date in the
    row's raw start (the provider's own calendar), under which the row is remembered. `finished` is False while the
    call is still going on: such a row is remembered, and told when it finishes. `audio` says whether asking for a
    recording makes sense. `raw` is the row as it came, for subscriptions that ask for it; it is not content.
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
        """Inbound, and neither answered nor taken by a voice mailbox."""
        return self.direction is Direction.INBOUND and self.outcome not in (
            Outcome.ANSWERED,
            Outcome.VOICEMAIL,
            Outcome.UNKNOWN,
        )

    def content(self) -> Json:
        """Build the record's part of the payload's `call` object: JSON types only, keys in their published order."""
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

    def content_hash(self) -> str:
        """Digest what subscribers could see of this record: 16 hex digits; `raw` does not count."""
        canonical = orjson.dumps([self.finished, self.content()], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(canonical).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Contact:
    """One person or organisation that the provider's address book has for a number."""

    id: str
    external_id: str | None = None
    name: str | None = None
    organization: str | None = None
    email: str | None = None
