"""Partitions of a lane take turns: a backlog in one does not delay another."""

from redis.asyncio import Redis

from relay.queue.changes import Put
from relay.queue.lane import Lane


async def test_a_new_item_does_not_wait_for_the_backlogs_of_others(redis: Redis) -> None:
    """Four backlogs could fill every claim; a new item of a fifth partition is claimed after one turn of each."""
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
    """Two backlogs, one a second older: claims alternate instead of draining the older one first."""
    lane = Lane(redis, "poll", lease_s=60, most=5)
    await lane.apply(*(Put("older", f"item{number}", -1000) for number in range(50)))
    await lane.apply(*(Put("younger", f"item{number}") for number in range(50)))

    served = [(await lane.exchange(want=5)).claims[0].partition for _ in range(6)]

    assert served == ["older", "younger"] * 3
