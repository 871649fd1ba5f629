"""`relay backfill`: what was never published is published under the ids it would have had, and nothing else."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from arq import Retry
from arq.constants import in_progress_key_prefix
from redis.asyncio import Redis

from relay.cli.main import main
from relay.domain import ids
from relay.domain.time import iso
from relay.providers.base import Purpose
from relay.queue import keys as queue_keys
from relay.runtime import Runtime, open_runtime
from relay.settings import Settings, load
from relay.simulator.webfones import WebFonesEndpoint
from relay.store import keys
from relay.store.jobs import Job, JobState
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.subscriber import ScriptedSubscriber
from tests.fakes.webfones import FaultyWebFones
from tests.store import open_store
from workers.jobs import backfill
from workers.runners import add_poller, add_workers

KEY = "simulated-key"
SECRET = "whsec_c2ltdWxhdG9yLXNlY3JldC0wMTIzNDU2Nzg5"
OWN_KEY = "k" * 40


@dataclass
class BackfillHarness:
    """A relay in this process, between a simulated provider and a verifying subscriber; it polls once."""

    settings: Settings
    redis: Redis
    runtime: Runtime
    provider: FaultyWebFones
    subscriber: ScriptedSubscriber
    waits_s: list[float]

    async def backfill(
        self, hours: float, *, to_hours: float = 0, force: bool = False, job: str = "job", sid: str = "main"
    ) -> Job:
        """Run the job as arq would, for what started between `hours` and `to_hours` ago; returns it as it ended."""
        now = datetime.now(UTC)
        since, until = (iso(now - timedelta(hours=ago)) or "" for ago in (hours, to_hours))
        await backfill(self.context(), sid, since, until, job, force)
        return await self.job(job)

    async def job(self, job_id: str = "job") -> Job:
        job = await self.runtime.store.jobs.get(job_id)
        assert job is not None
        return job

    def context(self) -> dict[str, Any]:
        async def sleep(seconds: float) -> None:
            self.waits_s.append(seconds)

        return {"runtime": self.runtime, "job_id": "arq-job", "sleep": sleep}

    def call(self, hours_ago: float) -> str:
        """Add a call that started some hours ago, too late for the polls that come now."""
        ended_at = datetime.now(UTC) - timedelta(hours=hours_ago)
        return str(self.provider.appear(KEY, ended_at=ended_at, talk_s=20, disposition="NO ANSWER").rid)

    async def polled(self) -> None:
        """Wait until the first poll has been ingested, its deepest look too."""
        deepest_s = max(tier.depth_s for tier in self.runtime.settings.poll.tiers)

        async def ingested() -> bool:
            return deepest_s in (await self.runtime.store.sources.read("main")).poll_state.reached

        await _until(ingested)

    async def delivered(self, *rids: str) -> None:
        """Wait until these calls, and no others, were delivered."""
        await self.subscriber.until(lambda: self.subscriber.completed("a") >= set(rids))
        assert self.subscriber.completed("a") == set(rids)

    async def delivered_nothing_more(self) -> None:
        """Wait until the relay is idle, and check that nothing was delivered meanwhile."""
        before = self.subscriber.received("a")

        async def idle() -> bool:
            lanes = [(lane, standing) for lane in ("enrich", "deliver") for standing in queue_keys.STANDINGS]
            return not await self.redis.exists(*(queue_keys.index(*lane) for lane in lanes))

        await _until(idle)
        assert self.subscriber.received("a") == before


def _write_config(folder: Path, provider_url: str, subscriber_url: str, *, poll_s: float = 600, **more: Any) -> Path:
    config = {
        "data_dir": "data",
        "delivery": {"allowed_networks": ["127.0.0.0/8"]},
        "sources": {
            "main": {"provider": "webfones", "base_url": provider_url, "api_key": KEY, "poll_interval_s": poll_s},
            "off": {"provider": "webfones", "base_url": provider_url, "api_key": KEY, "enabled": False},
        },
        "subscriptions": {"crm": {"url": f"{subscriber_url}/hook/a", "secret": SECRET}},
        **more,
    }
    path = folder / "relay.yaml"
    path.write_text(json.dumps(config))
    return path


def _counts(job: Job, *names: str) -> tuple[int, ...]:
    return tuple(job.counts[name] for name in names)


async def _until(happened: Callable[[], Awaitable[bool]], *, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await happened():
                return
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _both_ends() -> AsyncIterator[tuple[FaultyWebFones, ScriptedSubscriber, str, str]]:
    provider, subscriber = FaultyWebFones(), ScriptedSubscriber()
    provider.add_account(KEY)
    subscriber.add_hook("a", SECRET)
    async with provider.serve() as provider_url, subscriber.serve() as subscriber_url:
        yield provider, subscriber, provider_url, subscriber_url


@pytest.fixture
async def relay(redis: Redis, valkey_url: str, tmp_path: Path) -> AsyncIterator[BackfillHarness]:
    """A running relay on an empty store; nothing was polled so far where `polled` is not awaited."""
    async with _both_ends() as (provider, subscriber, provider_url, subscriber_url):
        settings = load(_write_config(tmp_path, provider_url, subscriber_url), {})
        async with open_runtime(settings, redis_url=valkey_url, secret_keys=[OWN_KEY]) as runtime:
            add_poller(runtime)
            add_workers(runtime)
            stop = asyncio.Event()
            running = asyncio.create_task(runtime.run(stop, drain_s=5))
            try:
                yield BackfillHarness(settings, redis, runtime, provider, subscriber, [])
            finally:
                stop.set()
                await running


async def test_a_call_that_no_poll_returned_is_published_once_under_its_own_id(relay: BackfillHarness) -> None:
    """As if a poll had returned it; a second backfill publishes nothing, and the cursor stays."""
    await relay.polled()
    rid = relay.call(hours_ago=5)
    cursor = (await relay.runtime.store.sources.read("main")).poll_state.cursor

    first = await relay.backfill(6)
    await relay.delivered(rid)
    second = await relay.backfill(6, job="again")
    await relay.delivered_nothing_more()

    assert _counts(first, "rows", "new", "changed") == (1, 1, 0)
    assert _counts(second, "rows", "new", "changed") == (1, 0, 0)
    assert [event["id"] for event in relay.subscriber.events("a")] == [ids.event_id("main", rid, "call.completed")]
    assert relay.subscriber.events("a")[0]["context"]["via"] == "backfill"
    assert (await relay.runtime.store.sources.read("main")).poll_state.cursor == cursor


async def test_a_seeded_call_is_published_when_a_backfill_covers_it(relay: BackfillHarness) -> None:
    """The first start publishes nothing old; a backfill of the last six hours does, once."""
    rid = relay.call(hours_ago=5)
    await relay.polled()
    await relay.delivered_nothing_more()

    job = await relay.backfill(6)
    await relay.delivered(rid)
    again = await relay.backfill(6, job="again")
    await relay.delivered_nothing_more()

    assert _counts(job, "rows", "new") == (1, 1)
    assert _counts(again, "rows", "new") == (1, 0)


async def test_only_calls_of_the_range_are_published(relay: BackfillHarness) -> None:
    """A call after `to` is another range's, even where the provider lists it because its list has no upper bound."""
    await relay.polled()
    rid = relay.call(hours_ago=5)
    relay.call(hours_ago=2)
    relay.call(hours_ago=8)

    job = await relay.backfill(6, to_hours=4)
    await relay.delivered(rid)
    await relay.delivered_nothing_more()

    assert _counts(job, "new") == (1,)


async def test_rows_below_the_floor_need_force(relay: BackfillHarness) -> None:
    """Whether a call of ten days ago was published is no longer known, so it needs a decision."""
    await relay.polled()
    rid = relay.call(hours_ago=240)

    unforced = await relay.backfill(300)
    await relay.delivered_nothing_more()
    forced = await relay.backfill(300, force=True, job="forced")
    await relay.delivered(rid)
    again = await relay.backfill(300, force=True, job="forced again")
    await relay.delivered_nothing_more()

    assert _counts(unforced, "new", "too_old") == (0, 1)
    assert _counts(forced, "new") == (1,)
    assert _counts(again, "new") == (0,)


async def test_two_runs_at_once_publish_everything_once(relay: BackfillHarness) -> None:
    """A job that was taken for dead goes on beside its successor."""
    await relay.polled()
    rids = [relay.call(hours_ago=4 + number / 60) for number in range(120)]

    await asyncio.gather(relay.backfill(7), relay.backfill(7), relay.backfill(7, job="other"))
    await relay.delivered(*rids)
    await relay.delivered_nothing_more()

    assert relay.subscriber.reports().duplicates == 0
    assert relay.subscriber.received("a") == 120


async def test_an_interrupted_run_is_resumed(relay: BackfillHarness) -> None:
    """The relay stops in the middle: the next run of the same job finishes it, and one after that does nothing."""
    await relay.polled()
    rid = relay.call(hours_ago=5)
    relay.provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.RECORDS, times=None))
    interrupted = asyncio.create_task(relay.backfill(6))

    async def begun() -> bool:
        job = await relay.runtime.store.jobs.get("job")
        return job is not None and job.state is JobState.RUNNING

    await _until(begun)
    interrupted.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await interrupted
    relay.provider.clear_faults()

    resumed = await relay.backfill(6)
    await relay.delivered(rid)
    asked = relay.provider.requests[KEY, WebFonesEndpoint.RECORDS]
    await relay.backfill(6)

    assert interrupted.cancelled()
    assert resumed.state is JobState.DONE
    assert relay.provider.requests[KEY, WebFonesEndpoint.RECORDS] == asked


async def test_a_resumed_run_does_not_read_again_what_it_has_read(relay: BackfillHarness) -> None:
    """It goes on where the job's position is, which matters for ranges of months."""
    await relay.polled()
    relay.call(hours_ago=5)
    rid = relay.call(hours_ago=2)
    jobs = relay.runtime.store.jobs
    await jobs.create(Job("job", "backfill"))
    position = {"at": iso(datetime.now(UTC) - timedelta(hours=3)), "total": {"rows": 7}}
    await jobs.update("job", JobState.RUNNING, position=position)

    resumed = await relay.backfill(6)
    await relay.delivered(rid)

    assert _counts(resumed, "rows", "new") == (8, 1)


async def test_the_job_of_a_killed_worker_is_free_within_a_minute(relay: BackfillHarness) -> None:
    """arq would take it for running for hours; its in-progress key is kept short while the job lives."""
    await relay.polled()
    mark = in_progress_key_prefix + "arq-job"
    await relay.redis.psetex(mark, 7_200_000, b"1")
    relay.provider.inject(Fault(kind=FaultKind.HANG, on=WebFonesEndpoint.RECORDS, times=None))
    running = asyncio.create_task(relay.backfill(6))

    async def shortened() -> bool:
        return bool(await relay.redis.pttl(mark) <= 45_000)

    try:
        await _until(shortened)
        left_ms = await relay.redis.pttl(mark)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    assert 30_000 < left_ms <= 45_000


async def test_an_unavailable_provider_is_retried(relay: BackfillHarness) -> None:
    await relay.polled()
    rid = relay.call(hours_ago=5)
    relay.provider.inject(Fault(kind=FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, status=503, times=2))

    job = await relay.backfill(6)

    assert job.state is JobState.DONE
    assert len(relay.waits_s) == 2
    assert _counts(job, "new") == (1,)
    await relay.delivered(rid)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(kind=FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, status=403, times=None), "rejected the key"),
        (Fault(kind=FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, status=500, times=None), "failed to return"),
        (Fault(kind=FaultKind.NOT_JSON, on=WebFonesEndpoint.RECORDS, times=None), "WebFones"),
    ],
)
async def test_a_provider_that_keeps_failing_fails_the_job_with_its_error(
    relay: BackfillHarness, fault: Fault, sentence: str
) -> None:
    await relay.polled()
    relay.provider.inject(fault)

    job = await relay.backfill(6)

    assert job.state is JobState.FAILED
    assert sentence in job.error


async def test_an_exhausted_budget_is_waited_for(relay: BackfillHarness) -> None:
    """A backfill comes last: it waits for its share of the provider's limit, and then reads on."""
    await relay.polled()
    spent: list[float] = []
    context = relay.context()

    async def sleep(seconds: float) -> None:
        spent.append(seconds)
        await relay.redis.delete(*[key async for key in relay.redis.scan_iter("relay:budget:*")])

    context["sleep"] = sleep
    budget = relay.runtime.sources["main"].budget
    assert budget.limit is not None
    for _ in range(int(budget.limit.burst * 0.7)):
        await budget.spend(Purpose.POLL)

    now = datetime.now(UTC)
    await backfill(context, "main", iso(now - timedelta(hours=6)) or "", iso(now) or "", "job")

    assert (await relay.job()).state is JobState.DONE
    assert len(spent) == 1


async def test_a_source_that_was_never_polled_is_not_backfilled(relay: BackfillHarness) -> None:
    """Before the first poll everything would be new, and all of last week would be published."""
    relay.provider.inject(Fault(kind=FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, status=500, times=None))
    await relay.redis.delete(keys.source("main"))
    relay.call(hours_ago=5)

    job = await relay.backfill(6)

    assert job.state is JobState.FAILED
    assert "wait for its first poll" in job.error


async def test_an_unknown_source_fails_the_job(relay: BackfillHarness) -> None:
    """The command and the relay may have different configurations."""
    job = await relay.backfill(6, sid="elsewhere")

    assert job.state is JobState.FAILED
    assert "no source called elsewhere" in job.error


async def test_an_unavailable_store_queues_the_job_again(relay: BackfillHarness) -> None:
    class Gone:
        store = open_store(Redis(unix_socket_path="/nowhere/valkey.sock"))

    with pytest.raises(Retry):
        await backfill({"runtime": Gone(), "job_id": "j", "sleep": asyncio.sleep}, "main", "", "", "job")


async def test_the_command_works_beside_a_relay_of_one_process(tmp_path: Path, free_port: int) -> None:
    """`relay up` on its embedded store, `relay backfill` in another shell."""
    async with _both_ends() as (provider, subscriber, provider_url, subscriber_url):
        ports = {"api": {"port": free_port}, "internal": {"port": 0}}
        config = _write_config(tmp_path, provider_url, subscriber_url, poll_s=1, **ports)
        relay = await _command("up", "-c", str(config), stderr=subprocess.DEVNULL)

        async def polled_twice() -> bool:
            assert relay.returncode is None
            return provider.statuses[KEY, WebFonesEndpoint.RECORDS, 200] > 1

        try:
            await _until(polled_twice, timeout_s=30)
            ended_at = datetime.now(UTC) - timedelta(hours=5)
            rid = str(provider.appear(KEY, ended_at=ended_at, disposition="NO ANSWER").rid)
            filling = await _command("backfill", "main", "--since", "6h", "-c", str(config), stderr=subprocess.PIPE)
            stdout, stderr = await filling.communicate()
            await subscriber.until(lambda: rid in subscriber.completed("a"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                relay.terminate()
            await relay.communicate()

    assert filling.returncode == 0, stderr.decode()
    assert stdout.decode() == "backfill done: 1 rows, 1 new\n"
    assert relay.returncode == 0


async def _command(*arguments: str, stderr: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={name: value for name, value in os.environ.items() if not name.startswith("RELAY_")},
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "soon"], "--since: 'soon' is not a valid time; use 2h, 3d or 2026-11-20T10:00:00Z"),
        (["--since", "2"], "--since: '2' is not a valid duration; use 2s, 2h or 2d"),
        (["--since", "2h", "--until", "eventually"], "--until: 'eventually' is not a valid time"),
        (["--since", "2h", "--until", "3h"], "must be before --until"),
    ],
)
def test_an_invalid_range_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is sent to the relay."""
    with pytest.raises(SystemExit) as ended:
        main(["backfill", "main", *arguments, "--url", "http://127.0.0.1:1", "--token", "t"])

    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_relay_the_message_names_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write_config(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:1", api={"port": 1, "tokens": ["t" * 16]})

    with pytest.raises(SystemExit) as ended:
        main(["backfill", "main", "--since", "2h", "-c", str(config)])

    assert ended.value.code == 1
    assert "no relay answers at http://127.0.0.1:1 (connection refused); start it with `relay up`" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "data").exists()
