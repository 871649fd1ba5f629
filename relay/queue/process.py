"""This process as the store sees it: its leases hold for as long as its heartbeat goes on."""

import asyncio
import contextlib
import secrets
import sys
import time
from itertools import count

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay.queue.scripts import load_script

log = structlog.get_logger(__name__)

_BEAT_EVERY_S = 1.0
_CLOCK_STEP_MS = 5000.0
_LEAP_MS = 60_000.0
# A process without a heartbeat for so long is dead: others claim what it had leased.
_LEAP_HINT = "check the clock of the store; until it is set back, or for 7 days, nothing is deleted by age"
DEAD_AFTER_S = 4.0


class StoreClock:
    """The store's two clocks as of its last reply, carried on by our monotonic clock; before the first reply our own.

    `now_ms` is the relay's clock, which never goes back: everything is scheduled by it. `wall_ms` is the server's time
    of day, which people read and signatures carry; it may step. `stepped_ms` adds up by how much it did since it was
    last reported, as our monotonic clock has it.
    """

    def __init__(self) -> None:
        self._ahead_ms: float | None = None
        self._wall_ahead_ms = 0.0
        self.stepped_ms = 0.0

    @property
    def now_ms(self) -> int:
        if self._ahead_ms is None:
            return int(time.time() * 1000)
        return int(_elapsed_ms() + self._ahead_ms)

    @property
    def wall_ms(self) -> int:
        if self._ahead_ms is None:
            return int(time.time() * 1000)
        return int(_elapsed_ms() + self._wall_ahead_ms)

    def note(self, now_ms: int, wall_ms: int) -> None:
        """Take over what a reply says."""
        elapsed_ms = _elapsed_ms()
        step_ms = wall_ms - elapsed_ms - self._wall_ahead_ms
        if self._ahead_ms is not None and abs(step_ms) > _CLOCK_STEP_MS:
            self.stepped_ms += step_ms
        self._ahead_ms = now_ms - elapsed_ms
        self._wall_ahead_ms = wall_ms - elapsed_ms


def _elapsed_ms() -> float:
    """Read a clock that never steps. On Linux it goes on while the machine is suspended, as the store's time does."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) * 1000
    return time.monotonic() * 1000


class Process:
    """The id of this process in the leases that it has, its heartbeat, and the store's clock."""

    def __init__(self, redis: Redis) -> None:
        self.id = secrets.token_hex(6)
        self.clock = StoreClock()
        self._exchanges = count()
        self._heartbeat = load_script(redis, "relay.queue", "heartbeat")
        self._give_back = load_script(redis, "relay.queue", "give_back")
        self.beat_at: float | None = None

    def next_exchange(self) -> int:
        """Return a number that no other exchange of this process has; with it, tokens are unique."""
        return next(self._exchanges)

    async def beat(self, *, alone: bool = False) -> list[str]:
        """Send a heartbeat; returns the processes that were found dead. `alone`: all others are known to be dead."""
        before, self.beat_at = self.beat_at, time.monotonic()
        elapsed_ms = "" if before is None else int((self.beat_at - before) * 1000)
        dead_after_ms = 0 if alone else int(DEAD_AFTER_S * 1000)
        stepped_ms, self.clock.stepped_ms = self.clock.stepped_ms, 0.0
        if stepped_ms < 0:
            log.warning("store_clock_stepped_back", by_s=round(-stepped_ms / 1000))
        elif stepped_ms > _LEAP_MS:
            log.error("store_clock_leapt", by_s=round(stepped_ms / 1000), action=_LEAP_HINT)
        args = [self.id, elapsed_ms, dead_after_ms, int(stepped_ms)]
        now_ms, wall_ms, *dead = await self._heartbeat(args=args)
        self.clock.note(now_ms, wall_ms)
        return [process.decode() for process in dead]

    async def beats(self) -> None:
        """Send heartbeats until cancelled."""
        while True:
            with contextlib.suppress(RedisError, OSError):  # the runners report a store that is unavailable
                for dead in await self.beat():
                    log.warning("process_died", process=dead, action="its work is claimed by the others")
            await asyncio.sleep(_BEAT_EVERY_S)

    async def give_back(self, lane: str, working: list[str]) -> int:
        """Give back the leases of a lane whose tokens are not in `working`; returns how many there were."""
        return int(await self._give_back(args=[self.id, lane, *working]))

    async def leave(self) -> None:
        """Give back every lease, at the end of the process."""
        await self._give_back(args=[self.id, ""])
