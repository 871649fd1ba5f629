"""What the tests of the API share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.flow.api import ApiClient, open_api


@pytest.fixture
async def api(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ApiClient]:
    """A client of the API of a running relay."""
    async with open_api(redis, valkey_url, tmp_path, monkeypatch) as client:
        yield client
