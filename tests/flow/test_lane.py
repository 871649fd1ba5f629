"""A lane: an item is claimed once, no update is lost, and no partition delays another; against a real Valkey."""

import inspect
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal

import orjson
import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from relay.domain.call import Record
from relay.domain.time import from_iso
from relay.queue import keys as queue_keys
from relay.queue.changes import DisablePartition, LimitInFlight, LimitRate, Pause, Put
from relay.queue.claim import Claim
from relay.queue.lane import Lane, Room
from relay.queue.process import Process
from relay.queue.settlement import Detail, Done, Intent, PartitionHealth, Retry, Settlement
from relay.store import keys
from relay.store.calls import Row, claimed_call
from relay.store.codes import ReplayOutcome
from relay.store.deliveries import DeliveryState, claimed_event
from relay.store.events import NewEvent
from relay.store.lanes import (
    ContactFound,
    ContactWanted,
    DeliveryUpdate,
    FetchProgress,
    LaneName,
    LookupProgress,
    RecordingStored,
    open_lane,
)
from relay.store.store import Store
from tests.store import open_store, prove

EVENT_TTL_S = 1000
DONE = Done()


def lane_of(redis: Redis, name: LaneName = LaneName.POLL) -> Lane:
    return open_lane(redis, name, events_ttl_s=EVENT_TTL_S)


def store_of(redis: Redis) -> Store:
    return open_store(redis, calls_ttl_s=3000, events_ttl_s=EVENT_TTL_S)


async def claims_of(lane: Lane, want: int = 1000) -> list[Claim]:
    return list((await lane.exchange(want=want)).claims)


async def items_of(lane: Lane, want: int = 1000) -> list[str]:
    return [claim.item for claim in await claims_of(lane, want)]


async def claim_one(lane: Lane) -> Claim:
    [claim] = await claims_of(lane)
    return claim


async def settled(lane: Lane, claim: Claim, settlement: Settlement = DONE) -> bool:
    """Settle; False when it was refused."""
    return not (await lane.exchange([(claim, settlement)])).refused


async def let_leases_end(redis: Redis, lane: Lane, partition: str = "") -> None:
    """End leases as the death of their process does; dropping an unknown item has the index follow."""
    for item in await redis.zrange(queue_keys.leased(lane.name, partition), 0, -1):
        await redis.zadd(queue_keys.leased(lane.name, partition), {item: 1})
    await lane.drop(partition, "unknown")


async def due_of(redis: Redis, lane: Lane, item: str, partition: str = "") -> float | None:
    """When a waiting item is due, ms from the store's now."""
    due = await redis.zscore(queue_keys.waiting(lane.name, partition), item)
    return None if due is None else due - lane.store_now_ms


async def publish(redis: Redis, sub: str, ordering_key: str, *eids: str) -> None:
    for eid in eids:
        await store_of(redis).events.publish(NewEvent(eid, {"id": eid}, [sub]), ordering_key=ordering_key)


async def ingest(redis: Redis, *record_keys: str) -> list[str]:
    """Ingest calls; each then waits in the enrich and in the record lane of `main`. Returns their ids."""
    rows = []
    for key in record_keys:
        record = Record(key=key, started_at=from_iso("2025-07-01T12:00:00Z"), local_date="2025-07-01", audio=True)
        rows.append(Row(record, record.content_hash()))
    await store_of(redis).calls.ingest("main", rows, token=b"", mapping=1, via="poll")
    return [cid.decode() for cid in await redis.zrange(keys.CALLS, 0, -1)]


async def field(redis: Redis, name: str, of: str) -> bytes | None:
    value: bytes | None = await redis.hget(name, of)  # type: ignore[misc]  # typed for both clients
    return value


@asynccontextmanager
async def full_memory(redis: Redis) -> AsyncIterator[None]:
    """A store whose memory is full."""
    await redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        await redis.config_set("maxmemory", 0)


# Claiming


async def test_an_item_is_claimed_by_one_of_two_workers(redis: Redis) -> None:
    """Two workers claim at the same moment."""
    one, other = lane_of(redis), lane_of(redis)
    await one.apply(*(Put(f"source{n}", f"source{n}") for n in range(20)))

    first, second = await items_of(one, 12), await items_of(other, 12)

    assert (len(first), len(second)) == (12, 8)
    assert {*first, *second} == {f"source{n}" for n in range(20)}


async def test_items_are_claimed_in_order_of_their_dues(redis: Redis) -> None:
    """Over partitions and within them; an item that is not due yet stays."""
    lane = lane_of(redis)
    await prove(redis, "poll", "a")
    for partition, item, due in (("b", "1", 20), ("a", "2", 30), ("a", "3", 40), ("c", "4", 10)):
        await lane.put(partition, item, after_ms=10**7)
        await redis.zadd(queue_keys.waiting("poll", partition), {item: due})
        await lane.drop(partition, "unknown")
    await lane.put("d", "later", after_ms=5000)

    reply = await lane.exchange(want=100)

    assert [claim.item for claim in reply.claims] == ["4", "1", "2", "3"]
    assert reply.next_due_ms is not None
    assert 0 < reply.next_due_ms - reply.now_ms <= 5000


async def test_an_empty_lane_has_nothing_due(redis: Redis) -> None:
    """A runner may sleep."""
    reply = await lane_of(redis).exchange(want=5)

    assert (reply.claims, reply.next_due_ms) == ([], None)


async def test_a_settled_partition_leaves_nothing_behind(redis: Redis) -> None:
    """A year of calls leaves no trace in the lanes."""
    lane = lane_of(redis)
    await lane.put("p", "item")
    assert await settled(lane, await claim_one(lane))

    assert await redis.keys("relay:l*") == []


async def test_no_token_is_handed_out_twice(redis: Redis) -> None:
    """Two processes claim 2,000 items in the same moments, and an older copy of the store is restored in between."""
    lanes = [lane_of(redis), lane_of(redis)]
    tokens = []
    for _ in range(2):
        await redis.flushdb()
        await prove(redis, "poll", "p")
        await lanes[0].apply(*(Put("p", f"item{n}") for n in range(1000)))
        for lane in lanes:
            tokens += [claim.token for claim in await claims_of(lane, 2000)]

    assert len(tokens) == len(set(tokens)) == 2000


async def test_put_never_delays_an_item(redis: Redis) -> None:
    """The earlier due wins; with `keep_due` an existing item keeps its own."""
    lane = lane_of(redis)
    await lane.put("", "item", after_ms=60_000)
    await lane.put("", "item", after_ms=90_000)
    assert 50_000 < (await due_of(redis, lane, "item") or 0) <= 60_100
    await lane.put("", "item", after_ms=1000, keep_due=True)
    assert (await due_of(redis, lane, "item") or 0) > 50_000
    await lane.put("", "item", after_ms=20_000)

    assert 10_000 < (await due_of(redis, lane, "item") or 0) <= 20_100


# Leases


async def test_an_item_that_is_put_while_leased_is_due_again(redis: Redis) -> None:
    """An update that arrives during the work is not lost, however the work ends."""
    lane = lane_of(redis)
    for settlement in (Done(), Retry(600_000)):
        await lane.put("", "item")
        claim = await claim_one(lane)
        await lane.put("", "item")
        assert await items_of(lane) == []

        assert await settled(lane, claim, settlement)

        again = await claim_one(lane)
        assert again.item == "item"
        assert await settled(lane, again)


async def test_a_put_during_a_lease_and_a_retry_leave_the_earlier_due(redis: Redis) -> None:
    """A put for later does not bring the retry forward beyond it."""
    lane = lane_of(redis)
    await lane.put("", "item")
    claim = await claim_one(lane)
    await lane.put("", "item", after_ms=60_000)
    await lane.put("", "item", after_ms=30_000)
    await lane.put("", "item", after_ms=90_000)

    assert await settled(lane, claim, Retry(600_000))
    assert 20_000 < (await due_of(redis, lane, "item") or 0) <= 30_100


async def test_a_finished_item_is_gone(redis: Redis) -> None:
    """`keep_due` on a leased item does not make it due again."""
    lane = lane_of(redis)
    await lane.put("", "item")
    claim = await claim_one(lane)
    await lane.put("", "item", keep_due=True)

    assert await settled(lane, claim)
    assert (await lane.exchange(want=1)).next_due_ms is None


async def test_an_expired_lease_is_claimable_again(redis: Redis) -> None:
    """A worker was killed: another gets its item, with the number of expired leases."""
    lane, other = lane_of(redis), lane_of(redis)
    await lane.put("", "item")
    dead = await claim_one(lane)
    assert await items_of(other) == []
    await let_leases_end(redis, lane)

    next_claim = await claim_one(other)

    assert (dead.deaths, next_claim.deaths) == (0, 1)
    assert next_claim.token != dead.token


async def test_an_item_is_due_again_four_seconds_after_its_process_died(redis: Redis) -> None:
    """No lease has to run out: the processes that live notice that one has stopped its heartbeat."""
    lane, dead, living = lane_of(redis), lane_of(redis), Process(redis)
    await dead.put("", "item")
    claim = await claim_one(dead)
    await living.beat()
    assert await living.beat() == []
    assert await items_of(lane) == []

    await redis.zincrby(queue_keys.PROCESSES, -4100, dead.process.id)
    assert await living.beat() == [dead.process.id]

    following = await claim_one(lane)
    assert (following.item, following.deaths) == ("item", 1)
    assert not await settled(dead, claim)
    assert await redis.exists(queue_keys.held(dead.process.id)) == 0


async def test_a_slow_process_keeps_its_leases(redis: Redis) -> None:
    """Work may take hours: the lease holds for as long as the process lives."""
    slow, other = lane_of(redis), lane_of(redis)
    await slow.put("", "item")
    claim = await claim_one(slow)
    for _ in range(5):
        await redis.zincrby(queue_keys.PROCESSES, -3000, slow.process.id)
        assert await slow.process.beat() == await other.process.beat() == []

    assert await items_of(other) == []
    assert await settled(slow, claim)


@pytest.mark.parametrize("missed_by", ["clock", "process"])
async def test_a_process_that_missed_its_own_heartbeat_declares_no_other_dead(redis: Redis, missed_by: str) -> None:
    """The store was away, or its clock leapt: everybody seems dead, and everybody has a second to come back."""
    holder, living = lane_of(redis), Process(redis)
    await holder.put("", "item")
    await claim_one(holder)
    await living.beat()
    for process in (holder.process.id, living.id) if missed_by == "clock" else (holder.process.id,):
        await redis.zincrby(queue_keys.PROCESSES, -60_000, process)
    if missed_by == "process":
        living.beat_at = (living.beat_at or 0) - 60

    assert await living.beat() == []
    await holder.process.beat()

    assert await living.beat() == []
    assert await items_of(lane_of(redis)) == []


async def test_a_process_that_is_alone_ends_all_other_leases_at_once(redis: Redis) -> None:
    """The holder of the lock on an embedded store knows that every former process is dead."""
    former, lane = lane_of(redis), lane_of(redis)
    await former.apply(Put("a", "one"), Put("b", "two"))
    held = await claims_of(former)
    assert await items_of(lane) == []

    await lane.process.beat(alone=True)
    again = await claims_of(lane)

    assert {claim.item for claim in again} == {"one", "two"}
    assert [claim.deaths for claim in again] == [1, 1]
    assert not await settled(former, held[0])


async def test_a_process_that_leaves_gives_its_items_back(redis: Redis) -> None:
    """What it could not finish is due at once, and nothing of that counts as a death."""
    leaving, lane = lane_of(redis), lane_of(redis)
    await leaving.put("", "item")
    claim = await claim_one(leaving)

    await leaving.process.leave()

    assert (await claim_one(lane)).deaths == 0
    assert not await settled(leaving, claim)
    assert await redis.zscore(queue_keys.PROCESSES, leaving.process.id) is None


async def test_claims_whose_reply_was_lost_are_given_back(redis: Redis) -> None:
    """The process lives, so its leases would last: it names what it works on, and the rest is due again."""
    lane = lane_of(redis)
    await lane.apply(Put("a", "one"), Put("b", "two"))
    claims = {claim.item: claim for claim in await claims_of(lane)}

    assert await lane.give_back([claims["one"]]) == 1

    again = await claim_one(lane)
    assert (again.item, again.deaths) == ("two", 0)
    assert await settled(lane, claims["one"])
    assert not await settled(lane, claims["two"])
    assert await settled(lane, again)


async def test_an_old_token_is_refused(redis: Redis) -> None:
    """A worker that slept past its lease wakes up: every settlement of it is refused."""
    lane = lane_of(redis)
    await lane.put("", "item")
    dead = await claim_one(lane)
    await let_leases_end(redis, lane)
    next_claim = await claim_one(lane)

    update = DeliveryUpdate("evt_x", DeliveryState("delivered"))
    for settlement in (Done(update), Retry(detail=update), Intent(update)):
        assert not await settled(lane, dead, settlement)
    assert await redis.exists(keys.event("evt_x")) == 0
    assert await settled(lane, next_claim)


async def test_a_settlement_is_accepted_past_the_lease_until_the_item_is_claimed_again(redis: Redis) -> None:
    """The store was unavailable for longer than a lease."""
    lane = lane_of(redis)
    await lane.put("", "item")
    late = await claim_one(lane)
    await let_leases_end(redis, lane)

    assert await settled(lane, late)
    assert await items_of(lane) == []


async def test_a_settle_counts_once(redis: Redis) -> None:
    """A settlement whose reply was lost is sent again, and refused."""
    lane = lane_of(redis)
    await lane.put("", "item")
    claim = await claim_one(lane)

    assert await settled(lane, claim)
    assert not await settled(lane, claim)


async def test_a_settle_resets_the_count_of_expired_leases(redis: Redis) -> None:
    """Only expired leases in a row count against an item."""
    lane = lane_of(redis)
    await lane.put("", "item")
    for expiries in (0, 1, 2):
        claim = await claim_one(lane)
        assert claim.deaths == expiries
        await let_leases_end(redis, lane)
    assert await settled(lane, claim, Retry())

    assert (await claim_one(lane)).deaths == 0


async def test_a_dropped_item_is_gone_even_while_leased(redis: Redis) -> None:
    """A source that was removed is not polled again; its last poll is refused."""
    lane = lane_of(redis)
    await lane.apply(Put("", "held"), Put("", "waits", 60_000))
    claim = await claim_one(lane)
    await lane.drop("", "held")
    await lane.drop("", "waits")

    assert not await settled(lane, claim, Retry())
    assert await redis.keys("relay:l*") == []


# Limits and pauses


async def test_the_limit_in_flight_holds_over_all_processes(redis: Redis) -> None:
    """`max_in_flight` is a promise to the subscriber, however many workers there are."""
    one, other = lane_of(redis), lane_of(redis)
    await prove(redis, "poll", "sub")
    await one.apply(LimitInFlight("sub", 3))
    await one.apply(*(Put("sub", str(n)) for n in range(10)))

    first = await claims_of(one)
    assert len(first) == 3
    assert await claims_of(other) == []
    assert await settled(other, first[0])

    assert len(await claims_of(other)) == 1


async def test_the_limit_in_flight_counts_expired_leases(redis: Redis) -> None:
    """A worker was killed with three attempts in flight: they are claimed first, and nothing in addition."""
    one, other = lane_of(redis), lane_of(redis)
    await prove(redis, "poll", "sub")
    await one.apply(LimitInFlight("sub", 3))
    await one.apply(*(Put("sub", str(n)) for n in range(10)))
    dead = await claims_of(one)
    await let_leases_end(redis, one, "sub")

    next_claims = await claims_of(other)

    assert {claim.item for claim in next_claims} == {claim.item for claim in dead}
    assert await redis.zcard(queue_keys.leased("poll", "sub")) == 3
    assert await claims_of(one) == []
    assert not await settled(one, dead[0])
    assert await claims_of(one) == []


async def test_a_full_partition_is_not_due(redis: Redis) -> None:
    """A runner does not spin over a partition whose limit is reached."""
    lane = lane_of(redis)
    await prove(redis, "poll", "sub")
    await lane.apply(LimitInFlight("sub", 1))
    await lane.apply(*(Put("sub", str(n)) for n in range(5)))
    claim = await claim_one(lane)

    reply = await lane.exchange(want=5)

    assert (reply.claims, reply.next_due_ms) == ([], None)
    assert await settled(lane, claim)
    assert len(await claims_of(lane)) == 1


async def test_ended_leases_keep_to_the_rate_and_to_the_probe_of_a_circuit(redis: Redis) -> None:
    """Ten attempts were in flight when their process died: they are claimed as slowly as any others."""
    lane = lane_of(redis)
    await prove(redis, "poll", "paced", "probed")
    await lane.apply(*(Put(partition, str(n)) for partition in ("paced", "probed") for n in range(10)))
    assert len(await claims_of(lane)) == 20
    await lane.apply(LimitRate("paced", 1000))
    await redis.hset(queue_keys.partition("poll", "probed"), "circuit_opened_at", "1")  # type: ignore[misc]
    for partition in ("paced", "probed"):
        await let_leases_end(redis, lane, partition)

    claims = [claim for _ in range(3) for claim in await claims_of(lane)]

    assert sorted(claim.partition for claim in claims) == ["paced", "probed"]


async def test_a_raised_limit_is_used_at_once(redis: Redis) -> None:
    """No lease has to end first when the operator allows more."""
    lane = lane_of(redis)
    await prove(redis, "poll", "sub")
    await lane.apply(LimitInFlight("sub", 1))
    await lane.apply(*(Put("sub", str(n)) for n in range(5)))
    await claim_one(lane)
    await lane.apply(LimitInFlight("sub", 4))

    assert len(await claims_of(lane)) == 3


async def test_a_pause_lasts_until_its_moment(redis: Redis) -> None:
    """Nothing is claimed, expired leases included, and the runner knows when to look again."""
    lane = lane_of(redis)
    await prove(redis, "poll", "p")
    await lane.apply(Put("p", "a"), Put("p", "b"))
    await claims_of(lane, 1)
    await let_leases_end(redis, lane, "p")
    until_ms = lane.store_now_ms + 30_000
    await lane.apply(Pause("p", until_ms))

    reply = await lane.exchange(want=5)
    assert (reply.claims, reply.next_due_ms) == ([], until_ms)
    await lane.apply(Pause("p", None))

    assert await items_of(lane) == ["a", "b"]


async def test_a_pause_that_is_over_holds_nothing_back(redis: Redis) -> None:
    """The pause of an open circuit is over: what waits goes on by itself."""
    lane = lane_of(redis)
    await lane.put("p", "a")
    await lane.apply(Pause("p", lane.store_now_ms - 5))

    assert await items_of(lane) == ["a"]


async def test_nothing_is_claimed_from_a_disabled_partition(redis: Redis) -> None:
    """Whatever is put, settled or limited meanwhile."""
    lane = lane_of(redis)
    await prove(redis, "poll", "p")
    await lane.apply(Put("p", "held"), Put("p", "leased"))
    held, _ = await claims_of(lane)
    await lane.apply(Pause("p", "inf"))

    await lane.put("p", "new")
    assert await settled(lane, held, Retry())
    await lane.apply(LimitInFlight("p", 10))
    await let_leases_end(redis, lane, "p")
    reply = await lane.exchange(want=5)
    assert (reply.claims, reply.next_due_ms) == ([], None)
    await lane.apply(Pause("p", None))

    assert sorted(await items_of(lane)) == ["held", "leased", "new"]


async def test_a_late_success_does_not_enable_a_disabled_partition(redis: Redis) -> None:
    """The circuit was open when the subscription was disabled; a late 200 closes the circuit and enables nothing."""
    lane = lane_of(redis, LaneName.DELIVER)
    await prove(redis, "deliver", "sub")
    for n in range(6):
        await publish(redis, "sub", f"call{n}", f"evt_{n}")
    *unhealthy, late = await claims_of(lane)
    for claim in unhealthy:
        assert await settled(
            lane,
            claim,
            Retry(
                detail=DeliveryUpdate(claimed_event(claim).id, DeliveryState("waiting")),
                health=PartitionHealth.UNHEALTHY,
            ),
        )
    assert await field(redis, queue_keys.partition("deliver", "sub"), "circuit_opened_at") is not None
    await lane.apply(DisablePartition("sub", "by hand"))

    assert await settled(
        lane, late, Done(DeliveryUpdate(claimed_event(late).id, DeliveryState("delivered")), PartitionHealth.HEALTHY)
    )

    assert await claims_of(lane) == []
    assert await field(redis, queue_keys.partition("deliver", "sub"), "paused_until") == b"inf"


async def calls_in_the_store(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return sum(
        each["calls"] for name, each in stats.items() if name not in ("cmdstat_info", "cmdstat_config|resetstat")
    )


async def test_a_hundred_thousand_paused_partitions_hide_no_healthy_one(redis: Redis) -> None:
    """A claim costs what it returns, however many partitions may not run."""
    lane = lane_of(redis)
    pauses: list[Literal["inf"] | int] = ["inf", lane.store_now_ms + 10**7]
    for start in range(0, 100_000, 1000):
        await lane.apply(
            *(
                change
                for n in range(start, start + 1000)
                for change in (Pause(f"dead{n}", pauses[n % 2]), Put(f"dead{n}", "item"))
            )
        )
    await lane.put("healthy", "item")
    await redis.config_resetstat()

    claims = await claims_of(lane)

    assert [claim.partition for claim in claims] == ["healthy"]
    assert await calls_in_the_store(redis) < 40
    assert await redis.zcard(queue_keys.group("poll", "unproven:")) == 100_000


# Quarantine


async def fill(redis: Redis, lane: LaneName) -> str:
    """Put the item that will turn out bad into a lane; returns its partition."""
    if lane == "deliver":
        await publish(redis, "main", "bad", "evt_1")
        return "main"
    if lane == "poll":
        await lane_of(redis).put("", "bad")
        return ""
    [cid] = await ingest(redis, "bad")
    if lane == "contacts":
        await lane_of(redis, lane).put("main", cid)
    return "main"


async def add_healthy(redis: Redis, lane: LaneName, partition: str) -> None:
    if lane == "deliver":
        await publish(redis, partition, "good", "evt_good")
    elif lane == "poll":
        await lane_of(redis).put(partition, "good")
    else:
        cids = await ingest(redis, "good")
        if lane == "contacts":
            await lane_of(redis, lane).put(partition, cids[-1])


@pytest.mark.parametrize("name", LaneName)
async def test_an_item_that_kills_its_workers_is_quarantined_and_delays_no_other(redis: Redis, name: LaneName) -> None:
    """From the third death on it runs while no other such item does; after five it is quarantined."""
    lane = lane_of(redis, name)
    partition = await fill(redis, name)
    await prove(redis, name, partition)
    bad = await claim_one(lane)
    for deaths in (1, 2, 3, 4):
        await let_leases_end(redis, lane, partition)
        assert [claim.deaths for claim in await claims_of(lane)] == [deaths]
    await let_leases_end(redis, lane, partition)
    await add_healthy(redis, name, partition)

    [good] = await claims_of(lane)

    assert good.item != bad.item
    assert await redis.zrange(queue_keys.quarantine(name), 0, -1) == [f"{partition}\x1f{bad.item}".encode()]
    assert await field(redis, keys.COUNTS, f"quarantined_{name}") == b"1"
    due_ms = await due_of(redis, lane, bad.item, partition)
    # A call may still have to be published: it is tried again after an hour.
    assert due_ms == (pytest.approx(3_600_000, abs=5000) if name == "enrich" else None)


async def test_sixty_suspects_delay_no_healthy_partition(redis: Redis) -> None:
    """One suspect at a time runs in a process; what is not suspected is claimed beside it."""
    lane = lane_of(redis)
    await prove(redis, "poll", "healthy")
    for n in range(60):
        await lane.put(f"bad{n}", "item")
    for _ in range(3):
        assert len(await claims_of(lane)) == 60
        for n in range(60):
            await let_leases_end(redis, lane, f"bad{n}")
    await lane.put("healthy", "item")

    claims = await claims_of(lane)
    assert sorted(claim.deaths for claim in claims) == [0, 3]
    await lane.put("healthy", "another")
    [claim] = (await lane.exchange(room=Room(1000, 1000, suspect=False))).claims
    assert claim.item == "another"


async def test_only_the_suspect_of_a_dead_process_is_counted(redis: Redis) -> None:
    """Long transfers that run beside it may see it kill any number of processes."""
    living = Process(redis)
    await living.beat()
    await living.beat()
    for deaths in range(5):
        lane = lane_of(redis)
        await lane.apply(Put("bad", "item", keep_due=True), *([Put("innocent", "item")] if deaths >= 3 else ()))
        claims = {claim.partition: claim.deaths for claim in await claims_of(lane)}
        assert claims == {"bad": deaths} | ({"innocent": 0} if deaths >= 3 else {})
        await redis.zadd(queue_keys.PROCESSES, {lane.process.id: 1})
        assert await living.beat() == [lane.process.id]

    assert await redis.zrange(queue_keys.quarantine("poll"), 0, -1) == []
    assert [claim.partition for claim in await claims_of(lane_of(redis))] == ["innocent"]
    assert await redis.zrange(queue_keys.quarantine("poll"), 0, -1) == [b"bad\x1fitem"]


async def test_a_quarantined_call_that_changed_is_due_at_once(redis: Redis) -> None:
    """The update may not have what killed the workers."""
    lane = lane_of(redis, LaneName.ENRICH)
    [cid] = await ingest(redis, "7")
    for _ in range(4):
        await claim_one(lane)
        await let_leases_end(redis, lane, "main")
    await claim_one(lane)
    record = Record(key="7", started_at=from_iso("2025-07-01T12:00:00Z"), local_date="2025-07-01", status_raw="x")
    await store_of(redis).calls.ingest("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")
    await let_leases_end(redis, lane, "main")

    claim = await claim_one(lane)
    assert (claim.item, claim.deaths) == (cid, 0)
    assert await redis.zcard(queue_keys.quarantine("enrich")) == 1
    assert await settled(lane, claim)
    assert await redis.zcard(queue_keys.quarantine("enrich")) == 0


async def test_a_quarantined_source_that_is_put_meanwhile_is_polled_again(redis: Redis) -> None:
    """`poll now`, or its next poll: what is new may not be what killed the pollers."""
    lane = lane_of(redis)
    await lane.put("main", "main")
    for _ in range(5):
        await claim_one(lane)
        await lane.put("main", "main")
        await let_leases_end(redis, lane, "main")

    claim = await claim_one(lane)

    assert (claim.item, claim.deaths) == ("main", 0)
    assert await redis.zcard(queue_keys.quarantine("poll")) == 1


async def test_an_intent_for_an_expired_event_expires_too(redis: Redis) -> None:
    """What is written for it has the TTL of the event."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1")
    claim = await claim_one(lane)
    await redis.delete(keys.event("evt_1"))

    assert await settled(lane, claim, Intent(DeliveryUpdate("evt_1", DeliveryState("intent", 1))))
    assert 0 < await redis.ttl(keys.event("evt_1")) - keys.FALLBACK_TTL_S <= EVENT_TTL_S


async def test_a_quarantined_event_does_not_block_the_next_of_its_call(redis: Redis) -> None:
    """Only the event at the head is quarantined, with its attempts; the next one follows."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "key", "evt_1", "evt_2")
    await redis.zadd(keys.pending("sub", "key"), {"evt_1": 1, "evt_2": 2})
    failed = DeliveryState().attempted("waiting", {"kind": "timeout"}, at_ms=77)
    assert await settled(lane, await claim_one(lane), Retry(detail=DeliveryUpdate("evt_1", failed)))
    for _ in range(5):
        assert claimed_event(await claim_one(lane)).id == "evt_1"
        await let_leases_end(redis, lane, "sub")
    await redis.expire(keys.event("evt_1"), 5)

    following = await claim_one(lane)

    assert claimed_event(following).id == "evt_2"
    assert following.deaths == 0
    state = DeliveryState.read(await field(redis, keys.event("evt_1"), "sub") or b"")
    assert (state.status, state.attempts, state.log) == ("poison", 1, failed.log)
    assert await redis.ttl(keys.event("evt_1")) > EVENT_TTL_S - 60
    assert await redis.zrange(keys.DEAD, 0, -1) == [b"sub\x1fevt_1"]
    assert await settled(lane, following, Done(DeliveryUpdate("evt_2", DeliveryState("delivered"))))
    assert await redis.exists(keys.pending("sub", "key")) == 0
    assert await redis.zcard(queue_keys.quarantine("deliver")) == 1
    outcomes = await store_of(redis).deliveries.replay("evt_1", "key", ["sub"], at_ms=1, force=False)
    assert outcomes == [ReplayOutcome.QUEUED]
    assert await redis.zcard(queue_keys.quarantine("deliver")) == 0


# What claims carry and settlements write


async def test_the_events_of_an_ordering_key_are_claimed_one_after_the_other(redis: Redis) -> None:
    """The second waits for the end of the first, through its retries."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1", "evt_2", "evt_3")
    await redis.zadd(keys.pending("sub", "call"), {"evt_1": 1, "evt_2": 2, "evt_3": 3})

    claim = await claim_one(lane)
    assert claimed_event(claim).id == "evt_1"
    assert await settled(lane, claim, Retry(detail=DeliveryUpdate("evt_1", DeliveryState("waiting", 1))))
    claim = await claim_one(lane)
    assert claimed_event(claim).id == "evt_1"
    assert claimed_event(claim).state == b'{"s":"waiting","n":1}'
    assert await settled(lane, claim, Done(DeliveryUpdate("evt_1", DeliveryState("delivered", 2))))
    for eid in ("evt_2", "evt_3"):
        claim = await claim_one(lane)
        assert claimed_event(claim).id == eid
        assert await settled(lane, claim, Done(DeliveryUpdate(eid, DeliveryState("delivered"))))

    assert await claims_of(lane) == []
    assert await redis.keys("relay:pending:*") == []


async def test_an_event_published_during_an_attempt_follows_it(redis: Redis) -> None:
    """The settle of the attempt finds it."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1")
    claim = await claim_one(lane)
    await publish(redis, "sub", "call", "evt_2")

    assert await settled(lane, claim, Done(DeliveryUpdate("evt_1", DeliveryState("delivered"))))
    assert claimed_event(await claim_one(lane)).id == "evt_2"


async def test_a_new_event_does_not_shorten_the_backoff_of_the_one_before(redis: Redis) -> None:
    """However often the call changes."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1")
    claim = await claim_one(lane)
    await publish(redis, "sub", "call", "evt_2")
    assert await settled(lane, claim, Retry(300_000, DeliveryUpdate("evt_1", DeliveryState("waiting"))))
    await publish(redis, "sub", "call", "evt_3")

    assert 290_000 < (await due_of(redis, lane, "call", "sub") or 0) <= 300_100


async def test_an_expired_event_is_claimed_without_its_body(redis: Redis) -> None:
    """The worker marks the delivery as expired, and the next one goes on."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1")
    await redis.delete(keys.event("evt_1"))

    event = claimed_event(await claim_one(lane))

    assert (event.id, event.body, event.state) == ("evt_1", None, b"")


async def test_an_ordering_key_without_pending_events_leaves_the_lane(redis: Redis) -> None:
    """There is nothing to deliver."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1")
    await redis.delete(keys.pending("sub", "call"))

    assert await claims_of(lane) == []
    assert await redis.zcard(queue_keys.waiting("deliver", "sub")) == 0


async def test_every_settle_keeps_the_event_alive(redis: Redis) -> None:
    """An event that is retried for days must not expire under its retries."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1")
    await redis.expire(keys.event("evt_1"), 5)

    assert await settled(lane, await claim_one(lane), Retry(detail=DeliveryUpdate("evt_1", DeliveryState("waiting"))))

    assert await redis.ttl(keys.event("evt_1")) > EVENT_TTL_S - 60


async def test_a_stored_recording_makes_the_call_due_for_enrichment(redis: Redis) -> None:
    """The recording, a new version of the call and its due are written in one step."""
    [cid] = await ingest(redis, "7")
    record, enrich = lane_of(redis, LaneName.RECORD), lane_of(redis, LaneName.ENRICH)
    enriching = await claim_one(enrich)
    assert await settled(enrich, enriching)
    claim = await claim_one(record)
    assert await settled(record, claim, Retry(detail=FetchProgress({"step": 1})))
    claim = await claim_one(record)
    assert claimed_call(claim).fetch == {"step": 1}

    assert await settled(record, claim, Done(RecordingStored({"status": "none"})))

    call = await store_of(redis).calls.get(cid)
    assert call is not None
    assert (call.recording, call.fetch) == ({"status": "none"}, None)
    assert call.version == claimed_call(enriching).version + 1
    assert await claims_of(record) == []
    assert await items_of(enrich) == [cid]


async def test_a_recording_stored_during_enrichment_is_not_lost(redis: Redis) -> None:
    """The call is leased in the enrich lane: its settle makes it due again."""
    await ingest(redis, "7")
    record, enrich = lane_of(redis, LaneName.RECORD), lane_of(redis, LaneName.ENRICH)
    enriching = await claim_one(enrich)
    assert await settled(record, await claim_one(record), Done(RecordingStored({"status": "none"})))
    assert await claims_of(enrich) == []

    assert await settled(enrich, enriching)
    assert claimed_call(await claim_one(enrich)).recording == {"status": "none"}


async def test_a_wanted_contact_is_looked_up_and_then_published(redis: Redis) -> None:
    """Enrich puts the call into contacts; once the contact is found, enrich looks at the call again."""
    [cid] = await ingest(redis, "7")
    enrich, contacts = lane_of(redis, LaneName.ENRICH), lane_of(redis, LaneName.CONTACTS)
    assert await settled(enrich, await claim_one(enrich), Retry(60_000, ContactWanted()))
    assert await claims_of(enrich) == []

    claim = await claim_one(contacts)
    assert await settled(contacts, claim, Retry(0, LookupProgress({"failures": 1})))
    claim = await claim_one(contacts)
    assert claimed_call(claim).lookup == {"failures": 1}
    assert await claims_of(enrich) == []
    assert await settled(contacts, claim, Done(ContactFound()))

    assert await items_of(enrich) == [cid]
    assert await claims_of(contacts) == []


async def test_a_call_that_is_enriched_again_keeps_the_backoff_of_its_look_up(redis: Redis) -> None:
    """The end of a hold, or a recording, brings no second look-up, neither during the first nor after its failure."""
    await ingest(redis, "7")
    enrich, contacts = lane_of(redis, LaneName.ENRICH), lane_of(redis, LaneName.CONTACTS)
    assert await settled(enrich, await claim_one(enrich), Retry(0, ContactWanted()))
    looking_up = await claim_one(contacts)
    assert await settled(enrich, await claim_one(enrich), Retry(0, ContactWanted()))
    assert await settled(contacts, looking_up, Retry(60_000, LookupProgress({"failures": 1})))
    assert await settled(enrich, await claim_one(enrich), Done(ContactWanted()))

    assert await claims_of(contacts) == []
    assert await due_of(redis, contacts, looking_up.item, "main") == pytest.approx(60_000, abs=5000)


@pytest.mark.parametrize(
    ("name", "part"),
    [(LaneName.RECORD, RecordingStored({"status": "none"})), (LaneName.CONTACTS, LookupProgress({"failures": 1}))],
)
async def test_a_part_of_an_erased_call_is_not_written(redis: Redis, name: LaneName, part: Detail) -> None:
    """The call was erased while its audio was fetched, or its contact looked up."""
    [cid] = await ingest(redis, "7")
    lane = lane_of(redis, name)
    await lane.put("main", cid)
    claim = await claim_one(lane)
    await redis.delete(keys.call(cid))

    assert await settled(lane, claim, Done(part))
    assert await redis.exists(keys.call(cid)) == 0


@pytest.mark.parametrize("name", ["enrich", "contacts", "record"])
async def test_an_expired_call_is_not_claimed(redis: Redis, name: LaneName) -> None:
    """Its retention is over; its items are dropped."""
    [cid] = await ingest(redis, "7")
    await lane_of(redis, name).put("main", cid)
    await redis.delete(keys.call(cid))

    assert await claims_of(lane_of(redis, name)) == []
    assert await redis.zcard(queue_keys.waiting(name, "main")) == 0


# The store at its limits


async def test_settlements_are_accepted_when_the_memory_is_full(redis: Redis) -> None:
    """Or everything would be sent again; new calls are refused as a whole."""
    lane = lane_of(redis, LaneName.DELIVER)
    await publish(redis, "sub", "call", "evt_1", "evt_2")
    claim = await claim_one(lane)
    before = sorted(await redis.keys("*"))

    async with full_memory(redis):
        with pytest.raises(OutOfMemoryError):
            await ingest(redis, "7")
        with pytest.raises(OutOfMemoryError):
            await publish(redis, "sub", "call", "evt_3")
        assert sorted(await redis.keys("*")) == before
        assert await settled(lane, claim, Done(DeliveryUpdate("evt_1", DeliveryState("delivered"))))
        following = await claim_one(lane)

    assert claimed_event(following).id == "evt_2"
    assert await field(redis, keys.event("evt_1"), "sub") == b'{"s":"delivered"}'
    assert len(await ingest(redis, "7")) == 1


async def test_scripts_are_loaded_again_even_into_a_full_store(redis: Redis) -> None:
    """A restarted store has an empty script cache."""
    lane = lane_of(redis)
    await lane.put("", "item")
    claim = await claim_one(lane)
    await redis.script_flush()

    async with full_memory(redis):
        assert await settled(lane, claim)


# Key names and headers

_LUA_NAME = re.compile(r"'relay:[^']*'(?:\s*\.\.\s*(?:'[^']*'|[A-Za-z_][\w.]*(?:\[[^\]]*\])?))*")
_LUA_PART = re.compile(r"'([^']*)'|([A-Za-z_][\w.]*(?:\[[^\]]*\])?)")


def lua_files() -> list[Traversable]:
    """Every script of the store and of the queue."""
    folders = (resources.files("relay.queue"), resources.files("relay.store"))
    return [file for folder in folders for file in folder.iterdir() if file.name.endswith(".lua")]


def names_in_lua() -> dict[str, str]:
    """Each key name that a Lua file builds, with {} for what varies, and its file."""
    names = {}
    for file in lua_files():
        if file.name.endswith(".lua"):
            code = "\n".join(line.split("--")[0] for line in file.read_text().splitlines())
            for name in _LUA_NAME.findall(code):
                names["".join("{}" if variable else text for text, variable in _LUA_PART.findall(name))] = file.name
    return names


def names_in_python() -> set[str]:
    names = set()
    for module in (keys, queue_keys):
        names |= {value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name not in ("bucket", "contact", "__annotate__"):
                names.add(function(*("{}" for _ in inspect.signature(function).parameters)))
    return names


def test_lua_and_python_name_the_same_keys() -> None:
    """The keys.py files document every key, also those that only a script builds."""
    in_lua = names_in_lua()

    assert len(in_lua) > 12
    assert {name: file for name, file in in_lua.items() if name not in names_in_python()} == {}


async def test_every_key_in_the_store_is_documented(redis: Redis) -> None:
    """Read back from the store after each kind of work."""
    await ingest(redis, "7", "8")
    enrich, deliver = lane_of(redis, LaneName.ENRICH), lane_of(redis, LaneName.DELIVER)
    await claims_of(enrich, 1)
    await publish(redis, "sub", "call", "evt_1", "evt_2")
    await deliver.apply(LimitInFlight("sub", 4))
    assert await settled(
        deliver,
        await claim_one(deliver),
        Done(DeliveryUpdate("evt_1", DeliveryState("exhausted"), dead_letter=True), PartitionHealth.FAILING),
    )
    for _ in range(6):
        await let_leases_end(redis, deliver, "sub")
        await claims_of(deliver)

    patterns = [re.compile(re.escape(name).replace(r"\{\}", ".*")) for name in names_in_python()]
    names = [name.decode() for name in await redis.keys("*")]
    assert len(names) > 12
    assert [name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)] == []


def test_each_script_documents_its_arguments_reply_and_races() -> None:
    """The header of a Lua file is its contract."""
    for file in lua_files():
        if file.name not in ("lane.lua", "keys.lua"):
            header = file.read_text().split("\n\n")[0]
            contract = ("ARGV", "FIELDS") if "The hooks of" in header else ("KEYS", "ARGV", "REPLY")
            assert all(word in header for word in contract), file.name
            assert re.search(r"Races? closed here", file.read_text()), file.name


def test_a_state_that_a_script_writes_can_be_read() -> None:
    """`missing` is written by a script, not by `DeliveryState.write`."""
    text = resources.files("relay.store").joinpath("publish.lua").read_text()
    written = re.findall(r"'(\{\"s\".*?\})'", text)

    assert [DeliveryState.read(each.encode()).status for each in written] == ["missing"]
    assert [orjson.loads(each) for each in written] == [{"s": "missing"}]
