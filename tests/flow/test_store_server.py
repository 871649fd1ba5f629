"""A server that would lose what the relay stores is refused at the start, and reported when it becomes one."""

from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.errors import StoreError
from relay.gauges import measure
from relay.runtime import open_runtime
from relay.store import database
from tests.flow.harness import KEY, eventually, read_settings

EVICTING = ["allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-ttl"]


async def start(url: str, folder: Path) -> None:
    async with open_runtime(read_settings({"data_dir": str(folder)}), redis_url=url, secret_keys=[KEY]):
        pass


@pytest.mark.parametrize("policy", EVICTING)
async def test_an_evicting_store_is_refused(redis: Redis, valkey_url: str, tmp_path: Path, policy: str) -> None:
    """Whatever it evicts would be calls and deliveries; the message says what to set."""
    await redis.config_set("maxmemory-policy", policy)
    try:
        with pytest.raises(StoreError, match="maxmemory-policy noeviction"):
            await start(valkey_url, tmp_path)
    finally:
        await redis.config_set("maxmemory-policy", "noeviction")


async def test_a_replica_is_refused(redis: Redis, valkey_url: str, tmp_path: Path) -> None:
    """It accepts no writes; the message says which address to set."""
    await redis.replicaof("127.0.0.1", 9)
    try:
        with pytest.raises(StoreError, match="RELAY_REDIS_URL to the primary"):
            await start(valkey_url, tmp_path)
    finally:
        await redis.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"cluster_enabled": 1}, "Redis Cluster"),
        ({"redis_mode": "sentinel"}, "Sentinel"),
        ({"role": "slave"}, "replica"),
        ({"maxmemory_policy": "volatile-lfu"}, "volatile-lfu"),
    ],
)
def test_an_unsuitable_server_is_named(info: dict[str, object], reason: str) -> None:
    problem = database.unsuitable(info)

    assert problem is not None
    assert reason in problem.reason


def test_a_server_that_hides_its_settings_is_accepted() -> None:
    assert database.unsuitable({}) is None
    assert database.unsuitable({"role": "master", "cluster_enabled": 0, "maxmemory_policy": "noeviction"}) is None


async def test_a_store_that_begins_to_evict_is_reported(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged once with what to set, and a metric for the alert, while the relay works on; then the end of it."""
    monkeypatch.setattr(database, "WATCH_EVERY_S", 0.02)
    opening = open_runtime(read_settings({"data_dir": str(tmp_path)}), redis_url=valkey_url, secret_keys=[KEY])

    async def wait_for(event: str) -> None:
        async def events() -> list[str]:
            return [entry["event"] for entry in logs]

        await eventually(events, lambda names: event in names)

    with capture_logs() as logs:
        async with opening as runtime:
            await redis.config_set("maxmemory-policy", "allkeys-lru")
            await wait_for("store_unsuitable")
            await measure(runtime)
            evicting = REGISTRY.get_sample_value("relay_store_unsuitable")
            await redis.config_set("maxmemory-policy", "noeviction")
            await wait_for("store_suitable_again")
            await measure(runtime)

    assert evicting == 1
    assert REGISTRY.get_sample_value("relay_store_unsuitable") == 0
    assert [entry["event"] for entry in logs].count("store_unsuitable") == 1
