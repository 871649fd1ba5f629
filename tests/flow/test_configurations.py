"""Processes with different configurations: the newest decides what all of them share, and nothing is lost meanwhile."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.processes import reload_configuration
from relay.queue import keys as queue_keys
from relay.runtime import Runtime, open_runtime
from relay.settings import Settings
from relay.store import keys
from tests.flow.harness import KEY, read_settings
from workers.sweep import retire, sweep

SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"
MINUTE_MS = 60_000


class Processes:
    """Opens runtimes on one store, each with a configuration of its own; nothing of them runs."""

    def __init__(self, stack: AsyncExitStack, url: str, folder: Path) -> None:
        self._stack = stack
        self._url = url
        self._folder = folder

    def settings(self, *sources: str, **subscription: Any) -> Settings:
        document = {
            "data_dir": str(self._folder),
            "sources": {
                sid: {"provider": "webfones", "base_url": "http://127.0.0.1:9", "api_key": "key"} for sid in sources
            },
            "subscriptions": {"crm": {"url": "https://example.com/hook", "secret": SECRET, **subscription}},
        }
        return read_settings(document)

    async def open(self, *sources: str, **subscription: Any) -> Runtime:
        settings = self.settings(*sources, **subscription)
        opening = open_runtime(settings, redis_url=self._url, secret_keys=[KEY])
        return await self._stack.enter_async_context(opening)


@pytest.fixture
async def processes(redis: Redis, valkey_url: str, tmp_path: Path) -> AsyncIterator[Processes]:
    async with AsyncExitStack() as stack:
        yield Processes(stack, valkey_url, tmp_path)


async def limit(redis: Redis) -> int:
    return int(await redis.hget(queue_keys.partition("deliver", "crm"), "cap") or 0)  # type: ignore[misc]


async def let_pass(redis: Redis, ms: int) -> None:
    """Let so much time pass for all announcements of configurations."""
    for version in await redis.zrange(keys.CONFIGURATIONS, 0, -1):
        await redis.zincrby(keys.CONFIGURATIONS, -ms, version)


async def test_an_older_configuration_does_not_undo_a_newer_one(processes: Processes, redis: Redis) -> None:
    """Limits, and whether a subscription is enabled, are those of the newer one, whichever process sweeps."""
    old = await processes.open("main", max_in_flight=5)
    new = await processes.open("main", max_in_flight=7, enabled=False)

    for process in (old, new, old):
        await sweep(process)

        assert await limit(redis) == 7
        assert (await new.store.subscriptions.health("crm")).disabled_reason


async def test_a_restart_with_the_older_configuration_does_not_make_it_the_newer_one(
    processes: Processes, redis: Redis
) -> None:
    """A pod of the former release that restarts during a rolling upgrade changes nothing that is shared."""
    await processes.open("main", max_in_flight=5)
    await processes.open("main", max_in_flight=7)

    restarted = await processes.open("main", max_in_flight=5)

    assert await limit(redis) == 7
    assert not restarted.registry.decides("subscription", "crm")


async def test_an_older_configuration_that_comes_back_after_long_is_still_the_older_one(
    processes: Processes, redis: Redis
) -> None:
    """The release was rolled out long ago; one pod with the former configuration starts again."""
    await processes.open("main", max_in_flight=5)
    newer = await processes.open("main", max_in_flight=7)
    await let_pass(redis, 11 * MINUTE_MS)
    await newer.registry.announce()

    restarted = await processes.open("main", max_in_flight=5)

    assert not restarted.registry.decides("subscription", "crm")
    assert newer.registry.decides("subscription", "crm")


async def test_an_older_configuration_decides_again_when_no_newer_one_runs(processes: Processes, redis: Redis) -> None:
    """A rollback: once the last process with the newer configuration is gone, the older one is in force."""
    old = await processes.open("main", max_in_flight=5)
    await processes.open("main", max_in_flight=7)
    assert await limit(redis) == 7

    await let_pass(redis, 16_000)
    await sweep(old)

    assert await limit(redis) == 5


async def test_reloading_the_former_configuration_brings_it_into_force_at_once(
    processes: Processes, redis: Redis
) -> None:
    """SIGHUP with a change, SIGHUP without it again: nothing waits for the change to be forgotten."""
    process = await processes.open("main", max_in_flight=5)
    former, changed = process.settings, processes.settings("main", max_in_flight=7)

    for settings, expected in ((changed, 7), (former, 5)):
        await reload_configuration(process, lambda: settings)  # noqa: B023
        await process.registry.load()
        await process.reconciler.everything()

        assert await limit(redis) == expected


async def test_what_only_an_older_configuration_declares_is_still_its_own(processes: Processes, redis: Redis) -> None:
    """A process without sources, an API role say, takes nothing away from those that have them."""
    poller = await processes.open("main")
    await processes.open()

    await sweep(poller)

    assert await redis.zscore(queue_keys.waiting("poll", "main"), "main") is not None


async def test_a_source_is_removed_once_no_configuration_declares_it(processes: Processes, redis: Redis) -> None:
    """A source that left the configuration gets a tombstone, after the longest rolling restart and not before."""
    await processes.open("main", "other")
    remaining = await processes.open("main")
    await retire(remaining)
    assert await redis.hkeys(keys.removed("source")) == []  # type: ignore[misc]

    await let_pass(redis, 11 * MINUTE_MS)
    await remaining.registry.announce()
    await retire(remaining)

    assert await redis.hkeys(keys.removed("source")) == [b"other"]  # type: ignore[misc]


async def test_a_source_that_the_api_declares_too_outlives_its_place_in_the_configuration(
    processes: Processes, redis: Redis
) -> None:
    """It was moved from the configuration to the API: its calls and lanes go on."""
    await processes.open("main", "other")
    remaining = await processes.open("main")
    await let_pass(redis, 11 * MINUTE_MS)
    await remaining.registry.announce()
    await redis.hset("relay:declared:source", "other", "{}")  # type: ignore[misc]  # typed for both clients

    await retire(remaining)

    assert await redis.hkeys(keys.removed("source")) == []  # type: ignore[misc]


async def test_a_source_that_is_declared_again_has_no_tombstone(processes: Processes, redis: Redis) -> None:
    """Adding it again, whether by SIGHUP or by a new process, takes the removal back before anything is claimed."""
    process = await processes.open("main")
    await redis.hset(keys.removed("source"), "other", "1")  # type: ignore[misc]

    await processes.open("main", "other")

    assert await redis.hkeys(keys.removed("source")) == []  # type: ignore[misc]
    assert await process.store.configurations.retire() == []


async def test_a_reload_that_adds_at_most_once_needs_a_durable_store(processes: Processes, redis: Redis) -> None:
    """As at the start: on a store that may lose an answered write the current configuration stays in force."""
    process = await processes.open("main")
    await redis.config_set("appendonly", "no")
    added = {"url": "https://example.com/once", "secret": SECRET, "delivery": "at_most_once"}
    fresh = read_settings({"subscriptions": {"once": added}})

    with capture_logs() as logs:
        await reload_configuration(process, lambda: fresh)
    await process.registry.load()

    [entry] = logs
    assert entry["event"] == "configuration_reload_failed"
    assert "appendfsync always" in entry["error"]
    assert list(process.subscriptions) == ["crm"]
