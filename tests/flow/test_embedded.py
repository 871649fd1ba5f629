"""The embedded store on a full disk: it says so, waits, and recovers by itself."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.errors import StoreError
from relay.store.embedded import EmbeddedStore
from tests.flow.harness import eventually

MB = 1_000_000


class Disk:
    """The free space that the file system reports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_mb = 1000
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**11, free=self.free_mb * MB))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_no_store_is_started_on_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    """It would crash at its first write, again and again."""
    disk.free_mb = 3

    with pytest.raises(StoreError, match=r"is full \(3 MB left\)"):
        async with EmbeddedStore(tmp_path):
            pytest.fail("it was started")
    disk.free_mb = 300
    async with EmbeddedStore(tmp_path):
        pass  # and nothing stands in the way of the next start


async def test_a_store_that_crashed_on_a_full_disk_restarts_when_there_is_space(disk: Disk, tmp_path: Path) -> None:
    """What it answered is still there; until then the log says what to do."""
    with capture_logs() as logs:
        async with EmbeddedStore(tmp_path) as store, Redis.from_url(store.url) as redis:
            await redis.set("kept", "1")
            disk.free_mb = 3
            assert store.pid is not None
            os.kill(store.pid, signal.SIGKILL)
            await eventually(lambda: _named(logs, "store_start_failed"), bool)
            disk.free_mb = 300
            await eventually(lambda: _named(logs, "store_restarted"), bool)
            assert await redis.get("kept") == b"1"

    [died] = await _named(logs, "store_crashed")
    assert "why" not in died  # a killed server logs nothing
    assert "Free some space" in (await _named(logs, "store_start_failed"))[0]["error"]


async def test_a_store_that_exits_logs_why(tmp_path: Path) -> None:
    """By the last lines of its log, which explain more than an exit code."""
    with capture_logs() as logs:
        async with EmbeddedStore(tmp_path) as store:
            async with Redis.from_url(store.url) as redis:
                await redis.shutdown(nosave=True)
            await eventually(lambda: _named(logs, "store_restarted"), bool)

    [died] = await _named(logs, "store_crashed")
    assert "bye bye" in died["reason"]


async def _named(logs: list[dict[str, object]], event: str) -> list[dict[str, object]]:
    return [entry for entry in logs if entry["event"] == event]
