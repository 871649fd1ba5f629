"""A runner: a slow item delays no other, and no settlement is lost; against a real Valkey."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as StoreGone

from relay.domain import ids
from relay.domain.call import Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.events.publisher import Publisher
from relay.queue import keys as queue_keys
from relay.queue import runner
from relay.queue.changes import LimitInFlight, Put
from relay.queue.claim import Claim
from relay.queue.lane import Exchange, Lane
from relay.queue.runner import Runner, Settle
from relay.queue.settlement import Done, Renew, Retry, Settlement
from relay.store.calls import Row, claimed_call
from relay.store.lanes import LaneName, open_lane
from tests.store import open_store

LONG_S = 60.0


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.002)


class FakeWork:
    """Work that records which items ran when, and ends when the test lets it."""

    def __init__(self, lane: Lane, *, concurrency: int = 10, min_lease_s: float = 0, **options: Any) -> None:
        self.lane = lane
        self.runner = Runner(lane, self.work, concurrency=concurrency, min_lease_s=min_lease_s, **options)
        self.attempts: Counter[str] = Counter()
        self.company: dict[str, set[str]] = {}
        self.running: set[str] = set()
        self.most_running = 0
        self.hung = {"slow": asyncio.Event()}
        self.duration_s = 0.0
        self.failures: dict[str, Exception] = {}
        self.batches: list[list[str]] = []
        self.least_left_s = float("inf")

    async def work(self, claims: Sequence[Claim], settle: Settle) -> None:
        names = [claim.item for claim in claims]
        self.batches.append(names)
        self.attempts.update(names)
        self.least_left_s = min(self.least_left_s, *(claim.left_s for claim in claims))
        for name in names:
            self.company[name] = set(self.running)
        for name in self.running:
            self.company[name] |= set(names)
        self.running |= set(names)
        self.most_running = max(self.most_running, len(self.running))
        try:
            if self.duration_s:
                await asyncio.sleep(self.duration_s)
            for name in names:
                if name in self.hung:
                    await self.hung[name].wait()
                if name in self.failures:
                    raise self.failures[name]
        finally:
            self.running -= set(names)
        for claim in claims:
            settle(claim, Done())

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Run; at the end release what hangs, and drain."""
        task = asyncio.create_task(self.runner.run())
        try:
            yield task
        finally:
            for event in self.hung.values():
                event.set()
            self.runner.stop(within_s=5)
            await asyncio.gather(task, return_exceptions=True)


class Flaky(Lane):
    """A lane whose store can be unavailable, or lose a reply on its way."""

    unavailable = False
    lose_replies = 0
    failed_exchanges = 0
    lost: Sequence[Claim] = ()

    async def exchange(self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0) -> Exchange:
        if self.unavailable:
            self.failed_exchanges += 1
            raise StoreGone("the store is unavailable")
        reply = await super().exchange(settlements, want=want)
        if self.lose_replies and settlements:
            self.lose_replies -= 1
            self.lost = reply.claims
            raise StoreGone("the reply was lost")
        return reply


async def fill(lane: Lane, *items: str, partition: str = "p") -> None:
    await lane.apply(*(Put(partition, item) for item in items))


async def held_in_store(redis: Redis, partition: str = "p") -> list[str]:
    return sorted(item.decode() for item in await redis.zrange(queue_keys.leased("poll", partition), 0, -1))


async def waiting_in_store(redis: Redis, partition: str = "p") -> list[str]:
    return sorted(item.decode() for item in await redis.zrange(queue_keys.waiting("poll", partition), 0, -1))


async def empty(redis: Redis) -> bool:
    return not await redis.keys("relay:l*")


async def let_leases_end(redis: Redis, lane: Lane, partition: str = "p") -> None:
    for item in await redis.zrange(queue_keys.leased("poll", partition), 0, -1):
        await redis.zadd(queue_keys.leased("poll", partition), {item: 1})
    await lane.drop(partition, "unknown")


async def make_suspect(redis: Redis, lane: Lane, item: str) -> None:
    """Expire three leases of an item."""
    await fill(lane, item)
    for _ in range(3):
        assert [claim.item for claim in (await lane.exchange(want=5)).claims] == [item]
        await let_leases_end(redis, lane)


# Streaming


async def test_a_slow_item_delays_no_other(redis: Redis) -> None:
    """One subscriber hangs; hundreds of other deliveries are attempted and settled meanwhile."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S), concurrency=4)
    await fill(fake.lane, "slow", *(f"quick{n}" for n in range(200)))

    async with fake.run():
        await until(lambda: fake.runner.settled == 200)
        assert fake.running == {"slow"}
        assert await held_in_store(redis) == ["slow"]
        fake.hung["slow"].set()
        await until(lambda: fake.runner.settled == 201)

    assert set(fake.attempts.values()) == {1}
    assert await empty(redis)


async def test_400_items_of_a_slow_subscriber_are_each_attempted_once(redis: Redis) -> None:
    """All of them together take longer than a lease; none of them is held that long."""
    lane = Lane(redis, "poll", lease_s=1.0)
    await lane.apply(LimitInFlight("p", 10))
    fakes = [FakeWork(Lane(redis, "poll", lease_s=1.0), concurrency=10, min_lease_s=0.3) for _ in range(2)]
    await fill(lane, *(f"event{n}" for n in range(400)))
    began = time.monotonic()
    for fake in fakes:
        fake.duration_s = 0.035

    async with fakes[0].run(), fakes[1].run():
        await until(lambda: sum(fake.runner.settled for fake in fakes) >= 400)

    assert time.monotonic() - began > lane.lease_s
    attempts = fakes[0].attempts + fakes[1].attempts
    assert (len(attempts), attempts.total()) == (400, 400)
    assert sum(fake.runner.refused for fake in fakes) == 0


async def test_a_runner_holds_at_most_twice_what_it_can_start(redis: Redis) -> None:
    """What it cannot start soon is left to other workers."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S), concurrency=3)
    names = [f"slow{n}" for n in range(20)]
    fake.hung = {name: asyncio.Event() for name in names}
    await fill(fake.lane, *names)

    async with fake.run():
        await until(lambda: len(fake.running) == 3)
        await until(lambda: fake.runner.full)
        assert len(await held_in_store(redis)) == fake.runner.held == 6
        assert len(await waiting_in_store(redis)) == 14

    assert fake.most_running == 3


async def test_a_wake_up_starts_an_idle_runner_at_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps up to a second, here an hour: only the wake-up can start the item."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S))

    async with fake.run():
        for name in ("one", "two", "three"):
            await fill(fake.lane, name)
            fake.runner.wake()
            await until(lambda name=name: fake.attempts[name] == 1)  # type: ignore[misc]  # bound now

    assert fake.attempts.total() == 3


async def test_a_runner_sleeps_no_longer_than_until_the_next_due(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that is due soon is worked on then, without a wake-up."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S))
    await fake.lane.put("p", "soon", after_ms=40)

    async with fake.run():
        await until(lambda: fake.runner.settled == 1)


async def test_an_item_with_too_little_lease_left_is_returned(redis: Redis) -> None:
    """Nothing starts with less lease left than an attempt may take; it is claimed again with a new lease."""
    fake = FakeWork(Lane(redis, "poll", lease_s=2.0), concurrency=1, min_lease_s=1.9)
    fake.duration_s = 0.15
    await fill(fake.lane, *(f"item{n}" for n in range(4)))

    async with fake.run():
        await until(lambda: len(fake.attempts) == 4 and fake.runner.held == 0)

    assert fake.least_left_s >= 1.85
    assert set(fake.attempts.values()) == {1}


async def test_a_batch_has_claims_of_one_partition_only(redis: Redis) -> None:
    """One look-up serves the calls of one source; sources are never mixed."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane, concurrency=4, batch=5)
    for source in ("a", "b"):
        await fill(lane, *(f"{source}{n}" for n in range(12)), partition=source)

    async with fake.run():
        await until(lambda: fake.runner.settled == 24)

    assert sorted(len(batch) for batch in fake.batches) == [2, 2, 5, 5, 5, 5]
    assert all(len({name[0] for name in batch}) == 1 for batch in fake.batches)


async def test_unproven_partitions_share_a_fifth_of_the_room(redis: Redis) -> None:
    """Any number of hung subscribers leaves four fifths to the others."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane, concurrency=10, unproven=lambda partition: partition == "dead")
    names = [f"dead{n}" for n in range(60)]
    fake.hung = {name: asyncio.Event() for name in names}
    await fill(lane, *names, partition="dead")
    await fill(lane, *(f"quick{n}" for n in range(200)))

    async with fake.run():
        await until(lambda: sum(name.startswith("quick") for name in fake.attempts) == 200)
        assert len(fake.running) == 2


# Errors


async def test_settlements_wait_for_an_unavailable_store(redis: Redis) -> None:
    """Even for longer than the leases: nothing is done twice."""
    lane = Flaky(redis, "poll", lease_s=0.05)
    fake = FakeWork(lane, concurrency=10)
    fake.hung = {f"item{n}": asyncio.Event() for n in range(8)}
    await fill(lane, *fake.hung)

    async with fake.run():
        await until(lambda: len(fake.running) == 8)
        lane.unavailable = True
        for event in fake.hung.values():
            event.set()
        await until(lambda: lane.failed_exchanges >= 2)
        assert (fake.running, fake.runner.settled) == (set(), 0)
        await let_leases_end(redis, lane)
        lane.unavailable = False
        await until(lambda: fake.runner.settled == 8)

    assert set(fake.attempts.values()) == {1}
    assert fake.runner.refused == 0
    assert await empty(redis)


async def test_work_goes_on_while_the_store_is_unavailable(redis: Redis) -> None:
    """No attempt is cancelled because of the store, and claimed items are started."""
    lane = Flaky(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane, concurrency=2)
    fake.hung = {f"item{n}": asyncio.Event() for n in range(4)}
    await fill(lane, *fake.hung)

    async with fake.run():
        await until(lambda: len(fake.running) == 2 and fake.runner.held == 4)
        lane.unavailable = True
        for event in fake.hung.values():
            event.set()
        await until(lambda: fake.attempts.total() == 4 and not fake.running)
        lane.unavailable = False
        await until(lambda: fake.runner.settled == 4)

    assert set(fake.attempts.values()) == {1}


async def test_a_lost_reply_loses_nothing_and_repeats_nothing(redis: Redis) -> None:
    """The store had settled: sent again, the settlements are refused. What it had handed out is claimed again."""
    lane = Flaky(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane, concurrency=2)
    lane.lose_replies = 1
    await fill(lane, *(f"item{n}" for n in range(12)))

    async with fake.run():
        await until(lambda: fake.runner.refused > 0)
        assert lane.lost
        await redis.zadd(queue_keys.leased("poll", "p"), {claim.item: 1 for claim in lane.lost})
        await lane.drop("p", "unknown")
        await until(lambda: len(fake.attempts) == 12 and fake.runner.held == 0)
        await until(lambda: empty(redis))

    assert set(fake.attempts.values()) == {1}


async def test_work_that_raises_keeps_its_lease_until_it_expires(redis: Redis) -> None:
    """It counts against the item only: the runner goes on, and reserves no room for it."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S), concurrency=2)
    fake.failures["bad"] = KeyError("surprise")
    await fill(fake.lane, "bad", "good")

    async with fake.run():
        await until(lambda: fake.runner.settled == 1 and fake.runner.held == 0)
        assert await held_in_store(redis) == ["bad"]
        await let_leases_end(redis, fake.lane)
        fake.failures.clear()
        fake.runner.wake()
        await until(lambda: fake.runner.settled == 2)

    assert fake.attempts == {"bad": 2, "good": 1}


async def test_an_item_that_always_raises_is_quarantined_after_five_leases(redis: Redis) -> None:
    """It is not retried for ever, and an operator can find it."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S))
    fake.failures["bad"] = KeyError("surprise")
    await fill(fake.lane, "bad")

    async with fake.run():
        for attempt in range(1, 6):
            await until(lambda attempt=attempt: fake.attempts["bad"] == attempt)  # type: ignore[misc]  # bound now
            await until(lambda: fake.runner.held == 0)
            await let_leases_end(redis, fake.lane)
            fake.runner.wake()
        await until(lambda: empty(redis))

    assert await redis.zrange(queue_keys.quarantine("poll"), 0, -1) == [b"p\x1fbad"]


async def test_work_interrupted_by_a_store_error_is_retried_soon(redis: Redis) -> None:
    """That does not count against the item."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S))
    fake.failures["item"] = StoreGone("connection reset")
    await fill(fake.lane, "item")

    async with fake.run():
        await until(lambda: fake.runner.settled == 1)
        assert await waiting_in_store(redis) == ["item"]
        fake.failures.clear()
        await fake.lane.put("p", "item")
        fake.runner.wake()
        await until(lambda: fake.runner.settled == 2)

    assert await redis.exists(queue_keys.quarantine("poll")) == 0


async def test_a_renewal_keeps_the_lease_and_is_ignored_after_the_settle(redis: Redis) -> None:
    """Long work renews its lease."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    renewing = asyncio.Event()
    claims: list[Claim] = []

    async def work(batch: Sequence[Claim], settle: Settle) -> None:
        claims.extend(batch)
        await renewing.wait()
        settle(batch[0], Renew())
        await until(lambda: long.settled == 1)
        settle(batch[0], Done())
        settle(batch[0], Renew())
        settle(batch[0], Retry())

    long = Runner(lane, work, concurrency=1, min_lease_s=0)
    await fill(lane, "item")
    task = asyncio.create_task(long.run())
    await until(lambda: bool(claims))
    await redis.zadd(queue_keys.leased("poll", "p"), {"item": 1})
    renewing.set()
    await until(lambda: long.settled == 2)
    long.stop(within_s=5)
    await task

    assert len(claims) == 1
    assert long.refused == 0
    assert await empty(redis)


# Suspects


async def test_a_suspect_runs_alone(redis: Redis) -> None:
    """An item whose workers died three times may kill this process: then nothing dies with it."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    await make_suspect(redis, lane, "suspect")
    fake = FakeWork(lane, concurrency=10)
    fake.duration_s = 0.002
    fake.hung["suspect"] = asyncio.Event()
    await fill(lane, *(f"item{n}" for n in range(30)), partition="q")
    await redis.zadd(queue_keys.lane("poll"), {"q": 0})

    async with fake.run():
        await until(lambda: fake.running == {"suspect"})
        await fill(lane, "later")
        fake.runner.wake()
        assert fake.runner.full
        fake.hung["suspect"].set()
        await until(lambda: fake.attempts.total() == 32)

    assert fake.company["suspect"] == set()
    assert await empty(redis)


async def test_a_suspect_runs_beside_others_before_its_lease_expires(redis: Redis) -> None:
    """An audio transfer of an hour is running: the suspect starts beside it before its own lease expires."""
    lane = Lane(redis, "poll", lease_s=5.0)
    fake = FakeWork(lane, concurrency=10, min_lease_s=4.5)
    await fill(lane, "slow", partition="q")

    async with fake.run():
        await until(lambda: fake.running == {"slow"})
        await make_suspect(redis, Lane(redis, "poll", lease_s=5.0), "suspect")
        fake.runner.wake()
        await until(lambda: fake.attempts["suspect"] == 1)
        assert fake.company["suspect"] == {"slow"}
        await fill(lane, "later", partition="r")
        fake.runner.wake()
        await until(lambda: fake.attempts["later"] == 1)

    assert fake.attempts["suspect"] == 1


async def test_a_waiting_suspect_is_returned_when_the_runner_stops(redis: Redis) -> None:
    """It is not started during the drain."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane, concurrency=10)
    await fill(lane, "slow", partition="q")

    async with fake.run() as task:
        await until(lambda: fake.running == {"slow"})
        await make_suspect(redis, Lane(redis, "poll", lease_s=LONG_S), "suspect")
        fake.runner.wake()
        await until(lambda: fake.runner.held == 2)
        fake.runner.stop(within_s=10)
        await until(lambda: fake.runner.held == 1)
        fake.hung["slow"].set()
        await task

    assert fake.attempts == {"slow": 1}
    assert await waiting_in_store(redis) == ["suspect"]


# Stopping


async def test_a_stopping_runner_finishes_what_runs_and_returns_what_waits(redis: Redis) -> None:
    """SIGTERM: nothing more is claimed, attempts finish and are settled, other workers get the rest at once."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S), concurrency=2)
    names = [f"slow{n}" for n in range(8)]
    fake.hung = {name: asyncio.Event() for name in names}
    await fill(fake.lane, *names)

    async with fake.run() as task:
        await until(lambda: len(fake.running) == 2 and fake.runner.held == 4)
        running = set(fake.running)
        fake.runner.stop(within_s=10)
        await until(lambda: fake.runner.held == 2)
        for event in fake.hung.values():
            event.set()
        await task

    assert fake.attempts == dict.fromkeys(running, 1)
    assert await held_in_store(redis) == []
    assert await waiting_in_store(redis) == sorted(set(names) - running)


async def test_a_runner_with_nothing_to_do_stops_at_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the middle of a long sleep."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S))
    task = asyncio.create_task(fake.runner.run())
    await asyncio.sleep(0)
    fake.runner.stop(within_s=600)

    async with asyncio.timeout(10):
        await task


async def test_the_deadline_ends_a_drain(redis: Redis) -> None:
    """An attempt that does not end keeps its lease: whether it was delivered is unknown."""
    fake = FakeWork(Lane(redis, "poll", lease_s=LONG_S), concurrency=2)
    await fill(fake.lane, "slow", "quick")
    task = asyncio.create_task(fake.runner.run())
    await until(lambda: fake.runner.settled == 1)
    fake.runner.stop(within_s=0.05)

    async with asyncio.timeout(10):
        await task

    assert fake.running == set()
    assert await held_in_store(redis) == ["slow"]


async def test_the_last_settlements_are_sent_when_the_runner_ends(redis: Redis) -> None:
    """The store was unavailable during the drain and recovered at its end."""
    lane = Flaky(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane)
    fake.hung["item"] = asyncio.Event()
    await fill(lane, "item")
    task = asyncio.create_task(fake.runner.run())
    await until(lambda: fake.running == {"item"})
    lane.unavailable = True
    fake.hung["item"].set()
    await until(lambda: lane.failed_exchanges > 0)
    fake.runner.stop(within_s=0)
    lane.unavailable = False
    await task

    assert await empty(redis)


async def test_a_runner_cancelled_during_an_exchange_still_sends_its_settlements(redis: Redis) -> None:
    """Settlements that were on their way are sent once more."""
    asking = asyncio.Event()

    class Hanging(Lane):
        hang = False

        async def exchange(self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0) -> Exchange:
            if self.hang and settlements:
                self.hang = False
                asking.set()
                await asyncio.Event().wait()
            return await super().exchange(settlements, want=want)

    lane = Hanging(redis, "poll", lease_s=LONG_S)
    fake = FakeWork(lane)
    fake.hung["item"] = asyncio.Event()
    await fill(lane, "item")
    task = asyncio.create_task(fake.runner.run())
    await until(lambda: fake.running == {"item"})
    lane.hang = True
    fake.hung["item"].set()
    await asking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await empty(redis)


# Clocks


@pytest.mark.parametrize("wrong_by_s", [-40.0, 40.0])
async def test_a_wrong_process_clock_decides_nothing(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, wrong_by_s: float
) -> None:
    """Two workers, one of them 40 s off: dues, leases, holds and the times in events are those of the store."""
    true_time = time.time
    lane = open_lane(redis, LaneName.ENRICH, lease_s=LONG_S)
    monkeypatch.setattr(time, "time", lambda: true_time() + wrong_by_s)
    store = open_store(redis, calls_ttl_s=1000, events_ttl_s=1000)
    record = Record(key="7", started_at=datetime(2025, 7, 1, tzinfo=UTC), local_date="2025-07-01")
    await store.calls.ingest("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")
    rules = SourceRules("webfones", "UTC", True, False, 30_000, 0)
    waits: list[int | None] = []

    class Nobody:
        def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
            return ()

    publisher = Publisher(store, Nobody(), now_ms=lambda: lane.store_now_ms, on_deliveries=lambda: None)

    async def work(batch: Sequence[Claim], settle: Settle) -> None:
        wait_ms = await publisher.publish(claimed_call(batch[0]), rules, {})
        waits.append(wait_ms)
        settle(batch[0], Retry(wait_ms or 0))

    enrich = Runner(lane, work, concurrency=1, min_lease_s=0)
    await lane.apply()
    assert abs(lane.store_now_ms - true_time() * 1000) < 5000
    task = asyncio.create_task(enrich.run())
    await until(lambda: enrich.settled == 1)
    enrich.stop(within_s=5)
    await task

    [wait_ms] = waits
    assert wait_ms is not None
    assert 20_000 < wait_ms <= 30_000
    [(_, due_ms)] = await redis.zrange(queue_keys.waiting("enrich", "main"), 0, -1, withscores=True)
    assert 20_000 < due_ms - true_time() * 1000 <= 30_000
    call = await store.calls.get(ids.call_id("main", "7"))
    assert call is not None
    assert abs(call.ready_ms - true_time() * 1000) < 5000
