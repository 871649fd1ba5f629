"""One provider at the real poller: the store is real, HTTP is real, time is what the test says.

`Desk.poll` claims the source as the poll lane hands it out and lets the poller work on it once. What became of rows is
counted by `RowOutcome`.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp
from redis.asyncio import Redis

from relay.polling.poller import Poller
from relay.polling.window import Tier
from relay.providers.source import Source, connect_source
from relay.queue.lane import Lane
from relay.queue.settlement import Done, Renew, Retry, Settlement
from relay.recordings.markers import Marker
from relay.simulator.timeline import CallPlan
from relay.store.codes import RowOutcome
from tests.contract.providers.subject import MakeSubject, Subject
from tests.fakes.budget import FakeBudgetStore
from tests.store import WatchedCalls, open_store
from workers.poll import PollWorker

START = datetime(2025, 7, 1, 12, tzinfo=UTC)
TIERS = (Tier(0, 7_200), Tier(900, 93_600), Tier(21_600, 280_800))
SID = "main"


@dataclass
class Told:
    """Stands for the operations: what was said about the source."""

    errors: list[str] = field(default_factory=list)
    recovered: int = 0

    async def source_error(self, _source: object, error: str, *, since_ms: int) -> None:
        self.errors.append(error)

    async def source_recovered(self, _source: object, *, since_ms: int) -> None:
        self.recovered += 1


class NoMarkers:
    """Stands for the recording storage's markers: there are none."""

    async def read(self, _sid: str) -> Marker | None:
        return None

    async def write(self, _sid: str, _marker: Marker) -> None:
        return None


class Desk:
    """A poller, a source, and the provider behind it."""

    def __init__(self, subject: Subject, redis: Redis, budgets: FakeBudgetStore, now: "Moment") -> None:
        self.subject = subject
        self.redis = redis
        self.budgets = budgets
        self.moment = now
        self.store = open_store(redis)
        self.store.calls = self.ingested = WatchedCalls(redis)
        self.told = Told()
        self.lane = Lane(redis, "poll", lease_s=60)
        self.source: Source
        poller = Poller(
            self.store,
            cast(Any, self.told),
            cast(Any, NoMarkers()),
            tiers=TIERS,
            wake=lambda: None,
            now=now,
        )
        self.worker = PollWorker(lambda: {SID: self.source}, poller)

    @property
    def now(self) -> datetime:
        return self.moment()

    def pass_(self, **duration: float) -> None:
        """Let time pass."""
        self.moment.at += timedelta(**duration)

    def call(self, rid: int, *, start_s: float = -60, talk_s: float = 30, late_s: float = 0, **fields: Any) -> CallPlan:
        """Add a call that began `start_s` from now; it shows when it ends, or `late_s` after that."""
        started_at = (self.now + timedelta(seconds=start_s)).replace(microsecond=0)
        ended_at = started_at + timedelta(seconds=talk_s)
        plan = CallPlan(
            rid=rid,
            started_at=started_at,
            ended_at=ended_at,
            visible_at=ended_at + timedelta(seconds=late_s),
            **fields,
        )
        self.subject.add([plan])
        return plan

    async def poll(self) -> int:
        """Let the source be polled once; gives how long the poller wants to wait, in ms."""
        await self.lane.put("", SID)
        [claim] = (await self.lane.exchange(want=1)).claims
        settlements: list[Settlement] = []
        await self.worker.work([claim], lambda _, settlement: settlements.append(settlement))
        [retry] = [settlement for settlement in settlements if settlement != Renew()]
        assert isinstance(retry, Retry)
        exchanged = await self.lane.exchange([(claim, Done())])
        assert not exchanged.refused
        return retry.after_ms

    def count(self, outcome: RowOutcome) -> Counter[str]:
        """How often each row was ingested with this outcome."""
        return self.ingested.count(outcome)

    @property
    def told_keys(self) -> Counter[str]:
        """How often each call was taken for new, and so is told."""
        return self.count(RowOutcome.NEW)

    async def error(self) -> str:
        """What is wrong with the source, as an operator sees it; empty when all is well."""
        return (await self.store.sources.read(SID)).error

    async def cursor(self) -> datetime | None:
        """Where the source stands."""
        return (await self.store.sources.read(SID)).poll_state.cursor


@dataclass
class Moment:
    """The time that everybody here goes by."""

    at: datetime = START

    def __call__(self) -> datetime:
        return self.at


@contextlib.asynccontextmanager
async def open_desk(
    make: MakeSubject, redis: Redis, http: aiohttp.ClientSession, *, zone: str = "UTC", **options: Any
) -> AsyncIterator[Desk]:
    """Open a desk on an empty store; `options` are those of the source that its provider has."""
    await redis.flushall()
    moment = Moment()
    subject = make(moment, zone)
    desk = Desk(subject, redis, FakeBudgetStore(), moment)
    async with subject.serve() as base_url:
        known = {name: value for name, value in options.items() if name in subject.kind.options.model_fields}
        chosen = subject.options(base_url, **known)
        desk.source = connect_source(SID, chosen, http, cast(Any, desk.budgets), public_url=None)
        yield desk


OpenDesk = Callable[..., contextlib.AbstractAsyncContextManager[Desk]]
Act = Callable[[Desk], Awaitable[None]]
