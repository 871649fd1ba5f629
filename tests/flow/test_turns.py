"""Partitions of a lane take turns: a flood for one is no reason for another to wait."""

from redis.asyncio import Redis

from relay.queue.changes import Put
from relay.queue.lane import Lane


async def test_a_new_item_does_not_wait_for_the_flood_of_others(redis: Redis) -> None:
    """Four have backlogs that take all the room there is; what comes for a fifth is claimed when each had one turn."""
    lane = Lane(redis, "poll", lease_s=60, most=10)
    for partition in range(4):
        await lane.apply(*(Put(f"flood{partition}", f"item{number}") for number in range(100)))
    await lane.exchange(want=20)
    await lane.put("idle", "first")

    claimed = []
    for _ in range(3):
        claimed += [claim.partition for claim in (await lane.exchange(want=20)).claims]

    assert "idle" in claimed


async def test_a_long_backlog_is_served_in_turns(redis: Redis) -> None:
    """Two floods, one a second older than the other: claims alternate instead of draining the older one first."""
    lane = Lane(redis, "poll", lease_s=60, most=5)
    await lane.apply(*(Put("older", f"item{number}", -1000) for number in range(50)))
    await lane.apply(*(Put("younger", f"item{number}") for number in range(50)))

    served = [(await lane.exchange(want=5)).claims[0].partition for _ in range(6)]

    assert served == ["older", "younger"] * 3
