"""The events as their receivers see them: a JSON Schema and a sample of each type, in every payload form."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Literal

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.domain import ids
from relay.domain.call import Direction, NumberType, Outcome
from relay.domain.json import Json
from relay.domain.time import iso
from relay.events import render
from relay.events.decide import API_VERSION
from relay.events.types import EVENT_TYPES, matches

DESCRIPTIONS: Final[dict[str, str]] = {
    "call.completed": "First sight of a finished call, whatever its outcome.",
    "call.updated": "The content of a call changed, or its contact was found late.",
    "call.recording.completed": "The audio of a call is stored.",
    "call.recording.failed": "The audio of a call exists but cannot be had.",
    "call.transcript.completed": "The transcription of a call became available.",
    "webhook.test": "A person asked for a test.",
    "source.error": "A source stopped answering, or refuses its credential.",
    "source.recovered": "A source answers again.",
    "subscription.failing": "A subscriber is not heard; the event names the date at which it is switched off.",
    "subscription.disabled": "A subscriber has been switched off.",
}
SAMPLE_CALL: Final = "call_" + "a2345672345672345672345672"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartyShape(_Shape):
    """One side of a call."""

    number: str | None = Field(description="E.164, never a guess")
    raw: str | None = Field(description="what the provider wrote")
    type: NumberType
    extension: str | None
    name: str | None
    country: str | None = Field(description="two letters")
    internal: bool
    user_id: str | None


class RecordingShape(_Shape):
    """The audio of a call. `url` works until `expires_at`, and is made anew whenever the event is sent."""

    status: Literal["pending", "available", "none", "unavailable", "unsupported"]
    url: str | None
    expires_at: AwareDatetime | None
    content_type: str | None
    size_bytes: int | None
    duration_seconds: float | None
    sha256: str | None


class PersonShape(_Shape):
    """One entry of the provider's address book."""

    id: str | None
    external_id: str | None
    name: str | None
    organization: str | None
    email: str | None


class ContactShape(PersonShape):
    """Who was on the other side. When several match, the first stands here and the rest in `others`."""

    lookup_status: Literal["matched", "none", "unavailable", "skipped"]
    count: int
    others: list[PersonShape]


class CallShape(_Shape):
    """A call as events carry it."""

    model_config = ConfigDict(populate_by_name=True)

    id: str = Field(pattern="^call_[a-z2-7]{26}$")
    provider: str
    provider_call_id: str
    source_id: str
    kind: str
    revision: int = Field(ge=0, description="raised by each call.updated")
    direction: Direction
    outcome: Outcome
    missed: bool = Field(description="inbound, and taken by nobody and no mailbox")
    status_raw: str | None
    end_reason: str | None
    ended_by: str | None
    from_: PartyShape = Field(alias="from")
    to: PartyShape
    external_number: str | None
    internal_number: str | None
    extension: str | None
    started_at: AwareDatetime
    answered_at: AwareDatetime | None
    ended_at: AwareDatetime | None
    duration_seconds: float | None
    derived: list[str] = Field(description="fields that were worked out and not told by the provider")
    recording: RecordingShape
    contact: ContactShape
    transcription: dict[str, Any] | None
    transfers: list[dict[str, Any]]
    participants: list[dict[str, Any]]
    custom: dict[str, Any] = Field(description="what only this provider has")
    raw: dict[str, Any] | None = Field(None, description="the provider's own row; only with include_raw")


class CallData(_Shape):
    call: CallShape


class UpdatedCallData(CallData):
    changes: dict[str, list[Any] | None] = Field(description="path: [before, after]")


class AboutSubscription(_Shape):
    id: str
    reason: str | None = None
    disables_at: AwareDatetime | None = None


class TestData(_Shape):
    message: str
    subscription: AboutSubscription


class SubscriptionData(_Shape):
    subscription: AboutSubscription


class AboutSource(_Shape):
    id: str
    provider: str
    error: str | None = None
    since: AwareDatetime | None


class SourceData(_Shape):
    source: AboutSource


class ContextShape(_Shape):
    via: str = Field(description="how the call was found: poll, backfill, …")
    observed_at: AwareDatetime
    timezone_assumed: str


class LinksShape(_Shape):
    call: str | None
    recording: str | None


class _Envelope(_Shape):
    id: str = Field(pattern="^evt_[a-z2-7]{26}$", description="the same on every attempt; webhook-id has it too")
    timestamp: AwareDatetime = Field(description="when the event was made")
    api_version: str
    truncated: list[str] | None = Field(None, description="what was left out so that the body has at most 20 kB")


class _CallEnvelope(_Envelope):
    context: ContextShape
    links: LinksShape


class CallEvent(_CallEnvelope):
    """An event about a call."""

    type: Literal["call.completed", "call.recording.completed", "call.recording.failed", "call.transcript.completed"]
    data: CallData


class CallUpdated(_CallEnvelope):
    """A call changed after it was told."""

    type: Literal["call.updated"]
    data: UpdatedCallData


class WebhookTest(_Envelope):
    """A test that a person asked for."""

    type: Literal["webhook.test"]
    data: TestData


class SourceEvent(_Envelope):
    """An event about a source."""

    type: Literal["source.error", "source.recovered"]
    data: SourceData


class SubscriptionEvent(_Envelope):
    """An event about a subscription."""

    type: Literal["subscription.failing", "subscription.disabled"]
    data: SubscriptionData


_SHAPES: Final[dict[str, type[_Envelope]]] = {
    "call.updated": CallUpdated,
    "webhook.test": WebhookTest,
    "source.error": SourceEvent,
    "source.recovered": SourceEvent,
    "subscription.failing": SubscriptionEvent,
    "subscription.disabled": SubscriptionEvent,
}


def shape_of(event_type: str) -> type[BaseModel]:
    """Give the model of an event type."""
    return _SHAPES.get(event_type, CallEvent)


@lru_cache(maxsize=len(EVENT_TYPES))
def schema_of(event_type: str) -> Json:
    """Write the JSON Schema (2020-12) of the full payload of a type."""
    schema = shape_of(event_type).model_json_schema(by_alias=True, mode="serialization")
    schema["properties"]["type"] = {"const": event_type, "type": "string"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": event_type, **schema}


# --- samples ---------------------------------------------------------------------------------------------------------


def sample(event_type: str, *, now: datetime, number: int = 0) -> Json:
    """Make an event up, in its canonical form. `number` tells several of one type apart."""
    at = now.astimezone(UTC).replace(microsecond=0) - timedelta(hours=number)
    eid = ids.event_id("sample", str(number), event_type)
    document: Json = {
        "id": eid,
        "type": event_type,
        "timestamp": iso(at),
        "api_version": API_VERSION,
        "data": _sample_data(event_type, at, number),
    }
    if event_type.startswith("call."):
        document["context"] = {"via": "poll", "observed_at": iso(at), "timezone_assumed": "UTC"}
        document["links"] = {"call": None, "recording": None}
    return document


def _sample_data(event_type: str, at: datetime, number: int) -> Json:
    match event_type:
        case "webhook.test":
            return {"message": "A test from Call Relay.", "subscription": {"id": "sample"}}
        case "source.error":
            return {
                "source": {"id": "main", "provider": "webfones", "error": "WebFones refuses the key", "since": iso(at)}
            }
        case "source.recovered":
            return {"source": {"id": "main", "provider": "webfones", "since": iso(at)}}
        case "subscription.failing":
            ends = iso(at + timedelta(days=4))
            return {"subscription": {"id": "crm", "reason": "answered 500", "disables_at": ends}}
        case "subscription.disabled":
            return {"subscription": {"id": "crm", "reason": "answered 410"}}
        case "call.updated":
            changes = {"contact.name": [None, "Jo Sample"], "contact.lookup_status": ["unavailable", "matched"]}
            return {"call": _sample_call(event_type, at, number), "changes": changes}
        case _:
            return {"call": _sample_call(event_type, at, number)}


def _sample_call(event_type: str, at: datetime, number: int) -> Json:
    party = {"type": "e164", "extension": None, "name": None, "country": "US", "internal": False, "user_id": None}
    audio = event_type != "call.recording.failed"
    recording: Json = {
        "status": "available" if audio else "unavailable",
        "url": "https://relay.example.com/recordings/sample" if audio else None,
        "expires_at": iso(at + timedelta(days=7)) if audio else None,
        "content_type": "audio/wav" if audio else None,
        "size_bytes": 1_234_567 if audio else None,
        "duration_seconds": None,
        "sha256": "0" * 64 if audio else None,
    }
    transcription = {"available": True, "text": "Hello …", "summary": "A sample."}
    return {
        "id": SAMPLE_CALL,
        "provider": "webfones",
        "provider_call_id": str(1000 + number),
        "source_id": "main",
        "kind": "call",
        "revision": 2 if event_type == "call.updated" else 1,
        "direction": "inbound",
        "outcome": "answered",
        "missed": False,
        "status_raw": "ANSWERED",
        "end_reason": None,
        "ended_by": None,
        "from": {"number": "+12025550123", "raw": "(202) 555-0123", **party},
        "to": {"number": "+12025550199", "raw": "12025550199", **party, "extension": "101", "internal": True},
        "external_number": "+12025550123",
        "internal_number": "+12025550199",
        "extension": "101",
        "started_at": iso(at - timedelta(seconds=95)),
        "answered_at": iso(at - timedelta(seconds=90)),
        "ended_at": iso(at - timedelta(seconds=5)),
        "duration_seconds": 85,
        "derived": ["ended_at"],
        "recording": recording,
        "contact": {
            "lookup_status": "matched",
            "count": 1,
            "id": "1",
            "external_id": None,
            "name": "Jo Sample",
            "organization": "Sample Ltd",
            "email": "jo@example.com",
            "others": [],
        },
        "transcription": transcription if event_type == "call.transcript.completed" else None,
        "transfers": [],
        "participants": [],
        "custom": {},
    }


def samples(patterns: Sequence[str], limit: int, *, now: datetime) -> list[Json]:
    """Make up events that patterns ask for, newest first, each with an id of its own."""
    types = [each for each in EVENT_TYPES if matches(patterns, each)] or [EVENT_TYPES[0]]
    return [sample(types[number % len(types)], now=now, number=number) for number in range(limit)]


def rendered(event: Json, form: render.Payload, **options: Any) -> Json:
    """Write an event as a hook of a payload form would carry it."""
    document: Json = orjson.loads(render.render(event, payload=form, **options))
    return document
