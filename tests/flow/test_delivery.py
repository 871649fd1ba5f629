"""Delivery to subscribers that misbehave: promises 3, 4 and 5."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from relay.delivery.attempt import Attempts
from relay.delivery.replay import ReplayProgress, replay_since
from relay.delivery.subscriptions import Subscription
from relay.domain import ids
from relay.domain.call import Outcome
from relay.domain.time import iso
from relay.queue import keys as queue_keys
from relay.queue.changes import EnablePartition
from relay.store import keys
from relay.store.codes import ReplayOutcome
from relay.store.deliveries import ClaimedEvent
from relay.store.events import NewEvent
from relay.store.lanes import LaneName
from relay.store.subscriptions import SubscriptionHealth
from relay.tasks import cancel
from tests.fakes.subscriber import ReplyKind, ScriptedReply
from tests.flow.harness import RelayHarness, eventually, relay_harness

Start = Callable[..., AbstractAsyncContextManager[RelayHarness]]


@pytest.fixture
def start(redis: Redis, valkey_url: str, tmp_path: Path) -> Start:
    def run(
        subscriptions: dict[str, dict[str, Any]] | None = None, **top: Any
    ) -> AbstractAsyncContextManager[RelayHarness]:
        return relay_harness(redis, valkey_url, tmp_path, subscriptions, **top)

    return run


async def health_of(relay: RelayHarness) -> SubscriptionHealth:
    return await relay.runtime.store.subscriptions.health("a")


async def test_an_event_is_delivered_once_signed_and_with_its_id(start: Start) -> None:
    """A call is ingested, a verified event is delivered."""
    async with start() as relay:
        await relay.call("1")
        await relay.until_delivered("a", 1)

        state = await relay.until_state(relay.event_of("1"), "delivered")
        assert state.attempts == 1
        assert relay.report().problems() == ()
        assert relay.report().events == 1


async def test_a_failed_attempt_is_retried_and_logged_with_its_reason(start: Start) -> None:
    """A 500 is retried after the first wait; the log of attempts has both."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=500, times=1))
        cid = await relay.call("1")
        state = await relay.until_attempts(relay.event_of("1"), 1)
        waits_ms = state.next_ms - state.at_ms

        await relay.due_now("a", cid)
        state = await relay.until_state(relay.event_of("1"), "delivered")

        assert 5000 <= waits_ms <= 6000
        assert [each["outcome"] for each in state.log] == ["rejected", "delivered"]
        assert state.log[0]["words"] == "answered 500"
        assert relay.report().duplicates == {}


async def test_events_of_one_call_keep_their_order_and_others_go_on(start: Start) -> None:
    """While the first event of a call waits for its retry, its update waits behind it; another call is delivered."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=500, times=1))
        cid = await relay.call("1")
        await relay.until_attempts(relay.event_of("1"), 1)
        await relay.call("1", outcome=Outcome.ANSWERED)
        await relay.call("2")
        await relay.until_delivered("a", 1)
        delivered_meanwhile = relay.report().completed

        await relay.due_now("a", cid)
        await relay.until_delivered("a", 3)

        assert set(delivered_meanwhile) == {"2"}
        assert relay.report().problems() == ()
        assert relay.report().types == {"call.completed": 2, "call.updated": 1}


async def test_410_disables_the_subscription_and_loses_nothing(start: Start) -> None:
    """Nothing more is posted, what was queued stays, and later events are marked as missing."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=410, times=1))
        await relay.call("1")
        await eventually(lambda: health_of(relay), lambda health: bool(health.disabled_reason))
        health = await health_of(relay)
        await relay.call("2")
        await relay.until_state(relay.event_of("2"), "missing")
        assert relay.report().received == 1
        assert "410" in health.disabled_reason

        await relay.runtime.lanes[LaneName.DELIVER].apply(EnablePartition("a"))
        relay.runtime.wake_ups(LaneName.DELIVER)
        await relay.until_delivered("a", 1)
        outcomes = await relay.runtime.store.deliveries.replay(
            relay.event_of("2"), ids.call_id("main", "2"), ["a"], at_ms=1, force=False
        )
        await relay.until_delivered("a", 2)

        assert outcomes == [ReplayOutcome.QUEUED]
        assert set(relay.report().completed) == {"1", "2"}


async def test_a_replayed_event_takes_its_old_place_in_the_order_of_its_call(start: Start) -> None:
    """`call.completed` has failed and `call.updated` waits: the replayed one goes first."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=500))
        cid = await relay.call("1")
        first = relay.event_of("1")
        await relay.until_attempts(first, 1)
        # Its schedule ends: 100 hours pass for this event only.
        await relay.redis.hset(keys.event(first), "a", '{"s":"waiting","n":20}')  # type: ignore[misc]
        await relay.due_now("a", cid)
        await relay.until_state(first, "exhausted")
        dead = await relay.redis.zrange(keys.DEAD, 0, -1)
        await relay.call("1", outcome=Outcome.ANSWERED)
        update_pending = keys.pending("a", cid)
        await eventually(lambda: relay.redis.zcard(update_pending), bool)

        relay.subscriber.script("a")
        outcomes = await relay.runtime.store.deliveries.replay(
            first, cid, ["a"], at_ms=relay.runtime.lanes[LaneName.DELIVER].store_now_ms, force=False
        )
        relay.runtime.wake_ups(LaneName.DELIVER)
        await relay.until_delivered("a", 1)
        await relay.due_now("a", cid)
        await relay.until_delivered("a", 2)

        assert dead == [f"a\x1f{first}".encode()]
        assert outcomes == [ReplayOutcome.QUEUED]
        assert relay.report().order_violations == ()
        assert await relay.redis.zcard(keys.DEAD) == 0


async def test_replay_repeats_nothing_that_was_delivered_unless_forced(start: Start) -> None:
    """A delivered event is left alone; `force` sends it again under the same id."""
    async with start() as relay:
        cid = await relay.call("1")
        await relay.until_state(relay.event_of("1"), "delivered")

        left_alone = await relay.runtime.store.deliveries.replay(relay.event_of("1"), cid, ["a"], at_ms=1, force=False)
        forced = await relay.runtime.store.deliveries.replay(relay.event_of("1"), cid, ["a"], at_ms=1, force=True)
        relay.runtime.wake_ups(LaneName.DELIVER)
        await relay.until_delivered("a", 2)

        assert (left_alone, forced) == ([ReplayOutcome.DELIVERED], [ReplayOutcome.QUEUED])
        assert sum(relay.report().duplicates.values()) >= 1


async def replayed(relay: RelayHarness) -> ReplayProgress:
    """Replay everything to `a`, whether it was delivered or not."""
    progress = ReplayProgress(0)

    async def step(_: ReplayProgress) -> None:
        """Go on."""

    await replay_since(
        relay.runtime.store,
        relay.runtime.subscriptions["a"],
        progress=progress,
        until_ms=await relay.runtime.store.now_ms(),
        status="any",
        force=True,
        owner_of=lambda _: None,
        step=step,
    )
    return progress


async def test_a_replay_of_everything_follows_the_filters(start: Start) -> None:
    """What the subscription does not select now is not queued for it."""
    async with start({"a": {"outcome": ["no_answer"]}}) as relay:
        await relay.call("1", outcome=Outcome.NO_ANSWER)
        await relay.call("2", outcome=Outcome.BUSY)
        await relay.until_delivered("a", 1)
        await eventually(lambda: relay.redis.zcard(keys.EVENTS), lambda count: count == 2)

        assert (await replayed(relay)).queued == 1


async def test_a_replay_leaves_out_none_of_hundreds_of_events_of_one_millisecond(start: Start) -> None:
    """A poll that brings much publishes much at once, more than one batch of the replay."""
    async with start() as relay:
        for number in range(450):
            document = {"id": f"evt_{number}", "type": "source.error", "data": {}}
            await relay.runtime.store.events.publish(NewEvent(f"evt_{number}", document, []))
        await relay.redis.zadd(keys.EVENTS, {f"evt_{number}": 1000 for number in range(450)})

        assert (await replayed(relay)).looked_at == 450


async def test_an_open_circuit_spends_no_attempts_and_one_probe_closes_it(start: Start) -> None:
    """After five failures in a row nothing is sent; then one call is tried, and its success releases the others."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=500))
        for key in range(8):
            await relay.call(str(key))
        await eventually(lambda: health_of(relay), lambda health: health.circuit_open)
        received = relay.report().received
        relay.subscriber.script("a")
        await relay.call("late")
        index = await relay.redis.zscore(queue_keys.group("deliver", "unproven:"), "a")
        now_ms = relay.runtime.lanes[LaneName.DELIVER].store_now_ms

        assert index is not None
        assert index > now_ms + 20_000
        await relay.end_pause("a")
        await relay.until_delivered("a", 1)
        await eventually(lambda: health_of(relay), lambda health: not health.circuit_open)
        await relay.until_state(relay.event_of("late"), "delivered")
        assert received <= 8 + 5
        assert (await health_of(relay)).failing_since_ms == 0


async def test_a_hung_subscriber_delays_no_other(start: Start) -> None:
    """One endpoint accepts connections and never answers; the other gets its calls at once."""
    async with start({"hung": {}, "well": {}}, timeout_s=3) as relay:
        relay.subscriber.script("hung", ScriptedReply(kind=ReplyKind.HANG))
        for key in range(30):
            await relay.call(str(key))
        await relay.until_delivered("well", 30, timeout_s=2.5)

        assert relay.report("well").problems() == ()
        assert relay.report("hung").accepted == 0


async def test_at_most_once_is_not_repeated_after_a_timeout(start: Start) -> None:
    """The subscriber acted and did not answer: the outcome is unknown, and the event is not sent again."""
    async with start({"a": {"delivery": "at_most_once"}}, timeout_s=1) as relay:
        relay.subscriber.script("a", ScriptedReply(kind=ReplyKind.ACT_THEN_HANG, times=1))
        await relay.call("1")
        state = await relay.until_state(relay.event_of("1"), "unknown")
        await relay.call("2")
        await relay.until_state(relay.event_of("2"), "delivered")

        assert state.log[-1]["outcome"] == "timed_out"
        assert relay.report().duplicates == {}
        assert relay.report().received == 2


async def test_at_most_once_writes_its_intent_before_anything_is_sent(start: Start) -> None:
    """While the subscriber works on the request, the store knows that it may have it."""
    async with start({"a": {"delivery": "at_most_once"}}) as relay:
        relay.subscriber.script("a", ScriptedReply(delay_s=1))
        await relay.call("1")

        state = await relay.until_state(relay.event_of("1"), "intent", "delivered")

        assert state.status == "intent"
        await relay.until_state(relay.event_of("1"), "delivered")


async def test_at_most_once_finds_the_intent_of_a_worker_that_died(start: Start) -> None:
    """A claim that finds an intent cannot know its outcome: the delivery ends as unknown, unsent."""
    async with start({"a": {"delivery": "at_most_once", "enabled": False}}) as relay:
        await relay.call("1")
        eid = relay.event_of("1")
        await relay.until_state(eid, "missing")
        await relay.runtime.lanes[LaneName.DELIVER].apply(EnablePartition("a"))
        cid = ids.call_id("main", "1")
        await relay.runtime.store.deliveries.replay(eid, cid, ["a"], at_ms=1, force=False)
        await relay.redis.hset(keys.event(eid), "a", '{"s":"intent","n":1}')  # type: ignore[misc]
        relay.runtime.wake_ups(LaneName.DELIVER)
        await relay.until_state(eid, "unknown")

        assert relay.report().received == 0


async def test_at_most_once_survives_an_error_before_anything_is_sent(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the body fails on a store error: nothing was sent, so nothing is unknown."""
    body_for, troubles = Attempts.body_for, [RedisConnectionError("gone for a moment")]

    async def troubled(self: Attempts, subscription: Subscription, event: ClaimedEvent) -> bytes:
        if troubles:
            raise troubles.pop()
        return await body_for(self, subscription, event)

    monkeypatch.setattr(Attempts, "body_for", troubled)
    async with start({"a": {"delivery": "at_most_once", "include_raw": True}}) as relay:
        await relay.call("1")
        await relay.until_state(relay.event_of("1"), "delivered")

        assert relay.report().accepted == 1


async def test_an_expired_event_of_an_unknown_subscription_leaves_the_lane(start: Start) -> None:
    """A subscription that was removed from the configuration keeps its items no longer than their events live."""
    async with start({"a": {}}) as relay:
        event = NewEvent("evt_1", {"id": "evt_1", "data": {}}, ["gone"])
        await relay.runtime.store.events.publish(event)
        await relay.redis.delete(keys.event("evt_1"))
        relay.runtime.wake_ups(LaneName.DELIVER)

        await eventually(lambda: relay.redis.exists(keys.pending("gone", "evt_1")), lambda there: not there)
        assert await relay.redis.zcard(queue_keys.waiting("deliver", "gone")) == 0


async def test_at_most_once_retries_a_refused_connection(start: Start, free_port: int) -> None:
    """Nothing was sent, so nothing can have been processed: the schedule goes on."""
    url = {"delivery": "at_most_once", "url": f"http://127.0.0.1:{free_port}/"}
    async with start({"a": url}) as relay:
        await relay.call("1")
        state = await eventually(lambda: relay.state(relay.event_of("1")), lambda state: bool(state.log))

        assert state.status == "waiting"
        assert state.log[0]["outcome"] == "unreachable"


async def publish_of_age(relay: RelayHarness, hours: float) -> None:
    """Publish an event to `a` whose schedule began so long ago."""
    timestamp = iso(datetime.now(UTC) - timedelta(hours=hours))
    document = {"id": "evt_1", "type": "source.error", "timestamp": timestamp, "data": {}}
    await relay.runtime.store.events.publish(NewEvent("evt_1", document, ["a"]))
    relay.runtime.wake_ups(LaneName.DELIVER)


@pytest.mark.parametrize(("open_h", "status"), [(0, "exhausted"), (3, "exhausted"), (10, "waiting")])
async def test_time_with_an_open_circuit_is_given_back_to_an_event(start: Start, open_h: int, status: str) -> None:
    """Its schedule of 100 hours ended five hours ago, unless the endpoint was down for longer than that."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=500))
        if open_h:
            opened_ms = int((time.time() - open_h * 3600) * 1000)
            await relay.redis.hset(queue_keys.partition("deliver", "a"), "circuit_opened_at", opened_ms)  # type: ignore[misc]
        await publish_of_age(relay, 105)

        assert (await relay.until_attempts("evt_1", 1)).status == status


async def test_a_replayed_event_has_a_schedule_of_its_own(start: Start) -> None:
    """It was created long before: the replay counts, so a failed attempt is retried."""
    async with start() as relay:
        relay.subscriber.script("a", ScriptedReply(status=500))
        await publish_of_age(relay, 105)
        assert (await relay.until_state("evt_1", "exhausted")).attempts == 1

        now_ms = int(time.time() * 1000)
        await relay.runtime.store.deliveries.replay("evt_1", "evt_1", ["a"], at_ms=now_ms, force=False)
        relay.runtime.wake_ups(LaneName.DELIVER)

        await eventually(lambda: relay.state("evt_1"), lambda state: state.attempts == 1 and state.status == "waiting")


async def test_a_failing_subscription_is_announced_well_before_it_is_disabled(start: Start) -> None:
    """`subscription.failing` names the date from the 4th failed attempt on; after 5 days it is disabled."""
    async with start({"a": {}, "ops": {"events": ["subscription.*"]}}) as relay:
        relay.subscriber.script("a", ScriptedReply(status=404))
        cid = await relay.call("1")
        eid = relay.event_of("1")
        for attempt in range(1, 5):
            await relay.until_attempts(eid, attempt)
            if attempt < 4:
                await relay.due_now("a", cid)
        await relay.until_delivered("ops", 1)
        six_days_ago = relay.runtime.lanes[LaneName.DELIVER].store_now_ms - 6 * 86_400_000
        await relay.redis.hset(queue_keys.partition("deliver", "a"), "failing_since", str(six_days_ago))  # type: ignore[misc]
        await relay.due_now("a", cid)
        await relay.until_delivered("ops", 2)

        assert relay.report("ops").types == {"subscription.failing": 1, "subscription.disabled": 1}
        assert "5 days" in (await health_of(relay)).disabled_reason


async def test_the_rate_holds_over_any_ten_seconds(start: Start) -> None:
    """`rate_per_s: 20` lets at most 200 posts into any 10 s; scaled here to what a short run can show."""
    async with start({"a": {"rate_per_s": 20, "max_in_flight": 100}}) as relay:
        for key in range(60):
            await relay.call(str(key))
        await relay.until_delivered("a", 60)
        arrivals = sorted(each.monotonic_s for each in relay.subscriber.arrivals("a"))

        # 2 at once, then 198 more in 10 s: no second can hold more than 2 + 20.
        most = max(sum(1 for other in arrivals if at <= other < at + 1) for at in arrivals)
        assert most <= 23
        assert arrivals[-1] - arrivals[0] >= 2.5


async def test_a_costly_field_map_delays_no_other_subscription(start: Start) -> None:
    """Thirty costly expressions and 40 events: the event loop lags less than 100 ms, and the neighbour gets its events
    meanwhile; the costly deliveries fail with the reason. On 0.1.0 the loop stood still for half a minute."""
    costly = "data.call.custom.items[?@ == `0` || contains(to_string(`[1]`), '2')]"
    mapping = {f"field_{number}": costly for number in range(30)}
    async with start({"costly": {"payload": {"map": mapping}, "max_in_flight": 100}, "a": {}}) as relay:
        lags_s: list[float] = []

        async def measure() -> None:
            loop = asyncio.get_running_loop()
            while True:
                before = loop.time()
                await asyncio.sleep(0.005)
                lags_s.append(loop.time() - before - 0.005)

        measuring = asyncio.create_task(measure())
        for number in range(40):
            await relay.call(str(number), custom={"items": ["x"] * 500})
        await relay.until_delivered("a", 40)
        state = await eventually(
            lambda: relay.state(relay.event_of("0"), "costly"), lambda state: state.attempts > 0, timeout_s=20
        )
        await cancel(measuring)

    assert state.log[-1]["words"] == "the map takes more than 20 ms to evaluate; simplify its expressions"
    assert max(lags_s) < 0.1, f"the event loop lagged {max(lags_s):.3f} s"
