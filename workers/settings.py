"""`arq workers.settings.WorkerSettings`, `python -m workers` and `relay worker` are the same worker.

arq's start-up opens the runtime and the runners, its jobs are wake-ups and the operator's long work, its cron is the
sweep. Deliveries are not arq jobs: they wait in the deliver lane, under leases.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog
from arq import Worker, cron, func
from arq.connections import RedisSettings

from relay.api.server import serve_internal
from relay.errors import SettingsError
from relay.log import configure
from relay.processes import reload_on_hangup, require_connection, stop_on_signals
from relay.runtime import QUEUE, Runtime, open_runtime
from relay.settings import Settings, load
from relay.store.connection import STORE_ERRORS
from relay.tasks import cancel
from workers import jobs, sweep
from workers.heal import heal
from workers.runners import add_workers

log = structlog.get_logger(__name__)

# How often a worker checks for wake-ups.
WAKE_POLL_S = 0.02


async def _sweep(ctx: dict[str, Any]) -> None:
    await sweep.sweep(ctx["runtime"])


FUNCTIONS = [
    func(jobs.wake, name="wake", max_tries=1, keep_result=0, timeout=5),
    func(jobs.replay, name="replay", max_tries=10_000, keep_result=0, timeout=2 * 3600),
    func(jobs.erase, name="erase", max_tries=10_000, keep_result=0, timeout=2 * 3600),
    func(jobs.forget_source, name="forget_source", max_tries=10_000, keep_result=0, timeout=2 * 3600),
    func(jobs.backfill, name="backfill", max_tries=10_000, keep_result=0, timeout=2 * 3600),
    func(heal, name="heal", max_tries=10_000, keep_result=0, timeout=2 * 3600),
]
CRON = [cron(_sweep, name="sweep", second={0, 30}, timeout=60, keep_result=0, max_tries=1)]
OPTIONS: dict[str, Any] = {
    "functions": FUNCTIONS,
    "cron_jobs": CRON,
    "queue_name": QUEUE,
    "handle_signals": False,
    "keep_result": 0,
    "poll_delay": WAKE_POLL_S,
    "max_jobs": 50,
    "job_serializer": lambda job: json.dumps(job).encode(),
    "job_deserializer": json.loads,
    "log_results": False,
    "health_check_interval": 60,
}


async def host(runtime: Runtime, *, poll_delay_s: float = WAKE_POLL_S) -> None:
    """Keep an arq worker running over a runtime. Its loop ends when the store restarts, so it is started again."""
    unavailable = False
    while True:
        ctx = {"runtime": runtime, "sleep": asyncio.sleep}
        worker = Worker(**OPTIONS | {"poll_delay": poll_delay_s}, redis_pool=runtime.arq, ctx=ctx)
        try:
            await worker.async_run()
        except asyncio.CancelledError:
            await cancel(*worker.tasks.values())
            raise
        except STORE_ERRORS as error:
            if not unavailable:
                log.warning("wake_ups_paused", error=str(error), reason="the store is unavailable")
            unavailable = True
            await asyncio.sleep(1)
        else:
            unavailable = False


def settings_of_environment() -> tuple[Settings, str, Sequence[str]]:
    """Read the settings of a separate role from RELAY_CONFIG, RELAY_REDIS_URL and RELAY_SECRET_KEY."""
    config = os.environ.get("RELAY_CONFIG")
    settings = load(Path(config) if config else None, os.environ)
    return (settings, *require_connection(settings))


async def _startup(ctx: dict[str, Any]) -> None:
    """Open everything inside the loop of arq's own command line, and take over the signals."""
    settings, redis_url, secret_keys = settings_of_environment()
    configure(settings.log.level, settings.log.format)
    stack = AsyncExitStack()
    runtime = await stack.enter_async_context(open_runtime(settings, redis_url=redis_url, secret_keys=secret_keys))
    add_workers(runtime)
    runtime.wake_ups.send_through(runtime.arq)
    await stack.enter_async_context(serve_internal(runtime))
    stop = stop_on_signals(settings.drain_s)
    reload_on_hangup(runtime, lambda: settings_of_environment()[0])
    arq_main = asyncio.current_task()
    running = asyncio.create_task(runtime.run(stop, drain_s=settings.drain_s))

    async def leave() -> None:
        # arq's loop ends when its main task does; we end that after a stop, once everything is settled.
        await asyncio.wait([running])
        if arq_main is not None:
            await cancel(arq_main)

    leaving = asyncio.create_task(leave())
    ctx |= {"runtime": runtime, "stack": stack, "running": running, "leaving": leaving, "stop": stop}
    ctx["sleep"] = asyncio.sleep


async def _shutdown(ctx: dict[str, Any]) -> None:
    ctx["stop"].set()
    with contextlib.suppress(asyncio.CancelledError):
        await ctx["running"]
    await ctx["leaving"]
    await ctx["stack"].aclose()


def _worker_settings() -> type:
    try:
        _, url, _ = settings_of_environment()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    hooks = {"on_startup": _startup, "on_shutdown": _shutdown, "redis_settings": RedisSettings.from_dsn(url)}
    return type("WorkerSettings", (), OPTIONS | hooks)


def __getattr__(name: str) -> Any:
    """Build `WorkerSettings` when arq asks for it, so that importing this module reads nothing."""
    if name == "WorkerSettings":
        return _worker_settings()
    raise AttributeError(name)
