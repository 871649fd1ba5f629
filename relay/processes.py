"""The processes: what each role starts, and how it stops: claim nothing more, finish, settle, close."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog

from relay import secrets
from relay.api.server import serve_api, serve_internal
from relay.domain.time import from_ms, iso
from relay.errors import SettingsError
from relay.runtime import Runtime, open_runtime
from relay.settings import Settings, changed_outside_maps
from relay.store.connection import STORE_ERRORS
from relay.store.embedded import EmbeddedStore
from relay.tasks import cancel

log = structlog.get_logger(__name__)

_CLOSING_S = 5.0

# Adds the runners of a role to a runtime.
AddRunners = Callable[[Runtime], object]
# Keeps an arq worker running over a runtime.
Host = Callable[[Runtime], Awaitable[None]]


@asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[tuple[str, Sequence[str]]]:
    """Yield the store's URL and the secret keys: as configured, else those of an embedded store."""
    keys: Sequence[str] = [key.get_secret_value() for key in settings.secret_key]
    if settings.redis_url is not None:
        if not keys:
            raise SettingsError(
                "RELAY_SECRET_KEY is not set: with RELAY_REDIS_URL the relay needs a key of at least 32 characters, "
                f"the same for every process. A new one: {secrets.generate_key()}"
            )
        yield settings.redis_url.get_secret_value(), keys
        return
    if not keys:
        keys = secrets.load_or_create(settings.data_dir).keys
    async with EmbeddedStore(settings.data_dir) as store:
        yield store.url, keys


def require_connection(settings: Settings) -> tuple[str, Sequence[str]]:
    """The store's URL and secret keys, which a separate role needs. Raises SettingsError when one is missing."""
    missing = []
    if settings.redis_url is None:
        missing.append(
            "RELAY_REDIS_URL is not set: separate roles share a Redis or Valkey, such as redis://host:6379/0."
        )
    if not settings.secret_key:
        missing.append("RELAY_SECRET_KEY is not set: all roles need the same key of at least 32 characters.")
    if missing or settings.redis_url is None:
        raise SettingsError("\n".join(missing))
    return settings.redis_url.get_secret_value(), [key.get_secret_value() for key in settings.secret_key]


def stop_on_signals(drain_s: float) -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set; a second signal ends the process at once.

    The process ends within `drain_s` and a few seconds for closing, whatever it waits for.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("process_killed", signal=number.name)
            loop.remove_signal_handler(number)
            signal.raise_signal(number)
        log.info("process_stopping", signal=number.name)
        stop.set()
        exit_within(drain_s + _CLOSING_S, code=1)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def exit_within(wait_s: float, *, code: int) -> None:
    """Exit after `wait_s` if the process still runs then. A name that is being resolved cannot be cancelled: without an
    answer from DNS its thread keeps the event loop from closing and the interpreter from ending."""

    def leave() -> None:
        time.sleep(wait_s)
        if code != 0:
            log.error("process_exit_forced", after_s=wait_s, reason="something did not close in time")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    threading.Thread(target=leave, name="exit", daemon=True).start()


async def up(
    settings: Settings,
    add_runners: AddRunners,
    host: Host,
    stop: asyncio.Event,
    *,
    read: Callable[[], Settings],
) -> None:
    """Run everything in this process; `read` reloads the configuration."""
    async with open_store(settings) as (url, keys), open_runtime(settings, redis_url=url, secret_keys=keys) as runtime:
        if settings.redis_url is None:
            # We have the lock on the directory, so every former process is dead: its leases need not run out first.
            await runtime.process.beat(alone=True)
        add_runners(runtime)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(serve_api(runtime))
            await stack.enter_async_context(serve_internal(runtime))
            await stack.enter_async_context(_hosted(host, runtime))
            reload_on_hangup(runtime, read)
            log_start(runtime)
            await log_failing_sources(runtime)
            await runtime.run(stop, drain_s=settings.drain_s)
    log.info("process_stopped")


async def role(
    settings: Settings,
    name: str,
    stop: asyncio.Event,
    *,
    add_runners: AddRunners | None = None,
    host: Host | None = None,
    read: Callable[[], Settings],
) -> None:
    """Run one role: `poller`, `worker` (with its runners and arq host), or `api`."""
    url, keys = require_connection(settings)
    async with open_runtime(settings, redis_url=url, secret_keys=keys) as runtime, AsyncExitStack() as stack:
        runtime.wake_ups.send_through(runtime.arq)
        if add_runners is not None:
            add_runners(runtime)
        if name == "api":
            await stack.enter_async_context(serve_api(runtime))
        await stack.enter_async_context(serve_internal(runtime))
        if host is not None:
            await stack.enter_async_context(_hosted(host, runtime))
        reload_on_hangup(runtime, read)
        log.info("process_started", role=name)
        if name == "poller":
            await log_failing_sources(runtime)
        await runtime.run(stop, drain_s=settings.drain_s)
    log.info("process_stopped", role=name)


def reload_on_hangup(runtime: Runtime, read: Callable[[], Settings]) -> None:
    """Reload the configuration on SIGHUP: sources and subscriptions change, all else needs a restart."""
    one_at_a_time = asyncio.Lock()
    reloading: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        async with one_at_a_time:
            await reload_configuration(runtime, read)

    def on_hangup() -> None:
        task = asyncio.create_task(reload(), name="reload")
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)


async def reload_configuration(runtime: Runtime, read: Callable[[], Settings]) -> None:
    """Apply the configuration as it is now; one that would be refused at the start changes nothing."""
    try:
        fresh = read()
        await runtime.require_durability(fresh.subscriptions)
    except (SettingsError, *STORE_ERRORS) as error:
        log.error("configuration_reload_failed", error=str(error), action="the current one stays in force")
        return
    for name in changed_outside_maps(runtime.settings, fresh):
        log.warning("setting_change_ignored", setting=name, action="restart the process")
    runtime.registry.reconfigure(fresh)
    log.info("configuration_reloaded", sources=len(fresh.sources), subscriptions=len(fresh.subscriptions))


@asynccontextmanager
async def _hosted(host: Host, runtime: Runtime) -> AsyncIterator[None]:
    async def run() -> None:
        await host(runtime)

    hosting = asyncio.create_task(run(), name="arq")
    try:
        yield
    finally:
        await cancel(hosting)
        if not hosting.cancelled():
            hosting.result()


async def log_failing_sources(runtime: Runtime) -> None:
    """Log again which sources were failing before this start: one that was rejected is not polled for a while."""
    active = [source for source in runtime.sources.values() if not source.paused]
    states = await asyncio.gather(*(runtime.store.sources.read(source.id) for source in active))
    for source, state in zip(active, states, strict=True):
        if state.error:
            since = iso(from_ms(state.error_since_ms))
            log.error("source_still_failing", source=source.id, error=state.error, since=since)


def log_start(runtime: Runtime) -> None:
    """Log what is running, for the person who started it."""
    settings = runtime.settings
    log.info(
        "relay_started",
        sources=len(runtime.sources),
        subscriptions=len(runtime.subscriptions),
        api=f"{settings.api.host}:{settings.api.port}",
        recording_links="null: set public_url" if settings.public_url is None else settings.recording_links,
        data_dir=str(Path(settings.data_dir)),
    )
    if not runtime.sources:
        log.warning("sources_missing", action="add an account under sources: in relay.yaml")
    if not runtime.subscriptions:
        log.warning("subscriptions_missing", action="add a subscriber under subscriptions: in relay.yaml")
