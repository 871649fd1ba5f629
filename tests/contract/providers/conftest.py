"""Each test that asks for `make` or `desk` runs on every provider."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
from redis.asyncio import Redis

from tests.contract.providers.desk import Desk, open_desk
from tests.contract.providers.subject import MakeSubject
from tests.contract.providers.subjects import SUBJECTS


@pytest.fixture(params=sorted(SUBJECTS))
def make(request: pytest.FixtureRequest) -> MakeSubject:
    """A provider under test."""
    return SUBJECTS[request.param]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def desk(make: MakeSubject, redis: Redis, http: aiohttp.ClientSession) -> AsyncIterator[Desk]:
    """A provider at the poller, with pages of five rows where it has pages."""
    async with open_desk(make, redis, http, page_size=5) as desk:
        yield desk
