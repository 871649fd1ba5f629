"""The live stream of events (SSE). A client that reconnects gets the events that it missed.

Each stream reads the store's list of events for itself, at its client's pace, so nothing accumulates in memory for a
slow client; one that reads nothing for a while is disconnected and resumes with `Last-Event-ID`.
"""

import asyncio
import contextlib
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import orjson
import structlog
from aiohttp import web
from pydantic import ConfigDict, Field

from relay.api.auth import Caller
from relay.api.context import ApiContext
from relay.api.events import EventFilter, listing_of, read_events
from relay.api.fields import EVENT_ID
from relay.api.problems import Problem
from relay.api.sse import SseResponse
from relay.store.connection import STORE_ERRORS
from relay.store.listings import Listing
from relay.tasks import cancel

MAX_STREAMS: Final = 100
# The others are the operator's.
MAX_STREAMS_OF_TENANTS: Final = 80
MAX_STREAMS_PER_TENANT: Final = 25
MAX_STREAMS_PER_TOKEN: Final = 10
# Events that a client may have missed; further back there is `GET /v1/events`.
MAX_BACKLOG: Final = 10_000
_BATCH: Final = 200
# Each stream reads its index this often; what needs an event sooner has a webhook.
_POLL_INTERVAL_S: Final = 0.25
_VERIFY_EVERY_S: Final = 0.5
# Far more than one millisecond can hold.
_REMEMBERED: Final = 5_000
_RETRY_MS: Final = 2_000

log = structlog.get_logger(__name__)


class StreamEvents(EventFilter):
    """Filters of the stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last_event_id: str | None = Field(
        None, pattern=EVENT_ID, description="resume after this event, like the header Last-Event-ID"
    )


@dataclass(slots=True)
class _Position:
    """Where a stream is in its list.

    Events of the same millisecond can become visible one after another, so the last millisecond is read again, and
    the events that were sent are remembered.
    """

    from_ms: int
    sent: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    def add(self, event_id: str) -> None:
        self.sent[event_id] = None
        if len(self.sent) > _REMEMBERED:
            self.sent.popitem(last=False)


async def stream_events(
    context: ApiContext, caller: Caller, query: StreamEvents, request: web.Request
) -> web.StreamResponse:
    """Stream events as they are created (Server-Sent Events)."""
    listing = await listing_of(context, caller, query)
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a handler runs in a task
    _require_room(context, caller)
    context.streams[task] = caller  # before the first await: requests at the same time are counted
    try:
        return await _stream(context, caller, query, request, listing)
    finally:
        del context.streams[task]


def _require_room(context: ApiContext, caller: Caller) -> None:
    open_streams = list(context.streams.values())
    counts = [(len(open_streams), MAX_STREAMS, "in all")]
    if caller.tenant is not None:
        of_tenants = [other for other in open_streams if other.tenant is not None]
        of_tenant = [other for other in of_tenants if other.tenant == caller.tenant]
        counts.append((len(of_tenants), MAX_STREAMS_OF_TENANTS, "of all tenants"))
        counts.append((len(of_tenant), MAX_STREAMS_PER_TENANT, "of this tenant"))
    if caller.token is not None:
        of_token = [other for other in open_streams if other.token == caller.token]
        counts.append((len(of_token), MAX_STREAMS_PER_TOKEN, "of this token"))
    for count, most, whose in counts:
        if count >= most:
            raise Problem("too_many_streams", f"There are {most} open streams {whose} already; retry later.")


async def _stream(
    context: ApiContext, caller: Caller, query: StreamEvents, request: web.Request, listing: Listing
) -> web.StreamResponse:
    last_id = query.last_event_id or request.headers.get("Last-Event-ID")
    if last_id is not None and not re.fullmatch(EVENT_ID, last_id):
        last_id = "unknown"
    position, missed = await _start_position(context, listing, last_id)
    stream = SseResponse(request, write_timeout_s=context.write_timeout_s)
    revoked = asyncio.Event()
    watching = asyncio.create_task(_watch_token(context, request, stream, revoked))
    try:
        await stream.start(retry_ms=_RETRY_MS)
        if missed:
            await stream.send(b'{"missed":%s}' % missed, event="gap")
        await _follow(context, caller, query, stream, listing, position, revoked)
    except TimeoutError:
        log.info("stream_client_stalled")
        stream.abort()
    except ConnectionError:
        log.debug("stream_client_disconnected")
    finally:
        await cancel(watching)
    return stream.response


async def _watch_token(context: ApiContext, request: web.Request, stream: SseResponse, revoked: asyncio.Event) -> None:
    """End a stream within a second of the revocation of its token, also one that waits for its client to read."""
    authorization = request.headers.get("Authorization")
    while True:
        await asyncio.sleep(_VERIFY_EVERY_S)
        with contextlib.suppress(*STORE_ERRORS):
            if await context.authenticator.authenticate(authorization) is None:
                break
    revoked.set()
    await asyncio.sleep(_POLL_INTERVAL_S)
    stream.abort()


async def _start_position(context: ApiContext, listing: Listing, last_id: str | None) -> tuple[_Position, bytes]:
    """Find where to start. If what was missed cannot all be sent: how many events (JSON), else b""."""
    now = _Position(await context.store.now_ms())
    if last_id is None:
        return now, b""
    added_ms = await listing.added_ms(last_id)
    if added_ms is None:
        return now, b"null"
    backlog = await listing.count_after(added_ms)
    if backlog > MAX_BACKLOG:
        return now, b"%d" % backlog
    position = _Position(added_ms)
    position.add(last_id)
    return position, b""


async def _follow(
    context: ApiContext,
    caller: Caller,
    query: StreamEvents,
    stream: SseResponse,
    listing: Listing,
    position: _Position,
    revoked: asyncio.Event,
) -> None:
    loop = asyncio.get_running_loop()
    listed_at = loop.time()
    while not context.closing.is_set() and not stream.disconnected and not revoked.is_set():
        try:
            event_ids = await _next(listing, position)
            documents = await read_events(context, caller, query, event_ids) if event_ids else []
            if loop.time() - listed_at >= context.heartbeat_s:
                listing = await listing_of(context, caller, query)  # the tenant may have a new source
                listed_at = loop.time()
        except Problem:
            return  # the source or subscription of the filter was deleted
        except STORE_ERRORS:
            event_ids, documents = [], []  # the store is unavailable: the stream resumes with it
        for document in documents:
            if document is not None:
                await stream.send(orjson.dumps(document), event=document["type"], event_id=document["id"])
        for event_id in event_ids:
            position.add(event_id)
        if loop.time() - stream.written_at >= context.heartbeat_s:
            await stream.send_comment("heartbeat")
        if event_ids:
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_INTERVAL_S):
                await context.closing.wait()


async def _next(listing: Listing, position: _Position) -> list[str]:
    """Read the events that were created since, oldest first."""
    now_ms, entries = await listing.oldest_first(position.from_ms, limit=_BATCH + len(position.sent))
    # When the store's clock was set back, new events are older than the position: start again from its present.
    position.from_ms = min(position.from_ms, now_ms + 1000)
    unsent = [entry for entry in entries if entry[1] not in position.sent][:_BATCH]
    if unsent:
        position.from_ms = unsent[-1][0]
    return [event_id for _, event_id in unsent]
