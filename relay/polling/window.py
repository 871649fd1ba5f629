"""How far back a poll looks: pure, so every question about lost calls is a table in a test.

Every provider filters on the start of a call, and lists a call after its end: a request for what is newer than the
newest call misses the long ones. So each poll looks back, and now and then further (tiers). Each tier is a request of
its own: one that cannot be answered is shortened and owes the rest, and the others go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from relay.domain.polling import PollState, TierFailure

# How far before the relay's start a stream's calls are recorded without being published.
SEED_DEPTH: Final = timedelta(hours=78)
# Rows older than this before the cursor are not new: `seen` forgets them.
FLOOR: Final = timedelta(hours=96)
# While a tier owes older calls, `seen` remembers as far back as that, but no longer than this.
LONGEST_OWED: Final = timedelta(days=14)
# `seen` forgets a day this long after the floor: a day's rows lie up to a day off it, in zones far from UTC, and the
# floor itself may go back a little with the store's clock.
FORGET_DAYS: Final = 3
# A row that starts further ahead than any time zone explains is invalid.
FUTURE: Final = timedelta(hours=26)
# After so long without a successful poll, every tier is due.
GAP: Final = timedelta(hours=2)
# A look at the near tier that brings more than this is heavy; it is light again at less than half.
HEAVY_ROWS: Final = 2000
HEAVY_BYTES: Final = 1_000_000
HEAVY_STEP_S: Final = 600
HEAVY_EVERY_S: Final = 120
_RETRY_S: Final = 60
_NEAR_GROWS_EVERY_S: Final = 900
_GROWS_EVERY_S: Final = 3600
_LONGEST_GAP_DAYS: Final = 400


@dataclass(frozen=True, slots=True)
class Tier:
    """Every `every_s` seconds (0: at each poll) look `depth_s` seconds further back than needed."""

    every_s: int
    depth_s: int


@dataclass(frozen=True, slots=True)
class Look:
    """One request of the tier with this depth, for what started after `since`; the tier owes what started after `owed`.

    One that looks less far back than that is not complete: the tier goes on owing the rest.
    """

    depth_s: int
    since: datetime
    owed: datetime

    @property
    def complete(self) -> bool:
        return self.since <= self.owed


@dataclass(frozen=True, slots=True)
class TierUpdate:
    """What a look changes of the tiers' state; None ends a failure."""

    reached: Mapping[int, datetime]
    failing: Mapping[int, TierFailure | None]

    def apply(self, poll_state: PollState) -> PollState:
        """Return the state after the update."""
        failing = {**poll_state.failing, **self.failing}
        return replace(
            poll_state,
            reached={**poll_state.reached, **self.reached},
            failing={depth_s: failure for depth_s, failure in failing.items() if failure is not None},
        )


def effective(tiers: Sequence[Tier], *, heavy: bool) -> list[Tier]:
    """Return the tiers in force: heavy polls look back 10 min each time, and as far as the near tier every 2 min."""
    near, *others = tiers
    if not heavy or near.depth_s <= HEAVY_STEP_S:
        return list(tiers)
    return [Tier(0, HEAVY_STEP_S), Tier(HEAVY_EVERY_S, near.depth_s), *others]


def plan(poll_state: PollState, tiers: Sequence[Tier], *, now: datetime) -> list[Look]:
    """Decide which looks the poll at `now` takes: always the near one first, then the due ones, deepest first.

    The near rows are read twice when a deeper tier is due: the price of a near look that nothing can delay. Among the
    deeper ones, a complete look makes the shallower ones unnecessary (`covers`).
    """
    near, *others = effective(tiers, heavy=poll_state.heavy)
    due = [tier for tier in others if _is_due(poll_state, tier, now)]
    looks = [_look(poll_state, tier, now) for tier in sorted(due, key=lambda tier: tier.depth_s, reverse=True)]
    return [_near_look(poll_state, near, now), *looks]


def covers(deeper: Look, look: Look) -> bool:
    """Whether a successful deeper look read all that another one would."""
    return deeper.complete and deeper.since <= look.since


def shortened(look: Look, *, now: datetime) -> Look | None:
    """Return the near look without what its tier owes beyond its own depth; None when it is no shorter."""
    since = now - timedelta(seconds=look.depth_s)
    return replace(look, since=since) if now - look.since > timedelta(seconds=1.25 * look.depth_s) else None


def _near_look(poll_state: PollState, tier: Tier, now: datetime) -> Look:
    failure = poll_state.failing.get(tier.depth_s)
    if failure is None or not _backs_off(failure, now):
        return _look(poll_state, tier, now)
    owed = _owed(poll_state, tier, now)
    return Look(tier.depth_s, max(owed, now - timedelta(seconds=tier.depth_s)), owed)


def _look(poll_state: PollState, tier: Tier, now: datetime) -> Look:
    owed = _owed(poll_state, tier, now)
    failure = poll_state.failing.get(tier.depth_s)
    since = owed if failure is None else max(owed, now - timedelta(seconds=failure.depth_s))
    return Look(tier.depth_s, since, owed)


def _owed(poll_state: PollState, tier: Tier, now: datetime) -> datetime:
    """Return the start after which a tier has to look: each reaches back from its own last success."""
    failure = poll_state.failing.get(tier.depth_s)
    if failure is not None:
        return max(failure.since, now - LONGEST_OWED)
    cursor = min(poll_state.cursor or poll_state.started_at or now, now)
    reached = _reached(poll_state.reached, tier.depth_s) or min(poll_state.reached.values(), default=cursor)
    return min(reached, cursor) - timedelta(seconds=tier.depth_s)


def _is_due(poll_state: PollState, tier: Tier, now: datetime) -> bool:
    failure = poll_state.failing.get(tier.depth_s)
    if failure is not None:
        return not _backs_off(failure, now)
    reached = _reached(poll_state.reached, tier.depth_s)
    if reached is None or now - max(poll_state.reached.values()) > GAP:
        return True
    # A success in the future dates from before the store's clock was set back: its real age is unknown.
    return not timedelta(0) <= now - reached < timedelta(seconds=tier.every_s)


def _backs_off(failure: TierFailure, now: datetime) -> bool:
    # One that is further off than any backoff was written before the store's clock was set back.
    return timedelta(0) < failure.next_attempt - now <= timedelta(seconds=_GROWS_EVERY_S)


def _reached(reached: Mapping[int, datetime], depth_s: int) -> datetime | None:
    """When a depth was last read; a deeper look counts, since it saw the same rows."""
    return max((instant for depth, instant in reached.items() if depth >= depth_s), default=None)


def after_success(poll_state: PollState, look: Look, tiers: Sequence[Tier], *, now: datetime) -> TierUpdate:
    """Settle what a tier, and the shallower ones with it, owe; after a shortened look it may look twice as far back."""
    if look.complete:
        paid = [
            depth_s
            for depth_s, failure in poll_state.failing.items()
            if depth_s <= look.depth_s and look.since <= max(failure.since, now - LONGEST_OWED)
        ]
        return TierUpdate({look.depth_s: now}, dict.fromkeys(paid))
    failure = poll_state.failing.get(look.depth_s)
    if failure is None or _backs_off(failure, now):
        return TierUpdate({}, {})
    longer = replace(
        failure,
        until=look.since,
        failures=0,
        depth_s=2 * int((now - look.since).total_seconds()),
        next_attempt=now + timedelta(seconds=_grows_every_s(look, tiers)),
    )
    return TierUpdate({}, {look.depth_s: longer})


def after_failure(
    poll_state: PollState, look: Look, tiers: Sequence[Tier], error: str, *, now: datetime
) -> TierFailure:
    """Shorten a tier that could not be read to half, but not below the next shallower one, which is read anyway."""
    in_force = effective(tiers, heavy=poll_state.heavy)
    least_s = max((tier.depth_s for tier in in_force if tier.depth_s < look.depth_s), default=look.depth_s)
    former = poll_state.failing.get(look.depth_s)
    failures = former.failures + 1 if former else 1
    wait_s = min(_RETRY_S * 2 ** min(failures - 1, 10), _grows_every_s(look, tiers))
    return TierFailure(
        since=look.owed,
        until=now - timedelta(seconds=least_s),
        error=error,
        failing_since=former.failing_since if former and former.error else now,
        failures=failures,
        depth_s=max(int((now - look.since).total_seconds() / 2), least_s),
        next_attempt=now + timedelta(seconds=wait_s),
    )


def not_read_yet(look: Look, *, now: datetime) -> TierFailure:
    """What a tier owes while its first look is under way, so that a process that dies meanwhile leaves it owed."""
    depth_s = 2 * int((now - look.owed).total_seconds())
    return TierFailure(look.owed, now, "", now, failures=0, depth_s=depth_s, next_attempt=now)


def _grows_every_s(look: Look, tiers: Sequence[Tier]) -> int:
    every_s = next((tier.every_s for tier in tiers if tier.depth_s == look.depth_s), 0)
    return min(every_s or _NEAR_GROWS_EVERY_S, _GROWS_EVERY_S)


def heavy_after(
    poll_state: PollState, look: Look, tiers: Sequence[Tier], *, rows: int, size_bytes: int, now: datetime
) -> bool:
    """Judge whether polls are heavy, by looks at the near tier only: shorter and longer ones differ in size."""
    if look.depth_s != tiers[0].depth_s or shortened(look, now=now) is not None:
        return poll_state.heavy
    share = 0.5 if poll_state.heavy else 1.0
    return rows > HEAVY_ROWS * share or size_bytes > HEAVY_BYTES * share


def next_cursor(poll_state: PollState, newest: datetime | None, *, poll_started: datetime) -> datetime:
    """Move the cursor: the newest start seen, never past the poll's own start, never backwards before it."""
    candidates = [min(instant, poll_started) for instant in (poll_state.cursor, newest) if instant is not None]
    return max(candidates, default=min(poll_state.started_at or poll_started, poll_started))


def floor(poll_state: PollState, *, now: datetime) -> datetime | None:
    """Return the start before which no row is new; None while `seen` has forgotten nothing."""
    if poll_state.cursor is None:
        return None
    owed = [max(failure.since, now - LONGEST_OWED) for failure in poll_state.failing.values()]
    # The deepest tier may be a while behind the cursor, after an outage for example: what it is about to read is new.
    deepest = max(poll_state.reached, default=None)
    if deepest is not None and deepest not in poll_state.failing:
        owed.append(poll_state.reached[deepest] - FLOOR)
    return min([min(poll_state.cursor, now) - FLOOR, *owed])


def days_to_forget(old: datetime | None, new: datetime | None) -> list[str]:
    """List the days of `seen` that fall far enough below the floor when it moves from `old` to `new`."""
    if old is None or new is None:
        return []
    margin = timedelta(days=FORGET_DAYS)
    last = (new - margin).date()
    first = max((old - margin).date(), last - timedelta(days=_LONGEST_GAP_DAYS))
    return [(first + timedelta(days=step)).isoformat() for step in range((last - first).days + 1)]


def first_offset_s(source_id_hash: int, interval_s: float) -> float:
    """Spread sources over the interval: the delay of a source's first poll."""
    return (source_id_hash % 10_000) / 10_000 * interval_s
