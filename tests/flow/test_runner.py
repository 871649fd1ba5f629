"""A runner keeps every item moving: a slow one delays no other, and no outcome is lost; against a real Valkey."""

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
    """Wait for something that must become true."""
    async with asyncio.timeout(20):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.002)


class Phone:
    """Work that notes who ran when, and ends when it is told to."""

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
    async def at_work(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Run; in the end let go of what hangs, and drain."""
        task = asyncio.create_task(self.runner.run())
        try:
            yield task
        finally:
            for event in self.hung.values():
                event.set()
            self.runner.stop(within_s=5)
            await asyncio.gather(task, return_exceptions=True)


class Flaky(Lane):
    """A lane whose store can be away, or lose an answer on the way back."""

    away = False
    lose_answers = 0
    asked_in_vain = 0
    lost: Sequence[Claim] = ()

    async def exchange(self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0) -> Exchange:
        if self.away:
            self.asked_in_vain += 1
            raise StoreGone("the store is away")
        reply = await super().exchange(settlements, want=want)
        if self.lose_answers and settlements:
            self.lose_answers -= 1
            self.lost = reply.claims
            raise StoreGone("the answer was lost")
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
    await lane.drop(partition, "nobody")


async def make_suspect(redis: Redis, lane: Lane, item: str) -> None:
    """Let three leases of an item end."""
    await fill(lane, item)
    for _ in range(3):
        assert [claim.item for claim in (await lane.exchange(want=5)).claims] == [item]
        await let_leases_end(redis, lane)


# Streaming


async def test_a_slow_item_delays_no_other(redis: Redis) -> None:
    """One subscriber hangs; hundreds of other deliveries come and go meanwhile, each settled when it ends."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S), concurrency=4)
    await fill(phone.lane, "slow", *(f"quick{n}" for n in range(200)))

    async with phone.at_work():
        await until(lambda: phone.runner.settled == 200)
        assert phone.running == {"slow"}
        assert await held_in_store(redis) == ["slow"]
        phone.hung["slow"].set()
        await until(lambda: phone.runner.settled == 201)

    assert set(phone.attempts.values()) == {1}
    assert await empty(redis)


async def test_400_waiting_for_a_slow_subscriber_are_each_attempted_once(redis: Redis) -> None:
    """All of them together take longer than a lease; none of them is held for longer than one."""
    lane = Lane(redis, "poll", lease_s=1.0)
    await lane.apply(LimitInFlight("p", 10))
    phones = [Phone(Lane(redis, "poll", lease_s=1.0), concurrency=10, min_lease_s=0.3) for _ in range(2)]
    await fill(lane, *(f"event{n}" for n in range(400)))
    began = time.monotonic()
    for phone in phones:
        phone.duration_s = 0.035

    async with phones[0].at_work(), phones[1].at_work():
        await until(lambda: sum(phone.runner.settled for phone in phones) >= 400)

    assert time.monotonic() - began > lane.lease_s
    attempts = phones[0].attempts + phones[1].attempts
    assert (len(attempts), attempts.total()) == (400, 400)
    assert sum(phone.runner.refused for phone in phones) == 0


async def test_a_runner_holds_at_most_twice_what_it_can_start(redis: Redis) -> None:
    """What it cannot start soon is left for others."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S), concurrency=3)
    names = [f"slow{n}" for n in range(20)]
    phone.hung = {name: asyncio.Event() for name in names}
    await fill(phone.lane, *names)

    async with phone.at_work():
        await until(lambda: len(phone.running) == 3)
        await until(lambda: phone.runner.full)
        assert len(await held_in_store(redis)) == phone.runner.held == 6
        assert len(await waiting_in_store(redis)) == 14

    assert phone.most_running == 3


async def test_an_idle_runner_hears_a_wake_up_at_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps a second between two looks, here an hour: only the wake-up can bring the item."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S))

    async with phone.at_work():
        for name in ("one", "two", "three"):
            await fill(phone.lane, name)
            phone.runner.wake()
            await until(lambda name=name: phone.attempts[name] == 1)  # type: ignore[misc]  # bound now

    assert phone.attempts.total() == 3


async def test_a_runner_sleeps_no_longer_than_until_the_next_due(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that is due soon is done then, without a wake-up."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S))
    await phone.lane.put("p", "soon", after_ms=40)

    async with phone.at_work():
        await until(lambda: phone.runner.settled == 1)


async def test_an_item_whose_lease_grew_old_in_the_queue_is_given_back(redis: Redis) -> None:
    """Nothing is started with less lease left than an attempt may take; it comes again with a fresh one."""
    phone = Phone(Lane(redis, "poll", lease_s=2.0), concurrency=1, min_lease_s=1.9)
    phone.duration_s = 0.15
    await fill(phone.lane, *(f"item{n}" for n in range(4)))

    async with phone.at_work():
        await until(lambda: len(phone.attempts) == 4 and phone.runner.held == 0)

    assert phone.least_left_s >= 1.85
    assert set(phone.attempts.values()) == {1}


async def test_a_batch_has_claims_of_one_partition_only(redis: Redis) -> None:
    """One look-up serves the calls of one source; sources are never mixed."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    phone = Phone(lane, concurrency=4, batch=5)
    for source in ("a", "b"):
        await fill(lane, *(f"{source}{n}" for n in range(12)), partition=source)

    async with phone.at_work():
        await until(lambda: phone.runner.settled == 24)

    assert sorted(len(batch) for batch in phone.batches) == [2, 2, 5, 5, 5, 5]
    assert all(len({name[0] for name in batch}) == 1 for batch in phone.batches)


async def test_unproven_partitions_share_a_fifth_of_the_room(redis: Redis) -> None:
    """A crowd of subscribers that hang leaves four fifths to those who answer."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    phone = Phone(lane, concurrency=10, unproven=lambda partition: partition == "dead")
    names = [f"dead{n}" for n in range(60)]
    phone.hung = {name: asyncio.Event() for name in names}
    await fill(lane, *names, partition="dead")
    await fill(lane, *(f"quick{n}" for n in range(200)))

    async with phone.at_work():
        await until(lambda: sum(name.startswith("quick") for name in phone.attempts) == 200)
        assert len(phone.running) == 2


# Trouble


async def test_outcomes_wait_for_a_store_that_is_away(redis: Redis) -> None:
    """Longer than the leases, even: nothing that was done is done again."""
    lane = Flaky(redis, "poll", lease_s=0.05)
    phone = Phone(lane, concurrency=10)
    phone.hung = {f"item{n}": asyncio.Event() for n in range(8)}
    await fill(lane, *phone.hung)

    async with phone.at_work():
        await until(lambda: len(phone.running) == 8)
        lane.away = True
        for event in phone.hung.values():
            event.set()
        await until(lambda: lane.asked_in_vain >= 2)
        assert (phone.running, phone.runner.settled) == (set(), 0)
        await let_leases_end(redis, lane)
        lane.away = False
        await until(lambda: phone.runner.settled == 8)

    assert set(phone.attempts.values()) == {1}
    assert phone.runner.refused == 0
    assert await empty(redis)


async def test_work_goes_on_while_the_store_is_away(redis: Redis) -> None:
    """An attempt is never cancelled for the store's sake, and what is held is begun."""
    lane = Flaky(redis, "poll", lease_s=LONG_S)
    phone = Phone(lane, concurrency=2)
    phone.hung = {f"item{n}": asyncio.Event() for n in range(4)}
    await fill(lane, *phone.hung)

    async with phone.at_work():
        await until(lambda: len(phone.running) == 2 and phone.runner.held == 4)
        lane.away = True
        for event in phone.hung.values():
            event.set()
        await until(lambda: phone.attempts.total() == 4 and not phone.running)
        lane.away = False
        await until(lambda: phone.runner.settled == 4)

    assert set(phone.attempts.values()) == {1}


async def test_an_answer_that_got_lost_loses_nothing_and_repeats_nothing(redis: Redis) -> None:
    """The store had settled; offered again it refuses, and that is all. What it had handed out comes again."""
    lane = Flaky(redis, "poll", lease_s=LONG_S)
    phone = Phone(lane, concurrency=2)
    lane.lose_answers = 1
    await fill(lane, *(f"item{n}" for n in range(12)))

    async with phone.at_work():
        await until(lambda: phone.runner.refused > 0)
        assert lane.lost
        await redis.zadd(queue_keys.leased("poll", "p"), {claim.item: 1 for claim in lane.lost})
        await lane.drop("p", "nobody")
        await until(lambda: len(phone.attempts) == 12 and phone.runner.held == 0)
        await until(lambda: empty(redis))

    assert set(phone.attempts.values()) == {1}


async def test_work_that_raises_leaves_its_lease_to_end(redis: Redis) -> None:
    """It counts against the item, and only against it: the runner goes on, and keeps no place for it."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S), concurrency=2)
    phone.failures["bad"] = KeyError("surprise")
    await fill(phone.lane, "bad", "good")

    async with phone.at_work():
        await until(lambda: phone.runner.settled == 1 and phone.runner.held == 0)
        assert await held_in_store(redis) == ["bad"]
        await let_leases_end(redis, phone.lane)
        phone.failures.clear()
        phone.runner.wake()
        await until(lambda: phone.runner.settled == 2)

    assert phone.attempts == {"bad": 2, "good": 1}


async def test_an_item_that_always_raises_is_put_aside_after_five_leases(redis: Redis) -> None:
    """It does not come back for ever, and a person finds it."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S))
    phone.failures["bad"] = KeyError("surprise")
    await fill(phone.lane, "bad")

    async with phone.at_work():
        for attempt in range(1, 6):
            await until(lambda attempt=attempt: phone.attempts["bad"] == attempt)  # type: ignore[misc]  # bound now
            await until(lambda: phone.runner.held == 0)
            await let_leases_end(redis, phone.lane)
            phone.runner.wake()
        await until(lambda: empty(redis))

    assert await redis.zrange(queue_keys.quarantine("poll"), 0, -1) == [b"p\x1fbad"]


async def test_work_that_met_store_trouble_is_tried_again_soon(redis: Redis) -> None:
    """That is not the item's fault: it is given back, and nothing is counted."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S))
    phone.failures["item"] = StoreGone("connection reset")
    await fill(phone.lane, "item")

    async with phone.at_work():
        await until(lambda: phone.runner.settled == 1)
        assert await waiting_in_store(redis) == ["item"]
        phone.failures.clear()
        await phone.lane.put("p", "item")
        phone.runner.wake()
        await until(lambda: phone.runner.settled == 2)

    assert await redis.exists(queue_keys.quarantine("poll")) == 0


async def test_a_renewal_keeps_the_item_and_one_that_comes_too_late_is_nothing(redis: Redis) -> None:
    """Long work says that it is at it; after its end that means nothing any more."""
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
    """An item that was held at three crashes may kill the process: then it takes nobody with it."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    await make_suspect(redis, lane, "suspect")
    phone = Phone(lane, concurrency=10)
    phone.duration_s = 0.002
    phone.hung["suspect"] = asyncio.Event()
    await fill(lane, *(f"item{n}" for n in range(30)), partition="q")
    await redis.zadd(queue_keys.lane("poll"), {"q": 0})

    async with phone.at_work():
        await until(lambda: phone.running == {"suspect"})
        await fill(lane, "later")
        phone.runner.wake()
        assert phone.runner.full
        phone.hung["suspect"].set()
        await until(lambda: phone.attempts.total() == 32)

    assert phone.company["suspect"] == set()
    assert await empty(redis)


async def test_a_suspect_does_not_wait_for_ever_to_be_alone(redis: Redis) -> None:
    """An audio transfer of an hour runs beside it: before its lease ends untried, it is tried in company."""
    lane = Lane(redis, "poll", lease_s=5.0)
    phone = Phone(lane, concurrency=10, min_lease_s=4.5)
    await fill(lane, "slow", partition="q")

    async with phone.at_work():
        await until(lambda: phone.running == {"slow"})
        await make_suspect(redis, Lane(redis, "poll", lease_s=5.0), "suspect")
        phone.runner.wake()
        await until(lambda: phone.attempts["suspect"] == 1)
        assert phone.company["suspect"] == {"slow"}
        await fill(lane, "later", partition="r")
        phone.runner.wake()
        await until(lambda: phone.attempts["later"] == 1)

    assert phone.attempts["suspect"] == 1


async def test_a_suspect_that_waits_is_given_back_when_the_runner_stops(redis: Redis) -> None:
    """It is not begun during the drain."""
    lane = Lane(redis, "poll", lease_s=LONG_S)
    phone = Phone(lane, concurrency=10)
    await fill(lane, "slow", partition="q")

    async with phone.at_work() as task:
        await until(lambda: phone.running == {"slow"})
        await make_suspect(redis, Lane(redis, "poll", lease_s=LONG_S), "suspect")
        phone.runner.wake()
        await until(lambda: phone.runner.held == 2)
        phone.runner.stop(within_s=10)
        await until(lambda: phone.runner.held == 1)
        phone.hung["slow"].set()
        await task

    assert phone.attempts == {"slow": 1}
    assert await waiting_in_store(redis) == ["suspect"]


# Stopping


async def test_a_stopping_runner_ends_what_runs_and_gives_back_what_waits(redis: Redis) -> None:
    """SIGTERM: nothing is claimed any more, attempts end and are settled, others get the rest at once."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S), concurrency=2)
    names = [f"slow{n}" for n in range(8)]
    phone.hung = {name: asyncio.Event() for name in names}
    await fill(phone.lane, *names)

    async with phone.at_work() as task:
        await until(lambda: len(phone.running) == 2 and phone.runner.held == 4)
        running = set(phone.running)
        phone.runner.stop(within_s=10)
        await until(lambda: phone.runner.held == 2)
        for event in phone.hung.values():
            event.set()
        await task

    assert phone.attempts == dict.fromkeys(running, 1)
    assert await held_in_store(redis) == []
    assert await waiting_in_store(redis) == sorted(set(names) - running)


async def test_a_runner_with_nothing_to_do_stops_at_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it was going to sleep."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S))
    task = asyncio.create_task(phone.runner.run())
    await asyncio.sleep(0)
    phone.runner.stop(within_s=600)

    async with asyncio.timeout(10):
        await task


async def test_the_deadline_ends_a_drain(redis: Redis) -> None:
    """An attempt that does not end is left behind under its lease: nobody knows whether it was heard."""
    phone = Phone(Lane(redis, "poll", lease_s=LONG_S), concurrency=2)
    await fill(phone.lane, "slow", "quick")
    task = asyncio.create_task(phone.runner.run())
    await until(lambda: phone.runner.settled == 1)
    phone.runner.stop(within_s=0.05)

    async with asyncio.timeout(10):
        await task

    assert phone.running == set()
    assert await held_in_store(redis) == ["slow"]


async def test_the_last_outcomes_leave_with_the_runner(redis: Redis) -> None:
    """The store was away during the drain and came back in the last moment."""
    lane = Flaky(redis, "poll", lease_s=LONG_S)
    phone = Phone(lane)
    phone.hung["item"] = asyncio.Event()
    await fill(lane, "item")
    task = asyncio.create_task(phone.runner.run())
    await until(lambda: phone.running == {"item"})
    lane.away = True
    phone.hung["item"].set()
    await until(lambda: lane.asked_in_vain > 0)
    phone.runner.stop(within_s=0)
    lane.away = False
    await task

    assert await empty(redis)


async def test_a_runner_that_is_cancelled_while_it_asks_the_store_keeps_its_outcomes(redis: Redis) -> None:
    """The process ends in a hurry: what is known is still handed in."""
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
    phone = Phone(lane)
    phone.hung["item"] = asyncio.Event()
    await fill(lane, "item")
    task = asyncio.create_task(phone.runner.run())
    await until(lambda: phone.running == {"item"})
    lane.hang = True
    phone.hung["item"].set()
    await asking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await empty(redis)


# Clocks


@pytest.mark.parametrize("wrong_by_s", [-40.0, 40.0])
async def test_a_process_clock_that_is_wrong_decides_nothing(
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
