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

MAX_STREAMS: Final = 100
# Events that a client may have missed; further back there is `GET /v1/events`.
MAX_BACKLOG: Final = 10_000
_BATCH: Final = 200
# Each stream reads its index this often; what needs an event sooner has a webhook.
_POLL_INTERVAL_S: Final = 0.25
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
    if len(context.streams) >= MAX_STREAMS:
        raise Problem("too_many_streams", f"There are {MAX_STREAMS} open streams already; retry later.")
    last_id = query.last_event_id or request.headers.get("Last-Event-ID")
    if last_id is not None and not re.fullmatch(EVENT_ID, last_id):
        last_id = "unknown"
    position, missed = await _start_position(context, listing, last_id)
    stream = SseResponse(request, write_timeout_s=context.write_timeout_s)
    task = asyncio.current_task()
    context.streams.add(task)
    try:
        await stream.start(retry_ms=_RETRY_MS)
        if missed:
            await stream.send(b'{"missed":%s}' % missed, event="gap")
        await _follow(context, caller, query, request, stream, listing, position)
    except TimeoutError:
        log.info("stream_client_stalled")
        stream.abort()
    except ConnectionError:
        log.debug("stream_client_disconnected")
    finally:
        context.streams.discard(task)
    return stream.response


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
    request: web.Request,
    stream: SseResponse,
    listing: Listing,
    position: _Position,
) -> None:
    loop = asyncio.get_running_loop()
    verified_at = loop.time()
    while not context.closing.is_set() and not stream.disconnected:
        try:
            event_ids = await _next(listing, position)
            documents = await read_events(context, caller, query, event_ids) if event_ids else []
            if loop.time() - verified_at >= context.heartbeat_s:
                if await context.authenticator.authenticate(request.headers.get("Authorization")) is None:
                    return  # the token was revoked
                listing = await listing_of(context, caller, query)  # the tenant may have a new source
                verified_at = loop.time()
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
