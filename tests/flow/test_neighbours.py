"""A healthy source and a healthy subscription keep their pace beside hundreds that do not answer (promise 5)."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Outcome
from relay.providers.base import CallPage, Window
from relay.runtime import Runtime
from tests.fakes.ports import DrippingAudio, EmptyList, UnresponsiveBook, UnresponsiveList
from tests.fakes.subscriber import ReplyKind, ScriptedReply
from tests.fakes.webfones import FaultyWebFones
from tests.flow.harness import RelayHarness, eventually, relay_harness
from workers.runners import add_poller_and_workers

POLL_S = 2
BOOKS = [f"book{n}" for n in range(200)]
DRIPPING = [f"drip{n}" for n in range(50)]
SILENT = [f"silent{n}" for n in range(200)]
DEAD = [f"dead{n}" for n in range(200)]


class TimedPolls:
    """The call list of the healthy source, and when it was asked."""

    def __init__(self, runtime: Runtime) -> None:
        self._calls = runtime.sources["healthy"].provider.calls
        self.began_s: list[float] = []
        runtime.sources["healthy"].provider.calls = self

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        self.began_s.append(time.monotonic())
        async for page in self._calls.pages(window):
            yield page

    @property
    def longest_gap_s(self) -> float:
        return max(after - before for before, after in zip(self.began_s, self.began_s[1:], strict=False))


async def test_a_healthy_source_and_subscription_keep_their_pace_beside_hundreds_that_do_not_answer(
    redis: Redis, valkey_url: str, tmp_path: Path
) -> None:
    """200 dead subscribers, 200 unresponsive address books, 50 dripping recordings and 200 unresponsive sources, all of
    them with work from before a restart. A call is delivered within its poll interval and 3 s, its recording within
    8 s, and polls are at most 2 s late."""
    provider = FaultyWebFones()
    provider.add_account("key")
    provider.put_contact("key", firstname="Jo", lastname="Doe", phone_numbers=["2025550147"])
    polls: list[TimedPolls] = []

    def add_runners(runtime: Runtime) -> None:
        sources = runtime.sources
        for source in (*BOOKS, *DRIPPING):
            sources[source].provider.calls = EmptyList()
        for source in BOOKS:
            sources[source].provider.contacts = UnresponsiveBook()
        for source in DRIPPING:
            sources[source].provider.recordings = DrippingAudio()
        for source in SILENT:
            sources[source].provider.calls = UnresponsiveList()
        polls.append(TimedPolls(runtime))
        add_poller_and_workers(runtime)

    async with provider.serve() as base:
        plain = {
            "provider": "webfones",
            "base_url": "http://127.0.0.1:9",
            "api_key": "unused",
            "poll_interval_s": POLL_S,
        }
        sources = {
            "healthy": {**plain, "base_url": base, **provider.source_options("key"), "hold_for_recording_s": 0},
            **{key: {**plain, "recordings": False} for key in BOOKS},
            **{key: {**plain, "contacts": False, "hold_for_recording_s": 0} for key in DRIPPING},
            **{key: {**plain, "contacts": False, "recordings": False} for key in SILENT},
        }
        subscriptions = {key: {"sources": ["healthy"]} for key in ("a", *DEAD)}

        async with relay_harness(
            redis, valkey_url, tmp_path, subscriptions, add_runners=add_runners, sources=sources, timeout_s=15
        ) as relay:
            _hang(relay)
            await eventually(lambda: _poll_count(polls[0]), lambda count: count >= 2)
            await _call_and_recording_after_s(relay, provider)
            for source in BOOKS:
                await relay.calls((str(key) for key in range(2)), source=source)
            for source in DRIPPING:
                for key in range(3):
                    await relay.call(str(key), source=source, outcome=Outcome.ANSWERED, audio=True)
        async with relay_harness(
            redis, valkey_url, tmp_path, subscriptions, add_runners=add_runners, sources=sources, timeout_s=15
        ) as relay:
            _hang(relay)
            waiting = []
            for _ in range(20):
                waiting.append(asyncio.create_task(_call_and_recording_after_s(relay, provider)))
                await asyncio.sleep(0.6)
            waits_s = await asyncio.gather(*waiting)
            contacts = [event["data"]["call"]["contact"]["name"] for event in relay.subscriber.events("a")]

    assert max(call_s for call_s, _ in waits_s) <= POLL_S + 3
    assert max(recording_s for _, recording_s in waits_s) <= POLL_S + 8
    assert polls[1].longest_gap_s <= POLL_S + 2
    assert set(contacts) == {"Jo Doe"}


def _hang(relay: RelayHarness) -> None:
    for hook in DEAD:
        relay.subscriber.script(hook, ScriptedReply(kind=ReplyKind.HANG))


async def _poll_count(polls: TimedPolls) -> int:
    return len(polls.began_s)


async def _call_and_recording_after_s(relay: RelayHarness, provider: FaultyWebFones) -> tuple[float, float]:
    """Let the provider list a call with its audio; returns after how many seconds each was delivered."""
    now, began_s = datetime.now(UTC), time.monotonic()
    plan = provider.appear("key", now=now, talk_s=0, recording_at=now)
    cid = ids.call_id("healthy", str(plan.rid))
    return (
        await relay.delivered_after_s(cid, began_s),
        await relay.delivered_after_s(cid, began_s, event_type="call.recording.completed"),
    )
