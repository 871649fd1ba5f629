"""Each test that asks for `make` or `harness` runs on every provider."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
from redis.asyncio import Redis

from tests.contract.providers.harness import PollHarness, open_harness
from tests.contract.providers.registry import UNDER_TEST
from tests.contract.providers.under_test import MakeProvider


@pytest.fixture(params=sorted(UNDER_TEST))
def make(request: pytest.FixtureRequest) -> MakeProvider:
    """A provider under test."""
    return UNDER_TEST[request.param]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def harness(make: MakeProvider, redis: Redis, http: aiohttp.ClientSession) -> AsyncIterator[PollHarness]:
    """A provider at the poller, with pages of five rows where it has pages."""
    async with open_harness(make, redis, http, page_size=5) as harness:
        yield harness
