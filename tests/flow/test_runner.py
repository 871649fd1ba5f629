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
from redis.exceptions import OutOfMemoryError

from relay.domain import ids
from relay.domain.call import Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.events.publisher import Publisher
from relay.queue import keys as queue_keys
from relay.queue import runner
from relay.queue.changes import Drop, LimitInFlight, Put
from relay.queue.claim import Claim
from relay.queue.lane import Exchange, Lane, Room
from relay.queue.runner import Runner, Settle
from relay.queue.settlement import Done, PartitionHealth, Retry, Settlement
from relay.store.calls import Row, claimed_call
from relay.store.lanes import LaneName, open_lane
from tests.store import open_store, prove


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

    def __init__(self, lane: Lane, *, concurrency: int = 10, **options: Any) -> None:
        self.lane = lane
        self.runner = Runner(lane, self.work, concurrency=concurrency, **options)
        self.attempts: Counter[str] = Counter()
        self.running: set[str] = set()
        self.most_running = 0
        self.hung = {"slow": asyncio.Event()}
        self.duration_s = 0.0
        self.failures: dict[str, Exception] = {}
        self.batches: list[list[str]] = []

    async def work(self, claims: Sequence[Claim], settle: Settle) -> None:
        names = [claim.item for claim in claims]
        self.batches.append(names)
        self.attempts.update(names)
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
            settle(claim, Done(health=PartitionHealth.HEALTHY))

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

    async def exchange(
        self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0, room: Room | None = None
    ) -> Exchange:
        if self.unavailable:
            self.failed_exchanges += 1
            raise StoreGone("the store is unavailable")
        reply = await super().exchange(settlements, want=want, room=room)
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


async def is_waiting(redis: Redis, item: str) -> bool:
    return await waiting_in_store(redis) == [item]


async def empty(redis: Redis) -> bool:
    return not await redis.keys("relay:l*") and not await redis.keys("relay:index:*")


async def let_leases_end(redis: Redis, lane: Lane, partition: str = "p") -> None:
    for item in await redis.zrange(queue_keys.leased("poll", partition), 0, -1):
        await redis.zadd(queue_keys.leased("poll", partition), {item: 1})
    await lane.drop(partition, "unknown")


# Streaming


async def test_a_slow_item_delays_no_other(redis: Redis) -> None:
    """One subscriber hangs; hundreds of other deliveries are attempted and settled meanwhile."""
    fake = FakeWork(Lane(redis, "poll"), concurrency=4)
    await prove(redis, "poll", "p")
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
    """By two processes, within the limit in flight."""
    lane = Lane(redis, "poll")
    await prove(redis, "poll", "p")
    await lane.apply(LimitInFlight("p", 10))
    fakes = [FakeWork(Lane(redis, "poll"), concurrency=30) for _ in range(2)]
    await fill(lane, *(f"event{n}" for n in range(400)))
    for fake in fakes:
        fake.duration_s = 0.035

    async with fakes[0].run(), fakes[1].run():
        await until(lambda: sum(fake.runner.settled for fake in fakes) >= 400)

    attempts = fakes[0].attempts + fakes[1].attempts
    assert (len(attempts), attempts.total()) == (400, 400)
    assert sum(fake.runner.refused for fake in fakes) == 0


async def test_a_runner_claims_no_more_than_it_can_start(redis: Redis) -> None:
    """What it cannot start at once is left to other workers."""
    fake = FakeWork(Lane(redis, "poll"), concurrency=6)
    partitions = [f"slow{n}" for n in range(20)]
    fake.hung = {name: asyncio.Event() for name in partitions}
    await prove(redis, "poll", *partitions)
    for name in partitions:
        await fill(fake.lane, name, partition=name)

    async with fake.run():
        await until(lambda: len(fake.running) == 6)
        assert fake.runner.full
        assert fake.runner.held == 6

    assert fake.most_running == 6


async def test_a_wake_up_starts_an_idle_runner_at_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps up to a second, here an hour: only the wake-up can start the item."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    fake = FakeWork(Lane(redis, "poll"))

    async with fake.run():
        for name in ("one", "two", "three"):
            await fill(fake.lane, name)
            fake.runner.wake()
            await until(lambda name=name: fake.attempts[name] == 1)  # type: ignore[misc]  # bound now

    assert fake.attempts.total() == 3


async def test_a_runner_sleeps_no_longer_than_until_the_next_due(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that is due soon is worked on then, without a wake-up."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    fake = FakeWork(Lane(redis, "poll"))
    await fake.lane.put("p", "soon", after_ms=40)

    async with fake.run():
        await until(lambda: fake.runner.settled == 1)


async def test_a_batch_has_claims_of_one_partition_only(redis: Redis) -> None:
    """One look-up serves the calls of one source; sources are never mixed."""
    lane = Lane(redis, "poll")
    fake = FakeWork(lane, concurrency=12, batch=5)
    await prove(redis, "poll", "a", "b")
    for source in ("a", "b"):
        await fill(lane, *(f"{source}{n}" for n in range(12)), partition=source)

    async with fake.run():
        await until(lambda: fake.runner.settled == 24)

    assert sorted(len(batch) for batch in fake.batches) == [2, 2, 5, 5, 5, 5]
    assert all(len({name[0] for name in batch}) == 1 for batch in fake.batches)


async def test_unproven_partitions_have_one_slot_each_and_half_of_the_room(redis: Redis) -> None:
    """Any number of hung subscribers, right after a start, leaves half of the room to the others."""
    fake = FakeWork(Lane(redis, "poll"), concurrency=10)
    names = [f"dead{n}" for n in range(60)]
    fake.hung = {name: asyncio.Event() for name in names}
    await prove(redis, "poll", "p")
    for name in names:
        await fill(fake.lane, name, f"{name} again", partition=name)
    await fill(fake.lane, *(f"quick{n}" for n in range(200)))

    async with fake.run():
        await until(lambda: sum(name.startswith("quick") for name in fake.attempts) == 200)
        assert len(fake.running) == 5
        assert not any(name.endswith("again") for name in fake.running)


async def test_a_restart_forgets_no_standing(redis: Redis) -> None:
    """A new process knows who is proven, and three failures in a row end that; one 429 does not."""
    lane = Lane(redis, "poll")
    for failures, most in ((0, 4), (1, 4), (2, 4), (3, 1)):
        await fill(lane, "first")
        [claim] = (await lane.exchange(want=1)).claims
        await lane.exchange([(claim, Done(health=PartitionHealth.HEALTHY))])
        for _ in range(failures):
            await fill(lane, "next")
            [claim] = (await lane.exchange(want=1)).claims
            await lane.exchange([(claim, Done(health=PartitionHealth.FAILING))])
        await fill(lane, *(f"item{n}" for n in range(4)))

        claims = (await Lane(redis, "poll").exchange(want=100)).claims

        assert len(claims) == most
        await lane.apply(*(Drop("p", f"item{n}") for n in range(4)))


# Errors


async def test_settlements_wait_for_an_unavailable_store(redis: Redis) -> None:
    """Even if other processes took this one for dead: nothing is done twice."""
    lane = Flaky(redis, "poll")
    fake = FakeWork(lane, concurrency=24)
    await prove(redis, "poll", "p")
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
    """No attempt is cancelled because of the store."""
    lane = Flaky(redis, "poll")
    fake = FakeWork(lane, concurrency=10)
    await prove(redis, "poll", "p")
    fake.hung = {f"item{n}": asyncio.Event() for n in range(4)}
    await fill(lane, *fake.hung)

    async with fake.run():
        await until(lambda: len(fake.running) == 4)
        lane.unavailable = True
        for event in fake.hung.values():
            event.set()
        await until(lambda: not fake.running)
        lane.unavailable = False
        await until(lambda: fake.runner.settled == 4)

    assert set(fake.attempts.values()) == {1}


async def test_a_lost_reply_loses_nothing_and_repeats_nothing(redis: Redis) -> None:
    """The store had settled: sent again, the settlements are refused. What it had handed out is given back."""
    lane = Flaky(redis, "poll")
    fake = FakeWork(lane, concurrency=4)
    lane.lose_replies = 1
    await prove(redis, "poll", "p")
    await fill(lane, *(f"item{n}" for n in range(12)))

    async with fake.run():
        await until(lambda: fake.runner.refused > 0)
        assert lane.lost
        await until(lambda: len(fake.attempts) == 12 and fake.runner.held == 0)
        await until(lambda: empty(redis))

    assert set(fake.attempts.values()) == {1}


async def test_a_claim_that_a_runner_never_got_is_given_back_while_the_process_lives(redis: Redis) -> None:
    """Its reply came after the runner had stopped waiting for it; nothing else would end the lease."""
    lane = Lane(redis, "poll")
    fake = FakeWork(lane)
    fake.runner.recount_every_s = 0.1
    await fill(lane, "item")
    await lane.exchange(want=1)

    async with fake.run():
        await until(lambda: fake.attempts["item"] == 1)

    assert await empty(redis)


async def test_work_that_raises_is_retried_and_never_quarantined(redis: Redis) -> None:
    """An error is no death: it is counted apart, and waits longer each time, up to five minutes."""
    errors: list[str] = []
    fake = FakeWork(Lane(redis, "poll"), on_error=errors.append)
    fake.failures["bad"] = KeyError("surprise")
    await fill(fake.lane, "bad")
    waits_s = []

    async with fake.run():
        for attempt in range(1, 12):
            await until(lambda attempt=attempt: fake.attempts["bad"] == attempt)  # type: ignore[misc]  # bound now
            await until(lambda: is_waiting(redis, "bad"))
            due_ms = await redis.zscore(queue_keys.waiting("poll", "p"), "bad")
            waits_s.append(round(((due_ms or 0) - fake.lane.store_now_ms) / 1000))
            await fake.lane.put("p", "bad")
            fake.runner.wake()
        fake.failures.clear()
        await until(lambda: empty(redis))

    assert waits_s == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert len(errors) >= 11
    assert await redis.exists(queue_keys.quarantine("poll")) == 0


@pytest.mark.parametrize(
    "error",
    [StoreGone("connection reset"), OutOfMemoryError("maxmemory"), ExceptionGroup("tasks", [StoreGone("reset")])],
    ids=["reset", "full", "in a group"],
)
async def test_work_interrupted_by_a_store_error_is_retried_soon(redis: Redis, error: Exception) -> None:
    """That does not count against the item, however often it happens."""
    fake = FakeWork(Lane(redis, "poll"), on_error=lambda _: pytest.fail("it counts as an error of the work"))
    fake.failures["item"] = error
    await fill(fake.lane, "item")

    async with fake.run():
        for attempt in range(1, 7):
            await until(lambda attempt=attempt: fake.attempts["item"] == attempt)  # type: ignore[misc]  # bound now
            await until(lambda: is_waiting(redis, "item"))
            due_ms = await redis.zscore(queue_keys.waiting("poll", "p"), "item")
            assert 0 < (due_ms or 0) - fake.lane.store_now_ms <= 1000
            await fake.lane.put("p", "item")
            fake.runner.wake()
        fake.failures.clear()
        await until(lambda: empty(redis))

    assert await redis.exists(queue_keys.quarantine("poll")) == 0


async def test_a_settlement_is_only_of_the_claim_it_was_made_for(redis: Redis) -> None:
    """An older copy of the store was restored, and the runner claims an item that it works on: it is settled once."""
    fake = FakeWork(Lane(redis, "poll"))
    await fill(fake.lane, "slow")

    async with fake.run():
        await until(lambda: fake.attempts["slow"] == 1)
        await redis.flushdb()
        await fill(fake.lane, "slow")
        fake.runner.wake()
        await until(lambda: fake.attempts["slow"] == 2)
        fake.hung["slow"].set()
        await until(lambda: fake.runner.settled == 1)

    assert fake.runner.refused == 0
    assert await empty(redis)


# Suspects


async def test_suspects_run_one_at_a_time_and_delay_no_other(redis: Redis) -> None:
    """Sixty items with which three processes died: one of them runs, and a healthy partition is served beside it."""
    lane, dead = Lane(redis, "poll"), Lane(redis, "poll")
    for n in range(60):
        await lane.put(f"suspect{n}", f"suspect{n}")
    for _ in range(3):
        assert len((await dead.exchange(want=200)).claims) == 60
        for n in range(60):
            await let_leases_end(redis, dead, f"suspect{n}")
    fake = FakeWork(lane, concurrency=20)
    fake.hung = {f"suspect{n}": asyncio.Event() for n in range(60)}
    await prove(redis, "poll", "healthy")
    await fill(lane, *(f"item{n}" for n in range(100)), partition="healthy")

    async with fake.run():
        await until(lambda: sum(name.startswith("item") for name in fake.attempts) == 100)
        assert sum(name.startswith("suspect") for name in fake.running) <= 1
        assert fake.most_running > 1
        for event in fake.hung.values():
            event.set()
        await until(lambda: len(fake.attempts) == 160)

    assert set(fake.attempts.values()) == {1}


# Stopping


async def test_a_stopping_runner_finishes_what_runs(redis: Redis) -> None:
    """SIGTERM: nothing more is claimed, attempts finish and are settled, other workers get the rest."""
    fake = FakeWork(Lane(redis, "poll"), concurrency=6)
    names = [f"slow{n}" for n in range(8)]
    fake.hung = {name: asyncio.Event() for name in names}
    await prove(redis, "poll", "p")
    await fill(fake.lane, *names)

    async with fake.run() as task:
        await until(lambda: len(fake.running) == 2)
        running = set(fake.running)
        fake.runner.stop(within_s=10)
        for event in fake.hung.values():
            event.set()
        await task

    assert fake.attempts == dict.fromkeys(running, 1)
    assert await held_in_store(redis) == []
    assert await waiting_in_store(redis) == sorted(set(names) - running)


async def test_a_runner_with_nothing_to_do_stops_at_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the middle of a long sleep."""
    monkeypatch.setattr(runner, "_SLEEP_S", 3600.0)
    fake = FakeWork(Lane(redis, "poll"))
    task = asyncio.create_task(fake.runner.run())
    await asyncio.sleep(0)
    fake.runner.stop(within_s=600)

    async with asyncio.timeout(10):
        await task


async def test_the_deadline_ends_a_drain(redis: Redis) -> None:
    """An attempt that does not end keeps its lease: whether it was delivered is unknown."""
    fake = FakeWork(Lane(redis, "poll"), concurrency=4)
    await prove(redis, "poll", "p")
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
    lane = Flaky(redis, "poll")
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

        async def exchange(
            self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0, room: Room | None = None
        ) -> Exchange:
            if self.hang and settlements:
                self.hang = False
                asking.set()
                await asyncio.Event().wait()
            return await super().exchange(settlements, want=want, room=room)

    lane = Hanging(redis, "poll")
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
    lane = open_lane(redis, LaneName.ENRICH)
    monkeypatch.setattr(time, "time", lambda: true_time() + wrong_by_s)
    store = open_store(redis, calls_ttl_s=1000, events_ttl_s=1000)
    record = Record(key="7", started_at=datetime(2025, 7, 1, tzinfo=UTC), local_date="2025-07-01")
    await store.calls.ingest("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")
    rules = SourceRules("webfones", "UTC", True, False, 30_000, 0)
    waits: list[int | None] = []

    class NoSubscriptions:
        def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
            return ()

    publisher = Publisher(store, NoSubscriptions(), now_ms=lambda: lane.store_now_ms, on_deliveries=lambda: None)

    async def work(batch: Sequence[Claim], settle: Settle) -> None:
        wait_ms = await publisher.publish(claimed_call(batch[0]), rules, {})
        waits.append(wait_ms)
        settle(batch[0], Retry(wait_ms or 0))

    enrich = Runner(lane, work, concurrency=1)
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
