"""Contacts never hold an event longer than configured, and one request serves a batch (promise 7)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.simulator.webfones import WebFonesEndpoint
from relay.store import keys
from tests.fakes.faults import Fault, FaultKind
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


async def test_a_hung_address_book_holds_an_event_for_its_hold_only(start: Start) -> None:
    """After the hold the event goes out without the contact, which follows as an update when it comes."""
    async with start(hold_for_contact_s=0.3) as (relay, provider):
        provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.SEARCH, times=1))
        began = asyncio.get_running_loop().time()
        cid = await relay.call("1")
        await relay.until_delivered("a", 1)
        waited_s = asyncio.get_running_loop().time() - began
        await relay.redis.zadd(queue_keys.waiting("enrich", "main"), {cid: 1})
        await relay.until_delivered("a", 2, timeout_s=15)

        assert 0.25 <= waited_s < 3
        assert contact(relay)["lookup_status"] == "unavailable"
        assert relay.subscriber.events("a")[1]["type"] == "call.updated"
        assert relay.subscriber.events("a")[1]["data"]["changes"]["contact.name"] == [None, "Jo Doe"]


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
