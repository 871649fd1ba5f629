"""What polling loses: a week of an office, a poll every 30 s, on a virtual clock.

The provider filters on a call's start and lists it after its end. Each strategy asks for what started after some
instant; a call that is never in an answer is lost. Ours is the relay's own window (relay/polling/window.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from benchmarks.figures import Figure
from benchmarks.house import Bench
from relay.domain.polling import PollState
from relay.polling.window import FLOOR, HEAVY_ROWS, Tier, next_cursor, plan
from relay.settings import PollOptions
from relay.simulator.timeline import CallPlan, Habits, calls_between

START = datetime(2026, 3, 2, tzinfo=UTC)
POLL = timedelta(seconds=30)


@dataclass(slots=True)
class Clock:
    """A strategy that remembers the newest start it has seen, and asks `overlap` further back."""

    overlap: timedelta
    cursor: datetime = START

    def since(self, now: datetime) -> datetime:
        """What to ask for."""
        return self.cursor - self.overlap

    def seen(self, newest: datetime | None, now: datetime, rows: int) -> None:
        """Learn from an answer."""
        self.cursor = max(self.cursor, newest or self.cursor)


class Relay:
    """The relay's tiers as they come."""

    def __init__(self) -> None:
        self._tiers = [Tier(int(tier.every_s), int(tier.depth_s)) for tier in PollOptions().tiers]
        deepest = {tier.depth_s: START for tier in self._tiers}
        self._standing = PollState(started_at=START, cursor=START, reached=deepest)

    def since(self, now: datetime) -> datetime:
        """Plan as the poller does."""
        self._plan = plan(self._standing, self._tiers, now=now)
        return max(self._plan.since, (self._standing.cursor or START) - FLOOR)

    def seen(self, newest: datetime | None, now: datetime, rows: int) -> None:
        """Move as the poller does."""
        depths = self._plan.depths
        heavy = self._standing.heavy if len(depths) > 1 else rows > HEAVY_ROWS
        self._standing = replace(
            self._standing,
            cursor=next_cursor(self._standing, newest, poll_started=now),
            reached={**(self._standing.reached or {}), **dict.fromkeys(depths, now)},
            heavy=heavy or (self._standing.heavy and max(depths) < 7200),
        )


def lost(plans: Sequence[CallPlan], strategy: Clock | Relay, *, end: datetime) -> float:
    """Per cent of the calls that no poll returned; polling goes on for four days after the last call."""
    appearing = sorted(plans, key=lambda call: call.visible_at)
    hidden: list[CallPlan] = []
    recent: list[datetime] = []
    at, gone, now = 0, 0, START
    while now < end + timedelta(days=4):
        since = strategy.since(now)
        while at < len(appearing) and appearing[at].visible_at <= now:
            hidden.append(appearing[at])
            at += 1
        found = [call for call in hidden if call.started_at > since]
        if found:
            hidden = [call for call in hidden if call.started_at <= since]
            recent += [call.started_at for call in found]
        rows = 0
        if isinstance(strategy, Clock):
            gone += len(hidden)  # it never asks further back than it did
            hidden = []
        else:
            edge = now - timedelta(hours=2)
            recent = [started for started in recent if started > edge]
            rows = len(recent)
        strategy.seen(max((call.started_at for call in found), default=None), now, rows)
        now += POLL
    return 100 * (gone + len(hidden) + len(appearing) - at) / len(plans)


STRATEGIES: Sequence[tuple[str, Callable[[], Clock | Relay]]] = (
    ("ask for what is newer than the newest call", lambda: Clock(timedelta(0))),
    ("the same with 5 minutes of overlap", lambda: Clock(timedelta(minutes=5))),
    ("the same with 30 minutes of overlap", lambda: Clock(timedelta(minutes=30))),
)


async def run(bench: Bench) -> list[Figure]:
    """Play the week for an office with 60 calls an hour, and for one with 600."""
    rates: Iterable[int] = (60,) if bench.quick else (60, 600)
    bench.begin("loss", len(list(rates)) * (len(STRATEGIES) + 1))
    end = START + timedelta(days=bench.scaled(7, 1))
    figures: list[Figure] = []
    for rate in rates:
        plans = calls_between(START, end, seed=7, habits=Habits(calls_per_hour=rate))
        note = f"{len(plans):,} calls in {(end - START).days} days, a poll every 30 s, virtual clock"
        for name, strategy in STRATEGIES:
            bench.step(f"{rate}/h: {name}")
            figures.append(Figure(f"lost at {rate} calls/h: {name}", lost(plans, strategy(), end=end), "%", note=note))
        bench.step(f"{rate}/h: the relay")
        figures.append(Figure(f"lost at {rate} calls/h: the relay", lost(plans, Relay(), end=end), "%", 0, note=note))
    bench.end()
    return figures
