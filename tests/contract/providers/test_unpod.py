"""What is Unpod's own: pages of all kinds, identities that may be missing, headers."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import aiohttp
import pytest
from redis.asyncio import Redis

from relay.domain.call import Record
from relay.errors import UnexpectedResponse
from relay.providers.base import Window
from relay.simulator.unpod import LIST
from relay.store.codes import RowOutcome
from tests.contract.providers.harness import PollHarness, open_harness
from tests.contract.providers.unpod import UnpodUnderTest
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.unpod import FaultyUnpod


@pytest.fixture
async def unpod(redis: Redis, http: aiohttp.ClientSession) -> AsyncIterator[PollHarness]:
    async with open_harness(UnpodUnderTest, redis, http, page_size=5) as harness:
        yield harness


def simulator(harness: PollHarness) -> FaultyUnpod:
    assert isinstance(harness.provider, UnpodUnderTest)
    return harness.provider.simulator


async def pages(harness: PollHarness, *, hours: float = 24) -> list[list[str]]:
    window = Window(harness.now - timedelta(hours=hours), harness.now)
    return [
        [row.key for row in page.rows if isinstance(row, Record)]
        async for page in harness.source.provider.calls.pages(window)
    ]


@pytest.mark.parametrize(
    ("with_next", "with_count", "max_page_size"),
    [
        (True, True, 100),
        (True, False, 100),
        (False, True, 100),
        (False, False, 100),
        (True, True, 3),
        (True, False, 3),
        (False, True, 3),
    ],
)
@pytest.mark.parametrize("calls", [0, 1, 4, 5, 6, 10, 13])
async def test_every_page_is_read_whatever_next_and_count_are(
    unpod: PollHarness, with_next: bool, with_count: bool, max_page_size: int, calls: int
) -> None:
    """`next` may be there or not, the count too, and the server may give fewer rows than it is asked for."""
    provider = simulator(unpod)
    provider.with_next, provider.with_count, provider.max_page_size = with_next, with_count, max_page_size
    plans = [unpod.call(rid, start_s=-rid * 60) for rid in range(1, calls + 1)]

    keys = [key for page in await pages(unpod) for key in page]

    assert keys == [unpod.provider.key(plan) for plan in plans]


async def test_the_list_ends_where_rows_are_older_than_the_window(unpod: PollHarness) -> None:
    """The filter knows whole days; a near look must not read all of them."""
    for rid in range(1, 60):
        unpod.call(rid, start_s=-rid * 600)

    near = await pages(unpod, hours=1)

    assert len(near) == 2
    assert unpod.provider.requests == 2


async def test_an_unordered_list_is_read_to_its_end(unpod: PollHarness) -> None:
    plans = [unpod.call(rid, start_s=-rid * 1200) for rid in range(1, 31)]
    simulator(unpod).inject(Fault(kind=FaultKind.SHUFFLE, on=LIST, times=None, seed=3))

    keys = {key for page in await pages(unpod, hours=1) for key in page}

    assert keys == {unpod.provider.key(plan) for plan in plans}


async def test_the_first_page_is_read_again_when_the_count_changed(unpod: PollHarness) -> None:
    plans = [unpod.call(rid, start_s=-rid * 60) for rid in range(1, 13)]
    unpod.budgets.before_request = lambda paid: (
        plans.append(unpod.call(100, start_s=-31, talk_s=1)) if paid == 2 else None
    )

    read = await pages(unpod)

    assert {key for page in read for key in page} == {unpod.provider.key(plan) for plan in plans}
    assert unpod.provider.key(plans[-1]) == read[-1][0]


async def test_a_list_that_ends_before_its_count_is_an_error(unpod: PollHarness) -> None:
    """`Failed to fetch logs` past the last page is the end; in the middle of the list it is not."""
    for rid in range(1, 31):
        unpod.call(rid, start_s=-rid * 60)

    def fail(paid: int) -> None:
        if paid == 3:
            simulator(unpod).inject(Fault(kind=FaultKind.STATUS, on=LIST, status=400, body='{"message":"Failed"}'))

    unpod.budgets.before_request = fail

    with pytest.raises(UnexpectedResponse, match="announced 30 calls and ended the list after 10"):
        await pages(unpod)


@pytest.mark.parametrize("durations", ["clock", "whole", "fraction"])
async def test_rows_without_an_id_are_ingested_once(
    unpod: PollHarness, durations: Literal["clock", "whole", "fraction"]
) -> None:
    simulator(unpod).with_id = False
    simulator(unpod).durations = durations
    await unpod.poll()
    unpod.advance(seconds=90)
    for rid in range(1, 8):
        unpod.call(rid, outside_number=f"(202) 555-01{rid:02d}")

    await unpod.poll()
    await unpod.poll()

    assert len(unpod.new_keys) == 7
    assert set(unpod.new_keys.values()) == {1}
    assert not unpod.count(RowOutcome.CHANGED)


@pytest.mark.parametrize("status", [206, 400])
async def test_a_missing_handle_is_named(unpod: PollHarness, status: Any) -> None:
    simulator(unpod).refuse = (  # type: ignore[method-assign]
        lambda request: FaultyUnpod.refuse(simulator(unpod), replace(request, headers={}))
    )
    simulator(unpod).no_org_status = status

    with pytest.raises(UnexpectedResponse, match="Check org_handle"):
        await pages(unpod)
