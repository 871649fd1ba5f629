"""The event stream (SSE): events as they are made, and on a return those that were made meanwhile.

Every stream reads the index of events for itself, at its listener's own pace, so nothing piles up in memory for a slow
one; who takes nothing for a while is let go and comes back with `Last-Event-ID`.
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
from redis.exceptions import RedisError

from relay.api.auth import Caller
from relay.api.context import EVENT_ID, Api
from relay.api.events import EventFilter, indexes_of, read_events
from relay.api.problems import Problem
from relay.domain.json import Json

STREAMS_MOST: Final = 100
BACKLOG_MOST: Final = 10_000
"""Events that a return can be behind; further back there is `GET /v1/events`."""
_BATCH: Final = 200
_LOOK_EVERY_S: Final = 0.25
_REMEMBERED: Final = 5_000
_RETRY_MS: Final = 2_000

log = structlog.get_logger(__name__)


class StreamEvents(EventFilter):
    """Which events."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last_event_id: str | None = Field(
        None, pattern=EVENT_ID, description="go on after this event; the header Last-Event-ID says the same"
    )


@dataclass(slots=True)
class _Tail:
    """Where a stream is in the index. Of one ms several events may be seen at different times, so the last ms is read
    again, and what was sent is remembered."""

    from_ms: int
    sent: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    def is_new(self, eid: str) -> bool:
        """Whether an event was not looked at so far."""
        return eid not in self.sent

    def note(self, eid: str) -> None:
        """Remember that it was."""
        self.sent[eid] = None
        if len(self.sent) > _REMEMBERED:
            self.sent.popitem(last=False)


async def stream_events(api: Api, caller: Caller, query: StreamEvents, request: web.Request) -> web.StreamResponse:
    """Listen to events as they are made (server-sent events)."""
    indexes = await indexes_of(api, caller, query)
    if len(api.streams) >= STREAMS_MOST:
        raise Problem("too_many_streams", f"There are {STREAMS_MOST} streams already; try again later.")
    last = query.last_event_id or request.headers.get("Last-Event-ID")
    if last is not None and not re.fullmatch(EVENT_ID, last):
        last = "unknown"
    tail, missed = await _begin(api, indexes, last)
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
            "X-Content-Type-Options": "nosniff",
        }
    )
    task = asyncio.current_task()
    api.streams.add(task)
    try:
        await response.prepare(request)
        first = f"retry: {_RETRY_MS}\n\n"
        if missed:
            first += f'event: gap\ndata: {{"missed":{missed}}}\n\n'
        await _write(api, response, first.encode())
        await _follow(api, caller, query, request, response, indexes, tail)
    except TimeoutError:
        log.info("stream_listener_stalled")
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        log.debug("stream_listener_left")
    finally:
        api.streams.discard(task)
    return response


async def _begin(api: Api, indexes: list[str], last: str | None) -> tuple[_Tail, str]:
    """Find where to begin; with what was missed, as JSON, when not all of it can be sent."""
    redis = api.runtime.redis
    seconds, micros = await redis.time()
    now = _Tail(int(seconds) * 1000 + int(micros) // 1000)
    if last is None:
        return now, ""
    scores = [await redis.zscore(index, last) for index in indexes]
    known = [int(score) for score in scores if score is not None]
    if not known:
        return now, "null"
    behind = 0
    for index in indexes:
        behind += int(await redis.zcount(index, f"({known[0]}", "+inf"))
    if behind > BACKLOG_MOST:
        return now, str(behind)
    tail = _Tail(known[0])
    tail.note(last)
    return tail, ""


async def _follow(
    api: Api,
    caller: Caller,
    query: StreamEvents,
    request: web.Request,
    response: web.StreamResponse,
    indexes: list[str],
    tail: _Tail,
) -> None:
    loop = asyncio.get_running_loop()
    written_at = looked_at = loop.time()
    while not api.closing.is_set() and not _has_left(request):
        try:
            batch = await _next(api, indexes, tail)
            documents = await read_events(api, caller, query, batch) if batch else []
            if loop.time() - looked_at >= api.heartbeat_s:
                if await api.tokens.caller(request.headers.get("Authorization")) is None:
                    return  # revoked meanwhile
                indexes = await indexes_of(api, caller, query)  # a tenant may have another source by now
                looked_at = loop.time()
        except Problem:
            return  # what it listened to was deleted
        except (RedisError, OSError):
            batch, documents = [], []  # the store is away for a while
        for document in documents:
            if document is not None:
                await _write(api, response, _as_sse(document))
                written_at = loop.time()
        for eid in batch:
            tail.note(eid)
        if loop.time() - written_at >= api.heartbeat_s:
            await _write(api, response, b": still here\n\n")
            written_at = loop.time()
        if batch:
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_EVERY_S):
                await api.closing.wait()


async def _next(api: Api, indexes: list[str], tail: _Tail) -> list[str]:
    """Read what was made since, oldest first. When the store's clock was set back, begin again from its now."""
    redis = api.runtime.redis
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        for index in indexes:
            pipe.zrangebyscore(index, tail.from_ms, "+inf", start=0, num=_BATCH + len(tail.sent), withscores=True)
        (seconds, _), *answers = await pipe.execute()
    tail.from_ms = min(tail.from_ms, (int(seconds) + 1) * 1000)
    found = sorted({(int(score), member.decode()) for rows in answers for member, score in rows})
    fresh = [(score, eid) for score, eid in found if tail.is_new(eid)][:_BATCH]
    if fresh:
        tail.from_ms = fresh[-1][0]
    return [eid for _, eid in fresh]


def _has_left(request: web.Request) -> bool:
    """Whether the listener has hung up: a quiet stream would notice only with its next beat."""
    return request.transport is None or request.transport.is_closing()


def _as_sse(document: Json) -> bytes:
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (
        document["id"].encode(),
        document["type"].encode(),
        orjson.dumps(document),
    )


async def _write(api: Api, response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(api.write_timeout_s):
        await response.write(data)
