"""The circuit breaker, the rate and the standing of a partition, at their limits; against a real Valkey."""

from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.queue.changes import DisablePartition, Drop, EnablePartition, LimitRate, Own, Pause, Put
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.settlement import Done, PartitionHealth, Retry
from tests.store import prove

HEALTHY, FAILING, UNHEALTHY = PartitionHealth


async def open_lane(redis: Redis, *, items: int = 10) -> Lane:
    """A lane whose partition `p` is proven and has items that are due."""
    lane = Lane(redis, "poll")
    await prove(redis, "poll", "p")
    await lane.apply(*(Put("p", str(number)) for number in range(items)))
    return lane


async def settle(lane: Lane, claims: Sequence[Claim], health: PartitionHealth) -> None:
    await lane.exchange([(claim, Retry(health=health)) for claim in claims])


async def pause_ms(lane: Lane) -> int:
    """How long nothing is claimed; claims what is due."""
    reply = await lane.exchange(want=20)
    assert reply.next_due_ms is not None
    return reply.next_due_ms - reply.now_ms


async def attempt(lane: Lane, *outcomes: PartitionHealth) -> None:
    """Claim the one item that is there and settle it, once for each outcome."""
    for health in outcomes:
        [claim] = (await lane.exchange(want=20)).claims
        await settle(lane, [claim], health)


async def end_pause(lane: Lane) -> None:
    await lane.apply(Pause("p", lane.store_now_ms))


async def test_a_circuit_opens_after_five_unhealthy_attempts_in_a_row_and_no_earlier(redis: Redis) -> None:
    """Four and a success are no row of five."""
    lane = await open_lane(redis, items=1)
    await attempt(lane, *[UNHEALTHY] * 4, HEALTHY, *[UNHEALTHY] * 5)

    assert await pause_ms(lane) == pytest.approx(30_000, abs=1000)


async def test_events_that_are_rejected_open_no_circuit(redis: Redis) -> None:
    """A 400 says something about the event, not that the endpoint is broken."""
    lane = await open_lane(redis, items=1)
    await attempt(lane, *[FAILING] * 20)

    assert len((await lane.exchange(want=20)).claims) == 1


async def test_each_failed_probe_doubles_the_pause_up_to_ten_minutes(redis: Redis) -> None:
    lane = await open_lane(redis, items=1)
    await attempt(lane, *[UNHEALTHY] * 5)
    pauses_ms = [await pause_ms(lane)]
    for _ in range(6):
        await end_pause(lane)
        await attempt(lane, UNHEALTHY)
        pauses_ms.append(await pause_ms(lane))

    assert pauses_ms == pytest.approx([30_000, 60_000, 120_000, 240_000, 480_000, 600_000, 600_000], abs=1000)


async def test_attempts_from_before_a_circuit_opened_do_not_lengthen_its_pause(redis: Redis) -> None:
    """Ten were in flight when the endpoint broke: they say no more than the first five."""
    lane = await open_lane(redis)
    claims = list((await lane.exchange(want=100)).claims)
    await settle(lane, claims[:5], UNHEALTHY)
    await settle(lane, claims[5:], UNHEALTHY)

    assert await pause_ms(lane) == pytest.approx(30_000, abs=1000)
    await end_pause(lane)
    await attempt(lane, UNHEALTHY)
    assert await pause_ms(lane) == pytest.approx(60_000, abs=1000)


async def test_nothing_is_claimed_from_a_disabled_partition_and_enabling_forgets_its_circuit(redis: Redis) -> None:
    """Enabled by hand it starts afresh: one more failure is the first of five."""
    lane = await open_lane(redis, items=1)
    await attempt(lane, *[UNHEALTHY] * 5)
    await lane.apply(DisablePartition("p", "by hand"))
    await lane.put("p", "another")
    reply = await lane.exchange(want=20)
    assert (reply.claims, reply.next_due_ms) == ([], None)

    await lane.apply(EnablePartition("p"), Drop("p", "another"))

    await attempt(lane, *[UNHEALTHY] * 4)
    assert len((await lane.exchange(want=20)).claims) == 1


async def test_the_time_since_when_a_partition_fails_is_that_of_its_first_failure(redis: Redis) -> None:
    """A subscription is disabled five days after it, so a later failure must not move it."""
    lane = await open_lane(redis)
    claims = list((await lane.exchange(want=100)).claims)
    await settle(lane, claims[:1], FAILING)
    name = queue_keys.partition("poll", "p")
    await redis.hset(name, "failing_since", "1000")  # type: ignore[misc]  # typed for both clients

    await settle(lane, claims[1:2], UNHEALTHY)

    assert await redis.hget(name, "failing_since") == b"1000"  # type: ignore[misc]  # typed for both clients


async def test_a_runner_sleeps_until_the_rate_of_a_partition_allows_a_claim(redis: Redis) -> None:
    """It does not spin over items that are due and may not be claimed yet."""
    lane = await open_lane(redis)
    await lane.apply(LimitRate("p", 5_000))
    assert len((await lane.exchange(want=10)).claims) == 1

    reply = await lane.exchange(want=10)

    assert reply.claims == []
    assert reply.next_due_ms is not None
    assert 3_000 < reply.next_due_ms - reply.now_ms <= 5_000


@pytest.mark.parametrize(("hours", "proven"), [(23, True), (25, False)])
async def test_a_success_proves_a_partition_for_a_day(redis: Redis, hours: int, proven: bool) -> None:
    """An endpoint that was last reached long ago gets one slot until it answers."""
    lane = await open_lane(redis)
    seconds, _ = await redis.time()
    succeeded_at = (int(seconds) - hours * 3600) * 1000
    await redis.hset(queue_keys.partition("poll", "p"), "succeeded_at", succeeded_at)  # type: ignore[misc]
    await lane.drop("p", "unknown")  # the index follows

    claims = (await lane.exchange(want=100)).claims

    assert {claim.proven for claim in claims} == {proven}
    assert (len(claims) > 1) == proven


@pytest.mark.parametrize(("failures", "proven"), [(2, True), (3, False)])
async def test_the_third_failure_after_a_success_ends_the_standing(redis: Redis, failures: int, proven: bool) -> None:
    """One answer over time or one 429 costs a healthy partition nothing."""
    lane = await open_lane(redis, items=10)
    await settle(lane, (await lane.exchange(want=100)).claims[:failures], FAILING)

    claims = (await lane.exchange(want=100)).claims

    assert {claim.proven for claim in claims} <= {proven}


async def test_owners_take_turns_however_old_the_backlog_of_one_is(redis: Redis) -> None:
    """One item is claimed at a time: a tenant with a hundred partitions does not come first a hundred times."""
    lane = Lane(redis, "poll")
    many, one = [f"many{number}" for number in range(100)], "one"
    await prove(redis, "poll", *many, one)
    await lane.apply(*(change for p in many for change in (Own(p, "acme"), Put(p, "item", -5000))))
    await lane.apply(Own(one, "other"), *(Put(one, str(number)) for number in range(10)))

    owners = []
    for _ in range(6):
        [claim] = (await lane.exchange(want=1)).claims
        await lane.exchange([(claim, Done())])
        owners.append(claim.owner)

    assert owners == ["acme", "other"] * 3
