"""Budgets that a test can read, exhaust, and act on just before a request."""

from collections.abc import Callable

from relay.errors import OverBudget, RateLimited
from relay.providers.base import Purpose
from relay.store.budget import Pace


class FakeBudget:
    """A RequestBudget that records the purposes of requests and the refusals."""

    def __init__(self, *, exhausted: bool = False) -> None:
        self.exhausted = exhausted
        self.spent: list[Purpose] = []
        self.refusals: list[tuple[RateLimited, Purpose]] = []

    async def spend(self, purpose: Purpose) -> None:
        if self.exhausted:
            raise OverBudget(60)
        self.spent.append(purpose)

    async def close(self, refusal: RateLimited, purpose: Purpose) -> None:
        self.refusals.append((refusal, purpose))


class FakeBudgetStore:
    """A BudgetStore that counts requests; `before_request` is called with the count before each of them."""

    def __init__(self) -> None:
        self.exhausted = False
        self.requests = 0
        self.closed_s: list[float] = []
        self.before_request: Callable[[int], None] | None = None

    def bucket(self, provider: str, counted_by: str, value: str) -> str:
        return f"{provider}:{counted_by}:{value}"

    async def take(self, key_bucket: str, ip_bucket: str, pace: Pace | None, *, by_ip: bool) -> float:
        if self.exhausted:
            return 60
        self.requests += 1
        if self.before_request is not None:
            self.before_request(self.requests)
        return 0

    async def close(self, bucket: str, wait_s: float, *, counts_everything: bool) -> float:
        self.closed_s.append(wait_s)
        return wait_s

    async def ahead_ms(self, bucket: str) -> float:
        return 0
