"""Polls one source: plan how far back to look, read, move the cursor last. Promise: no call is missed.

The rules are in window.py. A look that fails half way moves no cursor: what it ingested is known to the next one, and
the rest is requested again. The near look comes first, at each poll; deeper ones never delay it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import structlog

from relay import metrics
from relay.domain.polling import Delays, PollState, TierFailure
from relay.domain.time import iso
from relay.errors import (
    OverBudget,
    RateLimited,
    RelayError,
    SettingsError,
    Unauthorized,
    Unavailable,
    UnexpectedResponse,
)
from relay.events.operations import Operations
from relay.polling.clock_skew import NOTABLE_SKEW_S, apparent_zone
from relay.polling.reader import Ingestion, PollStats, Reader
from relay.polling.window import (
    Look,
    Tier,
    TierUpdate,
    after_failure,
    after_success,
    covers,
    days_to_forget,
    floor,
    heavy_after,
    next_cursor,
    not_read_yet,
    plan,
    shortened,
)
from relay.providers.base import Window
from relay.providers.source import Source
from relay.recordings.markers import Marker, Markers
from relay.store.sources import CursorUpdate, SourceNote, SourceState
from relay.store.store import Store
from relay.tasks import cancel

log = structlog.get_logger(__name__)

# Wait after a credential was rejected.
PAUSE_S = 900
# So many failures in a row are published as `source.error`; what needs a person is published at once.
LASTING_FAILURES = 5
# Each request has a time limit of its own, but a look may need very many.
NEAR_DEADLINE_S = 600
DEEPER_DEADLINE_S = 1800
_LONGEST_BACKOFF_S = 300
_MARKER_EVERY = timedelta(hours=1)
_MARKER_RETRY = timedelta(minutes=5)
_STEADY = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class _Near:
    """What became of the near look: the outcome of the poll, when the next one is due, and which looks follow."""

    outcome: str
    wait_s: float
    looks: Sequence[Look] = ()
    first: bool = False
    recovery: bool = False
    stats: PollStats = field(default_factory=PollStats)


class Poller:
    """Polls sources, each under a lease of the poll lane.

    `now` is the store's clock; `wake` is called when calls were ingested.
    """

    def __init__(
        self,
        store: Store,
        operations: Operations,
        markers: Markers,
        *,
        tiers: Sequence[Tier],
        wake: Callable[[], None],
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._operations = operations
        self._markers = markers
        self._tiers = tiers
        self._wake = wake
        self._now = now
        self._reader = Reader(store, clock=now)

    async def poll(
        self, source: Source, *, token: bytes, is_current: Callable[[], bool] = lambda: True
    ) -> tuple[str, float]:
        """Poll once; return the outcome (a label of `relay_polls_total`) and the seconds until the next poll.

        While deeper looks are under way, the near one is repeated at its interval, as long as the source `is_current`.
        Raises LeaseLost when another process polls the source by now.
        """
        near = await self._poll_near(source, token)
        ended_s = time.monotonic()
        if near.looks:
            deeper = asyncio.create_task(self._look_deeper(source, near, token), name=f"deeper:{source.id}")
            try:
                while not (await asyncio.wait({deeper}, timeout=near.wait_s))[0] and is_current():
                    metrics.POLLS.labels(near.outcome).inc()
                    near = await self._poll_near(source, token)
                    ended_s = time.monotonic()
                if deeper.done():
                    await deeper
            finally:
                await cancel(deeper)
            return near.outcome, max(ended_s + near.wait_s - time.monotonic(), 0.05)
        return near.outcome, near.wait_s

    async def _poll_near(self, source: Source, token: bytes) -> _Near:
        """Take the near look, on which the health of the source depends."""
        started_s = time.monotonic()
        state = await self._store.sources.read(source.id)
        try:
            async with _deadline(NEAR_DEADLINE_S):
                near = await self._near(source, state, token, started_s)
        except OverBudget as error:
            return _Near("over_budget", error.wait_s)
        except RelayError as error:
            return _Near(_outcome(error), await self._failed(source, token, error))
        if state.error:
            log.info("source_recovered", source=source.id)
        if state.error_published:
            await self._operations.source_recovered(source, since_ms=state.error_since_ms)
            await self._store.sources.note(source.id, error_published=False)
        return near

    async def _near(self, source: Source, state: SourceState, token: bytes, started_s: float) -> _Near:
        now = self._now()
        if state.poll_state.started_at is None:
            state = replace(state, poll_state=await self._begin(source, now))
        poll_state = state.poll_state
        look, *others = plan(poll_state, self._tiers, now=now)
        try:
            stats, cursor = await self._look_near(source, state, look, others, token, now)
        except (Unavailable, UnexpectedResponse) as error:
            shorter = shortened(look, now=now)
            if shorter is None:
                raise
            failure = after_failure(poll_state, look, self._tiers, str(error), now=now)
            stats, cursor = await self._look_near(source, state, shorter, others, token, now, failure=failure)
            self._report_gap(source, poll_state, look, failure)
        await self._write_marker(source, poll_state, cursor, state, now)
        first, recovery = not poll_state.polled, poll_state.cursor is not None
        wait_s = max(source.options.poll_interval_s - (time.monotonic() - started_s), 0.05)
        return _Near("ok", wait_s, others, first=first, recovery=recovery, stats=stats)

    async def _look_near(
        self,
        source: Source,
        state: SourceState,
        look: Look,
        others: Sequence[Look],
        token: bytes,
        now: datetime,
        *,
        failure: TierFailure | None = None,
    ) -> tuple[PollStats, datetime]:
        """Read the near tier; return the cursor too. `failure` is that of the longer look that this one stands for."""
        poll_state = state.poll_state

        def cursor_update(stats: PollStats) -> CursorUpdate:
            tiers = after_success(poll_state, look, self._tiers, now=now)
            failing = dict(tiers.failing)
            if failure is not None:
                failing[look.depth_s] = failure
            if not poll_state.polled:
                failing |= {other.depth_s: not_read_yet(other, now=now) for other in others}
            unused = [depth_s for depth_s in poll_state.reached if depth_s > self._tiers[-1].depth_s]
            tiers = TierUpdate(tiers.reached, failing)
            cursor = next_cursor(poll_state, stats.newest, poll_started=now)
            after = tiers.apply(replace(poll_state, cursor=cursor))
            return CursorUpdate(
                polled_at=now,
                cursor=cursor,
                known_since=None if poll_state.polled else min(look.since, poll_state.started_at or now),
                reached={**dict.fromkeys(unused), **tiers.reached},
                failing=failing,
                heavy=self._heavy_after(poll_state, look, stats, now),
                forget_days=days_to_forget(floor(poll_state, now=now), floor(after, now=now)),
            )

        stats = await self._read(source, state, look, token, now, cursor_update)
        self._report_gaps_closed(source, poll_state, after_success(poll_state, look, self._tiers, now=now))
        return stats, next_cursor(poll_state, stats.newest, poll_started=now)

    async def _look_deeper(self, source: Source, near: _Near, token: bytes) -> None:
        """Take the looks that follow the near one. Each succeeds or fails for itself, and is no error of the source."""
        complete: Look | None = None
        stats = PollStats()
        for look in near.looks:
            if complete and covers(complete, look):
                continue
            state, now = await self._store.sources.read(source.id), self._now()
            try:
                async with _deadline(DEEPER_DEADLINE_S):
                    look_stats = await self._look_back(source, state, look, token, now)
            except (OverBudget, RateLimited):
                return  # the budget is closed for every tier; this one stays due
            except RelayError as error:
                failure = after_failure(state.poll_state, look, self._tiers, str(error), now=now)
                await self._store.sources.tier_failed(source.id, look.depth_s, failure)
                self._report_gap(source, state.poll_state, look, failure)
                continue
            if look.complete:
                complete = complete or look
                stats = look_stats if stats.rows < look_stats.rows else stats
        if near.first:
            depth_s = complete.depth_s if complete else self._tiers[0].depth_s
            log.info("source_first_polled", source=source.id, text=summarise_first_poll(near, stats, depth_s))

    async def _look_back(
        self, source: Source, state: SourceState, look: Look, token: bytes, now: datetime
    ) -> PollStats:
        """Read a deeper tier. It moves no cursor."""
        poll_state = state.poll_state
        tiers = after_success(poll_state, look, self._tiers, now=now)
        known_since = poll_state.known_since
        if known_since is not None:
            known_since = look.since if look.since < known_since else None

        def update(stats: PollStats) -> CursorUpdate:
            return CursorUpdate(
                polled_at=now,
                known_since=known_since,
                reached=tiers.reached,
                failing=tiers.failing,
                heavy=self._heavy_after(poll_state, look, stats, now),
                forget_days=days_to_forget(floor(poll_state, now=now), floor(tiers.apply(poll_state), now=now)),
            )

        stats = await self._read(source, state, look, token, now, update)
        self._report_gaps_closed(source, poll_state, tiers)
        return stats

    def _heavy_after(self, poll_state: PollState, look: Look, stats: PollStats, now: datetime) -> bool | None:
        """Judge whether polls are heavy; None where that did not change."""
        heavy = heavy_after(poll_state, look, self._tiers, rows=stats.rows, size_bytes=stats.size_bytes, now=now)
        return heavy if heavy is not poll_state.heavy else None

    async def _read(
        self,
        source: Source,
        state: SourceState,
        look: Look,
        token: bytes,
        now: datetime,
        cursor_update: Callable[[PollStats], CursorUpdate],
    ) -> PollStats:
        poll_state = state.poll_state
        # A provider whose clock is ahead dates its newest calls later than our now.
        until = now + timedelta(seconds=max(state.clock_ahead_s or 0, 0))
        stats = await self._reader.read(
            source,
            Window(look.since, until),
            Ingestion(
                now=now,
                via="poll",
                token=token,
                floor=floor(poll_state, now=now),
                seed_before=poll_state.known_since or poll_state.started_at,
                seed_before_is_ours=not poll_state.polled,
                deep=look.depth_s > self._tiers[0].depth_s or len(self._tiers) == 1,
            ),
            cursor_update=cursor_update,
        )
        if stats.new or stats.changed:
            self._wake()
        steady = poll_state.polled and state.last_poll is not None and now - state.last_poll <= _STEADY
        note = self._note_clock_skew(source, state, stats)
        if steady and stats.found_late_s:
            note |= self._note_zone(source, state, stats, now)
        await self._store.sources.look_succeeded(
            source.id, invalid=stats.bad, too_old=stats.too_old, new=stats.new, note=note
        )
        return stats

    def _report_gap(self, source: Source, poll_state: PollState, look: Look, failure: TierFailure) -> None:
        former = poll_state.failing.get(look.depth_s)
        if former is None or not former.error:
            log.warning(
                "source_gap_opened",
                source=source.id,
                reason=failure.text,
                next_attempt_at=iso(failure.next_attempt),
            )

    def _report_gaps_closed(self, source: Source, poll_state: PollState, tiers: TierUpdate) -> None:
        for depth_s, failure in tiers.failing.items():
            former = poll_state.failing.get(depth_s)
            if failure is None and former is not None and former.error:
                log.info("source_gap_closed", source=source.id, since=iso(former.since), until=iso(former.until))

    async def _begin(self, source: Source, now: datetime) -> PollState:
        """Start polling a source: from its marker when the store was lost, else from now on."""
        marker = await self._markers.read(source.id)
        if marker is None:
            poll_state = await self._store.sources.begin(source.id, now)
            started_at = poll_state.started_at or now
            await self._markers.write(source.id, Marker(started_at, started_at))
            return poll_state
        log.warning(
            "source_recovery_started", source=source.id, cursor=marker.cursor.isoformat(), reason="the store was empty"
        )
        return await self._store.sources.begin(source.id, marker.started_at, cursor=marker.cursor)

    async def _write_marker(
        self, source: Source, poll_state: PollState, cursor: datetime, state: SourceState, now: datetime
    ) -> None:
        """Write the marker when it is due; after a failure it is due again soon, but not at each poll."""
        due = state.marker_due
        if poll_state.started_at is None or (due is not None and now < due <= now + _MARKER_EVERY):
            return
        written = await self._markers.write(source.id, Marker(poll_state.started_at, cursor))
        await self._store.sources.note(source.id, marker_due=now + (_MARKER_EVERY if written else _MARKER_RETRY))

    def _note_clock_skew(self, source: Source, state: SourceState, stats: PollStats) -> SourceNote:
        """Report once that the provider's clock is wrong, and once that it is right again."""
        ahead = stats.server_ahead_s
        if ahead is None or (abs(ahead) > NOTABLE_SKEW_S) == bool(state.clock_ahead_s):
            return {}
        if state.clock_ahead_s:
            log.info("clock_skew_resolved", source=source.id)
            return {"clock_ahead_s": None}
        log.warning("clock_skew_detected", source=source.id, provider_ahead_s=round(ahead))
        return {"clock_ahead_s": round(ahead)}

    def _note_zone(self, source: Source, state: SourceState, stats: PollStats, now: datetime) -> SourceNote:
        """Judge the time zone by how late calls are seen while polls follow each other; report when that changes."""
        ahead = stats.server_ahead_s or 0.0
        delays = state.delays.plus(late_s + ahead for late_s in stats.found_late_s)
        off_s = delays.off_s()
        if off_s is None:
            return {"delays": delays}
        if off_s and off_s != state.zone_off_s:
            offset = now.astimezone(ZoneInfo(source.options.timezone)).utcoffset() or timedelta()
            log.warning(
                "timezone_mismatch_detected",
                source=source.id,
                configured=source.options.timezone,
                rows_look_like=apparent_zone(offset, off_s),
                action="set the source's timezone to the account's; `relay check` shows the age of its newest call",
            )
        elif not off_s and state.zone_off_s:
            log.info("timezone_mismatch_resolved", source=source.id)
        return {"delays": Delays(), "zone_off_s": off_s}

    async def _failed(self, source: Source, token: bytes, error: RelayError) -> float:
        """Record the failure, publish it when it lasts or needs a person; return the seconds until the next poll."""
        failing = await self._store.sources.poll_failed(source.id, str(error), token=token)
        wait_s = _wait_s(error, failing.failures, source.options.poll_interval_s)
        if failing.new:
            log.error("source_poll_failed", source=source.id, error=str(error), retry_in_s=round(wait_s))
        needs_a_person = isinstance(error, Unauthorized | UnexpectedResponse | SettingsError)
        if (needs_a_person or failing.failures >= LASTING_FAILURES) and not failing.published:
            await self._operations.source_error(source, str(error), since_ms=failing.since_ms)
            await self._store.sources.note(source.id, error_published=True)
        return wait_s


def summarise_first_poll(near: _Near, deeper: PollStats, depth_s: int) -> str:
    """Describe the first poll to the person who started the relay; `depth_s` is how far back it could look."""
    new = near.stats.new + deeper.new
    # A deeper look finds known what the near one has just ingested.
    known = deeper.known - near.stats.new if deeper.rows else near.stats.known
    calls = "1 call" if known == 1 else f"{known} calls"
    if near.recovery:
        return f"{calls} from before the relay recorded, {new} published since then (again); waiting for calls."
    hours = round(depth_s / 3600)
    if new:
        return f"{calls} of the {hours} h before the relay recorded, {new} since then published; waiting for calls."
    return f"{calls} of the last {hours} h recorded, none published; waiting for calls."


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Unavailable(f"the provider's call list took longer than {seconds / 60:.0f} minutes") from error


def _outcome(error: RelayError) -> str:
    match error:
        case Unauthorized():
            return "unauthorized"
        case RateLimited():
            return "rate_limited"
        case UnexpectedResponse():
            return "odd_answer"
        case _:
            return "failed"


def _wait_s(error: RelayError, failures: int, interval_s: float) -> float:
    match error:
        case Unauthorized():
            return PAUSE_S
        case RateLimited(retry_after_s=hint):
            return hint or interval_s
        case _:
            return float(min(interval_s * 2 ** min(failures - 1, 10), max(_LONGEST_BACKOFF_S, interval_s)))
