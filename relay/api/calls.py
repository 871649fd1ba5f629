"""Calls: lists, details with published events and deliveries, links to recordings, and erasure."""

from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.context import ApiContext
from relay.api.deliveries import DeliveryView, deliveries_of_event
from relay.api.fields import Id, Instant, instant, to_ms
from relay.api.jobs import JobView
from relay.api.jobs import view as view_job
from relay.api.paging import Page, PageQuery, page_of_listing
from relay.api.problems import Problem
from relay.api.route import ApiResponse, MultiValue
from relay.domain.call import Direction, Outcome
from relay.domain.json import Json
from relay.domain.numbers import match_key
from relay.events.payload import NO_CONTACT, NO_RECORDING, CallPayload
from relay.privacy.erase import Erased
from relay.store.calls import StoredCall
from relay.store.listings import Entry

# A store with at most this many keys is searched within the request; a larger one by a job.
MAX_INLINE_KEYS: Final = 20_000
_E164: Final = r"^\+[1-9][0-9]{6,14}$"


class ListCalls(PageQuery):
    """Filters of calls. `from` and `to` limit when the relay first saw them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    source: Id | None = None
    direction: Annotated[list[Direction] | None, MultiValue] = None
    outcome: Annotated[list[Outcome] | None, MultiValue] = None
    number: str | None = Field(None, min_length=2, max_length=64, description="a number or extension on either side")
    from_: Instant | None = Field(None, alias="from")
    to: Instant | None = Field(None)


class CallView(CallPayload):
    """A call in its current state."""

    model_config = ConfigDict(extra="ignore")  # a newer version may have stored fields that this one does not know

    provider: str | None = Field(description="null when the source was removed")  # type: ignore[assignment]
    finished: bool
    first_seen_at: AwareDatetime | None
    observed_via: str


class PublishedEvent(BaseModel):
    """An event of a call, with its deliveries."""

    id: str
    type: str | None = Field(description="null when the event has expired")
    timestamp: AwareDatetime | None
    deliveries: list[DeliveryView]


class CallDetail(CallView):
    """A call with its events."""

    events: list[PublishedEvent]


class RecordingLink(BaseModel):
    """A link to the recording; it works without a token until it expires."""

    url: str
    expires_at: AwareDatetime
    content_type: str | None
    size_bytes: int | None
    sha256: str | None


class EraseRequest(BaseModel):
    """Whose data to erase."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    number: str = Field(pattern=_E164, description="in E.164, like +12025550123")


class EraseResult(BaseModel):
    """What was erased, or the job that does it when there is much to search."""

    state: Literal["done", "running"]
    job: JobView | None
    calls: int
    events: int
    recordings: int
    contacts: int
    deliveries: int = Field(description="pending deliveries that have ended as expired")


def view(context: ApiContext, call: StoredCall) -> Json:
    source = context.runtime.sources.get(call.source_id)
    recording = {name: (call.recording or {}).get(name) for name in NO_RECORDING}
    if call.recording is None:
        expected = source is not None and source.rules.recordings and call.record["outcome"] == "answered"
        recording |= NO_RECORDING | {"status": "pending" if expected else "none"}
    return {
        **call.record,
        "id": call.id,
        "source_id": call.source_id,
        "provider": source.kind.name if source else None,
        "finished": call.finished,
        "revision": (call.published or {}).get("revision", 0),
        "contact": {name: (call.contact or NO_CONTACT).get(name) for name in NO_CONTACT},
        "recording": recording,
        "first_seen_at": instant(call.first_seen_ms),
        "observed_via": call.via,
    }


async def list_calls(context: ApiContext, caller: Caller, query: ListCalls) -> Page[CallView]:
    """List calls, newest first by when they were first seen."""
    calls = context.store.calls
    if query.source is not None:
        await context.source(caller, query.source)
        source_ids: list[str] | None = [query.source]
    else:
        source_ids = context.source_ids(caller.tenant)

    async def read(entries: Sequence[Entry]) -> list[CallView | None]:
        stored = await calls.get_many([call_id for _, call_id in entries])
        return [
            CallView.model_validate(view(context, call)) if call is not None and _matches(call.record, query) else None
            for call in stored
        ]

    page = await page_of_listing(
        calls.all() if source_ids is None else calls.of_sources(source_ids),
        read,
        query,
        newest_ms=to_ms(query.to),
        oldest_ms=to_ms(query.from_),
    )
    return Page(items=list(page.items), next_cursor=page.next_cursor)


def _matches(record: Json, query: ListCalls) -> bool:
    if query.direction and record["direction"] not in query.direction:
        return False
    if query.outcome and record["outcome"] not in query.outcome:
        return False
    return query.number is None or _has_number(record, query.number)


def _has_number(record: Json, number: str) -> bool:
    parties = (record["from"], record["to"])
    texts = [party[name] for party in parties for name in ("number", "raw", "extension")]
    texts += [record["external_number"], record["internal_number"], record["extension"]]
    key = match_key(number)
    return any(text is not None and (text == number or (key and match_key(text) == key)) for text in texts)


async def read_call(context: ApiContext, caller: Caller, call_id: str) -> CallDetail:
    """Read a call with its published events and their deliveries."""
    call = await context.call(caller, call_id)
    events: list[PublishedEvent] = []
    for event_id, document in zip(call.events, await context.store.events.get_many(call.events), strict=True):
        events.append(
            PublishedEvent(
                id=event_id,
                type=document["type"] if document else None,
                timestamp=document["timestamp"] if document else None,
                deliveries=await deliveries_of_event(context, caller, event_id),
            )
        )
    return CallDetail.model_validate({**view(context, call), "events": events})


async def read_recording(context: ApiContext, caller: Caller, call_id: str) -> RecordingLink:
    """Create a new link to the recording of a call."""
    call = await context.call(caller, call_id)
    if not call.recording or not call.recording.get("path"):
        raise Problem("not_found", "The call has no recording, or it is no longer stored.")
    link = await context.runtime.links.for_call(call_id)
    if link is None:
        raise Problem(
            "no_recording_links",
            "Recording links are not configured; set public_url, or recording_links: presigned with a bucket.",
        )
    url, expires_at = link
    part = call.recording
    return RecordingLink(
        url=url,
        expires_at=expires_at,
        content_type=part.get("content_type"),
        size_bytes=part.get("size_bytes"),
        sha256=part.get("sha256"),
    )


async def erase(context: ApiContext, caller: Caller, body: EraseRequest) -> ApiResponse:
    """Erase a person: calls, events, recordings and cached contacts with this number.

    Pending deliveries end as expired. The provider's own records are not touched; an erased call is not ingested again.
    """
    source_ids = context.source_ids(caller.tenant)
    if await context.store.size() > MAX_INLINE_KEYS:
        job = await context.start_job("erase", body.number, source_ids, caller=caller)
        result = EraseResult(state="running", job=view_job(job), **asdict(Erased()))
        return ApiResponse(result, HTTPStatus.ACCEPTED)
    books = list(context.runtime.sources) if source_ids is None else source_ids
    erased = await context.eraser.number(body.number, sources=source_ids, books=books, step=_no_step)
    return ApiResponse(EraseResult(state="done", job=None, **asdict(erased)))


async def _no_step(_: Erased) -> None:
    return
