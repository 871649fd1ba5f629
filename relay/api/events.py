"""Events, and the types of events with their JSON Schemas and samples."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from relay.api.auth import Caller
from relay.api.context import ApiContext
from relay.api.fields import CALL_ID, EVENT_ID, Id, Instant, to_ms
from relay.api.paging import Page, PageQuery, page_of_listing
from relay.api.problems import not_found
from relay.api.route import MultiValue
from relay.domain.json import Json
from relay.events.payload import schema_of
from relay.events.render import render_json
from relay.events.samples import sample, samples
from relay.events.types import DESCRIPTIONS, EVENT_TYPES, matches
from relay.store.listings import Listing

SAMPLE_SCAN_LIMIT: Final = 500

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
    """Filters of events."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    type: Annotated[list[_Pattern] | None, MultiValue] = Field(
        None, description="types; * is a wildcard", max_length=32
    )
    source: Id | None = None
    call: str | None = Field(None, pattern=CALL_ID)
    subscription: Id | None = Field(None, description="only those that this subscription matched")


class ListEvents(PageQuery, EventFilter):
    """Filters of events. `from` and `to` limit when they were created."""

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
    """Form and number of the samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    payload: Literal["full", "flat"] = "full"
    limit: int = Field(3, ge=1, le=20)


async def list_events(context: ApiContext, caller: Caller, query: ListEvents) -> Page[EventDocument]:
    """List events in their full form, newest first."""
    page = await page_of_listing(
        await listing_of(context, caller, query),
        lambda entries: read_events(context, caller, query, [event_id for _, event_id in entries]),
        query,
        newest_ms=to_ms(query.to),
        oldest_ms=to_ms(query.from_),
    )
    return Page(items=list(page.items), next_cursor=page.next_cursor)


async def listing_of(context: ApiContext, caller: Caller, query: EventFilter) -> Listing:
    """Choose the list of the store that answers a filter; a Problem for what the caller may not access."""
    if query.subscription is not None:
        await context.subscription(caller, query.subscription)
        return context.store.deliveries.of_subscriptions([query.subscription])
    if query.source is not None:
        await context.source(caller, query.source)
        return context.store.events.of_sources([query.source])
    return context.events_of(caller.tenant)


async def read_events(
    context: ApiContext, caller: Caller, query: EventFilter, event_ids: Sequence[str]
) -> list[Json | None]:
    documents = await context.store.events.get_many(event_ids)
    return [
        document
        if document is not None and _matches(query, document) and context.can_access_event(caller, document)
        else None
        for document in documents
    ]


def _matches(query: EventFilter, document: Json) -> bool:
    if query.type and not matches(query.type, document["type"]):
        return False
    call = document["data"].get("call") or {}
    if query.call is not None and call.get("id") != query.call:
        return False
    source = call.get("source_id") or document["data"].get("source", {}).get("id")
    return query.source is None or source == query.source


async def read_event(context: ApiContext, caller: Caller, event_id: str) -> EventDocument:
    """Read an event in its full form."""
    return await context.event(caller, event_id)


async def list_event_types(context: ApiContext, caller: Caller) -> list[EventTypeView]:
    """List the types of events, each with its JSON Schema and a sample."""
    return [
        EventTypeView(
            type=event_type,
            description=DESCRIPTIONS[event_type],
            schema_=schema_of(event_type),
            sample=sample(event_type, now=context.now()),
        )
        for event_type in EVENT_TYPES
    ]


async def sample_event_type(
    context: ApiContext, caller: Caller, event_type: str, query: TypeSampleQuery
) -> list[dict[str, Any]]:
    """Show the payloads of a type, newest first: recent events if there are any, generated ones otherwise."""
    if event_type not in EVENT_TYPES:
        raise not_found("Event type")
    event_filter = EventFilter(type=[event_type])
    page = await page_of_listing(
        await listing_of(context, caller, event_filter),
        lambda entries: read_events(context, caller, event_filter, [event_id for _, event_id in entries]),
        PageQuery(limit=query.limit),
        scan_limit=SAMPLE_SCAN_LIMIT,
    )
    links = context.runtime.links
    if page.items:
        return [
            render_json(document, query.payload, recording_link=await links.for_event(document))
            for document in page.items
        ]
    generated = samples([event_type], query.limit, now=context.now())
    return [render_json(document, query.payload) for document in generated]
