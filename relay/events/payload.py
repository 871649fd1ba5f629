"""The payload model: every field of every event is declared here, once.

The full event, the flat form, the API's views of a call, JSON Schema, samples and the tables in docs/events.md derive
from it. To add a field to a call, add a line to `CallPayload` and its value to `Record.content()`.
"""

from datetime import timedelta
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.domain.call import Direction, LookupStatus, NumberType, Outcome, RecordingStatus
from relay.domain.json import Json
from relay.events.fields import Info, fields_of, names_of
from relay.events.types import EVENT_TYPES

# The date of the payload's shape. It changes only when a field is removed or changes its meaning.
API_VERSION: Final = "2026-11-01"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# --- the call --------------------------------------------------------------------------------------------------------


class PartyPayload(_Model):
    """One side of a call."""

    number: Annotated[str | None, Info("E.164; null when it cannot be determined, never a guess", "+12025550123")]
    raw: Annotated[str | None, Info("the number as the provider wrote it", "(202) 555-0123")]
    type: Annotated[NumberType, Info("what kind of number `raw` is", "e164")]
    extension: Annotated[str | None, Info("internal extension")]
    name: Annotated[str | None, Info("caller ID name")]
    country: Annotated[str | None, Info("ISO 3166-1 country of `number`, two letters", "US")]
    internal: Annotated[bool, Info("whether this side belongs to the account", False)]
    user_id: Annotated[str | None, Info("the provider's id of the user")]


class RecordingPayload(_Model):
    """The recording of a call."""

    status: Annotated[
        RecordingStatus,
        Info("`pending`: may still come; `unavailable`: could not be fetched; `unsupported`: not fetched", "available"),
    ]
    url: Annotated[
        str | None,
        Info("works without credentials until `expires_at`; renewed on every attempt", "https://relay.example.com/r"),
    ]
    expires_at: Annotated[AwareDatetime | None, Info("when `url` stops working", timedelta(days=7))]
    content_type: Annotated[str | None, Info("media type", "audio/wav")]
    size_bytes: Annotated[int | None, Info("size of the file", 1_234_567)]
    duration_seconds: Annotated[float | None, Info("length of the audio, where the file states it", 85.0)]
    sha256: Annotated[str | None, Info("SHA-256 of the file, in hex", "0" * 64)]


class PersonPayload(_Model):
    """An entry of the provider's address book."""

    id: Annotated[str | None, Info("id in the address book", "1")]
    external_id: Annotated[str | None, Info("id in the customer's own system", "CRM-12345")]
    name: Annotated[str | None, Info("full name", "Jo Sample")]
    organization: Annotated[str | None, Info("company", "Sample Ltd")]
    email: Annotated[str | None, Info("email address", "jo@example.com")]


class LookupPayload(_Model):
    """What came of looking a number up."""

    lookup_status: Annotated[
        LookupStatus,
        Info(
            "`unavailable`: the address book did not answer in time, a `call.updated` follows when it does", "matched"
        ),
    ]
    count: Annotated[int, Info("number of matching entries", 1)]


class ContactPayload(PersonPayload, LookupPayload):  # pydantic lists the fields of the last base first
    """The contact on the external side of a call. When several match, the first is here and the rest in `others`."""

    others: Annotated[list[PersonPayload], Info("further matches, at most ten", [])]


class TranscriptionPayload(_Model):
    """The provider's transcript of a call."""

    available: Annotated[bool, Info("whether the provider has a transcript", True, flat=None)]
    summary: Annotated[str | None, Info("the provider's summary", "A sample.")] = None
    transcript: Annotated[str | None, Info("the conversation as text", "Hello …", flat="transcription_text")] = None
    truncated: Annotated[bool, Info("whether the text was cut", False, flat=None)] = False


_CALLED_PARTY: Final = {"number": "+12025550199", "raw": "12025550199", "extension": "101", "internal": True}


class CallPayload(_Model):
    """A call."""

    id: Annotated[
        str,
        Field(pattern="^call_[a-z2-7]{26}$"),
        Info("deterministic id", "call_a2345672345672345672345672", flat="call_id", essential=True),
    ]
    provider: Annotated[str, Info("the phone system", "webfones", essential=True)]
    provider_call_id: Annotated[str, Info("the provider's id of the call record", "1000", essential=True)]
    source_id: Annotated[str, Info("the source that the call came from", "main", essential=True)]
    kind: Annotated[str, Info("`call` or `conference`", "call", essential=True)]
    revision: Annotated[
        int,
        Field(ge=0),
        Info("1 in `call.completed`, one more with each `call.updated`; 0 before that", 1, essential=True),
    ]
    direction: Annotated[Direction, Info("seen from the account", "inbound", essential=True)]
    outcome: Annotated[Outcome, Info("how the call ended", "answered", essential=True)]
    missed: Annotated[bool, Info("inbound and neither answered nor taken by voicemail", False, essential=True)]
    status_raw: Annotated[str | None, Info("the provider's own status", "ANSWERED")]
    end_reason: Annotated[str | None, Info("the provider's own reason for the end")]
    ended_by: Annotated[str | None, Info("who ended the call, as the provider wrote it")]
    from_: Annotated[PartyPayload, Field(alias="from"), Info("the calling side")]
    to: Annotated[PartyPayload, Info("the called side", _CALLED_PARTY)]
    external_number: Annotated[str | None, Info("number of the external side, E.164", "+12025550123")]
    internal_number: Annotated[str | None, Info("number of the account's side, E.164", "+12025550199")]
    extension: Annotated[str | None, Info("extension of the account's side", "101")]
    started_at: Annotated[AwareDatetime, Info("when it began, UTC", timedelta(seconds=-95), essential=True)]
    answered_at: Annotated[AwareDatetime | None, Info("when it was answered", timedelta(seconds=-90))]
    ended_at: Annotated[AwareDatetime | None, Info("when it ended", timedelta(seconds=-5), essential=True)]
    duration_seconds: Annotated[float | None, Info("null when the provider does not state it", 85.0, essential=True)]
    derived: Annotated[list[str], Info("names of fields computed by the relay", ["ended_at"])]
    recording: Annotated[RecordingPayload, Info("the recording")]
    contact: Annotated[ContactPayload, Info("the contact of the external side")]
    transcription: Annotated[TranscriptionPayload | None, Info("the transcript, where the provider has one")]
    transfers: Annotated[list[dict[str, Any]], Info("transfers, as the provider reports them", [])]
    participants: Annotated[list[dict[str, Any]], Info("participants of a conference", [])]
    custom: Annotated[dict[str, Any], Info("fields that only this provider has", {})]


class CallWithRawPayload(CallPayload):
    """A call, with the provider's row where the subscription has `include_raw`."""

    raw: Annotated[
        dict[str, Any] | None,
        Info(
            "the provider's own row, with `include_raw: true` only; texts are cut at 256 characters, lists and maps at "
            "64 entries, four levels deep"
        ),
    ] = None


# --- events ----------------------------------------------------------------------------------------------------------


class CallDataPayload(_Model):
    call: Annotated[CallWithRawPayload, Info("the whole call as it was then: no second request is needed", flat="")]


class UpdatedCallDataPayload(CallDataPayload):
    changes: Annotated[
        dict[str, list[Any] | None],
        Info(
            'what changed, before and after: `{"outcome": ["no_answer", "answered"], "contact.name": [null, "Jo"]}`',
            {"contact.name": [None, "Jo Sample"], "contact.lookup_status": ["unavailable", "matched"]},
            flat="changed_fields",
        ),
    ]


class SubscriptionPayload(_Model):
    """The subscription that an event is about."""

    id: Annotated[str, Info("its id", "crm", flat="subscription_id")]


class DisabledSubscriptionPayload(SubscriptionPayload):
    reason: Annotated[str, Info("why", "answered 410")]


class FailingSubscriptionPayload(DisabledSubscriptionPayload):
    disables_at: Annotated[AwareDatetime, Info("when it will be disabled", timedelta(days=4))]


class SourcePayload(_Model):
    """The source that an event is about."""

    id: Annotated[str, Info("its id", "main", flat="source_id")]
    provider: Annotated[str, Info("the phone system", "webfones")]
    since: Annotated[AwareDatetime | None, Info("when the error began", timedelta(0))]


class FailedSourcePayload(SourcePayload):
    error: Annotated[str, Info("what is wrong", "WebFones rejects the key")]


class TestDataPayload(_Model):
    message: Annotated[str, Info("a text", "A test from Call Relay.", flat="message")]
    subscription: Annotated[SubscriptionPayload, Info("the tested subscription", flat=None)]


class FailingDataPayload(_Model):
    subscription: Annotated[FailingSubscriptionPayload, Info("the failing subscription", flat=None)]


class DisabledDataPayload(_Model):
    subscription: Annotated[DisabledSubscriptionPayload, Info("the disabled subscription", flat=None)]


class SourceErrorDataPayload(_Model):
    source: Annotated[FailedSourcePayload, Info("the source with the error", flat=None)]


class SourceRecoveredDataPayload(_Model):
    source: Annotated[SourcePayload, Info("the source that answers again", flat=None)]


class ContextPayload(_Model):
    via: Annotated[str, Info("how the call was seen: `poll`, `stream`, `backfill`", "poll", flat="observed_via")]
    observed_at: Annotated[AwareDatetime, Info("when the call was first seen", timedelta(0))]
    timezone_assumed: Annotated[str, Info("the time zone that the source is configured with", "UTC")]


class LinksPayload(_Model):
    call: Annotated[str | None, Info("the call in the API; null without `public_url`", flat="call_link")]
    recording: Annotated[str | None, Info("a fresh recording link from the API", flat="recording_link")]


_TYPE: Final = Info("one of the types above", flat="event_type", essential=True)


class EventPayload(_Model):
    """The envelope of every event."""

    id: Annotated[
        str,
        Field(pattern="^evt_[a-z2-7]{26}$"),
        Info(
            "deterministic: derived from source, call and type (`call.updated`: and revision and content); equals the "
            "header `webhook-id`",
            flat=("id", "event_id"),
            essential=True,
        ),
    ]
    type: Annotated[str, _TYPE]
    timestamp: Annotated[
        AwareDatetime, Info("when the event was created, UTC", timedelta(0), flat="event_timestamp", essential=True)
    ]
    api_version: Annotated[
        str,
        Info("the date of this shape; changes only when a field is removed or changes its meaning", essential=True),
    ]
    data: Annotated[_Model, Info("depends on the type", flat="")]
    truncated: Annotated[
        list[str] | None, Info("what was left out to keep the body below 20 KB; absent when nothing was")
    ] = None


class _CallEvent(EventPayload):
    data: Annotated[CallDataPayload, Info("the call", flat="")]
    context: Annotated[ContextPayload, Info("how the call was observed", flat="")]
    links: Annotated[LinksPayload, Info("addresses in the relay's API", flat="")]


class CallEvent(_CallEvent):
    """An event about a call."""

    type: Annotated[
        Literal["call.completed", "call.recording.completed", "call.recording.failed", "call.transcript.completed"],
        _TYPE,
    ]


class CallUpdatedEvent(_CallEvent):
    """A call changed after it was published."""

    type: Annotated[Literal["call.updated"], _TYPE]
    data: Annotated[UpdatedCallDataPayload, Info("the call and its changes", flat="")]


class WebhookTestEvent(EventPayload):
    """A test."""

    type: Annotated[Literal["webhook.test"], _TYPE]
    data: Annotated[TestDataPayload, Info("the tested subscription", flat="")]


class SourceErrorEvent(EventPayload):
    """A source stopped answering."""

    type: Annotated[Literal["source.error"], _TYPE]
    data: Annotated[SourceErrorDataPayload, Info("the source and its error", flat="")]


class SourceRecoveredEvent(EventPayload):
    """A source answers again."""

    type: Annotated[Literal["source.recovered"], _TYPE]
    data: Annotated[SourceRecoveredDataPayload, Info("the source", flat="")]


class SubscriptionFailingEvent(EventPayload):
    """A subscription has no successful deliveries."""

    type: Annotated[Literal["subscription.failing"], _TYPE]
    data: Annotated[FailingDataPayload, Info("the failing subscription", flat="")]


class SubscriptionDisabledEvent(EventPayload):
    """A subscription was disabled."""

    type: Annotated[Literal["subscription.disabled"], _TYPE]
    data: Annotated[DisabledDataPayload, Info("the disabled subscription", flat="")]


_MODELS: Final[dict[str, type[EventPayload]]] = {
    event_type: model
    for model in (
        CallUpdatedEvent,
        CallEvent,
        WebhookTestEvent,
        SourceErrorEvent,
        SourceRecoveredEvent,
        SubscriptionFailingEvent,
        SubscriptionDisabledEvent,
    )
    for event_type in get_args(model.model_fields["type"].annotation)
}


# --- what derives from it --------------------------------------------------------------------------------------------

CALL_FIELDS: Final = names_of(CallPayload)
RECORDING_FIELDS: Final = names_of(RecordingPayload)
CONTACT_FIELDS: Final = names_of(ContactPayload)
NO_RECORDING: Final[Json] = dict.fromkeys(RECORDING_FIELDS) | {"status": RecordingStatus.UNSUPPORTED.value}
NO_CONTACT: Final[Json] = dict.fromkeys(CONTACT_FIELDS) | {
    "lookup_status": LookupStatus.SKIPPED.value,
    "count": 0,
    "others": [],
}

_EVERY_FIELD: Final = tuple(field for model in dict.fromkeys(_MODELS.values()) for field in fields_of(model))
# The keys of a flat body, in their order, the same for every event; null where the event has no such field.
FLAT_FIELDS: Final = tuple(dict.fromkeys(name for field in _EVERY_FIELD for name in field.flat))

FLAT_PATHS: Final = tuple({field.path: field.flat for field in _EVERY_FIELD if field.flat}.items())
ESSENTIAL_PATHS: Final = tuple(dict.fromkeys(field.path for field in _EVERY_FIELD if field.info.essential))


def model_of(event_type: str) -> type[EventPayload]:
    return _MODELS[event_type]


@lru_cache(maxsize=len(EVENT_TYPES))
def schema_of(event_type: str) -> Json:
    """Write the JSON Schema (2020-12) of the full payload of a type."""
    schema = model_of(event_type).model_json_schema(by_alias=True, mode="serialization")
    schema["properties"]["type"] = {"const": event_type, "type": "string"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": event_type, **schema}
