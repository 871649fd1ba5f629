"""The record lane: fetches the recordings of answered calls.

Running twice does no harm: the audio is stored under the call's id, whole or not at all.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import assert_never

import structlog

from relay import metrics
from relay.domain.call import RecordingStatus
from relay.domain.json import Json
from relay.domain.time import from_ms
from relay.providers.source import Source
from relay.queue.lane import Claim, Settlement
from relay.queue.runner import Runner
from relay.recordings import fetch
from relay.recordings.fetch import (
    AccessDenied,
    Fetched,
    FetchState,
    NoRecording,
    RetriesExhausted,
    RetryLater,
)
from relay.recordings.storage import RecordingStorage
from relay.store.calls import StoredCall, claimed_call
from relay.store.documents import pack
from relay.store.sources import SourceStore
from workers import EXTRA_OFF_S

log = structlog.get_logger(__name__)


class RecordWorker:
    """Fetches the recordings of answered calls."""

    runner: Runner

    def __init__(
        self,
        sources: Callable[[], Mapping[str, Source]],
        storage: RecordingStorage,
        states: SourceStore,
        *,
        wake_enrich: Callable[[], None],
        find_call: Callable[[str], Awaitable[StoredCall | None]],
    ) -> None:
        self._sources = sources
        self._storage = storage
        self._states = states
        self._wake_enrich = wake_enrich
        self._find_call = find_call
        self._allowed: dict[str, bool] = {}  # source id → whether its credential may fetch recordings

    async def work(self, claims: Sequence[Claim]) -> None:
        """Fetch one recording and store it."""
        claim = claims[0]
        call = claimed_call(claim)
        source = self._sources().get(claim.partition)
        if source is None or not source.rules.recordings or call.record["outcome"] != "answered":
            self.runner.settle(claim, "done")
            return
        state = FetchState.from_json(call.fetch) if call.fetch else None
        async with self._lease_renewed(claim), source.asking() as provider:
            assert provider.recordings is not None  # noqa: S101 - rules.recordings says so
            result = await fetch.fetch(
                provider.recordings,
                self._storage,
                call.id,
                call.record["custom"].get("call_id") or call.key,
                state,
                clock=self._store_now,
                started_at=from_ms(call.started_ms),
            )
        if isinstance(result, Fetched) and await self._find_call(call.id) is None:
            await self._storage.delete(result.part["path"])  # erased while its audio was on its way
        await self._settle(claim, call, source, state, result)

    async def _settle(
        self, claim: Claim, call: StoredCall, source: Source, state: FetchState | None, result: fetch.FetchResult
    ) -> None:
        if isinstance(result, Fetched | NoRecording) and not self._allowed.get(source.id):
            self._allowed[source.id] = True
            await self._states.note(source.id, recordings_off="")
        match result:
            case Fetched(part):
                log.info("recording_stored", call=call.id, source=source.id, size_bytes=part["size_bytes"])
                self._keep(claim, part)
            case NoRecording():
                self._keep(claim, fetch.recording_part(RecordingStatus.NONE))
            case RetriesExhausted(reason):
                log.warning("recording_failed", call=call.id, source=source.id, reason=reason)
                self._keep(claim, fetch.recording_part(RecordingStatus.UNAVAILABLE))
            case RetryLater(at, kept, _):
                wait_ms = max(int((at - self._store_now()).total_seconds() * 1000), 1)
                self.runner.settle(claim, "again", wait_ms=wait_ms, b=pack(kept.to_json()))
            case AccessDenied(reason):
                first = state.first_attempt_at if state else self._store_now()
                if self._store_now() - first > timedelta(hours=24):
                    self._keep(claim, fetch.recording_part(RecordingStatus.UNAVAILABLE))
                    return
                # Every call of the source is refused alike: an error once, not for each of them.
                write = log.error if self._allowed.get(source.id, True) else log.debug
                self._allowed[source.id] = False
                write("source_recordings_paused", source=source.id, reason=reason, retry_s=EXTRA_OFF_S)
                await self._states.note(source.id, recordings_off=reason)
                kept = state or FetchState(first)
                self.runner.settle(claim, "again", wait_ms=EXTRA_OFF_S * 1000, b=pack(kept.to_json()))
            case _:
                assert_never(result)

    def _keep(self, claim: Claim, part: Json) -> None:
        metrics.RECORDINGS.labels(part["status"]).inc()
        self.runner.settle(claim, "part", b=pack(part))

    def settled(self, settlement: Settlement) -> None:
        """Wake the enrich lane once the store has the recording part, not before."""
        if settlement.verb == "part":
            self._wake_enrich()

    def _store_now(self) -> datetime:
        return from_ms(self.runner.lane.store_now_ms)

    @contextlib.asynccontextmanager
    async def _lease_renewed(self, claim: Claim) -> AsyncIterator[None]:
        """Renew the lease while the audio is transferred, however long that takes."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self.runner.lane.lease_s / 4)
                self.runner.settle(claim, "renew")

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
