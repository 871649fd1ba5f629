"""The record lane: the audio of answered calls. A shell: read the claim, call the relay, settle.

It may run twice without harm: the audio is kept under the call's name, whole or not at all.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import assert_never

import structlog

from relay import metrics
from relay.domain.json import Json
from relay.domain.time import from_ms
from relay.providers.source import Source
from relay.queue.lane import Claim, Settlement
from relay.queue.runner import Runner
from relay.recordings import fetch
from relay.recordings.fetch import Denied, Fetched, FetchState, GaveUp, NoneThere, RecordingStatus, TryAgain
from relay.recordings.storage import RecordingStorage
from relay.store.calls import StoredCall, claimed_call
from relay.store.documents import pack
from relay.store.sources import SourceStore
from workers import EXTRA_OFF_S

log = structlog.get_logger(__name__)


class Record:
    """Fetches the audio of answered calls."""

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
        self._well: dict[str, bool] = {}

    async def work(self, claims: Sequence[Claim]) -> None:
        """Fetch one recording and keep it."""
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
            await self._storage.delete(result.part["path"])  # it was erased while its audio came
        await self._settle(claim, call, source, state, result)

    async def _settle(
        self, claim: Claim, call: StoredCall, source: Source, state: FetchState | None, result: fetch.Result
    ) -> None:
        if isinstance(result, Fetched | NoneThere) and not self._well.get(source.id):
            self._well[source.id] = True
            await self._states.note(source.id, recordings_off="")
        match result:
            case Fetched(part):
                log.info("recording_stored", call=call.id, source=source.id, size_bytes=part["size_bytes"])
                self._keep(claim, part)
            case NoneThere():
                self._keep(claim, fetch.recording_part(RecordingStatus.NONE))
            case GaveUp(reason):
                log.warning("recording_failed", call=call.id, source=source.id, why=reason)
                self._keep(claim, fetch.recording_part(RecordingStatus.UNAVAILABLE))
            case TryAgain(at, kept, _):
                wait_ms = max(int((at - self._store_now()).total_seconds() * 1000), 1)
                self.runner.settle(claim, "again", wait_ms=wait_ms, b=pack(kept.to_json()))
            case Denied(reason):
                first = state.first_try_at if state else self._store_now()
                if self._store_now() - first > timedelta(hours=24):
                    self._keep(claim, fetch.recording_part(RecordingStatus.UNAVAILABLE))
                    return
                say = log.error if self._well.get(source.id, True) else log.debug  # once, not for each call
                self._well[source.id] = False
                say("recordings_off", source=source.id, why=reason, retry_s=EXTRA_OFF_S)
                await self._states.note(source.id, recordings_off=reason)
                kept = state or FetchState(first)
                self.runner.settle(claim, "again", wait_ms=EXTRA_OFF_S * 1000, b=pack(kept.to_json()))
            case _:
                assert_never(result)

    def _keep(self, claim: Claim, part: Json) -> None:
        metrics.RECORDINGS.labels(part["status"]).inc()
        self.runner.settle(claim, "part", b=pack(part))

    def settled(self, settlement: Settlement) -> None:
        """The store has an outcome: with audio in it the call is due in the enrich lane now, not a moment before."""
        if settlement.verb == "part":
            self._wake_enrich()

    def _store_now(self) -> datetime:
        return from_ms(self.runner.lane.store_now_ms)

    @contextlib.asynccontextmanager
    async def _lease_renewed(self, claim: Claim) -> AsyncIterator[None]:
        """Keep the lease while the audio flows, however long it is."""

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
