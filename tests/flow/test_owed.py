"""What is owed outlives its place in a lane, and a process that does not know a source or subscription (promise 1)."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Outcome
from relay.queue import keys as queue_keys
from relay.queue.changes import Pause, Put
from relay.queue.claim import Claim
from relay.queue.settlement import Retry, Settlement
from relay.store import keys
from relay.store.lanes import LaneName, open_lane
from relay.store.scripts import load_script
from tests.fakes.subscriber import ScriptedReply
from tests.flow.harness import RelayHarness, eventually, relay_harness
from workers.poll import PollWorker
from workers.sweep import restore

CALL_LANES = ("enrich", "record", "deliver")


@pytest.fixture
async def relay(redis: Redis, valkey_url: str, tmp_path: Path) -> AsyncIterator[RelayHarness]:
    async with relay_harness(redis, valkey_url, tmp_path, {"a": {}, "b": {}}) as harness:
        yield harness


async def owed(redis: Redis, lane: str) -> int:
    partitions = await redis.smembers(keys.owed(lane))  # type: ignore[misc]
    return sum([await redis.zcard(keys.owed_items(lane, partition.decode())) for partition in partitions])


async def lose_items(redis: Redis, rng: random.Random, *, share: float) -> int:
    """Remove waiting and leased items from the lanes at random, as a bug or an operator with redis-cli would."""
    lost = 0
    for lane in CALL_LANES:
        for pattern in (queue_keys.waiting(lane, "*"), queue_keys.leased(lane, "*")):
            async for name in redis.scan_iter(pattern):
                items = await redis.zrange(name, 0, -1)
                chosen = [item for item in items if rng.random() < share]
                lost += await redis.zrem(name, *chosen) if chosen else 0
    return lost


async def test_items_deleted_at_random_under_load_are_delivered_once(relay: RelayHarness, redis: Redis) -> None:
    """Lane items vanish while calls come in; each call is delivered to each subscriber, and none of them twice."""
    rng = random.Random(11)
    lost = 0
    for hook in ("a", "b"):
        relay.subscriber.script(hook, ScriptedReply(delay_s=0.2))
    for batch in range(20):
        await relay.calls(f"{batch}-{at}" for at in range(15))
        for _ in range(5):
            lost += await lose_items(redis, rng, share=0.5)
    assert lost > 50, "little was lost, so this shows little"

    async with asyncio.timeout(30):
        while min(relay.report(hook).accepted for hook in ("a", "b")) < 300:
            await restore(relay.runtime)
            await asyncio.sleep(0.05)

    await eventually(lambda: owed(redis, "deliver"), lambda count: count == 0)
    assert sum(relay.report("a").duplicates.values()) + sum(relay.report("b").duplicates.values()) == 0
    assert await owed(redis, "enrich") == 0


async def test_a_lane_without_losses_is_left_alone(relay: RelayHarness) -> None:
    """Restoring what nothing has lost changes nothing: no item becomes due earlier."""
    await relay.call("1")
    await relay.until_delivered("a", 1)

    assert [await relay.runtime.store.upkeep.restore(lane) for lane in LaneName] == [0] * len(LaneName)


async def test_what_is_settled_while_a_lane_is_being_restored_is_not_put_back(redis: Redis) -> None:
    """The sweep has read that the item is owed; before it can put it back, the item is settled."""
    assert await load_script(redis, "restore")(args=["deliver", "a", "settled meanwhile"]) == 0

    assert await redis.zcard(queue_keys.waiting("deliver", "a")) == 0


async def test_what_a_removed_source_is_owed_is_not_put_back(redis: Redis) -> None:
    """Its calls stay owed, for when it is declared again; until then nothing works on them."""
    await redis.zadd(keys.owed_items("enrich", "main"), {"call_1": 1})
    await redis.hset(keys.removed("source"), "main", "1")  # type: ignore[misc]

    assert await load_script(redis, "restore")(args=["enrich", "main", "call_1"]) == 0

    assert await redis.zcard(queue_keys.waiting("enrich", "main")) == 0
    assert await redis.zcard(keys.owed_items("enrich", "main")) == 1


async def test_a_removed_source_is_not_polled_by_a_process_that_still_knows_it(redis: Redis) -> None:
    lane = open_lane(redis, LaneName.POLL)
    await lane.apply(Put("gone", "gone"), Put("main", "main"))
    await redis.hset(keys.removed("source"), "gone", "1")  # type: ignore[misc]

    claims = (await lane.exchange(want=10)).claims

    assert [claim.item for claim in claims] == ["main"]


async def test_the_lease_of_a_live_process_goes_on_when_its_place_is_lost(relay: RelayHarness, redis: Redis) -> None:
    """Another process that claimed the item would deliver it a second time."""
    relay.subscriber.script("a", ScriptedReply(delay_s=2))
    call_id = await relay.call("1")
    await eventually(lambda: redis.zcard(queue_keys.leased("deliver", "a")), lambda count: count == 1)
    await redis.zrem(queue_keys.leased("deliver", "a"), call_id)

    await restore(relay.runtime)

    assert await redis.zscore(queue_keys.leased("deliver", "a"), call_id) == float("inf")
    await relay.until_delivered("a", 1)
    assert relay.report("a").duplicates == {}


async def test_a_partition_that_has_lost_its_place_in_the_index_is_served_again(
    relay: RelayHarness, redis: Redis
) -> None:
    """Its items are where they were, but nothing would have looked for them."""
    lane = relay.runtime.lanes[LaneName.DELIVER]
    await lane.apply(Pause("a", "inf"))
    await relay.call("1")
    await eventually(lambda: redis.zcard(queue_keys.waiting("deliver", "a")), lambda count: count == 1)
    await redis.hdel(queue_keys.partition("deliver", "a"), "paused_until")  # type: ignore[misc]
    async for name in redis.scan_iter("relay:group:deliver:*"):
        await redis.delete(name)
    async for name in redis.scan_iter("relay:index:deliver:*"):
        await redis.delete(name)

    await restore(relay.runtime)

    await relay.until_delivered("a", 1)


async def test_a_lost_poll_is_put_back(relay: RelayHarness, redis: Redis) -> None:
    """A source whose poll has lost its place, its lease included, is polled again."""
    await redis.hset(queue_keys.leases("poll", "main"), "main", "dead:1:0|0|")  # type: ignore[misc]
    await redis.zrem(queue_keys.waiting("poll", "main"), "main")
    await redis.zrem(queue_keys.leased("poll", "main"), "main")

    await restore(relay.runtime)

    assert await redis.zscore(queue_keys.leased("poll", "main"), "main") is not None


async def test_the_poll_of_an_unknown_source_is_given_back() -> None:
    """Another process may know the source, and this one after it has read its configuration again."""
    settlements: list[Settlement] = []
    worker = PollWorker(dict, None)  # type: ignore[arg-type]  # nothing is polled

    await worker.work([Claim("main", "main", b"token")], lambda _, settlement: settlements.append(settlement))

    assert [type(settlement) for settlement in settlements] == [Retry]


@pytest.mark.parametrize("outcome", [Outcome.ANSWERED, Outcome.NO_ANSWER])
async def test_a_call_of_an_unknown_source_waits_for_a_process_that_knows_it(
    relay: RelayHarness, redis: Redis, outcome: Outcome
) -> None:
    """The worker gives enrich and record items back; once it knows the source again, the call is delivered."""
    source = relay.runtime.sources.pop("main")
    await relay.call("1", outcome=outcome, audio=outcome is Outcome.ANSWERED)
    await eventually(lambda: redis.zcard(queue_keys.waiting("enrich", "main")), lambda count: count == 1)
    await asyncio.sleep(0.3)
    assert relay.report("a").accepted == 0
    assert await redis.zcard(queue_keys.waiting("record", "main")) == (1 if outcome is Outcome.ANSWERED else 0)

    relay.runtime.sources["main"] = source

    await relay.until_delivered("a", 1)
    assert await redis.zcard(keys.owed_items("enrich", "main")) == 0


async def test_an_event_of_an_unknown_subscription_waits_for_a_process_that_knows_it(
    relay: RelayHarness, redis: Redis
) -> None:
    """The worker gives the item back; once it knows the subscription again, the event is delivered."""
    lane = relay.runtime.lanes[LaneName.DELIVER]
    await lane.apply(Pause("a", "inf"))
    call_id = await relay.call("1")
    await eventually(lambda: redis.zcard(queue_keys.waiting("deliver", "a")), lambda count: count == 1)
    known = dict(relay.runtime.subscriptions)
    relay.runtime.subscriptions.replace({"b": known["b"]})
    await lane.apply(Pause("a", None))
    relay.runtime.wake_ups(LaneName.DELIVER)
    await asyncio.sleep(0.3)
    assert await redis.zrange(queue_keys.waiting("deliver", "a"), 0, -1) == [call_id.encode()]
    assert relay.report("a").received == 0

    relay.runtime.subscriptions.replace(known)

    await relay.until_delivered("a", 1)


async def test_a_process_that_still_knows_a_removed_subscription_delivers_nothing_to_it(
    relay: RelayHarness, redis: Redis
) -> None:
    """The tombstone ends its work in every process, whatever configuration that has."""
    lane = relay.runtime.lanes[LaneName.DELIVER]
    await lane.apply(Pause("a", "inf"))
    await relay.call("1")
    await eventually(lambda: redis.zcard(queue_keys.waiting("deliver", "a")), lambda count: count == 1)
    await redis.hset(keys.removed("subscription"), "a", "1")  # type: ignore[misc]
    await lane.apply(Pause("a", None))
    relay.runtime.wake_ups(LaneName.DELIVER)

    await eventually(lambda: redis.zcard(queue_keys.waiting("deliver", "a")), lambda count: count == 0)
    assert await redis.zcard(queue_keys.leased("deliver", "a")) == 0
    assert relay.report("a").received == 0


async def test_a_removed_source_ends_its_work_and_a_new_declaration_continues_it(
    relay: RelayHarness, redis: Redis
) -> None:
    """Only a removal empties the lanes of an unknown source, and what was owed is delivered once it is back."""
    source = relay.runtime.sources.pop("main")
    await relay.call("1")
    await redis.hset(keys.removed("source"), "main", "1")  # type: ignore[misc]
    await eventually(lambda: redis.zcard(queue_keys.waiting("enrich", "main")), lambda count: count == 0)
    await restore(relay.runtime)
    await eventually(lambda: redis.zcard(queue_keys.waiting("enrich", "main")), lambda count: count == 0)

    relay.runtime.sources["main"] = source
    await redis.hdel(keys.removed("source"), "main")  # type: ignore[misc]
    await restore(relay.runtime)

    await relay.until_delivered("a", 1)


async def test_an_event_for_a_subscription_that_another_process_knows_is_filtered_there(
    relay: RelayHarness, redis: Redis
) -> None:
    """Published by a process with an older configuration: the delivery waits, and the filters are applied then."""
    registry, everything = relay.runtime.registry, dict(relay.runtime.subscriptions)
    await relay.runtime.store.configurations.announce("newer", [("subscription", "b")])
    await registry.announce()
    relay.runtime.subscriptions.replace({"a": everything["a"]})
    await relay.call("1", outcome=Outcome.NO_ANSWER)
    await relay.call("2", outcome=Outcome.ANSWERED)
    await relay.until_delivered("a", 2)
    events = [relay.event_of("1"), relay.event_of("2")]
    assert [(await relay.state(eid, "b")).status for eid in events] == ["waiting", "waiting"]

    options = everything["b"].options.model_copy(update={"outcome": ("answered",)})
    relay.runtime.subscriptions.replace(everything | {"b": replace(everything["b"], options=options)})

    await relay.until_delivered("b", 1)
    await eventually(lambda: owed(redis, "deliver"), lambda count: count == 0)
    assert [event["id"] for event in relay.subscriber.events("b")] == events[1:]
    assert not await redis.hexists(keys.event(events[0]), "b")  # type: ignore[misc]


async def test_the_audio_of_a_quarantined_call_is_reported_as_unavailable(relay: RelayHarness, redis: Redis) -> None:
    """Five processes died while they fetched it: the recording is final, so that no subscriber waits for it."""
    relay.runtime.sources.pop("main")
    lane = relay.runtime.lanes[LaneName.RECORD]
    await relay.call("1", outcome=Outcome.ANSWERED, audio=True)
    call_id = ids.call_id("main", "1")
    for _ in range(5):
        await redis.hset(queue_keys.leases("record", "main"), call_id, "dead:1:0|4|")  # type: ignore[misc]
        await redis.zrem(queue_keys.waiting("record", "main"), call_id)
        await redis.zadd(queue_keys.leased("record", "main"), {call_id: 1})
        await lane.drop("main", "unknown")  # the index follows
        await lane.exchange(want=10)

    call = await relay.runtime.store.calls.get(call_id)

    assert call is not None
    assert call.recording == {"status": "unavailable"}
    assert await redis.zcard(keys.owed_items("record", "main")) == 0
