"""The sweep on a whole runtime: poll lane, credentials, retention, and silence."""

import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.gauges import measure
from relay.processes import log_failing_sources
from relay.queue import keys as queue_keys
from relay.queue.settlement import Done
from relay.runtime import Runtime, open_runtime
from relay.store import keys
from relay.store.lanes import LaneName
from tests.flow.harness import KEY, read_settings
from workers.sweep import check_for_silence, sweep, trim

DAY_MS = 86_400_000


class Relays:
    """Opens runtimes on one store; nothing of them runs."""

    def __init__(self, stack: AsyncExitStack, url: str, folder: Path) -> None:
        self._stack = stack
        self._url = url
        self._folder = folder

    async def open(self, **sources: dict[str, Any]) -> Runtime:
        document = {
            "data_dir": str(self._folder),
            "sources": {
                sid: {"provider": "webfones", "base_url": "http://127.0.0.1:9", **options}
                for sid, options in sources.items()
            },
        }
        opening = open_runtime(read_settings(document), redis_url=self._url, secret_keys=[KEY])
        return await self._stack.enter_async_context(opening)


@pytest.fixture
async def relays(redis: Redis, valkey_url: str, tmp_path: Path) -> AsyncIterator[Relays]:
    async with AsyncExitStack() as stack:
        yield Relays(stack, valkey_url, tmp_path)


async def now_ms(redis: Redis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def due_in_s(redis: Redis, sid: str) -> float | None:
    """When a source is due, or None when it is not waiting."""
    due = await redis.zscore(queue_keys.waiting("poll", sid), sid)
    return None if due is None else (due - await now_ms(redis)) / 1000


async def postpone(redis: Redis, runtime: Runtime, sid: str, seconds: int) -> None:
    """Let a source be due only then, as after a poll."""
    await runtime.lanes[LaneName.POLL].drop(sid, sid)
    await runtime.lanes[LaneName.POLL].put(sid, sid, after_ms=seconds * 1000)
    assert await due_in_s(redis, sid) == pytest.approx(seconds, abs=2)


async def test_sweeping_twice_changes_nothing(relays: Relays, redis: Redis) -> None:
    """A sweep neither hurries nor delays a poll."""
    runtime = await relays.open(a={"api_key": "one"}, b={"api_key": "two"})
    await sweep(runtime)
    await postpone(redis, runtime, "a", 300)

    await sweep(runtime)
    await sweep(runtime)

    assert await due_in_s(redis, "a") == pytest.approx(300, abs=3)
    assert [await redis.zcard(queue_keys.waiting("poll", sid)) for sid in ("a", "b")] == [1, 1]


async def test_a_source_missing_from_the_poll_lane_is_put_back(relays: Relays, redis: Redis) -> None:
    """Its item was quarantined after five dead pollers, or the lane was emptied by hand."""
    runtime = await relays.open(a={"api_key": "one"})
    await runtime.lanes[LaneName.POLL].drop("a", "a")

    await sweep(runtime)

    assert await due_in_s(redis, "a") == pytest.approx(0, abs=2)


async def test_a_running_poll_is_not_made_due_again(relays: Relays) -> None:
    """Its lease holds, and it is not made due a second time."""
    runtime = await relays.open(a={"api_key": "one"})
    lane = runtime.lanes[LaneName.POLL]
    (claim,) = (await lane.exchange(want=5)).claims

    await sweep(runtime)

    assert (await lane.exchange(want=5)).claims == []
    assert not (await lane.exchange([(claim, Done())])).refused


async def test_a_paused_source_is_not_polled(relays: Relays, redis: Redis) -> None:
    """`enabled: false` keeps it out of the lane."""
    runtime = await relays.open(a={"api_key": "one", "enabled": False})

    await sweep(runtime)

    assert await due_in_s(redis, "a") is None


async def test_a_changed_key_file_is_used_at_once(relays: Relays, redis: Redis, tmp_path: Path) -> None:
    """A source with a rejected key waits 15 minutes; a new key ends that, and turns its extras on again."""
    file = tmp_path / "key"
    file.write_text("old-key")
    runtime = await relays.open(a={"api_key_file": str(file)}, b={"api_key": "two"})
    await sweep(runtime)
    await postpone(redis, runtime, "a", 900)
    await postpone(redis, runtime, "b", 900)
    await runtime.store.sources.note("a", contacts_off="403", recordings_off="403")
    await sweep(runtime)
    assert await due_in_s(redis, "a") == pytest.approx(900, abs=3)

    file.write_text("new-key")
    await sweep(runtime)

    state = await runtime.store.sources.read("a")
    assert await due_in_s(redis, "a") == pytest.approx(0, abs=2)
    assert await due_in_s(redis, "b") == pytest.approx(900, abs=3)
    assert (state.contacts_off, state.recordings_off) == ("", "")
    assert b"new-key" not in b"".join((await redis.hgetall(keys.source("a"))).values())


async def test_a_changed_key_in_the_configuration_is_used_at_once(relays: Relays, redis: Redis) -> None:
    """The relay was restarted with another key."""
    before = await relays.open(a={"api_key": "one"})
    await sweep(before)
    await postpone(redis, before, "a", 900)

    after = await relays.open(a={"api_key": "other"})
    await sweep(after)

    assert await due_in_s(redis, "a") == pytest.approx(0, abs=2)


async def test_a_missing_key_file_does_not_stop_the_sweep(relays: Relays, redis: Redis, tmp_path: Path) -> None:
    """It is being replaced: the other sources are swept, and the same key afterwards is no change."""
    file = tmp_path / "key"
    file.write_text("a-key")
    runtime = await relays.open(a={"api_key_file": str(file)}, b={"api_key": "two"})
    await sweep(runtime)
    await postpone(redis, runtime, "a", 900)
    await postpone(redis, runtime, "b", 900)
    file.unlink()
    await redis.hset(keys.source("b"), "credential", "that of before")

    await sweep(runtime)
    file.write_text("a-key")
    await sweep(runtime)

    assert await due_in_s(redis, "b") == pytest.approx(0, abs=2)
    assert await due_in_s(redis, "a") == pytest.approx(900, abs=3)


async def test_lists_are_trimmed_to_their_retention(relays: Relays, redis: Redis) -> None:
    """Calls after 30 days, events after 14; the list of a removed source expires."""
    runtime = await relays.open(a={"api_key": "one"})
    now = await now_ms(redis)
    for name in (keys.CALLS, keys.calls_of("a"), keys.EVENTS, keys.events_of("a")):
        await redis.zadd(name, {f"{days} days": now - days * DAY_MS for days in (1, 15, 29, 31)})

    await redis.zadd(queue_keys.quarantine("deliver"), {"old": now - 31 * DAY_MS, "new": now})

    await trim(runtime)

    assert await redis.zrange(queue_keys.quarantine("deliver"), 0, -1) == [b"new"]
    assert await redis.zrange(keys.CALLS, 0, -1) == [b"29 days", b"15 days", b"1 days"]
    assert await redis.zrange(keys.calls_of("a"), 0, -1) == [b"29 days", b"15 days", b"1 days"]
    assert await redis.zrange(keys.EVENTS, 0, -1) == [b"1 days"]
    assert await redis.zrange(keys.events_of("a"), 0, -1) == [b"1 days"]
    assert await redis.ttl(keys.calls_of("a")) > 400 * 86_400


async def test_calls_and_events_are_deleted_after_their_last_change(relays: Relays, redis: Redis) -> None:
    """An old call that changed yesterday is kept, with its place in the list; what nothing has touched is deleted."""
    runtime = await relays.open(a={"api_key": "one"})
    now = await now_ms(redis)
    for days_old, days_untouched in ((31, 31), (31, 1), (29, 29)):
        call_id = f"{days_old}-{days_untouched}"
        await redis.zadd(keys.CALLS, {call_id: now - days_old * DAY_MS})
        await redis.hset(keys.call(call_id), "version", "1")  # type: ignore[misc]
        left_days = 30 - days_untouched
        await redis.expire(keys.call(call_id), left_days * 86_400 + keys.FALLBACK_TTL_S)

    await trim(runtime)

    assert await redis.zrange(keys.CALLS, 0, -1) == [b"31-1", b"29-29"]
    assert sorted(await redis.keys("relay:call:*")) == [b"relay:call:29-29", b"relay:call:31-1"]


async def test_nothing_is_deleted_by_age_after_a_leap_of_the_store_clock(
    relays: Relays, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is 40 days ahead, which the process's own clock contradicts; set back, retention goes on."""
    runtime = await relays.open(a={"api_key": "one"})
    await runtime.process.beat()
    await redis.zadd(keys.CALLS, {"a call": await now_ms(redis) - 31 * DAY_MS})
    clock_gettime, ahead_s = time.clock_gettime, [40 * 86_400.0]
    # The store seems 40 days ahead when our own clock is 40 days behind what it will be.
    monkeypatch.setattr(time, "clock_gettime", lambda clock: clock_gettime(clock) - ahead_s[0])

    with capture_logs() as logs:
        await runtime.lanes[LaneName.POLL].apply()
        await trim(runtime)
    await measure(runtime)

    assert {"store_clock_leapt", "retention_suspended"} <= {each["event"] for each in logs}
    assert await redis.zcard(keys.CALLS) == 1
    assert REGISTRY.get_sample_value("relay_retention_suspended") == 1
    ahead_s[0] = 0.0
    await runtime.lanes[LaneName.POLL].apply()
    await trim(runtime)
    assert await redis.zcard(keys.CALLS) == 0


async def test_nothing_is_deleted_by_age_on_the_first_day_after_a_long_pause(relays: Relays, redis: Redis) -> None:
    """Nothing ran for 40 days, or the store's clock is wrong: no process can say."""
    await (await relays.open(a={"api_key": "one"})).process.beat()
    await redis.hincrby(queue_keys.CLOCK, "seen_at", -40 * DAY_MS)  # type: ignore[misc]
    await redis.delete(queue_keys.PROCESSES)
    await redis.zadd(keys.CALLS, {"a call": await now_ms(redis) - 31 * DAY_MS})
    runtime = await relays.open(a={"api_key": "one"})

    await trim(runtime)

    assert await redis.zcard(keys.CALLS) == 1
    await redis.hset(queue_keys.CLOCK, "suspended_until", str(await now_ms(redis) - 1))  # type: ignore[misc]
    await trim(runtime)
    assert await redis.zcard(keys.CALLS) == 0


async def test_recordings_are_trimmed_to_their_retention_and_markers_stay(relays: Relays, tmp_path: Path) -> None:
    """Recordings are deleted after 30 days; markers are kept."""
    runtime = await relays.open(a={"api_key": "one"})
    started = datetime.now(UTC) - timedelta(days=40)
    old, young = ("call_" + letter * 26 for letter in "ab")
    paths = []
    for call_id, age_days in ((old, 40), (young, 2)):
        stored = await runtime.storage.put(call_id, _audio(), started_on=started.date(), expected_size_bytes=4)
        paths.append(stored.path)  # type: ignore[union-attr]
        (file,) = tmp_path.rglob(f"{call_id}.*")  # noqa: ASYNC240 - a handful of files
        at = datetime.now(UTC).timestamp() - age_days * 86_400
        os.utime(file, (at, at))
    await runtime.storage.put_small("markers/a.json", b"{}")

    await trim(runtime)

    assert [await runtime.storage.size(path) for path in paths] == [None, 4]
    assert await runtime.storage.get_small("markers/a.json") == b"{}"


async def _audio() -> AsyncIterator[bytes]:
    yield b"RIFF"


async def test_trimming_happens_once_an_hour(relays: Relays, redis: Redis) -> None:
    """However many processes sweep."""
    runtime = await relays.open(a={"api_key": "one"})
    await sweep(runtime)
    await redis.zadd(keys.CALLS, {"old": 1})

    await sweep(runtime)
    assert await redis.zcard(keys.CALLS) == 1
    assert 3500 < await redis.ttl(keys.TRIMMED) <= 3600
    await redis.delete(keys.TRIMMED)
    await sweep(runtime)

    assert await redis.zcard(keys.CALLS) == 0


# Silence


async def busy_weeks(redis: Redis, sid: str, *, calls: int) -> None:
    """So many calls in each of the stretches that an hour of silence is held against, and one an hour ago."""
    now = await now_ms(redis)
    hour_ms = 3_600_000
    members = {"newest": now - hour_ms}
    for week in range(1, 5):
        for n in range(calls):
            members[f"{week}-{n}"] = now - week * 7 * DAY_MS - hour_ms // 2 - n * 1000
    await redis.zadd(keys.calls_of(sid), members)
    await redis.hset(keys.source(sid), "started_at", now - 100 * DAY_MS)  # type: ignore[misc]


async def test_a_source_without_calls_at_a_busy_hour_is_reported_once(relays: Relays, redis: Redis) -> None:
    """No request fails, so nothing else shows it: it is in the log, the source's health and the metrics."""
    runtime = await relays.open(a={"api_key": "one"}, b={"api_key": "two"})
    await busy_weeks(redis, "a", calls=4)
    await busy_weeks(redis, "b", calls=3)

    with capture_logs() as logs:
        await check_for_silence(runtime)
        await check_for_silence(runtime)
    await measure(runtime)

    assert [(log["source"], log["usual_calls"]) for log in logs if log["event"] == "source_went_quiet"] == [("a", 4)]
    quiet_since = (await runtime.store.sources.read("a")).quiet_since
    assert quiet_since is not None
    assert quiet_since.timestamp() == pytest.approx(await now_ms(redis) / 1000 - 3600, abs=60)
    assert (await runtime.store.sources.read("b")).quiet_since is None
    assert REGISTRY.get_sample_value("relay_sources_quiet") == 1


async def test_the_next_call_ends_the_silence(relays: Relays, redis: Redis) -> None:
    """It needs no acknowledgement."""
    runtime = await relays.open(a={"api_key": "one"})
    await busy_weeks(redis, "a", calls=9)
    await check_for_silence(runtime)
    await redis.zadd(keys.calls_of("a"), {"again": await now_ms(redis)})

    with capture_logs() as logs:
        await check_for_silence(runtime)
    await measure(runtime)

    assert [log["event"] for log in logs] == ["source_quiet_resolved"]
    assert (await runtime.store.sources.read("a")).quiet_since is None
    assert REGISTRY.get_sample_value("relay_sources_quiet") == 0


@pytest.mark.parametrize("name", ["error", "started_at"])
async def test_a_failing_or_new_source_is_not_reported_as_quiet(relays: Relays, redis: Redis, name: str) -> None:
    """Failures are reported already, and for a new source it is not known what is usual."""
    runtime = await relays.open(a={"api_key": "one"})
    await busy_weeks(redis, "a", calls=9)
    value = {"error": "the key is refused", "started_at": str(await now_ms(redis) - 13 * DAY_MS)}[name]
    await redis.hset(keys.source("a"), name, value)  # type: ignore[misc]

    with capture_logs() as logs:
        await check_for_silence(runtime)

    assert logs == []


async def test_silence_is_checked_every_five_minutes(relays: Relays, redis: Redis) -> None:
    """However many processes sweep."""
    runtime = await relays.open(a={"api_key": "one"})
    await busy_weeks(redis, "a", calls=4)

    await sweep(runtime)

    assert (await runtime.store.sources.read("a")).quiet_since is not None
    assert 0 < await redis.ttl(keys.SILENCE_CHECKED) <= 300


# What was wrong before


async def test_failing_sources_are_logged_again_at_start(relays: Relays, redis: Redis) -> None:
    """A source with a rejected key is not polled for a while, so nothing else would show its error."""
    runtime = await relays.open(a={"api_key": "one"}, b={"api_key": "two"}, c={"api_key": "three", "enabled": False})
    for sid in ("a", "c"):
        error = {"error": "WebFones rejected the key", "error_since": 1_795_000_000_000}
        await redis.hset(keys.source(sid), mapping=error)

    with capture_logs() as logs:
        await log_failing_sources(runtime)

    assert [(log["event"], log["source"], log["error"], log["since"]) for log in logs] == [
        ("source_still_failing", "a", "WebFones rejected the key", "2026-11-18T11:06:40Z")
    ]
