"""Polling one source: ask, keep what is new, move the cursor last. The promise: no call is missed.

The rules are in window.py; admission is one step of the store (admit.lua). A poll that dies half way has moved nothing:
what it took in is known next time, the rest is asked for again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import structlog

from relay.errors import OddAnswer, OverBudget, ProviderError, RateLimited, RelayError, StorageError, Unauthorized
from relay.events.operations import Operations
from relay.ledger.calls import CHUNK, Landmark, LeaseLost, Ledger, Row
from relay.ledger.lane import Claim
from relay.ledger.runner import Runner
from relay.ledger.sources import SourceState, SourceStates
from relay.model import Record
from relay.poll.window import FLOOR, FUTURE, HEAVY_ROWS, Plan, Standing, Tier, next_cursor, plan
from relay.providers.base import BadRow, Window, excerpt
from relay.recordings.markers import Marker, Markers
from relay.sources import Source

log = structlog.get_logger(__name__)

PAUSE_S = 900
"""A source whose credential is refused is tried again after this, and at once when the credential changes."""
_LONGEST_BACKOFF_S = 300
_MARK_EVERY = timedelta(hours=1)


@dataclass(slots=True)
class Tally:
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

    def count(self, letters: str) -> None:
        """Count the answers of an admission."""
        self.new += letters.count("n")
        self.changed += letters.count("c")
        self.seeded += letters.count("s")


    def add(self, other: "Tally") -> None:
        """Add what another reading came to."""
        for name, count in other.counts().items():
            setattr(self, name, getattr(self, name) + count)

    def counts(self) -> dict[str, int]:
        """What became of the rows."""
        names = ("rows", "new", "changed", "seeded", "bad", "too_old")
        return {name: getattr(self, name) for name in names}


class Reader:
    """Reads a window of a source's calls into the ledger. The poller, a backfill and a stream's catch-up all use it."""

    def __init__(self, ledger: Ledger, states: SourceStates) -> None:
        self._ledger = ledger
        self._states = states

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
        landmark: Callable[[Tally], Landmark] | None = None,
        on_page: Callable[[Tally], None] | None = None,
    ) -> Tally:
        """Read and admit. With `landmark`, what it returns moves together with the last rows, and only then."""
        tally = Tally()
        waiting: list[Row] = []
        async with source.asking() as provider:
            async for page in provider.calls.pages(window):
                tally.size_bytes += page.size_bytes
                if page.server_time is not None:
                    tally.server_ahead_s = (page.server_time - datetime.now(UTC)).total_seconds()
                rows = await self._believe(source, page.rows, tally, now=now, floor=floor, seed_before=seed_before)
                if until is not None:
                    rows = [row for row in rows if row.record.started_at <= until]
                waiting += await self._ledger.unknown(source.id, rows, mapping=source.kind.mapping_version)
                while len(waiting) > CHUNK:
                    await self._admit(source, waiting[:CHUNK], tally, token=token, via=via, now=now)
                    del waiting[:CHUNK]
                if on_page:
                    on_page(tally)
        last = landmark(tally) if landmark else None
        if waiting or last:
            await self._admit(source, waiting, tally, token=token, via=via, now=now, last=last)
        return tally

    async def _admit(
        self,
        source: Source,
        rows: Sequence[Row],
        tally: Tally,
        *,
        token: bytes,
        via: str,
        now: datetime,
        last: Landmark | None = None,
    ) -> None:
        mapping = source.kind.mapping_version
        letters = await self._ledger.admit(source.id, rows, token=token, mapping=mapping, via=via, last=last)
        tally.count(letters)
        for row, letter in zip(rows, letters, strict=True):
            if letter == "n":
                tally.found_late_s.append((now - row.record.started_at).total_seconds())
                log.info("call_admitted", source=source.id, call=row.record.key, via=via)

    async def _believe(
        self,
        source: Source,
        rows: Sequence[Record | BadRow],
        tally: Tally,
        *,
        now: datetime,
        floor: datetime | None,
        seed_before: datetime | None,
    ) -> list[Row]:
        """Keep the rows that make sense; put the others aside where a person can see them."""
        believed: list[Row] = []
        for row in rows:
            tally.rows += 1
            if isinstance(row, Record) and row.started_at > now + FUTURE:
                row = BadRow("starts in the future, further than any time zone explains", row.key, excerpt(row.raw))
            if isinstance(row, BadRow):
                tally.bad += 1
                await self._states.quarantine(source.id, row)
                continue
            if floor is not None and row.started_at < floor:
                tally.too_old += 1
                continue
            if tally.newest is None or row.started_at > tally.newest:
                tally.newest = row.started_at
            believed.append(Row(row, row.content_hash(), seed_before is not None and row.started_at < seed_before))
        return believed


class Poller:
    """Does the work of the poll lane: one claim is one poll of one source."""

    def __init__(
        self,
        ledger: Ledger,
        states: SourceStates,
        sources: Callable[[], Mapping[str, Source]],
        operations: Operations,
        markers: Markers,
        *,
        tiers: Sequence[Tier],
        wake: Callable[[], None],
    ) -> None:
        self._states = states
        self._sources = sources
        self._operations = operations
        self._markers = markers
        self._tiers = tiers
        self._wake = wake
        self._reader = Reader(ledger, states)
        self.runner: Runner

    async def work(self, claims: Sequence[Claim]) -> None:
        """Poll the claimed source and say when it is due again."""
        claim = claims[0]
        source = self._sources().get(claim.item)
        if source is None:
            self.runner.settle(claim, "done")
            return
        began = time.monotonic()
        interval_s = source.options.poll_interval_s
        state = await self._states.read(source.id)
        try:
            tally = await self._poll(source, claim, state)
        except LeaseLost:
            log.warning("poll_overtaken", source=source.id, why="its lease ended and another poller has the source")
            self.runner.settle(claim, "again", wait_ms=int(interval_s * 1000))
            return
        except OverBudget as error:
            self.runner.settle(claim, "again", wait_ms=int(error.wait_s * 1000) + 1)
            return
        except (ProviderError, StorageError) as error:
            wait_s = await self._failed(source, state, error)
            self.runner.settle(claim, "again", wait_ms=int(wait_s * 1000))
            return
        if tally.new or tally.changed:
            self._wake()
        if state.error:
            log.info("source_recovered", source=source.id)
            await self._operations.source_recovered(source, since_ms=state.error_since_ms)
        wait_s = max(interval_s - (time.monotonic() - began), 0.05)
        self.runner.settle(claim, "again", wait_ms=int(wait_s * 1000))

    async def _poll(self, source: Source, claim: Claim, state: SourceState) -> Tally:
        now = _instant(self.runner.lane.store_now_ms)
        standing = state.standing
        recovering = False
        if standing.started_at is None:
            standing, recovering = await self._begin(source, now)
        if recovering and standing.cursor is not None:
            planned = Plan(standing.cursor - FLOOR, tuple(tier.depth_s for tier in self._tiers))
        else:
            planned = plan(standing, self._tiers, now=now)
        old_cursor = standing.cursor

        def landmark(tally: Tally) -> Landmark:
            cursor = next_cursor(standing, tally.newest, poll_started=now)
            fields: dict[str, str | int] = {f"tier:{depth}": _ms(now) for depth in planned.depths}
            fields |= {
                "cursor": _ms(cursor),
                "last_poll": _ms(now),
                "heavy": int(_is_heavy(tally, planned, standing)),
                "error": "",
                "failures": 0,
            }
            return Landmark(fields, _days_to_forget(old_cursor, cursor))

        tally = await self._reader.read(
            source,
            Window(planned.since, now),
            now=now,
            token=claim.token,
            floor=old_cursor - FLOOR if old_cursor and not recovering else None,
            seed_before=standing.started_at if planned.first or recovering else None,
            landmark=landmark,
            on_page=lambda _: self.runner.settle(claim, "renew"),
        )
        if planned.first:
            log.info(
                "source_first_poll",
                source=source.id,
                text=f"{tally.seeded} calls of the last 72 h known, none sent; waiting for the next.",
            )
        await self._states.polled(source.id, rows=tally.rows, bad=tally.bad, too_old=tally.too_old, new=tally.new)
        if tally.server_ahead_s is not None and abs(tally.server_ahead_s) > 60 and not state.clock_noted:
            await self._states.note(source.id, clock_ahead_s=round(tally.server_ahead_s))
            log.warning("clocks_differ", source=source.id, provider_ahead_s=round(tally.server_ahead_s))
        await self._mark(source, standing, next_cursor(standing, tally.newest, poll_started=now), state, now)
        return tally

    async def _begin(self, source: Source, now: datetime) -> tuple[Standing, bool]:
        """First contact with a source: from its marker when the store was lost, else from now on."""
        marker = await self._markers.read(source.id)
        if marker is None:
            started_at = await self._states.begin(source.id, now)
            await self._markers.write(source.id, Marker(started_at, started_at))
            return Standing(started_at=started_at), False
        log.warning("source_recovering", source=source.id, cursor=marker.cursor.isoformat(), why="the store was empty")
        await self._states.begin(source.id, marker.started_at)
        return Standing(started_at=marker.started_at, cursor=marker.cursor), True

    async def _mark(
        self, source: Source, standing: Standing, cursor: datetime, state: SourceState, now: datetime
    ) -> None:
        if standing.started_at and (state.marked_at is None or now - state.marked_at >= _MARK_EVERY):
            await self._markers.write(source.id, Marker(standing.started_at, cursor))
            await self._states.note(source.id, marked_at=_ms(now))

    async def _failed(self, source: Source, state: SourceState, error: RelayError) -> float:
        """Write down what is wrong, tell those who asked to be told, and say when to try again."""
        failures = state.failures + 1
        interval_s = source.options.poll_interval_s
        match error:
            case Unauthorized():
                wait_s: float = PAUSE_S
            case RateLimited(retry_after_s=hint):
                wait_s = hint or interval_s
            case _:
                wait_s = min(interval_s * 2 ** min(failures - 1, 10), max(_LONGEST_BACKOFF_S, interval_s))
        since_ms = await self._states.failed(source.id, str(error), failures=failures)
        lasting = isinstance(error, (Unauthorized, OddAnswer)) or failures >= 5
        if not state.error:
            log.error("source_error", source=source.id, error=str(error), next_try_s=round(wait_s))
        if lasting and not state.error_told:
            await self._operations.source_error(source, str(error), since_ms=since_ms)
            await self._states.note(source.id, error_told=1)
        return wait_s


def _is_heavy(tally: Tally, planned: Plan, standing: Standing) -> bool:
    """Very many rows come back; judged by a look of at least 2 h, so that shorter ones do not switch to and fro."""
    if standing.heavy and max(planned.depths) < 7200:
        return True
    return tally.rows > HEAVY_ROWS and len(planned.depths) == 1


def _days_to_forget(old: datetime | None, new: datetime) -> list[str]:
    """Name the days of `seen` that fell below the floor as the cursor went from `old` to `new`."""
    last = (new - FLOOR).date() - timedelta(days=2)
    first = ((old or new) - FLOOR).date() - timedelta(days=2)
    days: list[str] = []
    day: date = max(first, last - timedelta(days=400))
    while day <= last:
        days.append(day.isoformat())
        day += timedelta(days=1)
    return days


def _instant(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def _ms(instant: datetime) -> int:
    return int(instant.timestamp() * 1000)
