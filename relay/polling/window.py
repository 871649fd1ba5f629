"""How far back a poll looks: pure, so every question about lost calls is a table in a test.

Every provider filters on the start of a call, and lists a call after its end: a request for what is newer than the
newest call misses the long ones. So each poll looks back, and now and then one looks far back (tiers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from relay.domain.polling import PollState

# How far back the first poll records calls without publishing them. A recovery looks as far back from its marker: a
# call may be listed 72 h late, and the last deep look may have been 6 h before the marker.
SEED_DEPTH = timedelta(hours=78)
# Rows older than this before the cursor are not new: `seen` forgets them.
FLOOR = timedelta(hours=96)
# `seen` forgets a day this long after the floor: a day's rows lie up to a day off it, in zones far from UTC, and the
# floor itself may go back a little with the store's clock.
FORGET_DAYS = 3
# A row that starts further ahead than any time zone explains is invalid.
FUTURE = timedelta(hours=26)
# After so long without a successful poll, every tier is due.
GAP = timedelta(hours=2)
# A look at the near tier that brings more than this is heavy; it is light again at less than half.
HEAVY_ROWS = 2000
HEAVY_BYTES = 1_000_000
HEAVY_STEP_S = 600
HEAVY_EVERY_S = 120
_LONGEST_GAP_DAYS = 400


@dataclass(frozen=True, slots=True)
class Tier:
    """Every `every_s` seconds (0: at each poll) look `depth_s` seconds further back than needed."""

    every_s: int
    depth_s: int


@dataclass(frozen=True, slots=True)
class Plan:
    """List what started after `since`; success counts for the tiers whose depth is in `depths`.

    The `first` poll, and a `recovery`, only record what started before the relay did.
    """

    since: datetime
    depths: tuple[int, ...]
    first: bool = False
    recovery: bool = False

    @property
    def seeds(self) -> bool:
        """Whether calls from before the relay are recorded without being published."""
        return self.first or self.recovery


def effective(tiers: Sequence[Tier], *, heavy: bool) -> list[Tier]:
    """Return the tiers in force: heavy polls look back 10 min each time, and as far as the near tier every 2 min."""
    near, *others = tiers
    if not heavy or near.depth_s <= HEAVY_STEP_S:
        return list(tiers)
    return [Tier(0, HEAVY_STEP_S), Tier(HEAVY_EVERY_S, near.depth_s), *others]


def plan(poll_state: PollState, tiers: Sequence[Tier], *, now: datetime) -> Plan:
    """Decide how far back the poll at `now` looks. Each tier that is due reaches back from its own last success."""
    in_force = effective(tiers, heavy=poll_state.heavy)
    every_depth = tuple(tier.depth_s for tier in in_force)
    if poll_state.cursor is None:
        return Plan(min(poll_state.started_at or now, now) - SEED_DEPTH, every_depth, first=True)
    cursor = min(poll_state.cursor, now)
    if not poll_state.reached:
        return Plan(cursor - SEED_DEPTH, every_depth, recovery=True)
    after_gap = now - max(poll_state.reached.values()) > GAP
    since = now
    depths: list[int] = []
    for tier in in_force:
        reached = _reached(poll_state.reached, tier.depth_s)
        # A success in the future dates from before the store's clock was set back: its real age is unknown.
        recent = timedelta(0) <= now - reached < timedelta(seconds=tier.every_s)
        if recent and not after_gap:
            continue
        depths.append(tier.depth_s)
        since = min(since, min(reached, cursor) - timedelta(seconds=tier.depth_s))
    return Plan(since, tuple(depths))


def _reached(reached: Mapping[int, datetime], depth_s: int) -> datetime:
    """When a depth was last read; a deeper look counts, since it saw the same rows. A new depth counts as read when the
    oldest one was, never as never read."""
    as_deep = [instant for depth, instant in reached.items() if depth >= depth_s]
    return max(as_deep) if as_deep else min(reached.values())


def heavy_after(poll_state: PollState, planned: Plan, tiers: Sequence[Tier], *, rows: int, size_bytes: int) -> bool:
    """Judge whether polls are heavy, by polls of the near tier only: shorter and deeper ones differ in size."""
    if planned.seeds or max(planned.depths) != tiers[0].depth_s:
        return poll_state.heavy
    share = 0.5 if poll_state.heavy else 1.0
    return rows > HEAVY_ROWS * share or size_bytes > HEAVY_BYTES * share


def next_cursor(poll_state: PollState, newest: datetime | None, *, poll_started: datetime) -> datetime:
    """Move the cursor: the newest start seen, never past the poll's own start, never backwards before it."""
    candidates = [min(instant, poll_started) for instant in (poll_state.cursor, newest) if instant is not None]
    return max(candidates, default=min(poll_state.started_at or poll_started, poll_started))


def floor(poll_state: PollState, *, now: datetime) -> datetime | None:
    """Return the start before which no row is new; None while `seen` has forgotten nothing."""
    return None if poll_state.cursor is None else min(poll_state.cursor, now) - FLOOR


def days_to_forget(old: datetime | None, new: datetime) -> list[str]:
    """List the days of `seen` that fall far enough below the floor when the cursor moves from `old` to `new`."""
    if old is None:
        return []
    margin = timedelta(days=FORGET_DAYS)
    last = (new - FLOOR - margin).date()
    first = max((old - FLOOR - margin).date(), last - timedelta(days=_LONGEST_GAP_DAYS))
    return [(first + timedelta(days=step)).isoformat() for step in range((last - first).days + 1)]


def first_offset_s(source_id_hash: int, interval_s: float) -> float:
    """Spread sources over the interval: the delay of a source's first poll."""
    return (source_id_hash % 10_000) / 10_000 * interval_s
