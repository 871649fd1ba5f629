"""A virtual clock: tests decide when time passes."""

import asyncio
import heapq
from datetime import UTC, datetime, timedelta
from itertools import count


class ManualClock:
    """A virtual clock: it stands still until `advance`, which wakes sleepers in the order of their times."""

    def __init__(self, now: datetime = datetime(2025, 7, 1, 12, tzinfo=UTC)) -> None:
        if now.utcoffset() is None:
            raise ValueError("the clock starts at an aware datetime")
        self._now = now.astimezone(UTC)
        self._monotonic_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        """Read the virtual seconds since the clock was created; a `step` does not count."""
        return self._monotonic_s

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has advanced that far; zero or less only yields to other tasks."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic_s + seconds, next(self._order), woken))
        await woken

    async def advance(self, seconds: float, *, turns: int = 25) -> None:
        """Let time pass. Before it moves, and after each sleeper that wakes, others get `turns` of the event loop."""
        if seconds < 0:
            raise ValueError("time only advances; use step to set the wall clock back")
        target_s = self._monotonic_s + seconds
        await _give_turns(turns)
        while self._sleepers and self._sleepers[0][0] <= target_s:
            due_s, _, woken = heapq.heappop(self._sleepers)
            if woken.done():  # cancelled while asleep
                continue
            self._pass(due_s - self._monotonic_s)
            woken.set_result(None)
            await _give_turns(turns)
        self._pass(target_s - self._monotonic_s)
        await _give_turns(turns)

    def step(self, seconds: float) -> None:
        """Set the wall clock forward or back, as NTP may; no sleeper wakes, and `monotonic` stays."""
        self._now += timedelta(seconds=seconds)

    def next_due_s(self) -> float | None:
        """Return the seconds until the next sleeper wakes, or None without one."""
        dues = [due_s for due_s, _, woken in self._sleepers if not woken.done()]
        return min(dues) - self._monotonic_s if dues else None

    def _pass(self, seconds: float) -> None:
        self._monotonic_s += seconds
        self._now += timedelta(seconds=seconds)


async def _give_turns(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
