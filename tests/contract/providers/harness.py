"""One provider at the real poller: the store is real, HTTP is real, time is what the test says.

`PollHarness.poll` claims the source from the poll lane and lets the poller work on it once. What became of rows is
counted by `RowOutcome`.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp
from redis.asyncio import Redis

from relay.polling.poller import Poller
from relay.polling.window import Tier
from relay.providers.source import Source, connect_source
from relay.queue.lane import Lane
from relay.queue.settlement import Done, Retry, Settlement
from relay.recordings.markers import Marker
from relay.simulator.timeline import CallPlan
from relay.store.codes import RowOutcome
from tests.contract.providers.under_test import MakeProvider, ProviderUnderTest
from tests.fakes.budget import FakeBudgetStore
from tests.store import WatchedCalls, open_store
from workers.poll import PollWorker

START = datetime(2025, 7, 1, 12, tzinfo=UTC)
TIERS = (Tier(0, 7_200), Tier(900, 93_600), Tier(21_600, 280_800))
SID = "main"


@dataclass
class FakeOperations:
    """Records what is published about the source."""

    errors: list[str] = field(default_factory=list)
    recovered: int = 0

    async def source_error(self, _source: object, error: str, *, since_ms: int) -> None:
        self.errors.append(error)

    async def source_recovered(self, _source: object, *, since_ms: int) -> None:
        self.recovered += 1


class NoMarkers:
    """A recording storage without markers."""

    async def read(self, _sid: str) -> Marker | None:
        return None

    async def write(self, _sid: str, _marker: Marker) -> None:
        return None


class PollHarness:
    """A poller, a source, and the provider behind it."""

    def __init__(
        self, provider: ProviderUnderTest, redis: Redis, budgets: FakeBudgetStore, clock: "SettableClock"
    ) -> None:
        self.provider = provider
        self.redis = redis
        self.budgets = budgets
        self.clock = clock
        self.store = open_store(redis)
        self.store.calls = self.ingested = WatchedCalls(redis)
        self.operations = FakeOperations()
        self.lane = Lane(redis, "poll")
        self.source: Source
        poller = Poller(
            self.store,
            cast(Any, self.operations),
            cast(Any, NoMarkers()),
            tiers=TIERS,
            wake=lambda: None,
            now=clock,
        )
        self.worker = PollWorker(lambda: {SID: self.source}, poller)

    @property
    def now(self) -> datetime:
        return self.clock()

    def advance(self, **duration: float) -> None:
        """Move the clock."""
        self.clock.at += timedelta(**duration)

    def call(self, rid: int, *, start_s: float = -60, talk_s: float = 30, late_s: float = 0, **fields: Any) -> CallPlan:
        """Add a call that began `start_s` from now; it is listed when it ends, or `late_s` after that."""
        started_at = (self.now + timedelta(seconds=start_s)).replace(microsecond=0)
        ended_at = started_at + timedelta(seconds=talk_s)
        plan = CallPlan(
            rid=rid,
            started_at=started_at,
            ended_at=ended_at,
            visible_at=ended_at + timedelta(seconds=late_s),
            **fields,
        )
        self.provider.add([plan])
        return plan

    async def poll(self) -> int:
        """Poll the source once; gives the milliseconds until the next poll."""
        await self.lane.put(SID, SID)
        [claim] = (await self.lane.exchange(want=1)).claims
        settlements: list[Settlement] = []
        await self.worker.work([claim], lambda _, settlement: settlements.append(settlement))
        [retry] = settlements
        assert isinstance(retry, Retry)
        exchanged = await self.lane.exchange([(claim, Done())])
        assert not exchanged.refused
        return retry.after_ms

    def count(self, outcome: RowOutcome) -> Counter[str]:
        """How often each row was ingested with this outcome."""
        return self.ingested.count(outcome)

    @property
    def new_keys(self) -> Counter[str]:
        """How often each call was ingested as new, and so is published."""
        return self.count(RowOutcome.NEW)

    async def error(self) -> str:
        """The source's error, as an operator sees it; empty when there is none."""
        return (await self.store.sources.read(SID)).error

    async def cursor(self) -> datetime | None:
        """The source's cursor."""
        return (await self.store.sources.read(SID)).poll_state.cursor


@dataclass
class SettableClock:
    """The time in this test; set `at`, or `advance` the harness."""

    at: datetime = START

    def __call__(self) -> datetime:
        return self.at


@contextlib.asynccontextmanager
async def open_harness(
    make: MakeProvider, redis: Redis, http: aiohttp.ClientSession, *, zone: str = "UTC", **options: Any
) -> AsyncIterator[PollHarness]:
    """Open a harness on an empty store; of `options`, those that the provider's source has are used."""
    await redis.flushall()
    clock = SettableClock()
    provider = make(clock, zone)
    harness = PollHarness(provider, redis, FakeBudgetStore(), clock)
    async with provider.serve() as base_url:
        supported = {name: value for name, value in options.items() if name in provider.kind.options.model_fields}
        source_options = provider.options(base_url, **supported)
        harness.source = connect_source(SID, source_options, http, cast(Any, harness.budgets), public_url=None)
        yield harness
