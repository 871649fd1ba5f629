"""What is erased stays erased, whatever is in flight, and delays nothing; against a real Valkey."""

from collections.abc import Awaitable, Callable, Sequence

import pytest
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Party, Record
from relay.domain.json import Json
from relay.domain.time import from_iso
from relay.privacy.erase import Erased, Eraser
from relay.queue import keys as queue_keys
from relay.queue.lane import Lane
from relay.queue.settlement import Done, Intent, PartitionHealth, Retry, Settlement
from relay.store import keys
from relay.store.calls import Row, StoredCall
from relay.store.codes import ReplayOutcome
from relay.store.deliveries import DeliveryState, claimed_event
from relay.store.events import NewEvent
from relay.store.lanes import DeliveryUpdate, LaneName, open_lane
from relay.store.store import Store
from tests.store import open_store

JO, OTHER = "+12025550123", "+12025550199"
CALL = ids.call_id("main", "7")
QUOTED: Json = {"outcome": "rejected", "words": "answered 500", "excerpt": "no such number: (202) 555-0123"}


class NoAudio:
    """A storage without recordings."""

    async def size(self, path: str) -> int | None:
        return None

    async def delete(self, path: str) -> None:
        raise AssertionError(path)


def store_of(redis: Redis) -> Store:
    return open_store(redis, calls_ttl_s=3000, events_ttl_s=1000)


def lane_of(redis: Redis) -> Lane:
    return open_lane(redis, LaneName.DELIVER, events_ttl_s=1000)


async def ingest_call(redis: Redis) -> StoredCall:
    record = Record(key="7", started_at=from_iso("2025-07-01T12:00:00Z"), local_date="2025-07-01")
    await store_of(redis).calls.ingest("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")
    call = await store_of(redis).calls.get(CALL)
    assert call is not None
    return call


async def publish(redis: Redis, *numbers: str) -> list[str]:
    """Publish an event of one call for each number that it mentions; returns their ids."""
    call = await ingest_call(redis)
    events = [
        NewEvent(
            f"evt_{n}", {"id": f"evt_{n}", "data": {"call": {"id": CALL, "source_id": "main", "n": number}}}, ["sub"]
        )
        for n, number in enumerate(numbers, 1)
    ]
    await store_of(redis).events.publish_call(call, {}, events)
    return [event.id for event in events]


async def ignore_progress(done: Erased) -> None:
    """Ignore the progress."""


async def erase(redis: Redis, number: str = JO) -> Erased:
    eraser = Eraser(store_of(redis), NoAudio())
    return await eraser.number(number, sources=None, books=[], step=ignore_progress)


async def state_of(redis: Redis, eid: str) -> DeliveryState:
    return DeliveryState.read(await redis.hget(keys.event(eid), "sub") or b"")  # type: ignore[misc]


async def heads(lane: Lane) -> Sequence[str]:
    return [claimed_event(claim).id for claim in (await lane.exchange(want=5)).claims]


async def fail_head(lane: Lane) -> None:
    """Claim the event that is due, and retry it in hours."""
    [claim] = (await lane.exchange(want=1)).claims
    eid = claimed_event(claim).id
    await lane.exchange([(claim, Retry(36_000_000, DeliveryUpdate(eid, failed()), PartitionHealth.FAILING))])


def failed() -> DeliveryState:
    return DeliveryState().attempted("waiting", QUOTED, at_ms=1, next_ms=10**13)


@pytest.mark.parametrize(
    "settlement",
    [
        lambda eid: Retry(36_000_000, DeliveryUpdate(eid, failed()), PartitionHealth.UNHEALTHY),
        lambda eid: Done(DeliveryUpdate(eid, DeliveryState("delivered", 1, 5)), PartitionHealth.HEALTHY),
        lambda eid: Done(DeliveryUpdate(eid, DeliveryState("exhausted", 10, 5), dead_letter=True)),
        lambda eid: Intent(DeliveryUpdate(eid, DeliveryState("intent", 1))),
    ],
)
async def test_the_outcome_of_an_attempt_in_flight_is_not_stored(
    redis: Redis, settlement: Callable[[str], Settlement]
) -> None:
    """It may quote what was erased; the delivery has ended, and the next event of the call goes on at once."""
    first, second = await publish(redis, JO, OTHER)
    lane = lane_of(redis)
    [claim] = (await lane.exchange(want=1)).claims
    assert claimed_event(claim).id == first

    done = await erase(redis)
    answer = await lane.exchange([(claim, settlement(first))])

    assert (done.events, done.deliveries) == (1, 1)
    state = await state_of(redis, first)
    assert (state.status, state.log) == ("expired", ())
    assert await redis.zrange(keys.DEAD, 0, -1) == [f"sub\x1f{first}".encode()]
    if isinstance(settlement(first), Intent):
        assert answer.refused
        await lane.exchange([(claim, Retry(detail=DeliveryUpdate(first)))])
    assert await heads(lane) == [second]


@pytest.mark.parametrize("settlement", [Retry(1000), Done()])
async def test_the_lease_of_an_erased_delivery_ends_when_nothing_else_waits(
    redis: Redis, settlement: Settlement
) -> None:
    """Whatever the attempt comes to is refused, and nothing of it is left to claim."""
    await publish(redis, JO)
    lane = lane_of(redis)
    [claim] = (await lane.exchange(want=1)).claims

    await erase(redis)

    assert (await lane.exchange([(claim, settlement)])).refused
    assert await heads(lane) == []


async def test_the_backoff_of_an_erased_event_delays_no_other(redis: Redis) -> None:
    """Its next attempt was hours away; the event behind it does not wait for that."""
    _, second = await publish(redis, JO, OTHER)
    lane = lane_of(redis)
    await fail_head(lane)
    assert await heads(lane) == []

    await erase(redis)

    assert await heads(lane) == [second]


async def test_erasing_a_later_event_shortens_no_backoff(redis: Redis) -> None:
    """The first event keeps its backoff and is delivered after it."""
    first, _ = await publish(redis, OTHER, JO)
    lane = lane_of(redis)
    await fail_head(lane)

    await erase(redis)

    assert await heads(lane) == []
    assert await redis.zrange(keys.pending("sub", CALL), 0, -1) == [first.encode()]


async def test_logged_responses_are_erased_with_the_event(redis: Redis) -> None:
    """The excerpt of a response may repeat the number; how the delivery ended is kept."""
    first, _ = await publish(redis, JO, OTHER)
    lane = lane_of(redis)
    [claim] = (await lane.exchange(want=1)).claims
    exhausted = DeliveryState().attempted("exhausted", QUOTED, at_ms=7)
    await lane.exchange([(claim, Done(DeliveryUpdate(first, exhausted, dead_letter=True), PartitionHealth.FAILING))])

    await erase(redis)

    state = await state_of(redis, first)
    assert (state.status, state.attempts, state.at_ms, state.log) == ("exhausted", 1, 7, ())
    assert await store_of(redis).events.get(first) is None


async def test_erasing_twice_finds_nothing_more(redis: Redis) -> None:
    await publish(redis, JO, OTHER)

    assert (await erase(redis)).counts() | {"scanned": 0} == Erased(events=1, deliveries=1).counts()
    assert (await erase(redis)).counts() | {"scanned": 0} == Erased().counts()


async def test_an_erased_event_cannot_be_replayed(redis: Redis) -> None:
    """The attempt does not prolong the life of what is left of it either."""
    first, _ = await publish(redis, JO, OTHER)
    await erase(redis)
    await redis.expire(keys.event(first), 5)

    assert await store_of(redis).deliveries.replay(first, CALL, ["sub"], at_ms=1, force=True) == [ReplayOutcome.GONE]
    assert await redis.zscore(keys.pending("sub", CALL), first) is None
    assert await redis.ttl(keys.event(first)) <= 5


class ChangingAudio:
    """A storage; `on_delete` runs once, while the first recording is being deleted."""

    def __init__(self, on_delete: Callable[[], Awaitable[None]]) -> None:
        self.deleted: list[str] = []
        self._on_delete = on_delete

    async def size(self, path: str) -> int | None:
        return None

    async def delete(self, path: str) -> None:
        self.deleted.append(path)
        if len(self.deleted) == 1:
            await self._on_delete()


async def test_what_is_published_while_a_call_is_being_erased_is_erased_with_it(redis: Redis) -> None:
    """An event that does not mention the number itself; its audio, work and dues go too."""
    store = store_of(redis)
    record = Record(
        key="7",
        started_at=from_iso("2025-07-01T12:00:00Z"),
        local_date="2025-07-01",
        external=Party(number=JO, raw=JO),
        audio=True,
    )
    await store.calls.ingest("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")

    async def publish_event() -> None:
        call = await store.calls.get(CALL)
        assert call is not None
        late = NewEvent("evt_late", {"id": "evt_late", "data": {"call": {"id": CALL, "source_id": "main"}}}, ["sub"])
        await store.events.publish_call(call, {}, [late])

    call = await store.calls.get(CALL)
    assert call is not None
    await store.events.publish_call(call, {"recording": {"status": "available", "path": "audio.wav"}}, [])
    audio = ChangingAudio(publish_event)

    done = await Eraser(store, audio).number(JO, sources=None, books=[], step=ignore_progress)

    assert (done.calls, done.events, done.deliveries) == (1, 1, 1)
    assert set(audio.deleted) == {"audio.wav"}
    assert await store.events.get("evt_late") is None
    assert await redis.keys("relay:call:*") == []
    assert await redis.keys("relay:owed:*") == []
    for lane in (LaneName.ENRICH, LaneName.RECORD):
        assert not await redis.exists(queue_keys.waiting(lane, "main"))


async def test_a_removed_source_loses_also_calls_that_its_list_no_longer_has(redis: Redis) -> None:
    """The list is trimmed by when a call was first seen; one that changed since then is kept longer."""
    await publish(redis, OTHER)
    await redis.zrem(keys.calls_of("main"), CALL)

    done = await Eraser(store_of(redis), NoAudio()).source("main", step=ignore_progress)

    assert (done.calls, done.events) == (1, 1)
    assert await redis.keys("relay:call:*") == []
