"""What arq runs: wake-ups, which return at once, and the operator's long work. Each may run twice without harm."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from arq import Retry
from arq.constants import in_progress_key_prefix
from redis.exceptions import RedisError

from relay.delivery.replay import Replayed, ReplayStatus, SwitchedOff, replay_since
from relay.domain.json import Json
from relay.domain.time import from_iso, iso
from relay.errors import OverBudget, RateLimited, RelayError, StorageError, StoreError, Unavailable
from relay.polling.poller import PollStats, Reader
from relay.polling.window import PollState, floor
from relay.privacy.erase import REMEMBERED_S, Erased, Eraser
from relay.providers.base import Purpose, Window
from relay.providers.source import Source
from relay.runtime import Runtime
from relay.store import keys
from relay.store.calls import LeaseLost
from relay.store.lanes import LaneName
from relay.store.sources import Progress
from relay.tasks import cancel

log = structlog.get_logger(__name__)

_STEP = timedelta(hours=6)
_BEAT_S = 1.0
_HELD_MS = 45_000
"""How long a job counts as running after its last beat; a killed worker's job goes on elsewhere after that."""
_STINT_S = 3600.0
"""How long one run may go on before it lines up again, well before arq would end it."""
_LONGEST_WAIT_S = 60.0
_UNAVAILABLE_WAITS_S = (1.0, 5.0, 20.0, 60.0)
_STORE_AWAY_S = 5


async def wake(ctx: dict[str, Any], lane: str) -> None:
    """Have this process look at a lane now."""
    for known in LaneName:
        if known == lane:
            ctx["runtime"].wake_ups.wake_here(known)


async def backfill(ctx: dict[str, Any], sid: str, since: str, until: str, job: str, force: bool = False) -> None:
    """Read a range of a source again and tell what was never told. Never moves the cursor.

    Rows older than what can be told apart from known ones are only taken with `force`. A run that was cut short, by a
    restart or a kill, is taken up where its progress stands; two at once only read twice.
    """
    runtime: Runtime = ctx["runtime"]
    progress = Progress(runtime.redis, job)
    try:
        kept = await progress.read()
        if kept.get("state") in ("done", "failed"):
            return
        source = runtime.sources.get(sid)
        poll_state = (await runtime.states.read(sid)).poll_state
        if (why_not := _why_not(sid, source, poll_state, force=force)) or source is None:
            await progress.write(state="failed", error=why_not)
            return
        total = PollStats(**json.loads(kept["total"])) if "total" in kept else PollStats()
        oldest = None if force else floor(poll_state, now=await _store_now(runtime))
        reading = _Backfill(runtime, source, progress, oldest=oldest, total=total, sleep=ctx["sleep"])
        at = from_iso(kept["at"]) if "at" in kept else from_iso(since)
        async with _beating(ctx, reading.beat):
            await reading.read(at, from_iso(since), from_iso(until))
    except Cancelled:
        await progress.write(state="failed", error="cancelled")
    except LeaseLost:
        await progress.write(state="failed", error=f"the source {sid} was removed meanwhile")
    except (RedisError, OSError) as error:
        log.warning("backfill_interrupted", source=sid, error=str(error), again_in_s=_STORE_AWAY_S)
        raise Retry(defer=_STORE_AWAY_S) from error


def _why_not(sid: str, source: Source | None, poll_state: PollState, *, force: bool) -> str:
    """Say why a source cannot be read again as things are; nothing when it can."""
    if source is None:
        return f"no source called {sid} is configured where the relay runs"
    if source.paused:
        return f"the source {sid} is switched off, so it is not asked"
    if not poll_state.reached and not force:
        return (
            f"{sid} has not been polled with success so far, so what is known of it cannot be told from what is new; "
            "wait for its first poll, and run this again"
        )
    return ""


async def _store_now(runtime: Runtime) -> datetime:
    seconds, micros = await runtime.redis.time()
    return datetime.fromtimestamp(int(seconds) + int(micros) / 1_000_000, UTC)


class Cancelled(Exception):
    """A person has ended the job."""


class _Backfill:
    """One run of a backfill: window by window, with the time that each of them may take to come through."""

    def __init__(
        self,
        runtime: Runtime,
        source: Source,
        progress: Progress,
        *,
        oldest: datetime | None,
        total: PollStats,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._progress = progress
        self._oldest = oldest
        self._total = total
        self._sleep = sleep
        self._under_way = PollStats()
        self._cancelled = False

    async def read(self, at: datetime, first: datetime, end: datetime) -> None:
        """Read from `at` to `end`; `first` is where the whole began."""
        source = self._source
        await self._progress.write(state="running")
        failures = 0
        began = time.monotonic()
        while at < end:
            if time.monotonic() - began > _STINT_S:
                raise Retry
            await heed_cancel(self._progress)
            upto = min(at + _STEP, end) if source.kind.upper_bound else end
            try:
                await self._window(at, upto, end)
            except OverBudget as error:
                await self._wait(error.wait_s, "our share of the provider's limit is used up")
                continue
            except RateLimited as error:
                await self._wait(error.retry_after_s or _LONGEST_WAIT_S, str(error))
                continue
            except Unavailable as error:
                if failures == len(_UNAVAILABLE_WAITS_S):
                    await self._failed(error)
                    return
                failures += 1
                await self._wait(_UNAVAILABLE_WAITS_S[failures - 1], str(error))
                continue
            except RelayError as error:
                await self._failed(error)
                return
            failures = 0
            at = upto
            counts = self._total.counts()
            done = round((at - first) / (end - first), 3)
            stands = {"at": iso(at) or "", "total": json.dumps(counts)}
            await self._progress.write(state="running", done=done, **stands, **counts)
        await self._progress.write(state="done", done=1, **self._total.counts())
        log.info("backfill_completed", source=source.id, **self._total.counts())

    async def beat(self) -> None:
        """Say how far it is, while a window is being read, and whether it was cancelled."""
        self._cancelled = bool((await self._progress.read()).get("cancel"))
        so_far = PollStats()
        so_far.add(self._total)
        so_far.add(self._under_way)
        await self._progress.write(**so_far.counts())

    async def _window(self, at: datetime, upto: datetime, end: datetime) -> None:
        runtime = self._runtime
        reader = Reader(runtime.ledger, runtime.states)

        def noted(stats: PollStats) -> None:
            self._under_way = stats
            if self._cancelled:
                raise Cancelled

        try:
            stats = await reader.read(
                self._source,
                Window(at, upto, Purpose.BACKFILL),
                now=await _store_now(runtime),
                via="backfill",
                floor=self._oldest,
                until=end,
                on_page=noted,
            )
        finally:
            self._under_way = PollStats()
            runtime.wake_ups(LaneName.ENRICH)
            runtime.wake_ups(LaneName.RECORD)
        self._total.add(stats)

    async def _wait(self, wait_s: float, why: str) -> None:
        wait_s = min(max(wait_s, 0.05), _LONGEST_WAIT_S)
        await self._progress.write(state="waiting", wait_s=round(wait_s), error=why)
        await self._sleep(wait_s)
        await self._progress.write(state="running", error="")

    async def _failed(self, error: RelayError) -> None:
        log.error("backfill_failed", source=self._source.id, error=str(error))
        await self._progress.write(state="failed", error=str(error), **self._total.counts())


@contextlib.asynccontextmanager
async def _beating(ctx: dict[str, Any], say: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Keep the job ours for as long as we live, and not for the hours that arq would believe us dead or alive."""
    runtime: Runtime = ctx["runtime"]

    async def beat() -> None:
        while True:
            with contextlib.suppress(RedisError, OSError):
                await runtime.redis.pexpire(in_progress_key_prefix + ctx["job_id"], _HELD_MS)
                await say()
            await asyncio.sleep(_BEAT_S)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        await cancel(beating)


async def heed_cancel(progress: Progress) -> None:
    """Raise Cancelled when a person has ended the job."""
    if (await progress.read()).get("cancel"):
        raise Cancelled


async def replay(ctx: dict[str, Any], sub: str, since_ms: int, status: ReplayStatus, force: bool, job: str) -> None:
    """Deliver the events of a subscription since a time again. Taken up where its progress stands."""
    runtime: Runtime = ctx["runtime"]
    progress = Progress(runtime.redis, job)

    async def step(done: Replayed) -> None:
        runtime.wake_ups(LaneName.DELIVER)
        share = (done.at_ms - since_ms) / max(until_ms - since_ms, 1)
        stands = {"at_ms": done.at_ms, "until_ms": until_ms, "done": round(min(max(share, 0), 1), 3)}
        await progress.write(state="running", **stands, **done.counts())
        await heed_cancel(progress)

    def belongs(document: Json) -> str | None:
        data = document["data"]
        sid = data["call"]["source_id"] if "call" in data else data.get("source", {}).get("id")
        source = runtime.sources.get(sid)
        other = runtime.subscriptions.get(data.get("subscription", {}).get("id"))
        return source.tenant if source else other.tenant if other else None

    async with _long(ctx, progress) as kept:
        await runtime.registry.load()
        subscription = runtime.subscriptions.get(sub)
        if kept is None or subscription is None:
            if kept is not None:
                await progress.write(state="failed", error=f"there is no subscription {sub}")
            return
        seconds, micros = await runtime.redis.time()
        until_ms = int(kept.get("until_ms") or int(seconds) * 1000 + int(micros) // 1000)
        done = Replayed(int(kept.get("at_ms") or since_ms), **{n: int(kept.get(n) or 0) for n in Replayed(0).counts()})
        try:
            await replay_since(
                runtime.ledger,
                subscription,
                done=done,
                until_ms=until_ms,
                status=status,
                force=force,
                belongs=belongs,
                step=step,
            )
        except SwitchedOff:
            await progress.write(state="failed", error=f"{sub} is switched off; enable it, then replay again")
            return
        await progress.write(state="done", done=1, **done.counts())
        log.info("replay_completed", subscription=sub, **done.counts())


async def erase(ctx: dict[str, Any], number: str, sources: list[str] | None, job: str) -> None:
    """Forget a person by number, in some sources or everywhere. What was found before a restart is gone already."""
    runtime: Runtime = ctx["runtime"]
    progress = Progress(runtime.redis, job)
    step = _erasing(runtime, progress)
    async with _long(ctx, progress) as kept:
        if kept is None:
            return
        books = list(runtime.sources) if sources is None else sources
        eraser = Eraser(runtime.ledger, runtime.storage)
        done = await eraser.number(number, sources=sources, books=books, step=step)
        await progress.write(state="done", done=1, **done.counts())
        log.info("erase_completed", **done.counts())


async def forget_source(ctx: dict[str, Any], sid: str, job: str) -> None:
    """Clear up after a source that was removed; nothing of it is admitted meanwhile."""
    runtime: Runtime = ctx["runtime"]
    progress = Progress(runtime.redis, job)
    async with _long(ctx, progress) as kept:
        if kept is None:
            return
        done = await Eraser(runtime.ledger, runtime.storage).source(sid, step=_erasing(runtime, progress))
        await runtime.markers.delete(sid)
        await runtime.redis.expire(keys.forgotten(sid), REMEMBERED_S)
        await progress.write(state="done", done=1, **done.counts())
        log.info("source_erased", source=sid, **done.counts())


def _erasing(runtime: Runtime, progress: Progress) -> Callable[[Erased], Awaitable[None]]:
    async def step(done: Erased) -> None:
        await progress.write(state="running", **done.counts())
        await heed_cancel(progress)

    return step


@contextlib.asynccontextmanager
async def _long(ctx: dict[str, Any], progress: Progress) -> AsyncIterator[dict[str, str] | None]:
    """Run a long job: gives what it wrote down before, None when it has ended. It is taken up again after a restart,
    and after trouble with the store or the storage."""

    async def nothing() -> None:
        return

    try:
        kept = await progress.read()
        over = kept.get("state") in ("done", "failed")
        async with _beating(ctx, nothing):
            yield None if over else kept
    except Cancelled:
        await progress.write(state="failed", error="cancelled")
    except (RedisError, OSError, StorageError, StoreError) as error:
        log.warning("job_interrupted", job=ctx["job_id"], error=str(error), again_in_s=_STORE_AWAY_S)
        raise Retry(defer=_STORE_AWAY_S) from error
