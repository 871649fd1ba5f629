"""Events are published in one step or not at all, in order, to enabled subscriptions; against a real Valkey."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Outcome, Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.events.payload import NO_CONTACT, NO_RECORDING
from relay.events.publisher import Publisher
from relay.queue import keys as queue_keys
from relay.queue.changes import DisablePartition, EnablePartition
from relay.queue.settlement import Done, Retry
from relay.store import keys
from relay.store.calls import Row, StoredCall
from relay.store.codes import ReplayOutcome
from relay.store.deliveries import DeliveryState, Status, claimed_event
from relay.store.documents import unpack
from relay.store.events import EventStore, NewEvent
from relay.store.lanes import DeliveryUpdate, LaneName, open_lane
from relay.store.store import Store
from tests.store import open_store

NOON = datetime(2025, 7, 1, 12, tzinfo=UTC)
CALL_TTL_S, EVENT_TTL_S = 3000, 1000
CALL = ids.call_id("main", "7")
RULES = SourceRules("webfones", "UTC", False, False, 0, 0)
UNKNOWN: Json = {"lookup_status": "unavailable"}
NAMED: Json = {"lookup_status": "matched", "name": "Jo"}
MATCHED: Json = NAMED | {"number": "+12125550100"}


def store_of(redis: Redis) -> Store:
    return open_store(redis, calls_ttl_s=CALL_TTL_S, events_ttl_s=EVENT_TTL_S)


async def bring(redis: Redis, **fields: Any) -> StoredCall:
    """Admit the call, or a change of it, and read it."""
    record = Record(key="7", started_at=NOON, local_date="2025-07-01", **fields)
    store = store_of(redis)
    await store.calls.ingest("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")
    call = await store.calls.get(CALL)
    assert call is not None
    return call


def state_of(call: StoredCall, contact: Json = UNKNOWN) -> Json:
    """What has been published of a call as it is now."""
    return {"content": {**call.record, "contact": contact}, "revision": 1, "audio": None, "transcript": False}


def event(eid: str, *subscriptions: str, **data: Any) -> NewEvent:
    return NewEvent(eid, {"id": eid, **data}, subscriptions)


async def pending(redis: Redis, sub: str, subject: str = CALL) -> list[tuple[str, int]]:
    entries = await redis.zrange(keys.pending(sub, subject), 0, -1, withscores=True)
    return [(eid.decode(), int(sequence)) for eid, sequence in entries]


async def delivery(redis: Redis, eid: str, sub: str) -> bytes | None:
    state: bytes | None = await redis.hget(keys.event(eid), sub)  # type: ignore[misc]  # both clients
    return state


async def deliver_one(redis: Redis, status: Status = "delivered") -> str:
    """Claim the one delivery that is due and settle it; gives its event."""
    lane = open_lane(redis, LaneName.DELIVER, events_ttl_s=EVENT_TTL_S)
    [claim] = (await lane.exchange(want=1)).claims
    eid = claimed_event(claim).id
    await lane.exchange([(claim, Done(DeliveryUpdate(eid, DeliveryState(status))))])
    return eid


async def dump(redis: Redis) -> dict[bytes, Any]:
    return {name: await redis.dump(name) for name in sorted(await redis.keys("*"))}


class FixedAudience:
    """An audience of these subscriptions for everything."""

    def __init__(self, *subscriptions: str) -> None:
        self._subscriptions = subscriptions

    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
        return self._subscriptions


def publisher_of(store: Store, *subscriptions: str, woken: list[str] | None = None) -> Publisher:
    return Publisher(
        store,
        FixedAudience(*(subscriptions or ("sub",))),
        now_ms=lambda: int(NOON.timestamp() * 1000),
        on_deliveries=lambda: woken.append("deliver") if woken is not None else None,
    )


# One step


async def test_an_event_is_published_to_all_matching_subscriptions_in_one_step(redis: Redis) -> None:
    """The document, the published state, a delivery each; nothing is stored for a delivery before its first attempt."""
    call = await bring(redis)

    deliveries = await store_of(redis).events.publish_call(
        call, {"published": state_of(call)}, [event("evt_1", "a", "b")]
    )

    assert deliveries == 2
    assert await store_of(redis).events.get("evt_1") == {"id": "evt_1"}
    for sub in ("a", "b"):
        assert await pending(redis, sub) == [("evt_1", 1)]
        assert await delivery(redis, "evt_1", sub) == b""
        assert await redis.zrange(queue_keys.waiting("deliver", sub), 0, -1) == [CALL.encode()]
    after = await store_of(redis).calls.get(CALL)
    assert after is not None
    assert (after.version, after.published) == (call.version + 1, state_of(call))
    assert await redis.zrange(keys.EVENTS, 0, -1) == [b"evt_1"]
    assert await redis.hget(keys.COUNTS, "events") == b"1"  # type: ignore[misc]  # both clients


async def test_an_event_that_matches_no_subscription_is_stored(redis: Redis) -> None:
    """A subscription that is created tomorrow can have it replayed."""
    call = await bring(redis)

    assert await store_of(redis).events.publish_call(call, {}, [event("evt_1")]) == 0
    assert await store_of(redis).events.get("evt_1") == {"id": "evt_1"}
    assert await redis.keys("relay:pending*") == await redis.keys("relay:lane:deliver*") == []


async def test_what_was_published_is_retained_as_configured(redis: Redis) -> None:
    """An event as long as its retention, a call longer, a delivery as long as its event."""
    call = await bring(redis)
    await redis.expire(keys.call(CALL), 5)

    await store_of(redis).events.publish_call(call, {}, [event("evt_1", "sub")])

    for name, ttl_s in ((keys.call(CALL), CALL_TTL_S), (keys.event("evt_1"), EVENT_TTL_S)):
        assert ttl_s - 60 < await redis.ttl(name) - keys.FALLBACK_TTL_S <= ttl_s


async def test_a_part_can_be_written_and_removed(redis: Redis) -> None:
    """None removes; what is not named stays."""
    call = await bring(redis)
    store = store_of(redis)
    await store.events.publish_call(call, {"contact": {"n": 1}, "lookup": {"tries": 1}}, ())
    current = await store.calls.get(CALL)
    assert current is not None
    await store.events.publish_call(current, {"lookup": None}, ())

    after = await store.calls.get(CALL)
    assert after is not None
    assert (after.contact, after.lookup) == ({"n": 1}, None)


async def test_an_event_without_a_call_has_an_ordering_key_of_its_own(redis: Redis) -> None:
    """`source.error` and the like: no call is read or created."""
    deliveries = await store_of(redis).events.publish(event("evt_1", "sub"))

    assert deliveries == 1
    assert await pending(redis, "sub", "evt_1") == [("evt_1", 0)]
    assert await redis.keys("relay:call*") == []


# The version fence


async def test_a_call_that_changed_since_it_was_read_is_not_published(redis: Redis) -> None:
    """Not a byte is written: not the event, not the parts, not the delivery."""
    stale = await bring(redis)
    await bring(redis, status_raw="changed")
    before = await dump(redis)

    assert (
        await store_of(redis).events.publish_call(stale, {"published": state_of(stale)}, [event("evt_1", "sub")])
        is None
    )
    assert await dump(redis) == before


async def test_one_of_two_holders_publishes_a_difference(redis: Redis) -> None:
    """A lease ended and its holder did not notice: both read the same call, one publishes."""
    call = await bring(redis)

    events = store_of(redis).events

    answers = [
        await events.publish_call(call, {"published": state_of(call)}, [event("evt_1", "sub")]) for _ in range(2)
    ]

    assert answers == [1, None]
    assert await pending(redis, "sub") == [("evt_1", 1)]


async def test_a_call_that_was_erased_is_not_brought_back(redis: Redis) -> None:
    """A person's number is gone for good: what was about to be published about it is not."""
    call = await bring(redis)
    await redis.delete(keys.call(CALL))

    assert (
        await store_of(redis).events.publish_call(call, {"published": state_of(call)}, [event("evt_1", "sub")]) is None
    )
    assert await redis.exists(keys.call(CALL), keys.event("evt_1")) == 0


# The published state leaves out what it repeats of the call


@pytest.mark.parametrize(
    ("contact", "published"),
    [(None, UNKNOWN), (MATCHED, NAMED), (MATCHED, UNKNOWN)],
)
async def test_the_published_state_is_not_stored_twice_and_is_read_whole(
    redis: Redis, contact: Json | None, published: Json
) -> None:
    """With whatever contact there was then; most calls are published as they are."""
    call = await bring(redis)
    store = store_of(redis)

    await store.events.publish_call(call, {"contact": contact, "published": state_of(call, published)}, ())

    after = await store.calls.get(CALL)
    assert after is not None
    assert after.published == state_of(call, published)
    stored = unpack(await redis.hget(keys.call(CALL), "published") or b"")  # type: ignore[misc]  # both clients
    assert "content" not in stored
    assert ("contact" in stored) == (published != NAMED)


async def test_the_published_state_is_unaffected_by_later_changes(redis: Redis) -> None:
    """A difference is one to what was published last, not to the row before: nothing in between is lost."""
    store = store_of(redis)
    call = await bring(redis)
    await store.events.publish_call(call, {"contact": MATCHED, "published": state_of(call, NAMED)}, ())
    await bring(redis, status_raw="second")
    third = await bring(redis, status_raw="third")
    assert (third.record["status_raw"], third.published) == ("third", state_of(call, NAMED))

    await store.events.publish_call(third, {"contact": MATCHED | {"name": "Joe"}}, ())
    renamed = await store.calls.get(CALL)
    assert renamed is not None
    assert ((renamed.contact or {})["name"], renamed.published) == ("Joe", state_of(call, NAMED))

    await store.events.publish_call(renamed, {"published": state_of(renamed, NAMED | {"name": "Joe"})}, ())
    after = await store.calls.get(CALL)
    assert after is not None
    assert after.published == state_of(third, NAMED | {"name": "Joe"})
    assert await redis.hexists(keys.call(CALL), "published_record") is False  # type: ignore[misc]  # both clients


# Again


async def test_an_event_that_exists_keeps_its_body_and_is_not_delivered_again(redis: Redis) -> None:
    """The call was lost and seen again: delivered and waiting subscriptions receive it once, a new one too."""
    call = await bring(redis)
    store = store_of(redis)
    await store.events.publish_call(call, {}, [event("evt_1", "delivered", "waits", body="first")])
    await redis.hset(keys.event("evt_1"), "delivered", '{"s":"delivered"}')  # type: ignore[misc]  # both clients
    await redis.delete(keys.call(CALL), keys.pending("delivered", CALL), *await redis.keys("relay:seen*"))
    call = await bring(redis, status_raw="seen again")

    deliveries = await store.events.publish_call(call, {}, [event("evt_1", "delivered", "waits", "new", body="second")])

    assert deliveries == 1
    assert (await store.events.get("evt_1") or {})["body"] == "first"
    assert await pending(redis, "delivered") == []
    assert await pending(redis, "waits") == [("evt_1", 1)]
    assert await pending(redis, "new") == [("evt_1", 1)]


async def test_what_is_new_comes_after_what_exists_already(redis: Redis) -> None:
    """The call was lost with its count: an event that is created now must not overtake the earlier ones."""
    store = store_of(redis)
    call = await bring(redis)
    await store.events.publish_call(call, {}, [event("evt_1", "sub"), event("evt_2", "sub")])
    await redis.delete(keys.call(CALL), *await redis.keys("relay:seen*"))

    call = await bring(redis, status_raw="seen again")
    await store.events.publish_call(call, {}, [event("evt_1", "sub"), event("evt_2", "sub"), event("evt_3", "sub")])

    assert await pending(redis, "sub") == [("evt_1", 1), ("evt_2", 2), ("evt_3", 3)]


# Switched off


async def test_nothing_is_queued_for_a_disabled_subscription(redis: Redis) -> None:
    """That it is missing is recorded, so that it can be replayed; the others receive it."""
    call = await bring(redis)
    lane = open_lane(redis, LaneName.DELIVER)
    await lane.apply(DisablePartition("off", "410"))

    assert await store_of(redis).events.publish_call(call, {}, [event("evt_1", "off", "on")]) == 1

    assert DeliveryState.read(await delivery(redis, "evt_1", "off") or b"").status == "missing"
    assert await pending(redis, "off") == []
    assert await pending(redis, "on") == [("evt_1", 1)]
    await lane.apply(EnablePartition("off"))
    call = await bring(redis, status_raw="x")
    assert await store_of(redis).events.publish_call(call, {}, [event("evt_2", "off")]) == 1


@pytest.mark.parametrize("removed_by", ["the API", "the configuration"])
async def test_an_event_is_not_kept_for_a_subscription_that_is_gone(redis: Redis, removed_by: str) -> None:
    """A process that has not read of the removal yet still matches it; nothing is queued, nor recorded as missing."""
    call = await bring(redis)
    if removed_by == "the API":
        await open_lane(redis, LaneName.DELIVER).apply(DisablePartition("gone", "deleted"))
    else:
        await redis.hset(keys.removed("subscription"), "gone", "1")  # type: ignore[misc]  # typed for both clients

    assert await store_of(redis).events.publish_call(call, {}, [event("evt_1", "gone", "on")]) == 1

    assert await delivery(redis, "evt_1", "gone") is None
    assert await pending(redis, "gone") == []
    assert await redis.zcard(keys.deliveries_of("gone")) == 0


# Order


async def test_the_events_of_a_call_are_numbered_in_the_order_they_were_published(redis: Redis) -> None:
    """Over several publishes, whichever subscriptions receive them."""
    store = store_of(redis)
    call = await bring(redis)
    await store.events.publish_call(call, {}, [event("evt_z", "a", "b"), event("evt_m", "a")])
    call = await bring(redis, status_raw="x")
    await store.events.publish_call(call, {}, [event("evt_a", "a", "b")])

    assert await pending(redis, "a") == [("evt_z", 1), ("evt_m", 2), ("evt_a", 3)]
    assert await pending(redis, "b") == [("evt_z", 1), ("evt_a", 3)]
    assert [await deliver_one(redis) for _ in range(5)].count("evt_z") == 2


async def test_a_stuck_call_holds_up_no_other_call(redis: Redis) -> None:
    """Each call is an ordering key of its own in the lane."""
    store = store_of(redis)
    lane = open_lane(redis, LaneName.DELIVER, events_ttl_s=EVENT_TTL_S)
    call = await bring(redis)
    await store.events.publish_call(call, {}, [event("evt_stuck", "sub")])
    [claim] = (await lane.exchange(want=1)).claims
    retry = (claim, Retry(10**6, DeliveryUpdate("evt_stuck", DeliveryState("waiting"))))
    await lane.exchange([retry])
    await store.events.publish(event("evt_other", "sub"), ordering_key="other")

    assert await deliver_one(redis) == "evt_other"


async def test_a_replayed_event_goes_back_to_its_place(redis: Redis) -> None:
    """The first has failed, the second waits: the first is sent before it."""
    store = store_of(redis)
    call = await bring(redis)
    await store.events.publish_call(call, {}, [event("evt_1", "sub"), event("evt_2", "sub")])
    assert await deliver_one(redis, "exhausted") == "evt_1"

    await redis.expire(keys.event("evt_1"), 5)
    assert await store.deliveries.replay("evt_1", CALL, ["sub"], at_ms=1, force=False) == [ReplayOutcome.QUEUED]
    assert await redis.ttl(keys.event("evt_1")) > EVENT_TTL_S - 60
    assert await store.deliveries.replay("evt_1", CALL, ["sub"], at_ms=1, force=False) == [ReplayOutcome.WAITING]

    assert [await deliver_one(redis), await deliver_one(redis)] == ["evt_1", "evt_2"]
    assert await store.deliveries.replay("evt_1", CALL, ["sub"], at_ms=1, force=False) == [ReplayOutcome.DELIVERED]


@pytest.mark.parametrize(("backing_off", "replayed", "due"), [(1, 2, []), (2, 1, ["evt_1"])])
async def test_a_replay_leaves_the_backoff_of_an_earlier_event_and_not_that_of_a_later_one(
    redis: Redis, backing_off: int, replayed: int, due: list[str]
) -> None:
    """Events go out in order: one behind the event that backs off waits for it, one before it is due now."""
    store = store_of(redis)
    call = await bring(redis)
    await store.events.publish_call(call, {}, [event("evt_1", "sub"), event("evt_2", "sub")])
    for _ in range(2):
        await deliver_one(redis)
    lane = open_lane(redis, LaneName.DELIVER, events_ttl_s=EVENT_TTL_S)
    await store.deliveries.replay(f"evt_{backing_off}", CALL, ["sub"], at_ms=1, force=True)
    [claim] = (await lane.exchange(want=1)).claims
    await lane.exchange([(claim, Retry(60_000, DeliveryUpdate(f"evt_{backing_off}", DeliveryState("waiting"))))])

    await store.deliveries.replay(f"evt_{replayed}", CALL, ["sub"], at_ms=1, force=True)

    assert [claimed_event(claim).id for claim in (await lane.exchange(want=1)).claims] == due


async def test_a_replay_to_a_disabled_subscription_queues_nothing_and_says_so(redis: Redis) -> None:
    """What failed is still a dead letter afterwards."""
    store = store_of(redis)
    await store.events.publish_call(await bring(redis), {}, [event("evt_1", "sub")])
    await deliver_one(redis, "exhausted")
    await open_lane(redis, LaneName.DELIVER).apply(DisablePartition("sub", "by hand"))

    assert await store.deliveries.replay("evt_1", CALL, ["sub"], at_ms=1, force=True) == [ReplayOutcome.DISABLED]

    assert await pending(redis, "sub") == []
    assert DeliveryState.read(await delivery(redis, "evt_1", "sub") or b"").status == "exhausted"


async def test_a_replayed_event_is_a_dead_letter_no_more(redis: Redis) -> None:
    store = store_of(redis)
    await store.events.publish_call(await bring(redis), {}, [event("evt_1", "sub")])
    await deliver_one(redis, "exhausted")
    await redis.zadd(keys.DEAD, {"sub\x1fevt_1": 1})

    await store.deliveries.replay("evt_1", CALL, ["sub"], at_ms=1, force=False)

    assert await redis.zcard(keys.DEAD) == 0


# Publisher over it


async def test_a_call_that_changes_while_it_is_published_is_read_again(redis: Redis) -> None:
    """The change arrives between reading and publishing: one `call.completed`, with the change in it."""
    store = store_of(redis)
    stale = await bring(redis, outcome=Outcome.NO_ANSWER)
    await bring(redis, outcome=Outcome.BUSY)
    woken: list[str] = []

    assert await publisher_of(store, woken=woken).publish(stale, RULES, {}) is None

    [(eid, _)] = await pending(redis, "sub")
    assert eid == ids.event_id("main", "7", "call.completed")
    assert (await store.events.get(eid) or {})["data"]["call"]["outcome"] == "busy"
    assert woken == ["deliver"]


async def test_publishing_a_call_twice_publishes_it_once(redis: Redis) -> None:
    """The worker was killed between publishing and settling: for the next one nothing is due and nothing is written."""
    store = store_of(redis)
    call = await bring(redis)
    woken: list[str] = []
    await publisher_of(store).publish(call, RULES, {})
    current = await store.calls.get(CALL)
    assert current is not None
    before = await dump(redis)

    assert await publisher_of(store, woken=woken).publish(current, RULES, {}) is None
    assert await dump(redis) == before
    assert woken == []


async def test_parts_are_written_while_a_call_is_held(redis: Redis) -> None:
    """What was found out is stored, though nothing is published yet; the wait is what is left of the hold."""
    store = store_of(redis)
    call = await bring(redis, outcome=Outcome.ANSWERED)
    held = replace(RULES, contacts=True, recordings=True, hold_for_contact_ms=5000, hold_for_recording_ms=30_000)
    publisher = Publisher(store, FixedAudience("sub"), now_ms=lambda: call.ready_ms + 1000, on_deliveries=lambda: None)

    wait_ms = await publisher.publish(call, held, {"contact": NO_CONTACT | {"lookup_status": "none"}})

    assert wait_ms == 29_000
    stored = await store.calls.get(CALL)
    assert stored is not None
    assert stored.contact == NO_CONTACT | {"lookup_status": "none"}
    assert (stored.published, await redis.keys("relay:event:*")) == (None, [])


async def test_parts_for_a_call_that_changed_go_to_the_call_as_it_is_now(redis: Redis) -> None:
    """The contact was looked up while the recording arrived: neither is lost."""
    store = store_of(redis)
    stale = await bring(redis, outcome=Outcome.ANSWERED)
    await store.events.publish_call(stale, {"recording": NO_RECORDING | {"status": "available"}}, ())

    await publisher_of(store).publish(stale, replace(RULES, recordings=True), {"contact": NO_CONTACT | {"count": 3}})

    assert len(await pending(redis, "sub")) == 2
    stored = await store.calls.get(CALL)
    assert stored is not None
    assert stored.contact is not None
    assert stored.recording is not None
    assert (stored.contact["count"], stored.recording["status"]) == (3, "available")


async def test_a_call_that_was_erased_meanwhile_is_dropped(redis: Redis) -> None:
    """Nothing to publish, nothing to wait for."""
    store = store_of(redis)
    call = await bring(redis)
    await redis.delete(keys.call(CALL))

    assert await publisher_of(store).publish(call, RULES, {"contact": NO_CONTACT}) is None
    assert await redis.keys("relay:event:*") == []


async def test_a_call_that_keeps_changing_is_retried_later(redis: Redis) -> None:
    """Another writer wins every time: the worker does not spin, and comes back."""
    call = await bring(redis)

    class Restless(EventStore):
        async def publish_call(self, *args: Any) -> int | None:
            await bring(redis, status_raw=str(next(changes)))
            return await super().publish_call(*args)

    changes = iter(range(100))
    store = store_of(redis)
    store.events = Restless(redis, ttl_s=EVENT_TTL_S, calls_ttl_s=CALL_TTL_S)

    assert await publisher_of(store).publish(call, RULES, {}) == 1000
    assert next(changes) < 20
    assert await redis.keys("relay:event:*") == []
