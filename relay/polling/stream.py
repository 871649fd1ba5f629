"""Listens to providers that stream calls. Promise: faster where it works, and never needed.

All pollers together hold one stream per source, under a lease. Each connect makes the source due, so that a poll finds
what the stream missed. Rows are ingested like those of a poll, so a call that both bring is published once. A failed
stream affects nothing else.
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
from relay.polling.reader import Ingestion, Reader
from relay.polling.window import SEED_DEPTH, floor
from relay.providers.source import Source
from relay.store.connection import STORE_ERRORS
from relay.store.sources import SourceStore
from relay.store.streams import StreamLeases
from relay.tasks import cancel

log = structlog.get_logger(__name__)

# How long a stream stays unattended after its process died.
LEASE_S: Final = 20.0
SHORT_LIVED_S: Final = 5.0
_CHECK_AGAIN_S: Final = 0.5
_LONGEST_BACKOFF_S: Final = 60.0
_PERSON_NEEDED_S: Final = 300.0


class _LeaseEnded(Exception):
    """Another process may be listening by now."""


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
        calls_ingested: Callable[[], None],
        rng: random.Random | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        """`catch_up` makes a source due for a poll; `calls_ingested` is called when there are new or changed calls."""
        self._leases = leases
        self._reader = reader
        self._states = states
        self._sources = sources
        self._now = now
        self._catch_up = catch_up
        self._calls_ingested = calls_ingested
        self._rng = rng or random.Random()  # noqa: S311 - spreads reconnects, nothing secret
        self._lease_s = lease_s
        self._listeners: dict[str, _Listener] = {}
        self._leased_until_s = 0.0

    @property
    def listening_to(self) -> list[str]:
        return sorted(self._listeners)

    async def run(self) -> None:
        """Listen until cancelled; then every stream is closed and its lease released."""
        try:
            while True:
                try:
                    await self.take_leases()
                except STORE_ERRORS:  # the runners log that the store is unavailable
                    if time.monotonic() >= self._leased_until_s:
                        await self._end(list(self._listeners))
                await asyncio.sleep(self._lease_s / 4)
        finally:
            held = list(self._listeners)
            await self._end(held)
            with contextlib.suppress(*STORE_ERRORS):
                await self._leases.release(held)

    async def take_leases(self) -> None:
        """Renew our leases, take free ones, and close the streams whose lease or source has gone."""
        wanted = {
            sid: source
            for sid, source in self._sources().items()
            if source.provider.stream is not None and not source.paused
        }
        # Counted from before the request: the lease may start at any moment of it.
        requested_s = time.monotonic()
        held = await self._leases.acquire(list(wanted), lease_s=self._lease_s)
        self._leased_until_s = requested_s + self._lease_s
        gone = [
            sid for sid, listener in self._listeners.items() if sid not in held or wanted[sid] is not listener.source
        ]
        unwanted = [sid for sid in gone if sid not in wanted]
        crashed = [sid for sid, listener in self._listeners.items() if listener.task.done() and sid not in gone]
        await self._end([*gone, *crashed])
        await self._leases.release(unwanted)
        for sid in held:
            if sid not in self._listeners:
                task = asyncio.create_task(self._listen(wanted[sid]), name=f"stream:{sid}")
                self._listeners[sid] = _Listener(wanted[sid], task)

    async def _end(self, sids: Sequence[str]) -> None:
        await cancel(*[self._listeners.pop(sid).task for sid in sids])

    async def _listen(self, source: Source) -> None:
        failures = 0
        while True:
            started_s = time.monotonic()
            failure: Exception | None = None
            try:
                await self._listen_once(source, quiet=failures == 0)
            except _LeaseEnded:
                return
            except (RelayError, *STORE_ERRORS) as error:
                failure = error
            except Exception as error:
                log.exception("call_stream_failed", source=source.id)
                failure = error
            failures = failures + 1 if failure or time.monotonic() - started_s < SHORT_LIVED_S else 0
            if failure is not None and failures == 1:
                log.warning(
                    "call_stream_disconnected", source=source.id, error=str(failure), action="polling continues"
                )
                await self._note(source, str(failure))
            await asyncio.sleep(pause_s(failure, failures, self._rng))

    async def _listen_once(self, source: Source, *, quiet: bool) -> None:
        """Connect, let a poll catch up, and ingest rows until the stream ends."""
        await self._wait_for_first_poll(source)
        stream = source.provider.stream
        assert stream is not None  # noqa: S101 - only such sources are listened to
        async with stream.listening() as batches:
            await self._catch_up(source.id)
            (log.debug if quiet else log.info)("stream_connected", source=source.id)
            await self._note(source, "connected")
            async for rows in batches:
                await self._ingest(source, rows)

    async def _wait_for_first_poll(self, source: Source) -> None:
        """Wait until a poll has recorded the calls from before the relay: a stream may begin with all of them."""
        while not (await self._states.read(source.id)).poll_state.polled:  # noqa: ASYNC110 - another process may poll
            await asyncio.sleep(_CHECK_AGAIN_S)

    async def _ingest(self, source: Source, rows: Sequence[Record | InvalidRow]) -> None:
        if time.monotonic() >= self._leased_until_s:
            raise _LeaseEnded
        now = self._now()
        poll_state = (await self._states.read(source.id)).poll_state
        ingestion = Ingestion(
            now=now, via="stream", floor=oldest(poll_state, now=now), seed_before=poll_state.known_since
        )
        stats = await self._reader.ingest(source, rows, ingestion)
        if stats.new or stats.changed:
            self._calls_ingested()

    async def _note(self, source: Source, state: str) -> None:
        with contextlib.suppress(*STORE_ERRORS):
            await self._states.note(source.id, stream=state[:200])


def oldest(poll_state: PollState, *, now: datetime) -> datetime | None:
    """Return the start before which streamed rows are ignored, because the first poll did not read them either."""
    known_since = None if poll_state.started_at is None else poll_state.started_at - SEED_DEPTH
    bounds = [bound for bound in (floor(poll_state, now=now), known_since) if bound is not None]
    return max(bounds, default=None)


def pause_s(failure: Exception | None, failures: int, rng: random.Random) -> float:
    """Return the seconds until the next connect, spread so that all sources never reconnect at once."""
    match failure:
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
