"""The record lane: fetches the recordings of answered calls.

Running twice does no harm: the audio is stored under the call's id, whole or not at all.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import assert_never

import structlog

from relay import metrics
from relay.domain.call import RecordingStatus, provider_key
from relay.domain.time import from_ms
from relay.providers.source import Source
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.runner import Settle
from relay.queue.settlement import Done, PartitionHealth, Retry, Settlement
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
from relay.store.lanes import FetchProgress, RecordingStored
from relay.store.sources import SourceStore
from workers import EXTRA_PAUSE_S
from workers.unknown import unknown_wait_ms

log = structlog.get_logger(__name__)

_DENIED_RETRIED_FOR = timedelta(hours=24)


class RecordWorker:
    def __init__(
        self,
        lane: Lane,
        sources: Callable[[], Mapping[str, Source]],
        storage: RecordingStorage,
        states: SourceStore,
        *,
        wake_enrich: Callable[[], None],
        find_call: Callable[[str], Awaitable[StoredCall | None]],
        decides: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """`decides` says whether this process's configuration of a source is the newest."""
        self._lane = lane
        self._sources = sources
        self._storage = storage
        self._states = states
        self._wake_enrich = wake_enrich
        self._find_call = find_call
        self._decides = decides
        self._allowed: dict[str, bool] = {}  # source id → whether its credential may fetch recordings

    async def work(self, batch: Sequence[Claim], settle: Settle) -> None:
        [claim] = batch
        call = claimed_call(claim)
        source = self._sources().get(claim.partition)
        unwanted = source is not None and not source.rules.recordings
        if source is None or (unwanted and not self._decides(source.id)):
            now_ms = self._lane.store_now_ms
            settle(claim, Retry(unknown_wait_ms(waiting_since_ms=call.first_seen_ms, now_ms=now_ms)))
            return
        if unwanted or call.record["outcome"] != "answered":
            settle(claim, Done(health=PartitionHealth.HEALTHY))
            return
        state = FetchState.from_json(call.fetch) if call.fetch else None
        recordings = source.provider.recordings
        assert recordings is not None  # noqa: S101 - rules.recordings says so
        result = await fetch.fetch(
            recordings,
            self._storage,
            call.id,
            call.record["custom"].get("call_id") or provider_key(call.key),
            state,
            clock=self._store_now,
            started_at=from_ms(call.started_ms),
        )
        if isinstance(result, Fetched) and await self._find_call(call.id) is None:
            await self._storage.delete(result.part["path"])  # erased while its audio was on its way
        settle(claim, await self._settlement(call, source, state, result))

    async def _settlement(
        self, call: StoredCall, source: Source, state: FetchState | None, result: fetch.FetchResult
    ) -> Settlement:
        if isinstance(result, Fetched | NoRecording) and not self._allowed.get(source.id):
            self._allowed[source.id] = True
            await self._states.note(source.id, recordings_off="")
        match result:
            case Fetched(part):
                log.info("recording_stored", call=call.id, source=source.id, size_bytes=part["size_bytes"])
            case NoRecording():
                part = fetch.recording_part(RecordingStatus.NONE)
            case RetriesExhausted(reason):
                log.warning("recording_failed", call=call.id, source=source.id, reason=reason)
                part = fetch.recording_part(RecordingStatus.UNAVAILABLE)
            case RetryLater(at, progress, _):
                wait_ms = max(int((at - self._store_now()).total_seconds() * 1000), 1)
                return Retry(wait_ms, FetchProgress(progress.to_json()), _shown(state, progress))
            case AccessDenied(reason):
                first = state.first_attempt_at if state else self._store_now()
                if self._store_now() - first <= _DENIED_RETRIED_FOR:
                    await self._pause(source, reason)
                    unchanged = FetchProgress((state or FetchState(first)).to_json())
                    return Retry(EXTRA_PAUSE_S * 1000, unchanged, PartitionHealth.HEALTHY)
                part = fetch.recording_part(RecordingStatus.UNAVAILABLE)
            case _:
                assert_never(result)
        metrics.RECORDINGS.labels(part["status"]).inc()
        shown = PartitionHealth.FAILING if isinstance(result, RetriesExhausted) else PartitionHealth.HEALTHY
        return Done(RecordingStored(part), shown)

    async def _pause(self, source: Source, reason: str) -> None:
        # Every call of the source is refused alike: an error once, not for each of them.
        write = log.error if self._allowed.get(source.id, True) else log.debug
        self._allowed[source.id] = False
        write("source_recordings_paused", source=source.id, reason=reason, retry_in_s=EXTRA_PAUSE_S)
        await self._states.note(source.id, recordings_off=reason)

    def on_settled(self, claim: Claim, settlement: Settlement) -> None:
        """Wake the enrich lane once the store has the recording part, not before."""
        if isinstance(settlement, Done) and settlement.detail is not None:
            self._wake_enrich()

    def _store_now(self) -> datetime:
        return from_ms(self._lane.wall_ms)


def _shown(before: FetchState | None, after: FetchState) -> PartitionHealth | None:
    """What an attempt without a final result showed of the source: nothing, when our own budget stopped it."""
    outages, failures = (before.outages, before.failures) if before else (0, 0)
    if after.outages > outages or after.failures > failures:
        return PartitionHealth.FAILING
    return PartitionHealth.HEALTHY if after.step > (before.step if before else 0) else None
