"""`relay backfill`: hands a range to the running relay and shows how far it is. Who stops watching stops nothing."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import uuid4

from arq.connections import ArqRedis
from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from relay import secrets
from relay.domain.time import iso, parse_instant
from relay.errors import RelayError, SettingsError, StoreError
from relay.processes import require_connection
from relay.runtime import QUEUE
from relay.secrets import SecretBox
from relay.settings import Settings
from relay.store import keys
from relay.store.embedded import EmbeddedStore
from relay.store.sources import Progress

_LOOK_EVERY_S = 0.2
_PATIENCE_S = 15.0
_QUEUED_FOR = timedelta(days=7)
_REDIS = {"socket_timeout": 10, "socket_connect_timeout": 5}


@dataclass(frozen=True, slots=True)
class Range:
    """What is to be read again: calls of a source that started from `since` to `until`."""

    source: str
    since: datetime
    until: datetime
    force: bool = False


@dataclass(frozen=True, slots=True)
class PollState:
    """How far a backfill is. `done` is from 0 to 1."""

    state: Literal["queued", "running", "waiting", "done", "failed"]
    done: float
    rows: int
    new: int
    changed: int
    bad: int
    too_old: int
    error: str

    @property
    def known(self) -> int:
        """Rows that were as the relay had them, or were there before it began."""
        return max(self.rows - self.new - self.changed - self.bad - self.too_old, 0)

    def words(self) -> str:
        """Say what became of the rows; what did not happen is left out."""
        parts = [f"{self.new} new", f"{self.changed} changed", f"{self.known} known"]
        if self.too_old:
            parts.append(f"{self.too_old} too old to be told apart from known ones (--force takes them too)")
        if self.bad:
            parts.append(f"{self.bad} unreadable (relay check shows why)")
        return f"read {self.rows} rows: {', '.join(parts)}"


def asked_for(source: str, *, since: str, until: str | None, force: bool, now: datetime) -> Range:
    """Understand the command line; a SettingsError says in a sentence what is wrong with it."""
    start = parse_instant(since, name="--since", now=now)
    end = now if until is None else parse_instant(until, name="--until", now=now)
    if start >= now:
        raise SettingsError(f"--since: {iso(start)} is still to come")
    if start >= end:
        raise SettingsError(f"--since {iso(start)} must be before --until {iso(end)}")
    return Range(source, start, min(end, now), force)


def _unknown(source: str, known: Iterable[str]) -> SettingsError:
    names = ", ".join(sorted(known)) or "none: add one under sources: in relay.yaml"
    return SettingsError(f"no source is called {source[:64]!r}; there are {names}")


def poll_state(fields: Mapping[str, str]) -> PollState:
    """Read what the job has written down."""
    counts = {name: int(fields.get(name, 0)) for name in ("rows", "new", "changed", "bad", "too_old")}
    state = fields.get("state", "queued")
    known: dict[str, Literal["queued", "running", "waiting", "done", "failed"]] = {
        "running": "running",
        "waiting": "waiting",
        "done": "done",
        "failed": "failed",
    }
    return PollState(known.get(state, "queued"), float(fields.get("done", 0)), error=fields.get("error", ""), **counts)


class BackfillFailed(RelayError):
    """The relay gave the range up; the text says why."""


class NobodyHome(StoreError):
    """No relay has taken the job up; the text says how to start one."""


@contextlib.asynccontextmanager
async def queue_of(settings: Settings) -> AsyncIterator[ArqRedis]:
    """Reach the queue of the running relay: the configured Redis, else the embedded store's socket.

    Raises NobodyHome when there is no store to talk to, StoreError when it is another relay's.
    """
    if settings.redis_url is not None:
        url, secret_keys = require_connection(settings)
    else:
        store = EmbeddedStore(settings.data_dir)
        if not store.socket.exists():
            raise NobodyHome(_not_running(settings))
        url = store.url
        secret_keys = [key.get_secret_value() for key in settings.secret_key]
        secret_keys = secret_keys or secrets.load_or_create(settings.data_dir).keys
    pool = ConnectionPool.from_url(url, **_REDIS)
    arq = ArqRedis(pool, default_queue_name=QUEUE, job_serializer=lambda job: json.dumps(job).encode())
    try:
        try:
            owner = await arq.get(keys.IDENTITY)
        except (RedisError, OSError) as error:
            if settings.redis_url is None:
                raise NobodyHome(_not_running(settings)) from error
            raise StoreError(f"the Redis of RELAY_REDIS_URL does not answer: {error}") from error
        if owner is not None and owner.decode() not in SecretBox(secret_keys).fingerprints():
            raise StoreError(
                "this Redis database belongs to another relay (it was started with another RELAY_SECRET_KEY); "
                "use the configuration that the running relay has"
            )
        yield arq
    finally:
        await arq.aclose(close_connection_pool=True)


@contextlib.asynccontextmanager
async def _queue_for(settings: Settings, source: str) -> AsyncIterator[ArqRedis]:
    """Reach the queue of a relay that has this source: from the configuration, or made through its API."""
    async with AsyncExitStack() as stack:
        try:
            arq = await stack.enter_async_context(queue_of(settings))
        except NobodyHome:
            if source not in settings.sources:
                raise _unknown(source, settings.sources) from None
            raise
        if source not in settings.sources:
            made = {name.decode() for name in await arq.hkeys(keys.declared("source"))}  # type: ignore[misc]  # both clients
            if source not in made:
                raise _unknown(source, made.union(settings.sources))
        yield arq


def _not_running(settings: Settings) -> str:
    return (
        f"no relay is running on {settings.data_dir}; "
        "start one with `relay up` and the same configuration, then run this again"
    )


async def submit(arq: ArqRedis, wanted: Range) -> str:
    """Put the job into the queue; gives its name."""
    job = f"backfill-{uuid4().hex[:12]}"
    since, until = iso(wanted.since) or "", iso(wanted.until) or ""
    await Progress(arq, job).write(state="queued", source=wanted.source, since=since, until=until)
    await arq.enqueue_job("backfill", wanted.source, since, until, job, wanted.force, _job_id=job, _expires=_QUEUED_FOR)
    return job


async def watch(
    redis: Redis, job: str, *, show: Callable[[PollState], None], patience_s: float = _PATIENCE_S
) -> PollState:
    """Show how far the job is until it ends; gives how it ended.

    Raises NobodyHome when nobody takes it up within `patience_s`; the job stays queued. A store that is away for a
    while is waited for.
    """
    progress = Progress(redis, job)
    asked_at = time.monotonic()
    while True:
        try:
            now = poll_state(await progress.read())
        except (RedisError, OSError):
            await asyncio.sleep(1)
            continue
        show(now)
        if now.state in ("done", "failed"):
            return now
        if now.state == "queued" and time.monotonic() - asked_at > patience_s:
            raise NobodyHome(
                f"nobody has taken the job up for {patience_s:.0f} s: is a relay running? Start one with `relay up`, "
                "or `relay worker` where roles are apart; the job stays queued until then"
            )
        await asyncio.sleep(_LOOK_EVERY_S)


async def run(settings: Settings, wanted: Range) -> None:
    """Submit, show, and say how it ended; raises BackfillFailed. Ctrl-C only stops the showing."""
    configured = settings.sources.get(wanted.source)
    if configured is not None and not configured.enabled:
        raise SettingsError(f"the source {wanted.source} is switched off (enabled: false), so it is not asked")
    console = Console(soft_wrap=True, highlight=False)
    async with _queue_for(settings, wanted.source) as arq:
        job = await submit(arq, wanted)
        console.print(f"{wanted.source}: calls from {iso(wanted.since)} to {iso(wanted.until)} (job {job})")
        watching = asyncio.create_task(_show(arq, job, console))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, watching.cancel)
        try:
            ended = await watching
        except asyncio.CancelledError:
            console.print(f"No longer watching. The backfill goes on in the relay; `relay jobs show {job}` tells more.")
            return
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    if ended.state == "failed":
        so_far = f" after it had {ended.words()}" if ended.rows else ""
        raise BackfillFailed(f"the backfill failed{so_far}: {ended.error}")
    console.print(ended.words())


async def _show(redis: Redis, job: str, console: Console) -> PollState:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("queued", total=1.0, words="")

        said = "queued"

        def show(now: PollState) -> None:
            nonlocal said
            why = f" ({now.error})" if now.state == "waiting" else ""
            if not console.is_terminal and now.state not in (said, "done", "failed"):
                said = now.state
                console.print(now.state + why)  # a pipe sees each change of state once, and never a silent wait
            bar.update(task, completed=now.done, description=now.state, words=now.words() + why if now.rows else why)

        return await watch(redis, job, show=show)
