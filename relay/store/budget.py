"""Our share of a provider's limit: at most that in any window, and recordings never starve polls.

One bucket per credential; one per way out (the proxy, or "direct") for what a provider limits by IP address. A request
is paid for before it is sent. Lower purposes stop earlier, so polls always find room.
"""

import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import resources

import structlog
from redis.asyncio import Redis

from relay.errors import OverBudget, RateLimited
from relay.providers.base import Pay, Purpose
from relay.store import keys

log = structlog.get_logger(__name__)

_REACH = {
    Purpose.POLL: 1.0,
    Purpose.CONTACTS: 0.9,
    Purpose.RECORDING: 0.8,
    Purpose.RETRY: 0.7,
    Purpose.BACKFILL: 0.6,
}
"""How much of the burst a purpose may use up."""
_STATE_TTL_S = 86_400
_LONGEST_CLOSED_S = 3600
_UNKNOWN_WINDOW_S = 60
_PER_IP = frozenset({Purpose.CONTACTS})
"""What a provider's document limits by IP address whatever the key; other purposes join when a 429 says so."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A provider's limit and our share of it. Half of the share may come in a burst, the rest evenly."""

    requests: int
    window_s: int
    share: float

    @property
    def burst(self) -> float:
        """Requests that may come at once."""
        return max(self.requests * self.share / 2, 1)

    @property
    def interval_ms(self) -> float:
        """Between two requests once the burst is used up; in whole 1024ths, which add up exactly to any time of day."""
        evenly = self.requests * self.share - self.burst
        return math.ceil(self.window_s * 1000 / max(evenly, 1) * 1024) / 1024

    def tolerance_ms(self, purpose: Purpose) -> float:
        """How far ahead of an even pace this purpose may be; polls may be furthest."""
        return max(self.burst * _REACH[purpose], 1) * self.interval_ms


class Budget:
    """Pays for requests of sources, over all processes. `script` is budget.lua, or a test's, on a clock of its own."""

    def __init__(self, redis: Redis, *, script: str | None = None) -> None:
        self._redis = redis
        self._take = redis.register_script(script or budget_script())

    def pay_for(self, provider: str, credential: Callable[[], str], egress: str, limit: Limit | None) -> Pay:
        """Make the function that a client awaits before each request; without a limit only a 429 holds anything up.

        The credential is asked for each time: its file may have changed.
        """

        async def pay(purpose: Purpose) -> None:
            key, out = _buckets(provider, credential(), egress)
            pace: tuple[float, float, float] = (0, 0, 0)
            if limit is not None:
                pace = (limit.interval_ms, limit.tolerance_ms(purpose), limit.tolerance_ms(Purpose.POLL))
            interval_ms, tolerance_ms, most_ms = pace
            by_egress = int(purpose in _PER_IP)
            args = [interval_ms, tolerance_ms, _STATE_TTL_S, by_egress, most_ms, _LONGEST_CLOSED_S * 1000]
            wait_ms = int(await self._take(keys=[key, out], args=args))
            if wait_ms:
                raise OverBudget(wait_ms / 1000)

        return pay

    @contextlib.asynccontextmanager
    async def heeding(
        self, provider: str, credential: str, egress: str, limit: Limit | None, *, purpose: Purpose = Purpose.POLL
    ) -> AsyncIterator[None]:
        """Close the bucket that a 429 names, until the provider's hint or the end of its window."""
        try:
            yield
        except RateLimited as refusal:
            key, out = _buckets(provider, credential, egress)
            window_s = limit.window_s if limit else _UNKNOWN_WINDOW_S
            wait_s = min(max(refusal.retry_after_s or window_s, 1), _LONGEST_CLOSED_S)
            bucket = key if refusal.bucket == "key" else out
            seconds, micros = await self._redis.time()
            closed = int(seconds) * 1000 + int(micros) // 1000 + int(wait_s * 1000)
            state = {"closed": str(closed)}
            if refusal.bucket == "ip" and purpose not in _PER_IP:
                # This provider counts by address what we counted by key: from now on all from here is counted so.
                # Where contacts are refused by address that says nothing about polls, and they go on.
                state["all"] = "1"
            await self._redis.hset(bucket, mapping=state)  # type: ignore[misc]  # typed for both clients
            await self._redis.expire(bucket, _STATE_TTL_S)
            log.warning("rate_limited", provider=provider, bucket=refusal.bucket, wait_s=wait_s)
            raise

    async def left(self, provider: str, credential: str, limit: Limit) -> int:
        """Count how many requests could go right now."""
        key, _ = _buckets(provider, credential, "")
        tat, closed = await self._redis.hmget(key, ["tat", "closed"])  # type: ignore[misc]  # typed for both clients
        seconds, micros = await self._redis.time()
        now = int(seconds) * 1000 + int(micros) / 1000
        if float(closed or 0) > now:
            return 0
        ahead = max(float(tat or 0) - now, 0)
        return max(int(limit.burst - ahead / limit.interval_ms), 0)


def budget_script() -> str:
    """Read budget.lua."""
    return resources.files("relay.store").joinpath("budget.lua").read_text()


def _buckets(provider: str, credential: str, egress: str) -> tuple[str, str]:
    by_key = keys.budget(keys.bucket(provider, "key", credential))
    by_egress = keys.budget(keys.bucket(provider, "egress", egress))
    return by_key, by_egress
