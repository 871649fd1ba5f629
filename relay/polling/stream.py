"""Listening to providers that tell of calls by themselves. The promise: quicker where it works, and never needed.

One stream a source over all pollers, under a lease. Each connect makes the source due, so a poll finds what the stream
did not tell; rows are admitted like those of a poll, so what both bring is told once. Trouble here stops nothing else.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog

from relay.domain.call import InvalidRow, Record
from relay.domain.polling import PollState
from relay.errors import OverBudget, RateLimited, RelayError, SettingsError, Unauthorized, UnexpectedResponse
from relay.polling.poller import Reader
from relay.polling.window import SEED_DEPTH, floor
from relay.providers.source import Source
from relay.store.connection import STORE_ERRORS
from relay.store.sources import SourceStore
from relay.store.streams import StreamLeases
from relay.tasks import cancel

log = structlog.get_logger(__name__)

LEASE_S: Final = 20.0
"""How long a stream stays without a listener when its process dies."""
SHORT_LIVED_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.5
_LONGEST_BACKOFF_S: Final = 60.0
_PERSON_NEEDED_S: Final = 300.0


class _NotOurs(Exception):
    """The lease has ended: somebody else may be listening."""


@dataclass(slots=True)
class _Listener:
    source: Source
    task: "asyncio.Task[None]"


class Streams:
    """Listens to every source that has a stream and no other listener."""

    def __init__(
        self,
        leases: StreamLeases,
        reader: Reader,
        states: SourceStore,
        sources: Callable[[], Mapping[str, Source]],
        *,
        now: Callable[[], datetime],
        catch_up: Callable[[str], Awaitable[None]],
        fresh_calls: Callable[[], None],
        rng: random.Random | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        """`catch_up` makes a source due for a poll; `fresh_calls` says that something was admitted."""
        self._leases = leases
        self._reader = reader
        self._states = states
        self._sources = sources
        self._now = now
        self._catch_up = catch_up
        self._fresh_calls = fresh_calls
        self._rng = rng or random.Random()  # noqa: S311 - spreads reconnects, nothing secret
        self._lease_s = lease_s
        self._listeners: dict[str, _Listener] = {}
        self._until = 0.0

    @property
    def listening_to(self) -> list[str]:
        """The sources whose streams are ours."""
        return sorted(self._listeners)

    async def run(self) -> None:
        """Listen until cancelled; then every stream ends at once, and others may have them."""
        try:
            while True:
                try:
                    await self._share_out()
                except STORE_ERRORS:  # the runners say that the store is away
                    if time.monotonic() >= self._until:
                        await self._end(list(self._listeners))
                await asyncio.sleep(self._lease_s / 4)
        finally:
            held = list(self._listeners)
            await self._end(held)
            with contextlib.suppress(*STORE_ERRORS):
                await self._leases.release(held)

    async def _share_out(self) -> None:
        """Take the streams that nobody has, keep ours, and end those that are not ours any more."""
        wanted = {
            sid: source
            for sid, source in self._sources().items()
            if source.provider.stream is not None and not source.paused
        }
        asked_at = time.monotonic()
        held = await self._leases.acquire(list(wanted), lease_s=self._lease_s)
        self._until = asked_at + self._lease_s
        gone = [sid for sid, each in self._listeners.items() if sid not in held or wanted[sid] is not each.source]
        unwanted = [sid for sid in gone if sid not in wanted]
        broken = [sid for sid, each in self._listeners.items() if each.task.done() and sid not in gone]
        await self._end([*gone, *broken])
        await self._leases.release(unwanted)
        for sid in held:
            if sid not in self._listeners:
                task = asyncio.create_task(self._listen(wanted[sid]), name=f"stream:{sid}")
                self._listeners[sid] = _Listener(wanted[sid], task)

    async def _end(self, sids: Sequence[str]) -> None:
        await cancel(*[self._listeners.pop(sid).task for sid in sids])

    async def _listen(self, source: Source) -> None:
        """Listen to one source, again and again."""
        failures = 0
        while True:
            began = time.monotonic()
            trouble: Exception | None = None
            try:
                await self._connected_once(source, quiet=failures == 0)
            except _NotOurs:
                return
            except (RelayError, *STORE_ERRORS) as error:
                trouble = error
            except Exception as error:
                log.exception("call_stream_failed", source=source.id)
                trouble = error
            failures = failures + 1 if trouble or time.monotonic() - began < SHORT_LIVED_S else 0
            if trouble is not None and failures == 1:
                log.warning("call_stream_disconnected", source=source.id, error=str(trouble), action="polling goes on")
                await self._note(source, str(trouble))
            await asyncio.sleep(pause_s(trouble, failures, self._rng))

    async def _connected_once(self, source: Source, *, quiet: bool) -> None:
        """Connect, let a poll catch up, and take in what comes until the stream ends."""
        await self._first_poll_of(source)
        stream = source.provider.stream
        assert stream is not None  # noqa: S101 - only such sources are listened to
        async with stream.listening() as batches:
            await self._catch_up(source.id)
            (log.debug if quiet else log.info)("stream_connected", source=source.id)
            await self._note(source, "connected")
            async for rows in batches:
                await self._take_in(source, rows)

    async def _first_poll_of(self, source: Source) -> None:
        """Wait until a poll has found out what was there before: a stream may begin with all of that."""
        while not (await self._states.read(source.id)).poll_state.reached:  # noqa: ASYNC110 - another process may poll
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _take_in(self, source: Source, rows: Sequence[Record | InvalidRow]) -> None:
        if time.monotonic() >= self._until:
            raise _NotOurs
        now = self._now()
        poll_state = (await self._states.read(source.id)).poll_state
        stats = await self._reader.take(source, rows, now=now, via="stream", floor=oldest(poll_state, now=now))
        if stats.new or stats.changed:
            self._fresh_calls()

    async def _note(self, source: Source, how: str) -> None:
        with contextlib.suppress(*STORE_ERRORS):
            await self._states.note(source.id, stream=how[:200])


def oldest(poll_state: PollState, *, now: datetime) -> datetime | None:
    """The start before which a streamed row is neither new nor changed: what the first poll did not look at either."""
    known_since = None if poll_state.started_at is None else poll_state.started_at - SEED_DEPTH
    bounds = [bound for bound in (floor(poll_state, now=now), known_since) if bound is not None]
    return max(bounds, default=None)


def pause_s(trouble: Exception | None, failures: int, rng: random.Random) -> float:
    """Seconds until the next connect: a stream that has simply ended is opened again soon, never by all at once."""
    match trouble:
        case OverBudget(wait_s=wait_s):
            least_s = wait_s
        case RateLimited(retry_after_s=hint):
            least_s = hint or _LONGEST_BACKOFF_S
        case Unauthorized() | UnexpectedResponse() | SettingsError():
            least_s = _PERSON_NEEDED_S
        case None if failures == 0:
            return rng.uniform(0.05, 1.0)
        case _:
            return min(2.0 ** (min(failures, 10) - 1), _LONGEST_BACKOFF_S) * rng.uniform(0.5, 1.0)
    return least_s * rng.uniform(1.0, 1.2)
