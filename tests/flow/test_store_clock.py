"""The relay's clock in the store: it never goes back, and returns to the time of the server; against a real Valkey."""

import asyncio

from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.queue.lane import Lane

HOUR_MS = 3_600_000


async def server_ms(redis: Redis) -> float:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) / 1000


async def step_back(redis: Redis, by_ms: float) -> float:
    """Let the server's time step back: the clock has been so far ahead of it. Returns its last value."""
    last_ms = await server_ms(redis) + by_ms
    await redis.hset(queue_keys.CLOCK, mapping={"last": str(last_ms), "offset": "0"})  # type: ignore[misc]
    return last_ms


async def test_what_waits_is_not_frozen_when_the_servers_time_steps_back(redis: Redis) -> None:
    """An item that was due is still due, and one that is put now is due when it says."""
    lane = Lane(redis, "poll")
    await lane.put("a", "item")
    last_ms = await step_back(redis, HOUR_MS)
    await lane.put("b", "item")

    reply = await lane.exchange(want=10)

    assert {claim.partition for claim in reply.claims} == {"a", "b"}
    assert last_ms - 1 <= reply.now_ms < last_ms + 1000


async def test_the_clock_goes_on_at_nine_tenths_until_the_servers_time_has_caught_up(redis: Redis) -> None:
    """It neither stands still nor stays ahead for good."""
    lane = Lane(redis, "poll")
    await step_back(redis, HOUR_MS)
    first_ms, began_ms = (await lane.exchange()).now_ms, await server_ms(redis)
    await asyncio.sleep(0.5)
    ended_ms = await server_ms(redis)

    passed_ms = (await lane.exchange()).now_ms - first_ms

    assert 0.85 * (ended_ms - began_ms) <= passed_ms <= 0.95 * (await server_ms(redis) - began_ms) + 5


async def test_a_clock_that_was_ahead_for_long_is_the_servers_again(redis: Redis) -> None:
    lane = Lane(redis, "poll")
    now_ms = await server_ms(redis)
    clock = {"last": str(now_ms - HOUR_MS), "offset": str(HOUR_MS / 20)}
    await redis.hset(queue_keys.CLOCK, mapping=clock)  # type: ignore[misc]  # typed for both clients

    ahead_ms = (await lane.exchange()).now_ms - await server_ms(redis)

    assert -1000 < ahead_ms <= 0
