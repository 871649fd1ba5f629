"""Counters of requests to providers, shared by all processes (GCRA, in budget.lua)."""

import math
from dataclasses import dataclass
from importlib import resources
from typing import Final

from redis.asyncio import Redis

from relay.store import keys

# A bucket that was unused for a day is full again, whatever the limit, and one may be closed for a day.
_TTL_S: Final = 2 * 86_400
_LONGEST_CLOSED_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class Pace:
    """A request every `interval_ms` on average, and up to `tolerance_ms` ahead of that; `largest_tolerance_ms` is that
    of the purpose with the most room."""

    interval_ms: float
    tolerance_ms: float
    largest_tolerance_ms: float


class BudgetStore:
    """Reads and writes the buckets. `script` is budget.lua; tests pass one that reads a clock of their own."""

    def __init__(self, redis: Redis, *, script: str | None = None) -> None:
        self._redis = redis
        self._take = redis.register_script(script or budget_script())

    @staticmethod
    def bucket(provider: str, counted_by: str, value: str) -> str:
        """Name a bucket; `value` is hashed, since it may be a credential."""
        return keys.budget(keys.digest(provider, counted_by, value))

    async def take(self, key_bucket: str, ip_bucket: str, pace: Pace | None, *, by_ip: bool) -> float:
        """Take room for one request; seconds to wait when there is none, else 0."""
        pace = pace or Pace(0, 0, 0)
        args = [
            pace.interval_ms,
            pace.tolerance_ms,
            _TTL_S,
            int(by_ip),
            pace.largest_tolerance_ms,
            _LONGEST_CLOSED_S * 1000,
        ]
        return int(await self._take(keys=[key_bucket, ip_bucket], args=args)) / 1000

    async def close(self, bucket: str, wait_s: float, *, counts_everything: bool) -> float:
        """Refuse every request until `wait_s` (1 s to a day) is over; returns what that came to."""
        wait_s = min(max(wait_s, 1), _LONGEST_CLOSED_S)
        fields = {"closed": str(int(await self._now_ms() + wait_s * 1000))}
        if counts_everything:
            fields["all"] = "1"
        await self._redis.hset(bucket, mapping=fields)  # type: ignore[misc]  # typed for both clients
        await self._redis.expire(bucket, _TTL_S)
        return wait_s

    async def ahead_ms(self, bucket: str) -> float:
        """How far a bucket is ahead of its pace; infinite while it is closed."""
        tat, closed = await self._redis.hmget(bucket, ["tat", "closed"])  # type: ignore[misc]  # typed for both clients
        now_ms = await self._now_ms()
        if float(closed or 0) > now_ms:
            return math.inf
        return max(float(tat or 0) - now_ms, 0)

    async def closed_until_ms(self, *buckets: str) -> float | None:
        """Until when requests of these buckets are refused; None when they are not."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for bucket in buckets:
                pipe.hget(bucket, "closed")
            closed = max(float(value or 0) for value in await pipe.execute())
        return closed if 0 < closed - await self._now_ms() <= _LONGEST_CLOSED_S * 1000 else None

    async def _now_ms(self) -> float:
        seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) / 1000


def budget_script() -> str:
    return resources.files("relay.store").joinpath("budget.lua").read_text()
