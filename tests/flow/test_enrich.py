"""Contacts never hold an event longer than configured, and one request serves a batch (promise 7)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from relay.domain import ids
from relay.domain.call import Outcome, Party
from relay.queue import keys as queue_keys
from relay.simulator.webfones import WebFonesEndpoint
from relay.store import keys
from relay.store.calls import StoredCall
from relay.store.lanes import LaneName
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.ports import AnsweringBook, UnresponsiveBook
from tests.fakes.webfones import FaultyWebFones
from tests.flow.harness import RelayHarness, eventually, relay_harness

NUMBER = "+15551230001"
Start = Callable[..., AbstractAsyncContextManager[tuple[RelayHarness, FaultyWebFones]]]


@pytest.fixture
def start(redis: Redis, valkey_url: str, tmp_path: Path) -> Start:
    @contextlib.asynccontextmanager
    async def run(**source: Any) -> AsyncIterator[tuple[RelayHarness, FaultyWebFones]]:
        provider = FaultyWebFones()
        provider.add_account("key")
        provider.put_contact("key", firstname="Jo", lastname="Doe", phone_numbers=["5551230001"])
        async with provider.serve() as base:
            options = {
                "provider": "webfones",
                "base_url": base,
                "api_key": "key",
                "recordings": False,
                "contacts": True,
                **source,
            }
            async with relay_harness(redis, valkey_url, tmp_path, sources={"main": options}) as relay:
                yield relay, provider

    return run


def contact(relay: RelayHarness, index: int = 0) -> Any:
    return relay.subscriber.events("a")[index]["data"]["call"]["contact"]


async def test_the_first_event_names_a_known_caller(start: Start) -> None:
    """The contact is part of the first event."""
    async with start() as (relay, _):
        await relay.call("1")
        await relay.until_delivered("a", 1)

        assert contact(relay)["lookup_status"] == "matched"
        assert contact(relay)["name"] == "Jo Doe"


async def test_calls_ingested_together_cost_one_look_up(start: Start) -> None:
    """Twenty calls of twenty callers are looked up at once."""
    async with start() as (relay, provider):
        await relay.calls(str(key) for key in range(20))
        await relay.until_delivered("a", 20)

        assert provider.requests["key", WebFonesEndpoint.SEARCH] <= 2


@pytest.mark.parametrize(
    ("contact_s", "recording_s", "hold_s"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 2), (1, 3, 3), (0.3, 0, 0.3)]
)
async def test_an_event_is_delayed_by_its_holds_and_no_longer(
    start: Start, contact_s: float, recording_s: float, hold_s: float
) -> None:
    """Neither the address book nor the recording ever comes: the event goes out at the end of the longer hold."""
    holds = {"hold_for_contact_s": contact_s, "hold_for_recording_s": recording_s}
    async with start(recordings=True, **holds) as (relay, provider):
        provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.SEARCH, times=None))
        provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.RECORDING, times=None))
        await relay.call("before")
        await relay.until_delivered("a", 1)
        began_s = time.monotonic()
        cid = await relay.call("1", outcome=Outcome.ANSWERED, audio=True)
        waited_s = await relay.delivered_after_s(cid, began_s)

        assert hold_s - 0.05 <= waited_s <= hold_s + 0.7
        assert contact(relay, 1)["lookup_status"] == "unavailable"
        assert relay.subscriber.events("a")[1]["data"]["call"]["recording"]["status"] == "pending"


async def test_a_contact_that_comes_after_the_hold_is_an_update(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event went out without the contact; the look-up is repeated, and what it finds follows."""
    monkeypatch.setattr("workers.contacts.LOOKUP_TIMEOUT_S", 1.0)
    async with start(hold_for_contact_s=0.3) as (relay, provider):
        provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.SEARCH, times=1))
        await relay.call("1")
        await relay.until_delivered("a", 2)

        assert contact(relay)["lookup_status"] == "unavailable"
        assert relay.subscriber.events("a")[1]["type"] == "call.updated"
        assert relay.subscriber.events("a")[1]["data"]["changes"]["contact.name"] == [None, "Jo Doe"]
        assert provider.requests["key", WebFonesEndpoint.SEARCH] == 2


async def test_a_corrected_number_is_looked_up_once_more(start: Start) -> None:
    """The provider corrects the caller after the event: the contact of the new number is published."""
    async with start() as (relay, provider):
        provider.put_contact("key", firstname="Al", lastname="Roe", phone_numbers=["5551230002"])
        await relay.call("1")
        await relay.until_delivered("a", 1)
        await relay.call("1", external=Party(number="+15551230002", raw="(555) 123-0002"))
        await relay.subscriber.until(lambda: contact(relay, -1)["name"] == "Al Roe")

        changes = {
            path: pair for event in relay.subscriber.events("a")[1:] for path, pair in event["data"]["changes"].items()
        }
        assert changes["contact.name"][1] == "Al Roe"
        assert changes["external_number"] == ["+15551230001", "+15551230002"]


@pytest.mark.parametrize("unresponsive", [60, 200])
async def test_unresponsive_address_books_delay_no_other_source(
    redis: Redis, valkey_url: str, tmp_path: Path, unresponsive: int
) -> None:
    """Right after a restart, with calls of every unresponsive source waiting, a source without contacts is delivered at
    once, and one whose own address book answers with its contact."""
    options = {"provider": "webfones", "base_url": "http://127.0.0.1:9", "api_key": "k", "recordings": False}
    stuck = [f"stuck{n}" for n in range(unresponsive)]
    sources = {"plain": {**options, "contacts": False}, "answering": options, **dict.fromkeys(stuck, options)}

    @contextlib.asynccontextmanager
    async def restarted() -> AsyncIterator[RelayHarness]:
        async with relay_harness(redis, valkey_url, tmp_path, sources=sources) as relay:
            relay.runtime.sources["answering"].provider.contacts = AnsweringBook()
            for source in stuck:
                relay.runtime.sources[source].provider.contacts = UnresponsiveBook()
            yield relay

    async with restarted() as relay:
        await relay.call("before", source="answering")
        await relay.until_delivered("a", 1)
        for source in stuck:
            await relay.calls((str(key) for key in range(3)), source=source)
    waits_s: dict[str, list[float]] = {"plain": [], "answering": []}
    async with restarted() as relay:
        for n in range(8):
            for source, waited_s in waits_s.items():
                began_s = time.monotonic()
                cid = await relay.call(f"healthy{n}", source=source)
                waited_s.append(await relay.delivered_after_s(cid, began_s))
            await asyncio.sleep(0.5)
        calls = [event["data"]["call"] for event in relay.subscriber.events("a")]

    assert max(waits_s["plain"]) < 1.5
    assert max(waits_s["answering"]) < 2
    assert {call["contact"]["name"] for call in calls if call["source_id"] == "answering"} == {"Jo Doe"}


async def test_a_connection_to_the_store_that_is_reset_delays_a_call_by_about_a_second(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publish was interrupted in the middle of a batch: it is repeated, and its neighbours are not delayed."""
    async with start(contacts=False) as (relay, _):
        publish = relay.runtime.store.events.publish_call
        failures = iter([ConnectionResetError(104, "Connection reset by peer"), RedisConnectionError("reset")])

        async def reset_once(call: StoredCall, *args: Any) -> int | None:
            if call.key in ("1", "2") and (failure := next(failures, None)):
                raise failure
            return await publish(call, *args)

        monkeypatch.setattr(relay.runtime.store.events, "publish_call", reset_once)
        began_s = time.monotonic()
        await relay.calls(str(key) for key in range(5))
        others_s = await relay.delivered_after_s(ids.call_id("main", "4"), began_s)
        await relay.until_delivered("a", 5)

        assert others_s < 1
        assert time.monotonic() - began_s < 3


async def test_a_store_that_keeps_closing_its_connections_delays_calls_by_seconds_at_most(start: Start) -> None:
    """Connections are closed five times a second while calls are ingested, looked up, published and delivered."""
    async with start() as (relay, _):
        keys_ingested = iter(range(10_000))
        waits_s: dict[str, float] = {}
        for _ in range(20):
            with contextlib.suppress(RedisConnectionError):
                batch = [str(next(keys_ingested)) for _ in range(5)]
                await relay.calls(batch)
                waits_s |= {ids.call_id("main", key): time.monotonic() for key in batch}
            await relay.redis.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.2)
        delays_s = [await relay.delivered_after_s(cid, began_s) for cid, began_s in waits_s.items()]

        assert len(delays_s) >= 50
        assert max(delays_s) < 8
        assert [await relay.redis.zcard(queue_keys.quarantine(lane)) for lane in LaneName] == [0] * len(LaneName)
        assert relay.report("a").duplicates == {}


async def test_a_full_store_delays_calls_and_quarantines_none(start: Start) -> None:
    """While the memory is full nothing can be published; as soon as there is space, everything is."""
    async with start() as (relay, _):
        await relay.redis.config_set("maxmemory-policy", "noeviction")
        await relay.calls(str(key) for key in range(5))
        await relay.redis.config_set("maxmemory", 1)
        await asyncio.sleep(3)
        await relay.redis.config_set("maxmemory", 0)
        began_s = time.monotonic()
        await relay.until_delivered("a", 5)

        assert time.monotonic() - began_s < 3
        assert [await relay.redis.zcard(queue_keys.quarantine(lane)) for lane in LaneName] == [0] * len(LaneName)


async def test_a_key_file_that_is_empty_for_a_moment_delays_a_contact_by_a_second(start: Start, tmp_path: Path) -> None:
    """A secret that is being replaced: the look-up is repeated within the hold."""
    key_file = tmp_path / "key"
    key_file.write_text("key")
    async with start(api_key=None, api_key_file=str(key_file)) as (relay, _):
        key_file.write_text("")
        began_s = time.monotonic()
        cid = await relay.call("1")
        await asyncio.sleep(0.5)
        key_file.write_text("key")
        waited_s = await relay.delivered_after_s(cid, began_s)

        assert waited_s < 3
        assert contact(relay)["name"] == "Jo Doe"


async def test_without_a_hold_nothing_waits(start: Start) -> None:
    """`hold_for_contact_s: 0`: published at once; the contact comes as an update."""
    async with start(hold_for_contact_s=0) as (relay, provider):
        provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.SEARCH, times=1))
        await relay.call("1")
        await relay.until_delivered("a", 1, timeout_s=2)

        assert contact(relay)["lookup_status"] == "unavailable"


async def test_a_rejected_credential_pauses_contacts_and_calls_go_on(start: Start) -> None:
    """401 on contacts: logged once; calls are published without."""
    async with start(hold_for_contact_s=1) as (relay, provider):
        provider.inject(Fault(kind=FaultKind.STATUS, status=403, on=WebFonesEndpoint.SEARCH, times=None))
        await relay.call("1")
        await relay.until_delivered("a", 1)
        await relay.call("2")
        await relay.until_delivered("a", 2)

        off = await eventually(lambda: relay.redis.hget(keys.source("main"), "contacts_off"), bool)
        assert off
        assert provider.requests["key", WebFonesEndpoint.SEARCH] == 1
        assert {each["data"]["call"]["contact"]["lookup_status"] for each in relay.subscriber.events("a")} == {
            "unavailable"
        }


async def test_extensions_and_hidden_numbers_are_not_looked_up(start: Start) -> None:
    """A call without an external number costs no look-up."""
    async with start() as (relay, provider):
        await relay.call("1", external=None)
        await relay.until_delivered("a", 1)

        assert contact(relay)["lookup_status"] == "skipped"
        assert provider.requests["key", WebFonesEndpoint.SEARCH] == 0


async def test_a_cached_contact_is_used_until_the_address_book_changes(start: Start) -> None:
    """A second call of the same caller costs no look-up; after a change it does."""
    async with start() as (relay, provider):
        await relay.call("1")
        await relay.until_delivered("a", 1)
        await relay.redis.hset(keys.contacts("main"), mapping={"checked_at": "9999999999"})  # type: ignore[misc]
        await relay.call("2")
        await relay.until_delivered("a", 2)
        kept = provider.requests["key", WebFonesEndpoint.SEARCH]

        provider.put_contact("key", firstname="Jo", lastname="Smith", phone_numbers=["5551230001"])
        await relay.redis.hset(keys.contacts("main"), mapping={"checked_at": "0", "version": "1"})  # type: ignore[misc]
        await relay.call("3")
        await relay.until_delivered("a", 3)

        assert kept == 1
        assert provider.requests["key", WebFonesEndpoint.SEARCH] == 2
        assert contact(relay, 2)["count"] == 2


async def test_audio_that_arrives_after_its_call_was_erased_is_deleted(start: Start) -> None:
    """The call was erased while the provider sent it: nothing of it stays in the storage."""
    async with start(recordings=True, contacts=False) as (relay, provider):
        plan = provider.appear("key", recording_at=provider.clock())
        provider.inject(Fault(kind=FaultKind.SLOW, on=WebFonesEndpoint.RECORDING, delay_s=0.5))
        stored: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        put = relay.runtime.storage.put

        async def watched(*args: Any, **options: Any) -> Any:
            result = await put(*args, **options)
            stored.set_result(result.path)
            return result

        async def requested() -> int:
            return provider.requests["key", WebFonesEndpoint.RECORDING]

        relay.runtime.storage.put = watched  # type: ignore[method-assign]
        call_id = await relay.call(str(plan.rid), outcome=Outcome.ANSWERED, audio=True)
        await eventually(requested, bool)
        await relay.redis.delete(keys.call(call_id))
        path = await asyncio.wait_for(stored, 10)

        await eventually(lambda: relay.runtime.storage.size(path), lambda size_bytes: size_bytes is None)
