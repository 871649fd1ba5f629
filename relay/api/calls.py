"""Calls over HTTP: listing, reading with what was told to whom, a fresh link to the audio, and forgetting a person."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.context import Api, Id, Instant, instant, to_ms
from relay.api.deliveries import DeliveryView, of_event
from relay.api.jobs import JobView, read_job
from relay.api.paging import Page, PageQuery, page_of, read_cursor
from relay.api.problems import Problem, invalid, not_found
from relay.api.route import Listed, Reply
from relay.domain.call import Direction, Outcome
from relay.domain.json import Json
from relay.domain.numbers import match_key
from relay.events.payload import NO_CONTACT, NO_RECORDING, CallPayload
from relay.privacy.erase import Erased
from relay.store import keys
from relay.store.calls import StoredCall
from relay.store.calls import read_call as stored_call

INLINE_KEYS: Final = 20_000
"""A store with at most so many keys is searched at once; a larger one by a job."""
_E164: Final = r"^\+[1-9][0-9]{6,14}$"


class ListCalls(PageQuery):
    """Which calls. `from` and `to` say when the relay first saw them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    source: Id | None = None
    direction: Annotated[list[Direction] | None, Listed] = None
    outcome: Annotated[list[Outcome] | None, Listed] = None
    number: str | None = Field(None, min_length=2, max_length=64, description="a number or extension on either side")
    from_: Instant | None = Field(None, alias="from")
    to: Instant | None = Field(None)


class CallView(CallPayload):
    """A call as the relay knows it now."""

    model_config = ConfigDict(extra="ignore")  # a newer version may have stored fields that this one does not know

    provider: str | None = Field(description="null when the source is gone")  # type: ignore[assignment]
    finished: bool
    first_seen_at: AwareDatetime | None
    observed_via: str


class PublishedEvent(BaseModel):
    """What was told of a call, and to whom."""

    id: str
    type: str | None = Field(description="null when the event is not kept any more")
    timestamp: AwareDatetime | None
    deliveries: list[DeliveryView]


class CallDetail(CallView):
    """A call with what was told of it."""

    events: list[PublishedEvent]


class RecordingLink(BaseModel):
    """A fresh link to the audio; whoever has it may listen until it expires."""

    url: str
    expires_at: AwareDatetime
    content_type: str | None
    size_bytes: int | None
    sha256: str | None


class EraseRequest(BaseModel):
    """Whom to forget."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    number: str = Field(pattern=_E164, description="E.164, as +12025550123")


class EraseResult(BaseModel):
    """How much was erased, or the job that does it where there is much to search."""

    state: Literal["done", "running"]
    job: JobView | None
    calls: int
    events: int
    recordings: int
    contacts: int
    deliveries: int = Field(description="that were still waiting, and have ended as expired")


def show(api: Api, call: StoredCall) -> Json:
    """Write a call as it is answered."""
    source = api.runtime.sources.get(call.source_id)
    recording = {name: (call.recording or {}).get(name) for name in NO_RECORDING}
    if call.recording is None:
        expects = source is not None and source.rules.recordings and call.record["outcome"] == "answered"
        recording |= NO_RECORDING | {"status": "pending" if expects else "none"}
    return {
        **call.record,
        "id": call.id,
        "source_id": call.source_id,
        "provider": source.kind.name if source else None,
        "finished": call.finished,
        "revision": (call.said or {}).get("revision", 0),
        "contact": {name: (call.contact or NO_CONTACT).get(name) for name in NO_CONTACT},
        "recording": recording,
        "first_seen_at": instant(call.first_seen_ms),
        "observed_via": call.via,
    }


async def list_calls(api: Api, caller: Caller, query: ListCalls) -> Page[CallView]:
    """List the calls, those that were first seen last first."""
    indexes = await _indexes(api, caller, query.source)
    redis = api.runtime.redis

    async def keep(entries: Sequence[tuple[int, str]]) -> list[CallView | None]:
        async with redis.pipeline(transaction=False) as pipe:
            for _, call_id in entries:
                pipe.hgetall(keys.call(call_id))
            rows = await pipe.execute()
        found: list[CallView | None] = []
        for (_, call_id), fields in zip(entries, rows, strict=True):
            call = stored_call(call_id, fields) if fields else None
            wanted = call is not None and _matches(call.record, query)
            found.append(CallView.model_validate(show(api, call)) if wanted and call else None)
        return found

    try:
        cursor = read_cursor(query.cursor)
    except ValueError as error:
        raise invalid("cursor", str(error)) from None
    part = await page_of(
        redis,
        indexes,
        keep,
        limit=query.limit,
        cursor=cursor,
        newest_ms=to_ms(query.to),
        oldest_ms=to_ms(query.from_),
    )
    return Page(items=list(part.found), next_cursor=part.next_cursor)


async def _indexes(api: Api, caller: Caller, sid: str | None) -> list[str]:
    if sid is not None:
        await api.source(caller, sid)
        return [keys.calls_of(sid)]
    own = api.source_ids(caller)
    return [keys.CALLS] if own is None else [keys.calls_of(each) for each in own]


def _matches(record: Json, query: ListCalls) -> bool:
    if query.direction and record["direction"] not in query.direction:
        return False
    if query.outcome and record["outcome"] not in query.outcome:
        return False
    return query.number is None or _has_number(record, query.number)


def _has_number(record: Json, number: str) -> bool:
    sides = (record["from"], record["to"])
    texts = [side[name] for side in sides for name in ("number", "raw", "extension")]
    texts += [record["external_number"], record["internal_number"], record["extension"]]
    wanted = match_key(number)
    return any(text is not None and (text == number or (wanted and match_key(text) == wanted)) for text in texts)


async def _call(api: Api, caller: Caller, call_id: str) -> StoredCall:
    call = await api.runtime.ledger.call(call_id)
    own = api.source_ids(caller)
    if call is None or (own is not None and call.source_id not in own):
        raise not_found("call")
    return call


async def read_call(api: Api, caller: Caller, call_id: str) -> CallDetail:
    """Read a call, with what was told of it and to whom."""
    call = await _call(api, caller, call_id)
    runtime = api.runtime
    told: list[PublishedEvent] = []
    for eid, event in zip(call.events, await runtime.ledger.events(call.events), strict=True):
        document = event or {}
        deliveries = await of_event(api, caller, eid)
        told.append(
            PublishedEvent(
                id=eid, type=document.get("type"), timestamp=document.get("timestamp"), deliveries=deliveries
            )
        )
    return CallDetail.model_validate({**show(api, call), "events": told})


async def read_recording(api: Api, caller: Caller, call_id: str) -> RecordingLink:
    """Make a fresh link to the audio of a call."""
    call = await _call(api, caller, call_id)
    if not call.recording or not call.recording.get("path"):
        raise Problem("not_found", "There is no recording of this call, or it is not kept any more.")
    link = await api.runtime.links.for_call(call_id)
    if link is None:
        raise Problem(
            "no_recording_links", "No link can be made: set public_url, or recording_links: presigned with a bucket."
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


async def erase(api: Api, caller: Caller, body: EraseRequest) -> Reply:
    """Forget a person: calls, events, audio and kept contacts with this number. What waits ends as expired.

    The provider's own records are not touched; the relay does not take an erased call in again.
    """
    runtime = api.runtime
    own = api.source_ids(caller)
    if await runtime.redis.dbsize() > INLINE_KEYS:
        name = await api.start("erase", body.number, own, caller=caller)
        job = await read_job(api, caller, name)
        empty = EraseResult(state="running", job=job, calls=0, events=0, recordings=0, contacts=0, deliveries=0)
        return Reply(empty, HTTPStatus.ACCEPTED)
    books = list(runtime.sources) if own is None else own
    done = await api.eraser.number(body.number, sources=own, books=books, step=_no_step)
    counts = {name: count for name, count in done.counts().items() if name != "scanned"}
    return Reply(EraseResult(state="done", job=None, **counts))


async def _no_step(_: Erased) -> None:
    return
