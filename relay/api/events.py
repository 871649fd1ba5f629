"""Events over HTTP: listing, reading, and what there can be, each with a schema and a sample."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from relay.api.auth import Caller
from relay.api.context import CALL_ID, EVENT_ID, Api, Id, Instant, to_ms
from relay.api.paging import Page, PageQuery, page_of, read_cursor
from relay.api.problems import invalid, not_found
from relay.api.route import Listed
from relay.domain.json import Json
from relay.events import payload
from relay.events.render import render_json
from relay.events.types import DESCRIPTIONS, EVENT_TYPES, matches
from relay.store import keys

_SAMPLE_SCAN: Final = 500

EventDocument = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "title": "Event",
            "description": "An event in its full form; `GET /v1/event-types` has the schema of each type.",
            "required": ["id", "type", "timestamp", "api_version", "data"],
            "properties": {
                "id": {"type": "string", "pattern": EVENT_ID},
                "type": {"enum": list(EVENT_TYPES)},
                "timestamp": {"type": "string", "format": "date-time"},
                "api_version": {"type": "string"},
                "data": {"type": "object"},
            },
        }
    ),
]
_Pattern = Annotated[str, Field(min_length=1, max_length=64)]


class EventFilter(BaseModel):
    """Which events."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    type: Annotated[list[_Pattern] | None, Listed] = Field(None, description="types; * is a wildcard", max_length=32)
    source: Id | None = None
    call: str | None = Field(None, pattern=CALL_ID)
    subscription: Id | None = Field(None, description="only those that were made for this subscription")


class ListEvents(PageQuery, EventFilter):
    """Which events. `from` and `to` say when they were made."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: Instant | None = Field(None, alias="from")
    to: Instant | None = None


class EventTypeView(BaseModel):
    """A type of event."""

    model_config = ConfigDict(populate_by_name=True)

    type: str
    description: str
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema 2020-12 of the full payload")
    sample: dict[str, Any]


class TypeSampleQuery(BaseModel):
    """In which form, and how many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    payload: Literal["full", "flat"] = "full"
    limit: int = Field(3, ge=1, le=20)


async def list_events(api: Api, caller: Caller, query: ListEvents) -> Page[EventDocument]:
    """List the events in their full form, newest first."""
    indexes = await indexes_of(api, caller, query)
    try:
        cursor = read_cursor(query.cursor)
    except ValueError as error:
        raise invalid("cursor", str(error)) from None
    part = await page_of(
        api.runtime.redis,
        indexes,
        lambda entries: read_events(api, caller, query, [eid for _, eid in entries]),
        limit=query.limit,
        cursor=cursor,
        newest_ms=to_ms(query.to),
        oldest_ms=to_ms(query.from_),
    )
    return Page(items=list(part.found), next_cursor=part.next_cursor)


async def indexes_of(api: Api, caller: Caller, query: EventFilter) -> list[str]:
    """Name the indexes that hold the events asked for; a Problem for what is not the caller's."""
    if query.subscription is not None:
        await api.subscription(caller, query.subscription)
        return [keys.deliveries_of(query.subscription)]
    if query.source is not None:
        await api.source(caller, query.source)
        return [keys.events_of(query.source)]
    own = api.source_ids(caller)
    return [keys.EVENTS] if own is None else [keys.events_of(sid) for sid in own]


async def read_events(api: Api, caller: Caller, query: EventFilter, eids: Sequence[str]) -> list[Json | None]:
    """Read events; None for those that are gone, are not asked for or not the caller's."""
    documents = await api.runtime.ledger.events(eids)
    return [
        document if document is not None and _asked_for(query, document) and api.sees_event(caller, document) else None
        for document in documents
    ]


def _asked_for(query: EventFilter, document: Json) -> bool:
    if query.type and not matches(query.type, document["type"]):
        return False
    call = document["data"].get("call") or {}
    if query.call is not None and call.get("id") != query.call:
        return False
    source = call.get("source_id") or document["data"].get("source", {}).get("id")
    return query.source is None or source == query.source


async def read_event(api: Api, caller: Caller, event_id: str) -> EventDocument:
    """Read an event in its full form."""
    return await api.event(caller, event_id)


async def list_event_types(api: Api, caller: Caller) -> list[EventTypeView]:
    """List the types of events, each with its JSON Schema and a sample."""
    return [
        EventTypeView(
            type=each,
            description=DESCRIPTIONS[each],
            schema_=payload.schema_of(each),
            sample=payload.sample(each, now=api.now()),
        )
        for each in EVENT_TYPES
    ]


async def sample_event_type(api: Api, caller: Caller, event_type: str, query: TypeSampleQuery) -> list[dict[str, Any]]:
    """Show what hooks carry for this type, newest first: real events where there are some, made-up ones otherwise."""
    if event_type not in EVENT_TYPES:
        raise not_found("event type")
    wanted = EventFilter(type=[event_type])
    part = await page_of(
        api.runtime.redis,
        await indexes_of(api, caller, wanted),
        lambda entries: read_events(api, caller, wanted, [eid for _, eid in entries]),
        limit=query.limit,
        cursor=None,
        scan_most=_SAMPLE_SCAN,
    )
    links = api.runtime.links
    if part.found:
        return [render_json(each, query.payload, recording_link=await links.for_event(each)) for each in part.found]
    made_up = payload.samples([event_type], query.limit, now=api.now())
    return [render_json(each, query.payload) for each in made_up]
