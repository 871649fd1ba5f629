"""The relay's clock is one value in the store that never goes back: what waits does not wait for TIME."""

import asyncio

import pytest
from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.queue.lane import Lane
from relay.store.connection import now_ms, wall_ms

HOUR_MS = 3_600_000


async def step_time_back(redis: Redis, by_ms: int) -> None:
    """As the scripts see it: the last moment that they gave lies so far ahead of TIME."""
    await redis.hincrbyfloat(queue_keys.CLOCK, "last", by_ms)  # type: ignore[misc]


async def test_what_waits_is_not_delayed_when_the_clock_steps_back(redis: Redis) -> None:
    """An item that is due in 0.2 s is due in 0.2 s, in every lane, whichever process runs."""
    poll, enrich = Lane(redis, "poll"), Lane(redis, "enrich")
    await poll.put("p", "waits", after_ms=HOUR_MS + 200)
    await enrich.put("p", "waits", after_ms=HOUR_MS + 200)

    await step_time_back(redis, HOUR_MS)
    for lane in (poll, enrich):
        reply = await lane.exchange(want=1)
        assert reply.claims == []
        assert 0 < (reply.next_due_ms or 0) - reply.now_ms <= 200
    await asyncio.sleep(0.25)

    assert [(await lane.exchange(want=1)).claims[0].item for lane in (poll, enrich)] == ["waits", "waits"]


async def test_the_clock_never_goes_back_and_follows_slowly(redis: Redis) -> None:
    """After a step back of an hour it is an hour ahead of TIME, which it gives back a tenth of the time that passes."""
    lane = Lane(redis, "poll")
    moments = [await lane.apply()]
    await step_time_back(redis, HOUR_MS)
    for _ in range(20):
        moments.append(await lane.apply())
        await asyncio.sleep(0.01)

    assert moments == sorted(moments)
    assert moments[-1] - await wall_ms(redis) == pytest.approx(HOUR_MS, abs=1000)
    assert await now_ms(redis) >= moments[-1]
    assert HOUR_MS - 100 < float(await redis.hget(queue_keys.CLOCK, "offset") or 0) < HOUR_MS  # type: ignore[misc]


async def test_people_read_the_time_of_day(redis: Redis) -> None:
    """Signatures and events carry the store's TIME, right again at once when it was set back."""
    lane = Lane(redis, "poll")
    await lane.apply()
    await step_time_back(redis, HOUR_MS)
    await lane.apply()

    assert lane.wall_ms == pytest.approx(await wall_ms(redis), abs=1000)
    assert lane.store_now_ms == pytest.approx(lane.wall_ms + HOUR_MS, abs=1000)
