"""Reads a source's rows into the store: validate, skip what is known, ingest. Polls, backfills and streams use it.

Ingestion is one step of the store (ingest.lua), so a reader that dies half way has ingested some rows for good, and the
next one finds them known.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import structlog

from relay import metrics
from relay.domain import ids
from relay.domain.call import InvalidRow, Record, numbered_key
from relay.domain.json import Json
from relay.polling.clock_skew import ahead_s
from relay.polling.completeness import ReadingLog
from relay.polling.window import FUTURE
from relay.providers.base import Window
from relay.providers.parsing import excerpt
from relay.providers.source import Source
from relay.store.calls import CHUNK, Row
from relay.store.codes import RowOutcome
from relay.store.sources import CursorUpdate
from relay.store.store import Store

log = structlog.get_logger(__name__)

_SAME_START_MS = 60_000
_FOUND_WITHIN = ((7_200, "2h"), (93_600, "26h"), (280_800, "78h"))


@dataclass(slots=True)
class PollStats:
    """What became of the rows of one reading."""

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
    log: ReadingLog | None = None

    def count(self, outcomes: Sequence[RowOutcome]) -> None:
        self.new += outcomes.count(RowOutcome.NEW)
        self.changed += outcomes.count(RowOutcome.CHANGED)
        self.seeded += outcomes.count(RowOutcome.SEEDED)

    @property
    def known(self) -> int:
        """Valid rows that lead to no event: known ones, and those that were only recorded."""
        return self.rows - self.new - self.changed - self.bad - self.too_old

    def add(self, other: "PollStats") -> None:
        for name, count in other.counts().items():
            setattr(self, name, getattr(self, name) + count)

    def counts(self) -> dict[str, int]:
        names = ("rows", "new", "changed", "seeded", "bad", "too_old")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingestion:
    """How rows are ingested at `now`; `token` is that of the poll's lease, empty for whatever needs none.

    A row before `floor` is too old to tell from one that `seen` has forgotten, and is skipped; so is one after `until`.
    One before `seed_before` is recorded without being published; rows carry the provider's time, which is corrected for
    where `seed_before_is_ours`. `deep`: completeness is judged by what this reading shows. `only`: ingest just the rows
    with these keys, also where their calls are lost.
    """

    now: datetime
    via: str
    token: bytes = b""
    floor: datetime | None = None
    until: datetime | None = None
    seed_before: datetime | None = None
    deep: bool = False
    only: Collection[str] | None = None
    seed_before_is_ours: bool = False


class Reader:
    def __init__(self, store: Store, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._clock = clock

    async def read(
        self,
        source: Source,
        window: Window,
        ingestion: Ingestion,
        *,
        cursor_update: Callable[[PollStats], CursorUpdate] | None = None,
        on_page: Callable[[PollStats], None] | None = None,
    ) -> PollStats:
        """List a window and ingest it. `cursor_update` is applied in the same step as the last rows, and only then.

        Raises ProviderError, OverBudget, SettingsError, and LeaseLost when `token` is no longer the lease's.
        """
        stats = PollStats(log=ReadingLog.begin(ingestion.floor, now=ingestion.now) if ingestion.deep else None)
        waiting: list[Row] = []
        asked_at = self._clock()
        async for page in source.provider.calls.pages(window):
            stats.size_bytes += page.size_bytes
            if page.server_time is not None and stats.server_ahead_s is None:
                stats.server_ahead_s = ahead_s(page.server_time, asked_at=asked_at, answered_at=self._clock())
            waiting += await self._unseen(source, page.rows, ingestion, stats)
            # The last chunk waits for the end of the list, since the cursor moves with it.
            while len(waiting) > CHUNK:
                await self._ingest(source, waiting[:CHUNK], ingestion, stats)
                del waiting[:CHUNK]
            if on_page:
                on_page(stats)
        update = cursor_update(stats) if cursor_update else None
        if waiting or update:
            await self._ingest(source, waiting, ingestion, stats, update)
        if stats.log is not None:
            # After the rows are ingested: whoever compares both never finds a row shown that is about to be ingested.
            covered = stats.log.covered_days(window.since, zone=source.options.timezone) if ingestion.token else ()
            await self._store.completeness.remember(source.id, stats.log.days, covered=covered, read_at=ingestion.now)
        return stats

    async def ingest(self, source: Source, rows: Sequence[Record | InvalidRow], ingestion: Ingestion) -> PollStats:
        """Ingest rows that a stream delivered; they move no cursor."""
        stats = PollStats()
        unseen = await self._unseen(source, rows, ingestion, stats)
        for start in range(0, len(unseen), CHUNK):
            await self._ingest(source, unseen[start : start + CHUNK], ingestion, stats)
        return stats

    async def _unseen(
        self, source: Source, rows: Sequence[Record | InvalidRow], ingestion: Ingestion, stats: PollStats
    ) -> list[Row]:
        """Return the rows worth ingesting; with deep overlap more than 99 % are repeats."""
        valid = await self._valid(source, rows, ingestion, stats)
        if ingestion.only is not None:
            return [replace(row, restore=True) for row in valid]
        unseen = await self._store.calls.unseen(
            source.id, valid, mapping=source.mapping, with_seeded=ingestion.via == "backfill"
        )
        metrics.ROWS.labels("known").inc(len(valid) - len(unseen))
        return await self._apart(source, unseen)

    async def _apart(self, source: Source, rows: Sequence[Row]) -> list[Row]:
        """Give a row a key of its own where its id was used for another call before, which is kept as it is."""
        apart: list[Row] = []
        for row, identity in zip(rows, await self._identities(source, rows), strict=True):
            number, other = 1, row
            while identity is not None and is_other_call(row.record, *identity):
                number += 1
                record = replace(row.record, key=numbered_key(row.record.key, number))
                other = replace(row, record=record, hash=record.content_hash())
                [identity] = await self._identities(source, [other])
            apart.append(other)
        return apart

    async def _identities(self, source: Source, rows: Sequence[Row]) -> list[tuple[int, Json] | None]:
        return await self._store.calls.identities([ids.call_id(source.id, row.record.key) for row in rows])

    async def _valid(
        self, source: Source, rows: Sequence[Record | InvalidRow], ingestion: Ingestion, stats: PollStats
    ) -> list[Row]:
        """Return the rows in range, and quarantine the invalid ones."""
        if ingestion.seed_before is not None and ingestion.seed_before_is_ours:
            # Rows carry the provider's time: by its clock, the relay started that much later.
            provider_ahead = timedelta(seconds=stats.server_ahead_s or 0)
            ingestion = replace(ingestion, seed_before=ingestion.seed_before + provider_ahead)
        valid: list[Row] = []
        invalid: list[InvalidRow] = []
        too_old = 0
        for row in rows:
            if isinstance(row, InvalidRow):
                invalid.append(row)
            elif row.started_at > ingestion.now + FUTURE:
                reason = "starts in the future, further than any time zone explains"
                invalid.append(InvalidRow(reason, row.key, excerpt(row.raw)))
            elif ingestion.floor is not None and row.started_at < ingestion.floor:
                too_old += 1
                if stats.log is not None:
                    stats.log.add_valid(row, too_old=True)
            else:
                stats.newest = row.started_at if stats.newest is None else max(stats.newest, row.started_at)
                seed = ingestion.seed_before is not None and row.started_at < ingestion.seed_before
                if (ingestion.until is None or row.started_at <= ingestion.until) and (
                    ingestion.only is None or row.key in ingestion.only
                ):
                    valid.append(Row(row, row.content_hash(), seed))
        valid, conflicting = one_row_per_key(valid)
        invalid += conflicting
        if stats.log is not None:
            for listed in valid:
                stats.log.add_valid(listed.record)
            for rejected in invalid:
                stats.log.add_invalid(rejected)
        stats.rows += len(rows)
        stats.bad += len(invalid)
        stats.too_old += too_old
        metrics.ROWS.labels("quarantined").inc(len(invalid))
        metrics.ROWS.labels("too_old").inc(too_old)
        if invalid and (quarantined := await self._store.sources.quarantine(source.id, invalid)):
            log.warning("rows_quarantined", source=source.id, rows=quarantined, reason=invalid[0].reason)
        return valid

    async def _ingest(
        self,
        source: Source,
        rows: Sequence[Row],
        ingestion: Ingestion,
        stats: PollStats,
        cursor_update: CursorUpdate | None = None,
    ) -> None:
        rows = await self._with_details(source, rows)
        outcomes = await self._store.calls.ingest(
            source.id,
            rows,
            token=ingestion.token,
            mapping=source.mapping,
            via=ingestion.via,
            cursor_update=cursor_update,
        )
        stats.count(outcomes)
        for outcome in RowOutcome:
            if count := outcomes.count(outcome):
                metrics.ROWS.labels(outcome.value).inc(count)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome is RowOutcome.NEW:
                late_s = (ingestion.now - row.record.started_at).total_seconds()
                stats.found_late_s.append(late_s)
                metrics.CALLS.labels(_found_within(late_s)).inc()
                log.info("call_ingested", source=source.id, call=row.record.key, via=ingestion.via)

    async def _with_details(self, source: Source, rows: Sequence[Row]) -> list[Row]:
        """Add what the list only announces, such as a transcript, to the rows that will be published."""
        if source.provider.details is None:
            return list(rows)
        published = [row.record for row in rows if not row.seed]
        records = iter(await source.provider.details.complete(published))
        return [
            row if row.seed else replace(row, record=(record := next(records)), hash=record.content_hash())
            for row in rows
        ]


def one_row_per_key(rows: Sequence[Row]) -> tuple[list[Row], list[InvalidRow]]:
    """Keep one row of each key: the later one, but a finished one before one in progress. The others are invalid."""
    chosen: dict[str, Row] = {}
    conflicting: list[InvalidRow] = []
    for row in rows:
        former = chosen.get(row.record.key)
        if former is None or former.hash == row.hash:
            chosen[row.record.key] = row
            continue
        loser, winner = (row, former) if former.record.finished and not row.record.finished else (former, row)
        chosen[row.record.key] = winner
        reason = "another row of the same response has this id and other content, and was ingested"
        conflicting.append(InvalidRow(reason, loser.record.key, excerpt(loser.record.raw)))
    return list(chosen.values()), conflicting


def is_other_call(record: Record, started_ms: int, stored: Json) -> bool:
    """Whether a row is about another call than the stored one with its key: another start, and other numbers."""
    content = record.content()
    numbers, stored_numbers = ([part[side]["raw"] for side in ("from", "to")] for part in (content, stored))
    return abs(record.started_at.timestamp() * 1000 - started_ms) > _SAME_START_MS and numbers != stored_numbers


def _found_within(late_s: float) -> str:
    return next((label for limit_s, label in _FOUND_WITHIN if late_s <= limit_s), "older")
