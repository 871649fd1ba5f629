"""Polling one source: ask, keep what is new, move the cursor last. The promise: no call is missed.

The rules are in window.py; ingestion is one step of the store (ingest.lua). A poll that dies half way moves nothing:
what it took in is known next time, the rest is asked for again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import structlog

from relay import metrics
from relay.domain.call import InvalidRow, Record
from relay.domain.polling import Delays, PollState
from relay.errors import OverBudget, RateLimited, RelayError, SettingsError, Unauthorized, UnexpectedResponse
from relay.events.operations import Operations
from relay.polling.clock_skew import NOTED_S, ahead_s, rows_look_like
from relay.polling.window import FUTURE, Plan, Tier, days_to_forget, floor, heavy_after, next_cursor, plan
from relay.providers.base import Window
from relay.providers.parsing import excerpt
from relay.providers.source import Source
from relay.recordings.markers import Marker, Markers
from relay.store.calls import CHUNK, Row
from relay.store.codes import RowOutcome
from relay.store.sources import CursorUpdate, SourceNote, SourceState
from relay.store.store import Store

log = structlog.get_logger(__name__)

Now = Callable[[], datetime]

PAUSE_S = 900
"""A source whose credential is refused is tried again after this, and at once when the credential changes."""
LASTING_FAILURES = 5
"""So many failures in a row are told as `source.error`; what needs a person is told at once."""
_LONGEST_BACKOFF_S = 300
_LONGEST_HINT_S = 3600
_MARK_EVERY = timedelta(hours=1)
_MARK_AGAIN = timedelta(minutes=5)
_SOON = timedelta(minutes=10)
_FOUND_WITHIN = ((7_200, "2h"), (93_600, "26h"), (280_800, "78h"))


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class PollStats:
    """What one reading of the call list came to."""

    rows: int = 0
    new: int = 0
    changed: int = 0
    seeded: int = 0
    bad: int = 0
    too_old: int = 0
    size_bytes: int = 0
    newest: datetime | None = None
    server_ahead_s: float | None = None
    found_late_s: list[float] = field(default_factory=list)

    def count(self, outcomes: Sequence[RowOutcome]) -> None:
        """Count what ingesting some rows came to."""
        self.new += outcomes.count(RowOutcome.NEW)
        self.changed += outcomes.count(RowOutcome.CHANGED)
        self.seeded += outcomes.count(RowOutcome.SEEDED)

    @property
    def known(self) -> int:
        """Rows that were there already, or are from now on, without being told."""
        return self.rows - self.new - self.changed - self.bad - self.too_old

    def add(self, other: "PollStats") -> None:
        """Add what another reading came to."""
        for name, count in other.counts().items():
            setattr(self, name, getattr(self, name) + count)

    def counts(self) -> dict[str, int]:
        """What became of the rows."""
        names = ("rows", "new", "changed", "seeded", "bad", "too_old")
        return {name: getattr(self, name) for name in names}


class Reader:
    """Reads a window of a source's calls into the store, for the poller, a backfill and a stream's catch-up alike."""

    def __init__(self, store: Store, *, clock: Now = _utc_now) -> None:
        self._store = store
        self._clock = clock

    async def read(
        self,
        source: Source,
        window: Window,
        *,
        now: datetime,
        token: bytes = b"",
        via: str = "poll",
        floor: datetime | None = None,
        until: datetime | None = None,
        seed_before: datetime | None = None,
        cursor_update: Callable[[PollStats], CursorUpdate] | None = None,
        on_page: Callable[[PollStats], None] | None = None,
    ) -> PollStats:
        """Read and ingest. With `cursor_update`, what it returns moves together with the last rows, and only then."""
        stats = PollStats()
        waiting: list[Row] = []
        asked = self._clock()
        async for page in source.provider.calls.pages(window):
            stats.size_bytes += page.size_bytes
            if page.server_time is not None and stats.server_ahead_s is None:
                stats.server_ahead_s = ahead_s(page.server_time, asked=asked, answered=self._clock())
            rows = await self._believe(source, page.rows, stats, now=now, floor=floor, seed_before=seed_before)
            if until is not None:
                rows = [row for row in rows if row.record.started_at <= until]
            fresh = await self._store.calls.unseen(
                source.id, rows, mapping=source.kind.mapping_version, with_seeded=via == "backfill"
            )
            metrics.ROWS.labels("known").inc(len(rows) - len(fresh))
            waiting += fresh
            while len(waiting) > CHUNK:
                await self._ingest(source, waiting[:CHUNK], stats, token=token, via=via, now=now)
                del waiting[:CHUNK]
            if on_page:
                on_page(stats)
        update = cursor_update(stats) if cursor_update else None
        if waiting or update:
            await self._ingest(source, waiting, stats, token=token, via=via, now=now, cursor_update=update)
        return stats

    async def take(
        self,
        source: Source,
        rows: Sequence[Record | InvalidRow],
        *,
        now: datetime,
        via: str,
        floor: datetime | None = None,
    ) -> PollStats:
        """Admit rows that came by themselves; they move no cursor."""
        stats = PollStats()
        believed = await self._believe(source, rows, stats, now=now, floor=floor, seed_before=None)
        fresh = await self._store.calls.unseen(source.id, believed, mapping=source.kind.mapping_version)
        metrics.ROWS.labels("known").inc(len(believed) - len(fresh))
        for start in range(0, len(fresh), CHUNK):
            await self._ingest(source, fresh[start : start + CHUNK], stats, token=b"", via=via, now=now)
        return stats

    async def _complete(self, source: Source, rows: Sequence[Row]) -> list[Row]:
        """Add what the list only announced, such as a transcript; what is not told needs none."""
        if source.provider.details is None:
            return list(rows)
        told = [row.record for row in rows if not row.seed]
        records = iter(await source.provider.details.complete(told))
        return [row if row.seed else Row(record := next(records), record.content_hash()) for row in rows]

    async def _ingest(
        self,
        source: Source,
        rows: Sequence[Row],
        stats: PollStats,
        *,
        token: bytes,
        via: str,
        now: datetime,
        cursor_update: CursorUpdate | None = None,
    ) -> None:
        mapping = source.kind.mapping_version
        rows = await self._complete(source, rows)
        outcomes = await self._store.calls.ingest(
            source.id, rows, token=token, mapping=mapping, via=via, cursor_update=cursor_update
        )
        stats.count(outcomes)
        for outcome in RowOutcome:
            if count := outcomes.count(outcome):
                metrics.ROWS.labels(outcome.value).inc(count)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome is RowOutcome.NEW:
                late_s = (now - row.record.started_at).total_seconds()
                stats.found_late_s.append(late_s)
                metrics.CALLS.labels(_found_within(late_s)).inc()
                log.info("call_ingested", source=source.id, call=row.record.key, via=via)

    async def _believe(
        self,
        source: Source,
        rows: Sequence[Record | InvalidRow],
        stats: PollStats,
        *,
        now: datetime,
        floor: datetime | None,
        seed_before: datetime | None,
    ) -> list[Row]:
        """Keep the rows that make sense; put the others aside where a person can see them."""
        if seed_before is not None:
            # The rows' times are the provider's: by its clock, the relay began that much later.
            seed_before += timedelta(seconds=stats.server_ahead_s or 0)
        believed: list[Row] = []
        bad: list[InvalidRow] = []
        too_old = 0
        for row in rows:
            if isinstance(row, Record) and row.started_at > now + FUTURE:
                row = InvalidRow("starts in the future, further than any time zone explains", row.key, excerpt(row.raw))
            if isinstance(row, InvalidRow):
                bad.append(row)
                continue
            if floor is not None and row.started_at < floor:
                too_old += 1
                continue
            if stats.newest is None or row.started_at > stats.newest:
                stats.newest = row.started_at
            believed.append(Row(row, row.content_hash(), seed_before is not None and row.started_at < seed_before))
        stats.rows += len(rows)
        stats.bad += len(bad)
        stats.too_old += too_old
        metrics.ROWS.labels("quarantined").inc(len(bad))
        metrics.ROWS.labels("too_old").inc(too_old)
        if bad and (fresh := await self._store.sources.quarantine(source.id, bad)):
            log.warning("rows_quarantined", source=source.id, rows=fresh, reason=bad[0].reason)
        return believed


class Poller:
    """Polls a source under a lease of the poll lane. `now` is the store's time."""

    def __init__(
        self,
        store: Store,
        operations: Operations,
        markers: Markers,
        *,
        tiers: Sequence[Tier],
        wake: Callable[[], None],
        now: Now,
    ) -> None:
        self._store = store
        self._operations = operations
        self._markers = markers
        self._tiers = tiers
        self._wake = wake
        self._now = now
        self._reader = Reader(store, clock=now)

    async def poll(self, source: Source, *, token: bytes, renew_lease: Callable[[], None]) -> tuple[str, float]:
        """Poll once; returns how that ended, and seconds until the next poll. Raises LeaseLost."""
        began = time.monotonic()
        state = await self._store.sources.read(source.id)
        try:
            await self._poll(source, state, token, renew_lease)
        except OverBudget as error:
            return "over_budget", error.wait_s
        except RelayError as error:
            return _outcome(error), await self._failed(source, token, error)
        if state.error:
            log.info("source_recovered", source=source.id)
        if state.error_published:
            await self._operations.source_recovered(source, since_ms=state.error_since_ms)
            await self._store.sources.note(source.id, error_published=False)
        return "ok", max(source.options.poll_interval_s - (time.monotonic() - began), 0.05)

    async def _poll(self, source: Source, state: SourceState, token: bytes, renew_lease: Callable[[], None]) -> None:
        now = self._now()
        poll_state = state.poll_state
        if poll_state.started_at is None:
            poll_state = await self._begin(source, now)
        planned = plan(poll_state, self._tiers, now=now)

        def cursor_update(stats: PollStats) -> CursorUpdate:
            cursor = next_cursor(poll_state, stats.newest, poll_started=now)
            heavy = heavy_after(poll_state, planned, self._tiers, rows=stats.rows, size_bytes=stats.size_bytes)
            forget_days = days_to_forget(poll_state.cursor, cursor)
            return CursorUpdate(cursor, now, planned.depths, heavy=heavy, forget_days=forget_days)

        stats = await self._reader.read(
            source,
            Window(planned.since, now),
            now=now,
            token=token,
            floor=floor(poll_state, now=now),
            seed_before=poll_state.started_at if planned.first or planned.recovery else None,
            cursor_update=cursor_update,
            on_page=lambda _: renew_lease(),
        )
        if stats.new or stats.changed:
            self._wake()
        if planned.first or planned.recovery:
            log.info("source_first_polled", source=source.id, text=first_sentence(planned, stats))
        note = self._note_clocks(source, state, stats) | self._note_zone(source, state, planned, stats, now)
        await self._store.sources.poll_succeeded(
            source.id, rows=stats.rows, invalid=stats.bad, too_old=stats.too_old, new=stats.new, note=note
        )
        await self._mark(source, poll_state, next_cursor(poll_state, stats.newest, poll_started=now), state, now)

    async def _begin(self, source: Source, now: datetime) -> PollState:
        """First contact with a source: from its marker when the store was lost, else from now on."""
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

    async def _mark(
        self, source: Source, poll_state: PollState, cursor: datetime, state: SourceState, now: datetime
    ) -> None:
        """Renew the marker when that is due; a storage that refuses is asked again soon, but not with each poll."""
        due = state.marker_due
        if poll_state.started_at is None or (due is not None and now < due <= now + _MARK_EVERY):
            return
        written = await self._markers.write(source.id, Marker(poll_state.started_at, cursor))
        await self._store.sources.note(source.id, marker_due=now + (_MARK_EVERY if written else _MARK_AGAIN))

    def _note_clocks(self, source: Source, state: SourceState, stats: PollStats) -> SourceNote:
        """Say once that the provider's clock is off, and once that it is not any more."""
        ahead = stats.server_ahead_s
        if ahead is None or (abs(ahead) > NOTED_S) == bool(state.clock_ahead_s):
            return {}
        if state.clock_ahead_s:
            log.info("clock_skew_resolved", source=source.id)
            return {"clock_ahead_s": None}
        log.warning("clock_skew_detected", source=source.id, provider_ahead_s=round(ahead))
        return {"clock_ahead_s": round(ahead)}

    def _note_zone(
        self, source: Source, state: SourceState, planned: Plan, stats: PollStats, now: datetime
    ) -> SourceNote:
        """Judge the zone by how late calls are seen where one poll follows the other; say so when that changes."""
        steady = not (planned.first or planned.recovery) and state.last_poll and now - state.last_poll <= _SOON
        if not steady or not stats.found_late_s:
            return {}
        ahead = stats.server_ahead_s or 0.0
        delays = state.delays.and_(late_s + ahead for late_s in stats.found_late_s)
        off_s = delays.off_s()
        if off_s is None:
            return {"delays": delays}
        if off_s and off_s != state.zone_off_s:
            offset = now.astimezone(ZoneInfo(source.options.timezone)).utcoffset() or timedelta()
            log.warning(
                "timezone_mismatch_detected",
                source=source.id,
                configured=source.options.timezone,
                rows_look_like=rows_look_like(offset, off_s),
                action="set the source's timezone to the account's; `relay check` shows the age of its newest call",
            )
        elif not off_s and state.zone_off_s:
            log.info("timezone_mismatch_resolved", source=source.id)
        return {"delays": Delays(), "zone_off_s": off_s}

    async def _failed(self, source: Source, token: bytes, error: RelayError) -> float:
        """Write down what is wrong, tell those who asked to be told, and say when to try again."""
        failing = await self._store.sources.poll_failed(source.id, str(error), token=token)
        wait_s = _wait_s(error, failing.failures, source.options.poll_interval_s)
        if failing.new:
            log.error("source_poll_failed", source=source.id, error=str(error), retry_in_s=round(wait_s))
        needs_a_person = isinstance(error, Unauthorized | UnexpectedResponse | SettingsError)
        if (needs_a_person or failing.failures >= LASTING_FAILURES) and not failing.published:
            await self._operations.source_error(source, str(error), since_ms=failing.since_ms)
            await self._store.sources.note(source.id, error_published=True)
        return wait_s


def first_sentence(planned: Plan, stats: PollStats) -> str:
    """Tell the person who started the relay what the first look came to."""
    calls = "1 call" if stats.known == 1 else f"{stats.known} calls"
    if planned.recovery:
        return f"{calls} of before the relay began known, {stats.new} since then sent (again); waiting for the next."
    if stats.new:
        return f"{calls} of the 78 h before the relay began known, {stats.new} since then sent; waiting for the next."
    return f"{calls} of the last 78 h known, none sent; waiting for the next."


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
            return min(hint or interval_s, _LONGEST_HINT_S)
        case _:
            return float(min(interval_s * 2 ** min(failures - 1, 10), max(_LONGEST_BACKOFF_S, interval_s)))


def _found_within(late_s: float) -> str:
    return next((label for limit_s, label in _FOUND_WITHIN if late_s <= limit_s), "older")
