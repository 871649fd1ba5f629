"""Each difference is published exactly once, whatever happens between two round trips; against a real Valkey.

Two workers publish one call, stopped before and after every round trip to the store. Between any two of them a poll may
bring a change, the recording may arrive, a lease may end, a worker may be killed. At the end a subscriber that applied
every event in order has the call as it is, and received nothing twice.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Outcome, Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.events.payload import NO_CONTACT, NO_RECORDING
from relay.events.publisher import Publisher
from relay.queue import keys as queue_keys
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.settlement import Done, Retry
from relay.store import keys
from relay.store.calls import CallStore, Row, StoredCall, claimed_call
from relay.store.events import EventStore, NewEvent
from relay.store.lanes import ContactFound, LaneName, RecordingStored, open_lane
from tests.store import open_store

T = TypeVar("T")
CALL = ids.call_id("main", "7")
NOON = datetime(2025, 7, 1, 12, tzinfo=UTC)
HOLD_MS = 10**7
RULES = SourceRules("webfones", "UTC", True, True, HOLD_MS, HOLD_MS)
CONTACTS: dict[str, Json] = {
    "matched": NO_CONTACT | {"lookup_status": "matched", "count": 1, "name": "Jo"},
    "none": NO_CONTACT | {"lookup_status": "none"},
}
ONCE = ("call.completed", "call.recording.completed", "call.recording.failed", "call.transcript.completed")


Pause = Callable[[], Awaitable[None]]


class SteppedCalls(CallStore):
    """Pauses before each read."""

    def __init__(self, redis: Redis, pause: Pause) -> None:
        super().__init__(redis, ttl_s=1000, keep_raw=lambda: False)
        self._pause = pause

    async def get(self, call_id: str) -> StoredCall | None:
        await self._pause()
        return await super().get(call_id)


class SteppedEvents(EventStore):
    """Pauses before each publish, and after it."""

    def __init__(self, redis: Redis, pause: Pause) -> None:
        super().__init__(redis, ttl_s=1000, calls_ttl_s=1000)
        self._pause = pause

    async def publish_call(self, call: StoredCall, parts: Any, events: Sequence[NewEvent]) -> int | None:
        await self._pause()
        created = await super().publish_call(call, parts, events)
        await self._pause()
        return created


class Everybody:
    """One subscription, which receives everything."""

    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
        return ("sub",)


class Worker:
    """Holds the call's enrich item and publishes the call, a round trip at a time."""

    def __init__(self, bench: "Bench", claim: Claim, contact: str | None) -> None:
        self._bench = bench
        self._claim = claim
        self._go = asyncio.Event()
        self._stopped = asyncio.Event()
        store = open_store(bench.redis, calls_ttl_s=1000)
        store.calls, store.events = SteppedCalls(bench.redis, self._pause), SteppedEvents(bench.redis, self._pause)
        self._publisher = Publisher(store, Everybody(), now_ms=lambda: bench.now_ms, on_deliveries=lambda: None)
        self._parts = {"contact": CONTACTS[contact]} if contact else {}
        self._task = asyncio.create_task(self._work())

    @property
    def at_work(self) -> bool:
        return not self._task.done()

    async def _pause(self) -> None:
        self._stopped.set()
        await self._go.wait()
        self._go.clear()

    async def _work(self) -> None:
        wait_ms = await self._publisher.publish(claimed_call(self._claim), RULES, self._parts)
        await self._pause()
        settlement = Done() if wait_ms is None else Retry(wait_ms)
        await self._bench.enrich.exchange([(self._claim, settlement)])

    async def step(self) -> None:
        """Let it make one round trip."""
        if not self.at_work:
            return
        self._stopped.clear()
        self._go.set()
        stopped = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({self._task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if self._task.done():
            self._task.result()

    async def kill(self) -> None:
        """`kill -9`: what it wrote is written, nothing else happens, its lease goes on."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Bench:
    """One call in a store, with everybody who has to do with it."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store = open_store(redis, calls_ttl_s=1000, events_ttl_s=1000)
        self.enrich = open_lane(redis, LaneName.ENRICH)
        self.contacts = open_lane(redis, LaneName.CONTACTS)
        self.record = open_lane(redis, LaneName.RECORD)
        self.now_ms = 0
        self.published_before: list[str] = []

    async def ingest(
        self, status: str, *, answered: bool = True, finished: bool = True, text: str | None = None
    ) -> str:
        """A poll brings the row; `custom` shows in each event whether the row was finished."""
        record = Record(
            key="7",
            started_at=NOON,
            local_date="2025-07-01",
            outcome=Outcome.ANSWERED if answered else Outcome.NO_ANSWER,
            audio=answered,
            status_raw=status,
            finished=finished,
            transcription={"available": True, "transcript": text} if text else None,
            custom={"finished": finished},
        )
        row = Row(record, record.content_hash())
        return await self.store.calls.ingest("main", [row], token=b"", mapping=1, via="poll")

    async def claim(self, lane: Lane) -> Claim | None:
        claims = (await lane.exchange(want=1)).claims
        return claims[0] if claims else None

    async def worker(self, contact: str | None) -> Worker | None:
        """Give the call to a worker, if its item is due."""
        claim = await self.claim(self.enrich)
        return Worker(self, claim, contact) if claim else None

    async def fetched(self, claim: Claim, status: str) -> None:
        """The recording is stored, missing or lost."""
        part = NO_RECORDING | {"status": status}
        await self.record.exchange([(claim, Done(RecordingStored(part)))])

    async def audio(self, status: str) -> bool:
        """Claim the fetch and complete it; False when none is due."""
        claim = await self.claim(self.record)
        if claim:
            await self.fetched(claim, status)
        return claim is not None

    async def contact(self, contact: str) -> None:
        """The address book answers, or answers differently than before."""
        await self.contacts.put("main", CALL)
        claim = await self.claim(self.contacts)
        if claim:
            publisher = Publisher(self.store, Everybody(), now_ms=lambda: self.now_ms, on_deliveries=lambda: None)
            await publisher.publish(claimed_call(claim), RULES, {"contact": CONTACTS[contact]})
            await self.contacts.exchange([(claim, Done(ContactFound()))])

    async def let_pass(self, name: Callable[[LaneName, str], str], lane: Lane) -> None:
        """Move the times in a sorted set of a lane into the past."""
        await self.redis.zadd(name(lane.name, "main"), {CALL: 1}, xx=True)
        await lane.drop("main", "no_call")

    async def let_leases_end(self) -> None:
        for lane in (self.enrich, self.record):
            await self.let_pass(queue_keys.leased, lane)

    async def let_holds_end(self) -> None:
        """Hours pass: every hold is over, and every retry is due."""
        self.now_ms = 10**14
        await self.let_pass(queue_keys.waiting, self.enrich)

    async def settle_down(self) -> None:
        """Run until nothing is left to do: leases end, and the lanes' items are worked off."""
        await self.let_holds_end()
        idle = False
        for _ in range(20):
            await self.let_leases_end()
            worker = await self.worker(None)
            while worker is not None and worker.at_work:
                await worker.step()
            if worker is None and not await self.audio("available"):
                if idle:
                    return
                idle = True  # a claim that quarantines the fetch makes the call due again: look once more
        raise AssertionError("the call never settles")

    async def events(self) -> list[Json]:
        """What the subscriber will receive, in order."""
        queue = await self.redis.zrange(keys.pending("sub", CALL), 0, -1, withscores=True)
        assert [int(number) for _, number in queue] == list(range(1, len(queue) + 1))
        documents = []
        for eid, _ in queue:
            document = await self.store.events.get(eid.decode())
            assert document is not None
            assert document["id"] == eid.decode()
            documents.append(document)
        return documents

    async def check(self) -> list[Json]:
        """Follow the events as a subscriber does: each leads from the state before to its own."""
        events = await self.events()
        eids = [event["id"] for event in events]
        assert eids[: len(self.published_before)] == self.published_before
        self.published_before = eids
        kinds = Counter(event["type"] for event in events)
        assert all(kinds[kind] <= 1 for kind in ONCE)
        before: Json = {}
        revision = 0
        for event in events:
            state = content(event)
            assert state["custom"] == {"finished": True}
            if event["type"] in ONCE:
                assert event["id"] == ids.event_id("main", "7", event["type"])
            if event["type"] == "call.completed":
                assert not before
                revision = 1
            elif event["type"] == "call.updated":
                revision += 1
                assert event["data"]["changes"]
                assert without_transcript(applied(before, event["data"]["changes"])) == without_transcript(state)
            else:
                assert without_transcript(before) == without_transcript(state)
            assert event["data"]["call"]["revision"] == revision
            before = state
        return events

    async def check_nothing_is_lost(self) -> None:
        """Nothing is left to do: the last published state is the call as it is."""
        events = await self.check()
        call = await self.store.calls.get(CALL)
        if call is None or not call.finished:
            return
        assert events
        assert events[0]["type"] == "call.completed"
        contact = call.contact or NO_CONTACT | {"lookup_status": "unavailable"}
        assert content(events[-1]) == {**call.record, "contact": same_to_a_subscriber(contact)}
        kinds = {event["type"] for event in events}
        status = (call.recording or {}).get("status")
        assert ("call.recording.completed" in kinds) == (status == "available")
        assert ("call.recording.failed" in kinds) == (status == "unavailable")
        if call.record["transcription"]:
            assert "call.transcript.completed" in kinds
        for lane in ("enrich", "contacts", "record"):
            assert await self.redis.zcard(queue_keys.waiting(lane, "main")) == 0


def content(event: Json) -> Json:
    """The part of an event that changes are about."""
    own = ("id", "provider", "source_id", "revision", "recording")
    about = {name: value for name, value in event["data"]["call"].items() if name not in own}
    return {**about, "contact": same_to_a_subscriber(about["contact"])}


def same_to_a_subscriber(contact: Json) -> Json:
    """A failed look-up and one without a match: both mean no contact, so a change between them is no event."""
    return {**contact, "lookup_status": _SAME_STATUS.get(contact["lookup_status"], contact["lookup_status"])}


_SAME_STATUS = {"unavailable": "none"}


def without_transcript(state: Json) -> Json:
    """A new transcript has an event of its own and is in no `changes`."""
    return {name: value for name, value in state.items() if name != "transcription"}


def applied(known: Json, changes: dict[str, list[Any]]) -> Json:
    """Apply changes, each of which must begin where we are."""
    state = {name: dict(value) if isinstance(value, dict) else value for name, value in known.items()}
    for path, (before, after) in changes.items():
        name, _, inner = path.partition(".")
        there = state[name] if inner else state
        if path == "contact.lookup_status":
            before, after = _SAME_STATUS.get(before, before), _SAME_STATUS.get(after, after)
        assert there[inner or name] == before
        there[inner or name] = after
    return state


async def test_every_interleaving_of_two_holders_and_two_writers_publishes_each_difference_once(redis: Redis) -> None:
    """A lease ended unnoticed, so two workers hold the call; meanwhile a poll changes it and its audio arrives.

    All orders of the first three round trips of each worker and of the two writes; then each comes to its end.
    """
    schedules = sorted(set(itertools.permutations("AAABBBWW")))
    assert len(schedules) == 560
    for schedule in schedules:
        await redis.flushdb()
        bench = Bench(redis)
        await bench.ingest("first")
        bench.now_ms = 10**14
        one = await bench.worker("matched")
        await bench.let_leases_end()
        other = await bench.worker(None)
        assert one is not None
        assert other is not None
        writes = iter((bench.ingest("second"), bench.audio("available")))
        for actor in schedule:
            if actor == "W":
                await next(writes)
            else:
                await (one if actor == "A" else other).step()
            await bench.check()
        while one.at_work or other.at_work:
            await one.step()
            await other.step()

        await bench.settle_down()

        await bench.check_nothing_is_lost()
        call = await bench.store.calls.get(CALL)
        assert call is not None
        assert call.contact == CONTACTS["matched"], schedule
        assert call.record["status_raw"] == "second"


class OneCall(RuleBasedStateMachine):
    """Everything that can happen to a call, in any order."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.workers: list[Worker | None] = [None, None]
        self.fetch: Claim | None = None

    def run(self, step: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await step

        return self.loop.run(awaited())

    @initialize(finished=st.booleans(), answered=st.booleans(), holds=st.booleans())
    def begin(self, finished: bool, answered: bool, holds: bool) -> None:
        async def opened() -> Bench:
            redis = Redis.from_url(self.url)
            await redis.flushdb()
            return Bench(redis)

        self.bench = self.run(opened())
        self.bench.now_ms = 0 if holds else 10**14
        self.ingest("A", answered, finished, None)

    @rule(
        status=st.sampled_from("ABC"),
        answered=st.booleans(),
        finished=st.sampled_from([True, True, True, False]),
        text=st.sampled_from([None, None, "hello", "hallo"]),
    )
    def ingest(self, status: str, answered: bool, finished: bool, text: str | None) -> None:
        self.run(self.bench.ingest(status, answered=answered, finished=finished, text=text))

    @rule(which=st.sampled_from([0, 1]), contact=st.sampled_from([None, "matched", "none"]))
    def claim(self, which: int, contact: str | None) -> None:
        worker = self.workers[which]
        if worker is None or not worker.at_work:
            self.workers[which] = self.run(self.bench.worker(contact))

    @precondition(lambda self: any(worker and worker.at_work for worker in self.workers))
    @rule(which=st.sampled_from([0, 1]), steps=st.integers(1, 3))
    def step(self, which: int, steps: int) -> None:
        worker = self.workers[which] or self.workers[1 - which]
        assert worker is not None
        for _ in range(steps):
            self.run(worker.step())

    @precondition(lambda self: any(worker and worker.at_work for worker in self.workers))
    @rule(which=st.sampled_from([0, 1]))
    def kill(self, which: int) -> None:
        worker = self.workers[which]
        if worker is not None:
            self.run(worker.kill())

    @rule()
    def begin_to_fetch(self) -> None:
        self.fetch = self.run(self.bench.claim(self.bench.record)) or self.fetch

    @precondition(lambda self: self.fetch is not None)
    @rule(status=st.sampled_from(["available", "none", "unavailable"]))
    def end_to_fetch(self, status: str) -> None:
        assert self.fetch is not None
        self.run(self.bench.fetched(self.fetch, status))
        self.fetch = None

    @rule(contact=st.sampled_from(sorted(CONTACTS)))
    def look_up(self, contact: str) -> None:
        self.run(self.bench.contact(contact))

    @rule()
    def let_leases_end(self) -> None:
        self.run(self.bench.let_leases_end())

    @rule()
    def let_holds_end(self) -> None:
        self.run(self.bench.let_holds_end())

    @invariant()
    def published_events_are_consistent(self) -> None:
        self.run(self.bench.check())

    def teardown(self) -> None:
        async def rest() -> None:
            for worker in self.workers:
                while worker is not None and worker.at_work:
                    await worker.step()
            try:
                await self.bench.settle_down()
                await self.bench.check_nothing_is_lost()
            finally:
                await self.bench.redis.aclose()

        try:
            if hasattr(self, "bench"):
                self.run(rest())
        finally:
            self.loop.close()


def test_whatever_happens_to_a_call_each_difference_is_published_once(valkey_url: str) -> None:
    """Polls, audio, contacts, holds, leases that end, workers that are killed: in any order, at any point."""
    machine = type("OneCall", (OneCall,), {"url": valkey_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
