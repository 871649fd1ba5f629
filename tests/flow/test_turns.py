"""Partitions of a lane take turns, and so do their owners: a backlog in one does not delay another."""

from collections.abc import Sequence

from redis.asyncio import Redis

from relay.queue.changes import Own, Put
from relay.queue.claim import Claim
from relay.queue.lane import Lane, Room
from relay.queue.settlement import Done
from tests.store import prove


async def work(lane: Lane, want: int) -> Sequence[Claim]:
    """Claim and finish at once."""
    claims = (await lane.exchange(want=want)).claims
    await lane.exchange([(claim, Done()) for claim in claims])
    return claims


async def test_a_new_item_does_not_wait_for_the_backlogs_of_others(redis: Redis) -> None:
    """Four backlogs could fill every claim; a new item of a fifth partition is claimed after one turn of each."""
    lane = Lane(redis, "poll")
    floods = [f"flood{partition}" for partition in range(4)]
    await prove(redis, "poll", *floods, "idle")
    for partition in floods:
        await lane.apply(*(Put(partition, f"item{number}") for number in range(100)))
    await work(lane, 20)
    await lane.put("idle", "first")

    claimed = [claim.partition for _ in range(3) for claim in await work(lane, 20)]

    assert "idle" in claimed


async def test_a_long_backlog_is_served_in_turns(redis: Redis) -> None:
    """Two backlogs, one a second older: claims alternate instead of draining the older one first."""
    lane = Lane(redis, "poll")
    await prove(redis, "poll", "older", "younger")
    await lane.apply(*(Put("older", f"item{number}", -1000) for number in range(50)))
    await lane.apply(*(Put("younger", f"item{number}") for number in range(50)))

    served = [(await work(lane, 1))[0].partition for _ in range(6)]

    assert served == ["older", "younger"] * 3


async def test_a_tenant_with_thousands_of_due_partitions_hides_no_other(redis: Redis) -> None:
    """Owners take turns before their partitions do, proven or not."""
    lane = Lane(redis, "poll")
    for start in range(0, 10_000, 1000):
        partitions = [f"many{number}" for number in range(start, start + 1000)]
        await lane.apply(*(change for p in partitions for change in (Own(p, "acme"), Put(p, "item", -5000))))
    await lane.apply(Own("one", "other"), Put("one", "item"))
    await lane.put("ours", "item")

    claims = (await lane.exchange(want=10)).claims

    assert {"one", "ours"} <= {claim.partition for claim in claims}


async def test_a_lone_tenant_uses_at_most_half_of_the_room(redis: Redis) -> None:
    """Whoever comes next finds a free slot; the operator's own partitions have no such limit."""
    lane = Lane(redis, "poll")
    await prove(redis, "poll", *(f"theirs{number}" for number in range(40)))
    await lane.apply(*(Own(f"theirs{number}", "acme") for number in range(40)))
    await lane.apply(*(Put(f"theirs{number}", "item") for number in range(40)))

    claimed = 0
    for _ in range(10):
        room = Room(20 - claimed, 0, owners={"acme": claimed} if claimed else {})
        claimed += len((await lane.exchange(room=room)).claims)

    assert claimed == 10


async def test_a_partition_uses_no_more_slots_than_stay_free(redis: Redis) -> None:
    """However large its backlog is: half of the room; the next one half of what that has left."""
    for partitions, shares in ((["a"], [10]), (["b", "c"], [10, 5])):
        lane = Lane(redis, f"lane{len(partitions)}")
        await prove(redis, lane.name, *partitions)
        for partition in partitions:
            await lane.apply(*(Put(partition, f"item{number}") for number in range(50)))

        claims: list[Claim] = []
        for _ in range(20):
            claims += (await lane.exchange(want=20 - len(claims))).claims

        assert [sum(claim.partition == p for claim in claims) for p in partitions] == shares
