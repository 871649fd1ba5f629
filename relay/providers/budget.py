"""Our share of a provider's request limit: how large it is, and which purposes give way first.

The rules are pure (Limit); `relay.store.budget` holds the counters that all processes share. One bucket per server and
credential, and one per server, way out (the proxy, or "direct") and owner for what a provider counts by IP address. So
what a tenant's server answers closes no budget of others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog

from relay.domain.time import from_ms
from relay.errors import OverBudget, RateLimited
from relay.providers.base import Purpose
from relay.store.budget import BudgetStore, Pace

log = structlog.get_logger(__name__)

# The part of the burst that a purpose may use: each leaves room for those above it, so polls always find some.
_BURST_SHARE: Final = {
    Purpose.POLL: 1.0,
    Purpose.CONTACTS: 0.9,
    Purpose.RECORDING: 0.8,
    Purpose.RETRY: 0.7,
    Purpose.BACKFILL: 0.6,
}
_UNKNOWN_WINDOW_S: Final = 60
# WebFones counts contact requests by IP address whatever the key (Contact API 3.0, Rate Limiting). The other purposes
# join them once a 429 says so.
_COUNTED_BY_IP: Final = frozenset({Purpose.CONTACTS})


@dataclass(frozen=True, slots=True)
class Limit:
    """A provider's limit and our share of it. Half of the share may be spent in a burst, the rest evenly."""

    requests: int
    window_s: int
    share: float

    @property
    def burst(self) -> float:
        return max(self.requests * self.share / 2, 1)

    @property
    def interval_ms(self) -> float:
        """Time between requests once the burst is spent."""
        evenly = self.requests * self.share - self.burst
        # Whole 1024ths are exact in binary: sums with a time of day lose nothing, so buckets never drift.
        return math.ceil(self.window_s * 1000 / max(evenly, 1) * 1024) / 1024

    def tolerance_ms(self, purpose: Purpose) -> float:
        """How far ahead of the even pace a purpose may run."""
        return max(self.burst * _BURST_SHARE[purpose], 1) * self.interval_ms

    def pace(self, purpose: Purpose) -> Pace:
        return Pace(self.interval_ms, self.tolerance_ms(purpose), self.tolerance_ms(Purpose.POLL))


class SourceBudget:
    """The budget of one source; sources with the same credential, or behind the same address, share it.

    Without a known `limit` only a 429 stops requests. `credential` is called each time, because its file may change.
    """

    def __init__(
        self,
        store: BudgetStore,
        server: str,
        credential: Callable[[], str],
        egress: str,
        limit: Limit | None,
        *,
        owner: str = "",
    ) -> None:
        self.limit = limit
        self._store = store
        self._server = server
        self._credential = credential
        self._egress = f"{egress}\x1f{owner}"

    async def spend(self, purpose: Purpose) -> None:
        """Count a request that is about to be sent; see RequestBudget. Raises SettingsError for a bad key file too."""
        pace = self.limit.pace(purpose) if self.limit else None
        by_ip = purpose in _COUNTED_BY_IP
        wait_s = await self._store.take(self._key_bucket(), self._ip_bucket(), pace, by_ip=by_ip)
        if wait_s:
            raise OverBudget(wait_s)

    async def close(self, refusal: RateLimited, purpose: Purpose) -> None:
        """Close the bucket that a 429 names, until the time it states or for one window."""
        window_s = self.limit.window_s if self.limit else _UNKNOWN_WINDOW_S
        by_ip = refusal.bucket == "ip"
        # A provider that counts by address what we counted by key does so for everything from here, from now on.
        # Contacts are the exception: that they are refused by address says nothing about polls, which go on.
        wait_s = await self._store.close(
            self._ip_bucket() if by_ip else self._key_bucket(),
            refusal.retry_after_s or window_s,
            counts_everything=by_ip and purpose not in _COUNTED_BY_IP,
        )
        log.warning("budget_closed", host=self._server, bucket=refusal.bucket, wait_s=wait_s)

    async def requests_left(self) -> int | None:
        """Count the requests that could be sent right now; None without a known limit."""
        if self.limit is None:
            return None
        if await self.closed_until() is not None:
            return 0
        ahead_ms = await self._store.ahead_ms(self._key_bucket())
        return int(max(self.limit.burst - ahead_ms / self.limit.interval_ms, 0))

    async def closed_until(self) -> datetime | None:
        """Return until when a 429 stops requests; None when nothing is closed."""
        closed_ms = await self._store.closed_until_ms(self._key_bucket(), self._ip_bucket())
        return None if closed_ms is None else from_ms(int(closed_ms))

    def _key_bucket(self) -> str:
        return self._store.bucket(self._server, "key", self._credential())

    def _ip_bucket(self) -> str:
        return self._store.bucket(self._server, "egress", self._egress)
