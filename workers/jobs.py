"""What arq runs: wake-ups, which return at once, and long work. Each job may run twice without harm."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import datetime, timedelta
from typing import Any, NoReturn

import structlog
from arq import Retry

from relay.delivery.replay import ReplayProgress, ReplayStatus, SubscriptionDisabled, replay_since
from relay.domain.json import Json
from relay.domain.polling import PollState
from relay.domain.time import from_iso, from_ms, iso
from relay.errors import OverBudget, RateLimited, RelayError, StorageError, StoreError, Unavailable
from relay.polling.reader import Ingestion, PollStats, Reader
from relay.polling.window import floor
from relay.privacy.erase import Erased, Eraser
from relay.providers.base import Purpose, Window
from relay.providers.source import Source
from relay.runtime import Runtime
from relay.store.connection import STORE_ERRORS
from relay.store.jobs import Job, JobState, JobStore
from relay.store.lanes import LaneName
from relay.store.sources import LeaseLost
from relay.tasks import cancel

log = structlog.get_logger(__name__)

_STEP = timedelta(hours=6)
_HEARTBEAT_S = 1.0
# How long a job counts as running after its last heartbeat; after that another worker takes a killed worker's job.
_LEASE_MS = 45_000
# A run that lasts longer queues itself again, well before arq would time it out.
_MAX_RUN_S = 3600.0
_MAX_WAIT_S = 60.0
_UNAVAILABLE_WAITS_S = (1.0, 5.0, 20.0, 60.0)
_STORE_RETRY_S = 5
_UNKNOWN_RETRY_S = 5


class Cancelled(Exception):
    """Someone has cancelled the job."""


async def wake(ctx: dict[str, Any], lane: str) -> None:
    if lane in list(LaneName):
        ctx["runtime"].wake_ups.wake_here(LaneName(lane))


async def backfill(ctx: dict[str, Any], sid: str, since: str, until: str, job_id: str, force: bool = False) -> None:
    """Read a range of a source again and publish what was never published. Never moves the cursor.

    Rows too old to be distinguished from known ones are only ingested with `force`. An interrupted run is resumed where
    it stopped; two at once only read twice.
    """
    runtime: Runtime = ctx["runtime"]
    jobs = runtime.store.jobs
    try:
        job = await jobs.get(job_id) or Job(job_id, "backfill")
        if job.state.ended:
            return
        source = runtime.sources.get(sid)
        poll_state = (await runtime.store.sources.read(sid)).poll_state
        if source is None and await runtime.store.configurations.is_declared("source", sid):
            await wait_for_other_worker(jobs, job_id, f"this worker does not know the source {sid}")
        if (reason := reason_against(sid, source, poll_state, force=force)) or source is None:
            await jobs.update(job_id, JobState.FAILED, error=reason)
            return
        oldest = None if force else floor(poll_state, now=await _store_now(runtime))
        run = Backfill(runtime, source, job, oldest=oldest, sleep=ctx["sleep"])
        async with _heartbeat(ctx, run.heartbeat):
            if await run.read(from_iso(since), from_iso(until)):
                await jobs.update(job_id, JobState.DONE, share=1, counts=run.counts)
                log.info("backfill_completed", source=sid, **run.counts)
    except Cancelled:
        await jobs.update(job_id, JobState.CANCELLED, error="cancelled")
    except LeaseLost:
        await jobs.update(job_id, JobState.FAILED, error=f"the source {sid} was removed meanwhile")
    except STORE_ERRORS as error:
        log.warning("backfill_interrupted", source=sid, error=str(error), retry_in_s=_STORE_RETRY_S)
        raise Retry(defer=_STORE_RETRY_S) from error


async def wait_for_other_worker(jobs: JobStore, job_id: str, reason: str) -> NoReturn:
    """Give back a job on what this worker's configuration does not have, and another one's has."""
    await jobs.update(job_id, JobState.WAITING, error=reason)
    raise Retry(defer=_UNKNOWN_RETRY_S)


def reason_against(sid: str, source: Source | None, poll_state: PollState, *, force: bool) -> str:
    """Say why a source cannot be backfilled; empty when it can."""
    if source is None:
        return f"no source called {sid} is configured where the relay runs"
    if source.paused:
        return f"the source {sid} is paused, so it is not polled"
    if not poll_state.polled and not force:
        return (
            f"{sid} has not been polled successfully so far, so known calls cannot be distinguished from new ones; "
            "wait for its first poll, and run this again"
        )
    return ""


async def _store_now(runtime: Runtime) -> datetime:
    return from_ms(await runtime.store.wall_ms())


class Backfill:
    """One run of a backfill, window by window; with `only` just of the rows with these keys."""

    def __init__(
        self,
        runtime: Runtime,
        source: Source,
        job: Job,
        *,
        oldest: datetime | None,
        sleep: Callable[[float], Awaitable[None]],
        only: Collection[str] | None = None,
    ) -> None:
        self._runtime = runtime
        self._jobs = runtime.store.jobs
        self._source = source
        self._job = job
        self._oldest = oldest
        self._sleep = sleep
        self._only = only
        self._total = PollStats(**job.position.get("total", {}))
        self._window_stats = PollStats()
        self._cancelled = False

    @property
    def counts(self) -> dict[str, int]:
        return self._total.counts()

    async def read(self, since: datetime, until: datetime) -> bool:
        """Read the range, from where an earlier run stopped; False when that failed for good, which is recorded."""
        source, job_id = self._source, self._job.id
        at = from_iso(self._job.position["at"]) if self._job.position else since
        await self._jobs.update(job_id, JobState.RUNNING)
        failures = 0
        began = time.monotonic()
        while at < until:
            if time.monotonic() - began > _MAX_RUN_S:
                raise Retry
            if await self._jobs.cancel_requested(job_id):
                raise Cancelled
            window_end = min(at + _STEP, until) if source.kind.upper_bound else until
            try:
                await self._read_window(at, window_end, until)
            except OverBudget as error:
                await self._wait(error.wait_s, "our share of the provider's limit is used up")
                continue
            except RateLimited as error:
                await self._wait(error.retry_after_s or _MAX_WAIT_S, str(error))
                continue
            except Unavailable as error:
                if failures == len(_UNAVAILABLE_WAITS_S):
                    await self._failed(error)
                    return False
                failures += 1
                await self._wait(_UNAVAILABLE_WAITS_S[failures - 1], str(error))
                continue
            except RelayError as error:
                await self._failed(error)
                return False
            failures = 0
            at = window_end
            counts = self._total.counts()
            position = {"at": iso(at), "total": counts}
            share = (at - since) / (until - since)
            await self._jobs.update(job_id, JobState.RUNNING, share=share, counts=counts, position=position)
        return True

    async def heartbeat(self) -> None:
        """Write how far the window is while it is being read, and find out whether the job was cancelled."""
        self._cancelled = await self._jobs.cancel_requested(self._job.id)
        so_far = PollStats()
        so_far.add(self._total)
        so_far.add(self._window_stats)
        await self._jobs.update(self._job.id, counts=so_far.counts())

    async def _read_window(self, since: datetime, window_end: datetime, until: datetime) -> None:
        runtime = self._runtime

        def on_page(stats: PollStats) -> None:
            self._window_stats = stats
            if self._cancelled:
                raise Cancelled

        try:
            stats = await Reader(runtime.store).read(
                self._source,
                Window(since, window_end, Purpose.BACKFILL),
                Ingestion(
                    now=await _store_now(runtime),
                    via="backfill",
                    floor=self._oldest,
                    until=until,
                    deep=self._only is None,
                    only=self._only,
                ),
                on_page=on_page,
            )
        finally:
            self._window_stats = PollStats()
            runtime.wake_ups(LaneName.ENRICH)
            runtime.wake_ups(LaneName.RECORD)
        self._total.add(stats)

    async def _wait(self, wait_s: float, reason: str) -> None:
        await self._jobs.update(self._job.id, JobState.WAITING, error=reason)
        await self._sleep(min(max(wait_s, 0.05), _MAX_WAIT_S))
        await self._jobs.update(self._job.id, JobState.RUNNING, error="")

    async def _failed(self, error: RelayError) -> None:
        log.error("backfill_failed", source=self._source.id, error=str(error))
        await self._jobs.update(self._job.id, JobState.FAILED, error=str(error), counts=self._total.counts())


@contextlib.asynccontextmanager
async def _heartbeat(ctx: dict[str, Any], report: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
    """Hold the job while this process lives: otherwise arq would restart a killed worker's job only after hours."""
    runtime: Runtime = ctx["runtime"]

    async def beat() -> None:
        while True:
            with contextlib.suppress(*STORE_ERRORS):
                await runtime.store.jobs.hold(ctx["job_id"], ttl_ms=_LEASE_MS)
                if report is not None:
                    await report()
            await asyncio.sleep(_HEARTBEAT_S)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        await cancel(beating)


async def replay(ctx: dict[str, Any], sub: str, since_ms: int, status: ReplayStatus, force: bool, job_id: str) -> None:
    """Replay the events of a subscription since a time. An interrupted run is resumed where it stopped."""
    runtime: Runtime = ctx["runtime"]
    jobs = runtime.store.jobs

    async def step(progress: ReplayProgress) -> None:
        runtime.wake_ups(LaneName.DELIVER)
        share = (progress.at_ms - since_ms) / max(until_ms - since_ms, 1)
        position = {"at_ms": progress.at_ms, "until_ms": until_ms}
        await jobs.update(job_id, JobState.RUNNING, share=share, counts=progress.counts(), position=position)
        if await jobs.cancel_requested(job_id):
            raise Cancelled

    def owner_of(document: Json) -> str | None:
        data = document["data"]
        sid = data["call"]["source_id"] if "call" in data else data.get("source", {}).get("id")
        source = runtime.sources.get(sid)
        other = runtime.subscriptions.get(data.get("subscription", {}).get("id"))
        return source.tenant if source else other.tenant if other else None

    async with resumable(ctx, job_id) as job:
        if job is None:
            return
        await runtime.registry.load()
        subscription = runtime.subscriptions.get(sub)
        if subscription is None and await runtime.store.configurations.is_declared("subscription", sub):
            await wait_for_other_worker(jobs, job_id, f"this worker does not know the subscription {sub}")
        if subscription is None:
            await jobs.update(job_id, JobState.FAILED, error=f"subscription {sub} not found")
            return
        until_ms = job.position.get("until_ms") or await runtime.store.now_ms()
        progress = ReplayProgress(job.position.get("at_ms", since_ms), **job.counts)
        try:
            await replay_since(
                runtime.store,
                subscription,
                progress=progress,
                until_ms=until_ms,
                status=status,
                force=force,
                owner_of=owner_of,
                step=step,
            )
        except SubscriptionDisabled:
            await jobs.update(job_id, JobState.FAILED, error=f"{sub} is disabled; enable it, then replay again")
            return
        await jobs.update(job_id, JobState.DONE, share=1, counts=progress.counts())
        log.info("replay_completed", subscription=sub, **progress.counts())


async def erase(ctx: dict[str, Any], number: str, sources: list[str] | None, job_id: str) -> None:
    """Erase a person by number, in some sources or everywhere. An interrupted run starts over with what is left."""
    runtime: Runtime = ctx["runtime"]
    async with resumable(ctx, job_id) as job:
        if job is None:
            return
        books = list(runtime.sources) if sources is None else sources
        eraser = Eraser(runtime.store, runtime.storage)
        erased = await eraser.number(number, sources=sources, books=books, step=_erasure_step(runtime, job_id))
        await runtime.store.jobs.update(job_id, JobState.DONE, share=1, counts=erased.counts())
        log.info("erase_completed", **erased.counts())


async def forget_source(ctx: dict[str, Any], sid: str, job_id: str) -> None:
    """Erase everything of a source that is being removed."""
    runtime: Runtime = ctx["runtime"]
    async with resumable(ctx, job_id) as job:
        if job is None:
            return
        report = _erasure_step(runtime, job_id)

        async def step(erased: Erased) -> None:
            await runtime.store.sources.continue_removal(sid)
            await report(erased)

        erased = await Eraser(runtime.store, runtime.storage).source(sid, step=step)
        await runtime.markers.delete(sid)
        await runtime.store.sources.end_removal(sid)
        await runtime.store.jobs.update(job_id, JobState.DONE, share=1, counts=erased.counts())
        log.info("source_erased", source=sid, **erased.counts())


def _erasure_step(runtime: Runtime, job_id: str) -> Callable[[Erased], Awaitable[None]]:
    async def step(erased: Erased) -> None:
        await runtime.store.jobs.update(job_id, JobState.RUNNING, counts=erased.counts())
        if await runtime.store.jobs.cancel_requested(job_id):
            raise Cancelled

    return step


@contextlib.asynccontextmanager
async def resumable(ctx: dict[str, Any], job_id: str) -> AsyncIterator[Job | None]:
    """Run a job that is resumed after a restart and after store or storage errors; yields None when it has ended."""
    runtime: Runtime = ctx["runtime"]
    try:
        job = await runtime.store.jobs.get(job_id) or Job(job_id, ctx["job_id"].partition("-")[0])
        async with _heartbeat(ctx):
            yield None if job.state.ended else job
    except Cancelled:
        await runtime.store.jobs.update(job_id, JobState.CANCELLED, error="cancelled")
    except (*STORE_ERRORS, StorageError, StoreError) as error:
        log.warning("job_interrupted", job=ctx["job_id"], error=str(error), retry_in_s=_STORE_RETRY_S)
        raise Retry(defer=_STORE_RETRY_S) from error
