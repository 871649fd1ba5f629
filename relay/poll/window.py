"""When to ask and how far back: pure, so every question about lost calls is a table in a test.

Every provider filters on the start of a call, and a call is listed after its end: whoever asks only for what is newer
than the newest call loses the long ones. So each poll reaches back, and now and then one reaches far back (tiers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

SEED_DEPTH = timedelta(hours=78)
"""How far back the first poll looks to know, without telling, what was there before the relay."""
FLOOR = timedelta(hours=96)
"""Rows older than the cursor less this are no longer taken for new: `seen` forgets them."""
FUTURE = timedelta(hours=26)
"""A row that starts further ahead than any time zone explains is not believed."""
GAP = timedelta(hours=2)
"""After a silence longer than this the deepest tier goes first."""
HEAVY_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Tier:
    """Every `every_s` seconds (0: at each poll) look `depth_s` seconds further back than needed."""

    every_s: int
    depth_s: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a source stands: aware UTC, None where it never was. `reached` is each tier's last success, by depth."""

    started_at: datetime | None = None
    cursor: datetime | None = None
    reached: Mapping[int, datetime] | None = None
    heavy: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Ask for what started after `since`; success counts for the tiers whose depth is in `depths`."""

    since: datetime
    depths: tuple[int, ...]
    first: bool = False


def effective(tiers: Sequence[Tier], *, heavy: bool) -> list[Tier]:
    """The tiers in force: where polls return very many rows, the first step is shorter and the 2 h one less often."""
    if not heavy:
        return list(tiers)
    steps = [tier for tier in tiers if tier.every_s > 0]
    return [Tier(0, 600), Tier(120, 7200), *steps]


def plan(standing: Standing, tiers: Sequence[Tier], *, now: datetime) -> Plan:
    """Decide how far back the poll at `now` looks. Each tier that is due reaches back from its own last success."""
    in_force = effective(tiers, heavy=standing.heavy)
    every_depth = tuple(tier.depth_s for tier in in_force)
    if standing.cursor is None or not standing.reached:
        base = standing.started_at or now
        return Plan(min(base, now) - SEED_DEPTH, every_depth, first=True)
    last = max(standing.reached.values())
    after_gap = now - last > GAP
    since = now
    depths: list[int] = []
    for tier in in_force:
        reached = standing.reached.get(tier.depth_s, standing.started_at or last)
        if tier.every_s and not after_gap and now - reached < timedelta(seconds=tier.every_s):
            continue
        depths.append(tier.depth_s)
        since = min(since, min(reached, standing.cursor, now) - timedelta(seconds=tier.depth_s))
    return Plan(since, tuple(depths))


def next_cursor(standing: Standing, newest: datetime | None, *, poll_started: datetime) -> datetime:
    """Move the cursor: the newest start seen, never past the poll's own start, never backwards."""
    candidates = [instant for instant in (standing.cursor, newest and min(newest, poll_started)) if instant]
    return max(candidates, default=standing.started_at or poll_started)


def first_offset_s(source_id_hash: int, interval_s: float) -> float:
    """Spread sources over the interval: when the first poll of a source is due, in seconds from now."""
    return (source_id_hash % 10_000) / 10_000 * interval_s
