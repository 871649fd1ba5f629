"""A provider that streams calls: published at once, once, and never relied upon."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.json import Json
from relay.domain.polling import PollState
from relay.errors import OverBudget, RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.polling.stream import Streams, oldest, pause_s
from relay.runtime import Runtime, open_runtime
from relay.secrets import SecretBox
from relay.simulator.nfon import NfonEndpoint
from relay.store import keys
from relay.store.credentials import StoredCredentials
from relay.store.lanes import LaneName
from relay.store.streams import StreamLeases
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.nfon import DELETE_ENDPOINT, TOKEN_ENDPOINT, FaultyNfon
from tests.fakes.subscriber import ScriptedSubscriber
from tests.flow.harness import KEY, SECRET, eventually, read_settings
from workers.runners import add_poller, add_workers

TOKEN = "nfon-token"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


@dataclass
class House:
    """A relay with one NFON account and one subscriber."""

    runtime: Runtime
    streams: Streams
    provider: FaultyNfon
    subscriber: ScriptedSubscriber
    redis: Redis
    document: Json

    def call_id(self, rid: int) -> str:
        """The relay's id of a call."""
        return ids.call_id("office", self.provider.uuid_of(TOKEN, rid))

    def delivered(self, event_type: str = "call.completed") -> list[Json]:
        """The calls that the subscriber accepted in events of a type, in their order."""
        return [event["data"]["call"] for event in self.subscriber.events("a") if event["type"] == event_type]

    def via(self) -> list[str]:
        """What brought the delivered calls."""
        return [event["context"]["via"] for event in self.subscriber.events("a")]

    async def until_delivered(self, event_type: str, count: int, timeout_s: float = 10) -> list[Json]:
        """Wait until the subscriber accepted so many events of a type."""
        await self.subscriber.until(lambda: len(self.delivered(event_type)) >= count, timeout_s=timeout_s)
        return self.delivered(event_type)

    async def until_listening(self, streams: int = 1) -> None:
        """Wait until the provider has so many streams open."""
        await until(lambda: self.provider.streams_open == streams)

    def polls(self) -> int:
        """Requests for lists that the provider has had."""
        return self.provider.requests[TOKEN, NfonEndpoint.RECORDS]


async def until(holds: Callable[[], bool], *, timeout_s: float = 10) -> None:
    """Wait until something holds; a TimeoutError when it never does."""

    async def read() -> bool:
        return holds()

    await eventually(read, bool, timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def house(
    valkey_url: str, redis: Redis, tmp_path: Path, provider: FaultyNfon | None = None, **source: Any
) -> AsyncIterator[House]:
    """Run a relay whose polls are too rare to help a stream, unless `source` changes that."""
    provider = provider or FaultyNfon()
    provider.add_account(TOKEN)
    subscriber = ScriptedSubscriber()
    subscriber.add_hook("a", SECRET)
    async with provider.serve() as base, subscriber.serve() as hooks:
        document: Json = {
            "data_dir": str(tmp_path),
            "delivery": {"allowed_networks": ["127.0.0.0/8"]},
            "sources": {
                "office": {"provider": "nfon", "base_url": base, "poll_interval_s": 3600, "token": TOKEN, **source}
            },
            "subscriptions": {"a": {"url": f"{hooks}/hook/a", "secret": SECRET}},
        }
        if "oauth" in source:
            office = document["sources"]["office"]
            del office["token"]
            office["oauth"] = {"token_url": f"{base}/token", **source["oauth"]}
        async with running(document, valkey_url) as (runtime, streams):
            yield House(runtime, streams, provider, subscriber, redis, document)


@contextlib.asynccontextmanager
async def running(document: Json, valkey_url: str, *, workers: bool = True) -> AsyncIterator[tuple[Runtime, Streams]]:
    """Run one process with a poller."""
    async with open_runtime(read_settings(document), redis_url=valkey_url, secret_keys=[KEY]) as runtime:
        streams = add_poller(runtime)
        if workers:
            add_workers(runtime)
        stop = asyncio.Event()
        task = asyncio.create_task(runtime.run(stop, drain_s=5))
        try:
            yield runtime, streams
        finally:
            stop.set()
            await task


HouseOf = Callable[..., contextlib.AbstractAsyncContextManager[House]]


@pytest.fixture
def house_of(valkey_url: str, redis: Redis, tmp_path: Path) -> HouseOf:
    def make(provider: FaultyNfon | None = None, **source: Any) -> contextlib.AbstractAsyncContextManager[House]:
        return house(valkey_url, redis, tmp_path, provider, **source)

    return make


async def test_a_streamed_call_is_delivered_at_once(house_of: HouseOf) -> None:
    """The next poll is an hour away; the call arrives all the same, and shows that the stream brought it."""
    async with house_of() as relay:
        await relay.until_listening()
        plan = relay.provider.appear(TOKEN)

        [call] = await relay.until_delivered("call.completed", 1)

        assert call["id"] == relay.call_id(plan.rid)
        assert relay.via() == ["stream"]
        assert relay.provider.requests[TOKEN, DELETE_ENDPOINT] == 0


async def test_a_call_of_stream_and_poll_is_published_once(house_of: HouseOf) -> None:
    """Polls run beside the stream, and see every call again."""
    async with house_of(poll_interval_s=1) as relay:
        await relay.until_listening()
        for _ in range(5):
            relay.provider.appear(TOKEN)
        await relay.until_delivered("call.completed", 5)
        polls = relay.polls()
        await until(lambda: relay.polls() >= polls + 4)

        assert len(relay.delivered("call.completed")) == 5
        assert relay.delivered("call.updated") == []


async def test_each_connect_lets_a_poll_catch_up(house_of: HouseOf) -> None:
    """A call that appeared while the stream was down comes with the poll that the reconnect asks for."""
    async with house_of() as relay:
        await relay.until_listening()
        relay.provider.inject(Fault(kind=FaultKind.STATUS, on=NfonEndpoint.STREAM, status=503))
        relay.provider.drop_streams()
        await relay.until_listening(0)
        missed = relay.provider.appear(TOKEN)

        [call] = await relay.until_delivered("call.completed", 1)

        assert call["id"] == relay.call_id(missed.rid)
        assert relay.via() == ["poll"]


@pytest.mark.parametrize("how", [FaultKind.SPLIT, FaultKind.DUPLICATE, FaultKind.BAD_EVENTS, FaultKind.HUGE_EVENT])
async def test_a_stream_may_be_split_doubled_or_invalid(house_of: HouseOf, how: FaultKind) -> None:
    """Pieces of seven bytes, each event twice, garbage between them, an event of more than a megabyte."""
    provider = FaultyNfon()
    provider.inject(Fault(kind=how, on=NfonEndpoint.STREAM, times=None))
    async with house_of(provider) as relay:
        await relay.until_listening()
        rids = [provider.appear(TOKEN).rid for _ in range(3)]

        calls = await relay.until_delivered("call.completed", 3)

        assert sorted(call["id"] for call in calls) == sorted(relay.call_id(rid) for rid in rids)
        bad = await relay.runtime.store.sources.quarantined("office")
        assert bool(bad) is (how in (FaultKind.BAD_EVENTS, FaultKind.HUGE_EVENT))


async def test_a_stream_that_keeps_breaking_loses_nothing(house_of: HouseOf) -> None:
    """It is cut after its first event, each time; polls bring the rest."""
    provider = FaultyNfon()
    provider.inject(Fault(kind=FaultKind.CUT, on=NfonEndpoint.STREAM, times=None))
    async with house_of(provider, poll_interval_s=1) as relay:
        await relay.until_listening()
        rids = [provider.appear(TOKEN).rid for _ in range(6)]

        calls = await relay.until_delivered("call.completed", 6)

        assert sorted(call["id"] for call in calls) == sorted(relay.call_id(rid) for rid in rids)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind=FaultKind.STATUS, on=NfonEndpoint.STREAM, status=500, times=None),
        Fault(kind=FaultKind.STATUS, on=NfonEndpoint.STREAM, status=403, times=None),
        Fault(kind=FaultKind.HANG, on=NfonEndpoint.STREAM, times=None),
        Fault(kind=FaultKind.DROP, on=NfonEndpoint.STREAM, times=None),
        Fault(kind=FaultKind.NO_STREAM, on=NfonEndpoint.STREAM, times=None),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
async def test_a_failing_stream_never_stops_polling(house_of: HouseOf, fault: Fault) -> None:
    """The stream is unavailable: calls come with the polls, and the source counts as working."""
    provider = FaultyNfon()
    provider.inject(fault)
    async with house_of(provider, poll_interval_s=1) as relay:
        await until(lambda: provider.requests[TOKEN, NfonEndpoint.STREAM] >= 1)
        plan = provider.appear(TOKEN)

        [call] = await relay.until_delivered("call.completed", 1)

        assert call["id"] == relay.call_id(plan.rid)
        assert (await relay.runtime.store.sources.read("office")).error == ""


async def test_history_at_the_start_of_a_stream_is_not_published(house_of: HouseOf) -> None:
    """Whether NFON sends history on connect is unknown: what was there before the relay stays untold."""
    provider = FaultyNfon(replay=100)
    provider.add_account(TOKEN)
    now = datetime.now(UTC)
    for hours in (1, 5, 70, 77, 90, 24 * 30):
        provider.appear(TOKEN, ended_at=now - timedelta(hours=hours), visible_at=now - timedelta(seconds=5))
    async with house_of(provider) as relay:
        await until(lambda: provider.events_sent >= 6)
        plan = provider.appear(TOKEN)

        [call] = await relay.until_delivered("call.completed", 1)

        assert call["id"] == relay.call_id(plan.rid)


async def test_a_transcript_is_published_when_it_is_ready(house_of: HouseOf) -> None:
    """The record is streamed again; the transcript is fetched, and has an event of its own."""
    async with house_of() as relay:
        await relay.until_listening()
        plan = relay.provider.appear(TOKEN, extra={"transcription": {"available": False}})
        [call] = await relay.until_delivered("call.completed", 1)
        relay.provider.accounts[TOKEN].plans[plan.rid] = replace(plan, extra={})
        relay.provider.transcribe(TOKEN, plan.rid, summary="They agreed.", words="Hello.")

        [transcribed] = await relay.until_delivered("call.transcript.completed", 1)

        assert call["transcription"] == {"available": False}
        assert transcribed["transcription"]["summary"] == "They agreed."
        assert transcribed["transcription"]["transcript"] == "Alice: Hello."
        assert relay.delivered("call.updated") == []
        assert relay.provider.requests[TOKEN, NfonEndpoint.DETAILS] == 1


async def test_an_unavailable_transcript_comes_with_a_later_poll(house_of: HouseOf, monkeypatch: Any) -> None:
    """The call is published at once without it; a later poll asks again."""
    monkeypatch.setattr("relay.providers.nfon.client.DETAILS_PAUSE_S", 0.0)
    async with house_of(poll_interval_s=1) as relay:
        await relay.until_listening()
        relay.provider.inject(Fault(kind=FaultKind.STATUS, on=NfonEndpoint.DETAILS, status=503, times=2))
        plan = relay.provider.appear(TOKEN)
        relay.provider.transcribe(TOKEN, plan.rid)

        [call] = await relay.until_delivered("call.completed", 1)
        [transcribed] = await relay.until_delivered("call.transcript.completed", 1)

        assert (call["id"], call["transcription"]["available"]) == (transcribed["id"], False)
        assert transcribed["transcription"]["transcript"] == "Alice: Hello. Yes."
        assert relay.delivered("call.updated") == []


async def test_one_process_listens_to_a_source(house_of: HouseOf, valkey_url: str) -> None:
    """Two pollers run; there is one stream."""
    async with house_of() as relay:
        await relay.until_listening()
        async with running(relay.document, valkey_url, workers=False) as (_, second):
            first = relay.streams
            await second.take_leases()
            relay.provider.appear(TOKEN)
            await relay.until_delivered("call.completed", 1)

            assert relay.provider.streams_peak == 1
            assert (first.listening_to, second.listening_to) == (["office"], [])


async def test_a_listener_that_dies_is_replaced(house_of: HouseOf, valkey_url: str, redis: Redis) -> None:
    """Its lease ends by itself, and the next process takes the stream."""
    await redis.set(keys.listener("office"), "a process that was killed", px=700)
    async with house_of() as relay:
        streams = relay.streams
        streams._lease_s = 0.4

        await relay.until_listening()

        assert streams.listening_to == ["office"]


async def test_a_listener_without_its_lease_closes_its_stream(house_of: HouseOf, redis: Redis) -> None:
    """Fenced by expiry: another holder means that ours is over."""
    async with house_of() as relay:
        streams = relay.streams
        await relay.until_listening()
        await redis.set(keys.listener("office"), "another process", px=60_000)
        await streams.take_leases()

        assert streams.listening_to == []
        await relay.until_listening(0)


async def test_a_stop_closes_an_idle_stream_at_once(house_of: HouseOf, redis: Redis) -> None:
    """An idle stream holds up no shutdown, and is free for the next process."""
    loop = asyncio.get_running_loop()
    async with house_of() as relay:
        await relay.until_listening()
        began = loop.time()

    assert loop.time() - began < 3
    assert await redis.exists(keys.listener("office")) == 0


async def test_an_idle_stream_is_reconnected(house_of: HouseOf) -> None:
    """The watchdog cannot tell silence from a dead line: it reconnects, and a poll catches up."""
    async with house_of(stream_idle_s=5) as relay:
        source = relay.runtime.sources["office"]
        object.__setattr__(source.options, "stream_idle_s", 0.2)
        await until(lambda: relay.provider.requests[TOKEN, NfonEndpoint.STREAM] >= 3)

        assert relay.polls() >= 3
        assert relay.provider.streams_peak == 1


async def test_a_login_is_renewed_by_one_process_and_survives_a_restart(house_of: HouseOf, valkey_url: str) -> None:
    """The refresh token is good once; two processes and a restart never use one twice."""
    provider = FaultyNfon(access_ttl_s=2)
    provider.add_login(TOKEN, "first-refresh-token")
    oauth = {"client_id": "relay", "refresh_token": "first-refresh-token"}
    async with house_of(provider, poll_interval_s=1, oauth=oauth) as relay:
        async with running(relay.document, valkey_url, workers=False):
            await until(lambda: provider.requests["", TOKEN_ENDPOINT] >= 3, timeout_s=15)
        plan = provider.appear(TOKEN)
        await relay.until_delivered("call.completed", 1)
        sealed = await relay.redis.get(keys.credentials("office"))
        document = relay.document

        async with running(document, valkey_url) as (again, _):
            provider.expire_tokens()
            asked = relay.polls()
            await again.lanes[LaneName.POLL].put("office", "office")
            await until(lambda: relay.polls() > asked)

        assert relay.call_id(plan.rid) == relay.delivered()[0]["id"]
        assert provider.reused_refresh_tokens == 0
        assert b"refresh" not in sealed
        assert SecretBox([KEY]).decrypt(sealed.decode(), context=keys.credentials("office"))


async def test_a_stream_is_renewed_before_its_token_ends(house_of: HouseOf) -> None:
    """NFON never has to cut it: the relay reconnects with a fresh token in time."""
    provider = FaultyNfon(access_ttl_s=1.5)
    provider.add_login(TOKEN, "first-refresh-token")
    async with house_of(provider, oauth={"client_id": "relay", "refresh_token": "first-refresh-token"}) as relay:
        await until(lambda: provider.requests[TOKEN, NfonEndpoint.STREAM] >= 3)
        plan = provider.appear(TOKEN)

        [call] = await relay.until_delivered("call.completed", 1)

        assert call["id"] == relay.call_id(plan.rid)
        assert (provider.streams_expired, provider.statuses["", NfonEndpoint.STREAM, 401]) == (0, 0)


async def test_a_credential_store_reads_back_what_only_it_can_read(redis: Redis) -> None:
    """What is kept is encrypted for its source, and one at a time may be inside."""
    box = SecretBox([KEY])
    store, same, other = (
        StoredCredentials(redis, box, "a"),
        StoredCredentials(redis, box, "a"),
        StoredCredentials(redis, box, "b"),
    )
    inside: list[str] = []

    async def enter(name: str, each: StoredCredentials, leave: Callable[[], Awaitable[object]]) -> None:
        async with each.alone():
            inside.append(name)
            await leave()
            inside.append(f"{name} left")

    await store.write("a secret")
    gate = asyncio.Event()
    first = asyncio.create_task(enter("first", store, gate.wait))
    await until(lambda: inside == ["first"])
    second = asyncio.create_task(enter("second", same, lambda: asyncio.sleep(0)))
    await enter("other", other, lambda: asyncio.sleep(0))
    gate.set()
    await asyncio.gather(first, second)

    assert inside == ["first", "other", "other left", "first left", "second", "second left"]
    assert (await same.read(), await other.read()) == ("a secret", None)
    assert b"a secret" not in await redis.get(keys.credentials("a"))


@pytest.mark.parametrize(
    ("trouble", "failures", "least_s", "most_s"),
    [
        (None, 0, 0.05, 1),
        (None, 1, 0.5, 1),
        (Unavailable("x"), 1, 0.5, 1),
        (Unavailable("x"), 4, 4, 8),
        (Unavailable("x"), 99, 30, 60),
        (RuntimeError("x"), 3, 2, 4),
        (OverBudget(7), 1, 7, 8.4),
        (RateLimited("x", bucket="key", retry_after_s=90), 1, 90, 108),
        (RateLimited("x", bucket="key", retry_after_s=None), 1, 60, 72),
        (Unauthorized("x", status=401), 1, 300, 360),
        (UnexpectedResponse("x"), 1, 300, 360),
    ],
)
def test_reconnects_wait_longer_and_never_together(
    trouble: Exception | None, failures: int, least_s: float, most_s: float
) -> None:
    pauses = {pause_s(trouble, failures, random.Random(seed)) for seed in range(50)}

    assert all(least_s <= pause <= most_s for pause in pauses)
    assert len(pauses) > 40


@pytest.mark.parametrize(
    ("poll_state", "bound"),
    [
        (PollState(), None),
        (PollState(started_at=NOW), NOW - timedelta(hours=78)),
        (PollState(started_at=NOW - timedelta(days=30), cursor=NOW), NOW - timedelta(hours=96)),
        (PollState(started_at=NOW - timedelta(hours=1), cursor=NOW), NOW - timedelta(hours=79)),
    ],
)
def test_streamed_rows_count_as_far_back_as_polls_looked(poll_state: PollState, bound: datetime | None) -> None:
    assert oldest(poll_state, now=NOW) == bound


async def test_a_process_releases_and_renews_only_its_own_leases(redis: Redis) -> None:
    """One that stops late must not end the lease of the one that took over."""
    ours, theirs = (StreamLeases(redis, holder=holder) for holder in ("ours", "theirs"))
    assert await ours.acquire(["main"], lease_s=60) == {"main"}

    await theirs.release(["main"])

    assert await theirs.acquire(["main"], lease_s=60) == set()
    await ours.release(["main"])
    assert await theirs.acquire(["main"], lease_s=60) == {"main"}
