"""What is left behind, by a removal that died or while no worker runs, is bounded and stops nothing."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from arq import Retry
from redis.asyncio import Redis

from relay.domain.call import Outcome
from relay.queue.wake_ups import WakeUps
from relay.runtime import QUEUE
from relay.store import keys
from relay.store.jobs import Job, JobState
from relay.store.lanes import LaneName
from relay.store.sources import LeaseLost
from tests.flow.harness import RelayHarness, relay_harness
from workers.jobs import backfill, forget_source, replay
from workers.sweep import resume_removals, trim

DAY_MS = 86_400_000


@pytest.fixture
async def relay(redis: Redis, valkey_url: str, tmp_path: Path) -> AsyncIterator[RelayHarness]:
    async with relay_harness(redis, valkey_url, tmp_path) as harness:
        yield harness


async def die_while_removing(relay: RelayHarness, redis: Redis, sid: str) -> None:
    """Leave what a process leaves that was killed while it removed a source, two minutes ago."""
    await relay.runtime.store.sources.begin_removal(sid, tenant=None)
    await redis.delete(keys.removing(sid))


async def test_a_removal_that_died_does_not_keep_a_redeclared_source_from_ingesting(
    relay: RelayHarness, redis: Redis
) -> None:
    """The sweep resumes the removal; when it has ended, the source of the same id in relay.yaml ingests calls."""
    await die_while_removing(relay, redis, "main")
    with pytest.raises(LeaseLost):
        await relay.call("1")

    await resume_removals(relay.runtime)
    assert await redis.exists("arq:job:forget_source-main")
    await forget_source({"runtime": relay.runtime, "job_id": "forget_source-main"}, "main", "forget_source-main")

    await relay.call("1", outcome=Outcome.NO_ANSWER)
    await relay.until_delivered("a", 1)


async def test_a_removal_that_goes_on_is_not_resumed(relay: RelayHarness, redis: Redis) -> None:
    """Another process works on it."""
    await relay.runtime.store.sources.begin_removal("main", tenant=None)

    await resume_removals(relay.runtime)

    assert not await redis.exists("arq:job:forget_source-main")


async def test_nothing_is_left_of_a_removed_source_after_its_retention(relay: RelayHarness, redis: Redis) -> None:
    """What it was owed goes with its tombstone."""
    relay.runtime.sources.pop("main")
    await relay.call("1")
    now_ms = await relay.runtime.store.now_ms()
    await redis.hset(keys.removed("source"), "main", str(now_ms - 91 * DAY_MS))  # type: ignore[misc]

    await trim(relay.runtime)

    assert await redis.hkeys(keys.removed("source")) == []  # type: ignore[misc]
    assert await redis.keys("*owed*") == []


async def test_wake_ups_do_not_pile_up_without_a_worker(relay: RelayHarness, redis: Redis) -> None:
    """Two jobs a lane at most, however many calls come in."""
    wake_ups = WakeUps()
    wake_ups.send_through(relay.runtime.arq)

    for _ in range(30):
        for lane in LaneName:
            wake_ups(lane)
        await wake_ups.aclose()

    assert await redis.zcard(QUEUE) == 2 * len(LaneName)
    assert len(await redis.keys("arq:job:*")) == 2 * len(LaneName)


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("source", lambda ctx: backfill(ctx, "elsewhere", "", "", "j")),
        ("subscription", lambda ctx: replay(ctx, "elsewhere", 0, "all", True, "j")),
    ],
)
async def test_a_job_on_what_only_another_process_knows_waits_for_it(
    relay: RelayHarness, redis: Redis, kind: str, run: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """A worker with an older configuration gives the job back; what nothing declares fails it."""
    await redis.sadd(keys.configured(kind), "elsewhere")  # type: ignore[misc]
    ctx = {"runtime": relay.runtime, "job_id": "j", "sleep": None}
    await relay.runtime.store.jobs.create(Job("j", "any"))

    with pytest.raises(Retry):
        await run(ctx)

    job = await relay.runtime.store.jobs.get("j")
    assert job is not None
    assert job.state is JobState.WAITING
