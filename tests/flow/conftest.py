"""What the tests of the API share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.flow.api_desk import Desk, open_desk


@pytest.fixture
async def desk(redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """A running relay, asked over its API."""
    async with open_desk(redis, valkey_url, tmp_path, monkeypatch) as opened:
        yield opened
