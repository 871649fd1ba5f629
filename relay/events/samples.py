"""Made-up events, from the samples that the payload model declares."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import BaseModel

from relay.domain import ids
from relay.domain.call import RecordingStatus
from relay.domain.json import Json
from relay.domain.time import iso
from relay.events.fields import info_of, object_of
from relay.events.payload import API_VERSION, NO_RECORDING, model_of
from relay.events.types import EVENT_TYPES, matches

# Where the call of an event type differs from the declared samples.
_SAMPLE_CALLS: Final[dict[str, Json]] = {
    "call.updated": {"revision": 2},
    "call.recording.failed": {"recording": NO_RECORDING | {"status": RecordingStatus.UNAVAILABLE.value}},
    "call.transcript.completed": {"transcription": {}},
}


def sample(event_type: str, *, now: datetime, number: int = 0) -> Json:
    """Make up an event in its full form. `number` tells several of one type apart."""
    call = {"provider_call_id": str(1000 + number), **_SAMPLE_CALLS.get(event_type, {})}
    values = {
        "id": ids.event_id("sample", str(number), event_type),
        "type": event_type,
        "api_version": API_VERSION,
        "data": {"call": call},
    }
    at = now.astimezone(UTC).replace(microsecond=0) - timedelta(hours=number)
    return _sample_of(model_of(event_type), at, values)


def _sample_of(model: type[BaseModel], at: datetime, values: Mapping[str, Any]) -> Json:
    document: Json = {}
    for attribute, declared in model.model_fields.items():
        name = declared.alias or attribute
        value = values.get(name, info_of(declared).sample)
        inner = object_of(declared.annotation)
        if inner is not None and (value is not None or inner is declared.annotation):
            document[name] = _sample_of(inner, at, value or {})
        elif isinstance(value, timedelta):
            document[name] = iso(at + value)
        elif value is not None or declared.is_required():
            document[name] = value
    return document


def samples(patterns: Sequence[str], limit: int, *, now: datetime) -> list[Json]:
    """Make up events of the types that patterns select, newest first, each with an id of its own."""
    types = [event_type for event_type in EVENT_TYPES if matches(patterns, event_type)] or [EVENT_TYPES[0]]
    return [sample(types[number % len(types)], now=now, number=number) for number in range(limit)]
