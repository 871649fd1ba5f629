"""A poller inside the test: the real poller and lane on a real store, and a fake provider without HTTP.

The clock is the test's. A `PollFault` is what goes wrong with one poll.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

import orjson
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import InvalidRow, Record
from relay.domain.json import Json
from relay.errors import StorageError
from relay.events.operations import Operations
from relay.polling.poller import Poller
from relay.polling.window import Tier
from relay.providers import parsing
from relay.providers.base import CallPage, Window
from relay.providers.parsing import ErrorResponse
from relay.providers.source import Source, connect_source
from relay.providers.webfones import wire
from relay.providers.webfones.options import WebfonesOptions
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.settlement import Settlement
from relay.recordings.markers import Markers
from relay.store import keys
from relay.store.budget import BudgetStore
from relay.store.calls import StoredCall
from relay.store.codes import RowOutcome
from relay.store.sources import SourceState
from tests.fakes.clock import ManualClock
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.webfones import FaultyWebFones
from tests.store import WatchedCalls, open_store
from workers.poll import PollWorker

SID = "office"
KEY = "the-key"
TIERS = (Tier(0, 7_200), Tier(900, 93_600), Tier(21_600, 280_800))


class Killed(BaseException):
    """The poller's process died."""


class PollFault(StrEnum):
    """What goes wrong with a poll."""

    NONE = "none"
    DOWN = "down"
    REFUSED = "refused"
    TOO_MANY = "too_many"
    NOT_JSON = "not_json"
    SUCCESS_FALSE = "success_false"
    WRONG_COUNT = "wrong_count"
    PARTIAL = "partial"
    KILLED = "killed"
    """Before the answer is there."""
    KILLED_HALF_WAY = "killed_half_way"
    """When half of the answer was read."""
    KILLED_AT_THE_END = "killed_at_the_end"
    """When all was read, and the last rows are not ingested yet."""
    OVERTAKEN = "overtaken"
    """The lease ends while the provider's answer is on its way; another poller polls, and then the answer arrives."""


FAULTS = {
    PollFault.DOWN: Fault(kind=FaultKind.STATUS, status=500),
    PollFault.REFUSED: Fault(kind=FaultKind.STATUS, status=403),
    PollFault.TOO_MANY: Fault(kind=FaultKind.STATUS, status=429),
    PollFault.NOT_JSON: Fault(kind=FaultKind.NOT_JSON),
    PollFault.SUCCESS_FALSE: Fault(kind=FaultKind.SUCCESS_FALSE),
    PollFault.WRONG_COUNT: Fault(kind=FaultKind.WRONG_COUNT),
    PollFault.PARTIAL: Fault(kind=FaultKind.PARTIAL),
}
KILLS = (PollFault.KILLED, PollFault.KILLED_HALF_WAY, PollFault.KILLED_AT_THE_END)


@dataclass
class SimulatedCalls:
    """The call list of a WebFones account, as the client gives it, without a connection in between."""

    simulator: FaultyWebFones
    clock: ManualClock
    options: WebfonesOptions
    rows_per_page: int = 60
    fault: PollFault = PollFault.NONE
    faults: tuple[Fault, ...] = ()
    overtake: Any = None
    asked: list[Window] = field(default_factory=list)
    deepest: timedelta | None = None
    """The provider answers 504 to what reaches further back."""
    killed_beyond: timedelta | None = None
    hold: asyncio.Event | None = None
    """Set when what reaches back further than three hours may be answered."""

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        now, zone = self.clock.now(), ZoneInfo(self.options.timezone)
        self.asked.append(window)
        if self.fault is PollFault.KILLED:
            raise Killed
        depth = now - window.since
        if self.killed_beyond is not None and depth > self.killed_beyond:
            raise Killed
        if self.hold is not None and depth > timedelta(hours=3):
            await self.hold.wait()
        if self.deepest is not None and depth > self.deepest:
            raise wire.error_of(ErrorResponse(504, {}, b"", "the call list", "test", now))
        faults = (*self.faults, *([FAULTS[self.fault]] if self.fault in FAULTS else []))
        key = self.options.credential()
        answer = self.simulator.records(key, wire.query_time(window.since, zone), now, faults=faults)
        body = answer.encoded()
        if self.fault is PollFault.OVERTAKEN:
            await self.overtake()
        if answer.status != 200:
            raise wire.error_of(ErrorResponse(answer.status, answer.headers, body, "the call list", "test", now))
        rows = wire.read_call_list(parsing.load_json(body, name=wire.NAME))
        parsed = [wire.parse_row(row, zone=zone, region="US", seen_at=now) for row in rows]
        server_time = parsing.server_time(self.simulator.date_header())
        starts = list(range(0, max(len(parsed), 1), self.rows_per_page))
        for number, start in enumerate(starts):
            if self.fault is PollFault.KILLED_HALF_WAY and number == len(starts) // 2:
                raise Killed
            size_bytes = len(body) if start == 0 else 0
            yield CallPage(parsed[start : start + self.rows_per_page], server_time, size_bytes)
        if self.fault is PollFault.KILLED_AT_THE_END:
            raise Killed


class NoPorts:
    """A provider that has a call list and nothing else."""

    recordings = None
    contacts = None
    details = None
    stream = None

    def __init__(self, calls: Any) -> None:
        self.calls = calls


class Notes:
    """The storage's small notes, in memory; it may be out of order."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.writes = 0
        self.out_of_order = False

    async def get_small(self, name: str) -> bytes | None:
        self._try()
        return self.kept.get(name)

    async def put_small(self, name: str, data: bytes) -> None:
        self._try()
        self.writes += 1
        self.kept[name] = data

    def _try(self) -> None:
        if self.out_of_order:
            raise StorageError("the bucket cannot be reached")


class EverySubscription:
    """One subscription that wants everything."""

    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
        return ["ops"]


class PollHarness:
    """One source, its provider and its poller."""

    def __init__(self, redis: Redis, clock: ManualClock, *, zone: str = "UTC", **options: Any) -> None:
        self.redis = redis
        self.clock = clock
        self.simulator = FaultyWebFones(clock=clock.now)
        self.simulator.add_account(KEY, zone=zone)
        self.notes = Notes()
        self.woken = 0
        settings = {"api_key": KEY, "timezone": zone, "base_url": "http://127.0.0.1:9", **options}
        self.options = WebfonesOptions.model_validate(settings)
        self.calls = SimulatedCalls(self.simulator, clock, self.options)
        self.source: Source = replace(
            connect_source(SID, self.options, None, BudgetStore(redis), public_url=None),  # type: ignore[arg-type]  # no HTTP
            provider=NoPorts(self.calls),
        )
        self.lane = Lane(redis, "poll")
        self.store = open_store(redis, calls_ttl_s=30 * 86_400, events_ttl_s=14 * 86_400)
        self.store.calls = self.ingested = WatchedCalls(redis)
        poller = Poller(
            self.store,
            Operations(self.store.events, EverySubscription()),
            Markers(self.notes),  # type: ignore[arg-type]  # only the small notes are used
            tiers=TIERS,
            wake=self._wake,
            now=clock.now,
        )
        self.worker = PollWorker(lambda: {SID: self.source}, poller)

    def _wake(self) -> None:
        self.woken += 1

    @property
    def now(self) -> datetime:
        return self.clock.now()

    async def claim(self) -> Claim:
        """Claim the source, as a runner does, now."""
        await self.lane.put(SID, SID)
        (claim,) = (await self.lane.exchange(want=1)).claims
        return claim

    async def work(self, claim: Claim) -> Settlement | None:
        """Do the poll that was claimed and settle it; None when the store refused that, since the lease had ended."""
        settlements: list[tuple[Claim, Settlement]] = []
        await self.worker.work([claim], lambda *settled: settlements.append(settled))
        exchange = await self.lane.exchange(settlements)
        return None if settlements[-1] in exchange.refused else settlements[-1][1]

    async def poll(self, fault: PollFault = PollFault.NONE, *faults: Fault) -> Settlement | None:
        """Poll once, now; what comes of a fault is that the poll's lease is over."""
        self.calls.fault, self.calls.faults = fault, faults
        self.calls.overtake = self._overtake
        claim = await self.claim()
        try:
            return await self.work(claim)
        except Killed:
            await self.end_lease()
            return None

    async def _overtake(self) -> None:
        self.calls.fault = PollFault.NONE
        await self.end_lease()
        await self.clock.advance(600, turns=0)
        await self.work(await self.claim())

    async def end_lease(self) -> None:
        """Let the lease be over, and the source be anybody's."""
        await self.lane.drop(SID, SID)

    async def lose_the_store(self) -> None:
        """An unsaved Redis restarts, empty."""
        await self.redis.flushdb()

    async def state(self) -> SourceState:
        return await self.store.sources.read(SID)

    async def call(self, rid: int) -> StoredCall | None:
        return await self.store.calls.get(ids.call_id(SID, str(rid)))

    async def calls_stored(self) -> int:
        return int(await self.redis.zcard(keys.CALLS))

    def ingested_rows(self, wanted: RowOutcome = RowOutcome.NEW) -> Counter[str]:
        """How often each row was ingested as new (or with another outcome)."""
        return self.ingested.count(wanted)

    async def operational_events(self) -> list[Json]:
        """The operational events so far, in order."""
        names = await self.redis.zrange(keys.EVENTS, 0, -1)
        events = [await self.store.events.get(name.decode()) for name in names]
        return sorted((event for event in events if event), key=lambda event: str(event["timestamp"]))

    async def seen(self) -> dict[str, set[str]]:
        """The keys that are remembered, by day."""
        seen_keys: dict[str, set[str]] = {}
        async for name in self.redis.scan_iter(match=f"relay:seen:{SID}:*"):
            seen_keys[name.decode().rsplit(":", 1)[1]] = {key.decode() for key in await self.redis.hkeys(name)}
        return seen_keys

    def marker(self) -> Json | None:
        raw = self.notes.kept.get(f"markers/{SID}.json")
        return orjson.loads(raw) if raw else None

    def row(self, rid: int) -> Record | InvalidRow:
        """What the provider shows of a call now, as the relay reads it."""
        answer = self.simulator.records(KEY, "2000-01-01 00:00:00", self.now)
        body: Any = answer.body
        (row,) = (each for each in body["records"] if each["rid"] == rid)
        return wire.parse_row(row, zone=ZoneInfo(self.options.timezone), region="US", seen_at=self.now)
