"""What polling loses: a week of calls, a poll every 30 s, on a virtual clock.

The provider filters on a call's start and lists it after its end. Each strategy requests what started after some
instant; a call that is in no response is lost. Ours is the relay's own window (relay/polling/window.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from benchmarks.figures import Figure
from benchmarks.harness import Bench
from relay.domain.polling import PollState
from relay.polling.window import Tier, after_success, floor, heavy_after, next_cursor, plan
from relay.settings import PollOptions
from relay.simulator.timeline import CallPlan, Habits
from tests.fakes.timeline import calls_between

START = datetime(2026, 3, 2, tzinfo=UTC)
POLL = timedelta(seconds=30)


@dataclass(slots=True)
class CursorStrategy:
    """A cursor at the newest start seen, with `overlap` before it."""

    overlap: timedelta
    cursor: datetime = START

    def since(self, now: datetime) -> datetime:
        """The lower bound of the next request."""
        return self.cursor - self.overlap

    def seen(self, newest: datetime | None, now: datetime, rows: int) -> None:
        """Move after a response."""
        self.cursor = max(self.cursor, newest or self.cursor)


class RelayStrategy:
    """The relay's own tiers; `requests` counts their looks."""

    def __init__(self) -> None:
        self._tiers = [Tier(int(tier.every_s), int(tier.depth_s)) for tier in PollOptions().tiers]
        deepest = {tier.depth_s: START for tier in self._tiers}
        self._state = PollState(started_at=START, cursor=START, known_since=START, reached=deepest)
        self.requests = 0

    def since(self, now: datetime) -> datetime:
        """Plan as the poller does: the furthest of the looks that it takes."""
        near, *deeper = plan(self._state, self._tiers, now=now)
        self._looks = [near, *deeper[:1]]  # a complete deep look makes the others unnecessary
        self.requests += len(self._looks)
        bottom = floor(self._state, now=now)
        return max(min(look.since for look in self._looks), bottom or START)

    def seen(self, newest: datetime | None, now: datetime, rows: int) -> None:
        """Move as the poller does."""
        state = replace(self._state, cursor=next_cursor(self._state, newest, poll_started=now))
        for look in self._looks:
            heavy = heavy_after(state, look, self._tiers, rows=rows, size_bytes=0, now=now)
            state = after_success(replace(state, heavy=heavy), look, self._tiers, now=now).apply(state)
            state = replace(state, heavy=heavy)
        self._state = state


def lost(plans: Sequence[CallPlan], strategy: CursorStrategy | RelayStrategy, *, end: datetime) -> float:
    """Percentage of the calls that no poll returned; polling continues for four days after the last call."""
    appearing = sorted(plans, key=lambda call: call.visible_at)
    hidden: list[CallPlan] = []
    recent: list[datetime] = []
    at, gone, now = 0, 0, START
    while now < end + timedelta(days=4):
        since = strategy.since(now)
        while at < len(appearing) and appearing[at].visible_at <= now:
            hidden.append(appearing[at])
            at += 1
        returned = [call for call in hidden if call.started_at > since]
        if returned:
            hidden = [call for call in hidden if call.started_at <= since]
            recent += [call.started_at for call in returned]
        rows = 0
        if isinstance(strategy, CursorStrategy):
            gone += len(hidden)  # its lower bound never moves back
            hidden = []
        else:
            edge = now - timedelta(hours=2)
            recent = [started for started in recent if started > edge]
            rows = len(recent)
        strategy.seen(max((call.started_at for call in returned), default=None), now, rows)
        now += POLL
    return 100 * (gone + len(hidden) + len(appearing) - at) / len(plans)


STRATEGIES: Sequence[tuple[str, Callable[[], CursorStrategy | RelayStrategy]]] = (
    ("cursor at the newest call", lambda: CursorStrategy(timedelta(0))),
    ("the same with 5 minutes of overlap", lambda: CursorStrategy(timedelta(minutes=5))),
    ("the same with 30 minutes of overlap", lambda: CursorStrategy(timedelta(minutes=30))),
)


async def run(bench: Bench) -> list[Figure]:
    """Simulate the week with 60 calls an hour, and with 600."""
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
        relay = RelayStrategy()
        figures.append(Figure(f"lost at {rate} calls/h: the relay", lost(plans, relay, end=end), "%", 0, note=note))
        hours = (end - START) / timedelta(hours=1) + 96
        figures.append(Figure(f"requests an hour at {rate} calls/h: the relay", relay.requests / hours, "", note=note))
    bench.end()
    return figures
