"""A relay inside the test: the real store, runners and sender, a verifying subscriber on loopback, no provider.

Tests ingest calls themselves, and so decide exactly what becomes known and when.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Direction, Outcome, Party, Record
from relay.queue import keys as queue_keys
from relay.queue.changes import LimitInFlight, Pause
from relay.runtime import Runtime, open_runtime
from relay.settings import Settings
from relay.simulator.hook_log import HookReport
from relay.store import keys
from relay.store.calls import Row
from relay.store.deliveries import DeliveryState
from relay.store.lanes import LaneName
from tests.fakes.subscriber import ScriptedSubscriber
from workers.runners import add_workers

SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"
KEY = "k" * 40
T = TypeVar("T")


@dataclass
class RelayHarness:
    """A running worker and its subscriber."""

    runtime: Runtime
    subscriber: ScriptedSubscriber
    redis: Redis
    _made: int = field(default=0)

    async def call(self, key: str | None = None, *, source: str = "main", **fields: Any) -> str:
        """Ingest a finished call (or a new version of one); returns its id."""
        self._made += 1
        key = key or str(1000 + self._made)
        await self._ingest(source, [_record(key, self._made, fields)])
        return ids.call_id(source, key)

    async def calls(self, record_keys: Iterable[str], *, source: str = "main") -> None:
        """Ingest several calls in one step, as one poll does; each from a number of its own."""
        records = [
            _record(key, at, {"external": Party(number=f"+1555123{at:04}", raw=f"(555) 123-{at:04}")})
            for at, key in enumerate(record_keys)
        ]
        await self._ingest(source, records)

    async def _ingest(self, source: str, records: list[Record]) -> None:
        rows = [Row(record, record.content_hash()) for record in records]
        await self.runtime.store.calls.ingest(source, rows, token=b"", mapping=1, via="poll")
        self.runtime.wake_ups(LaneName.ENRICH)

    def event_of(self, key: str, event_type: str = "call.completed") -> str:
        """The id of a call's event."""
        return ids.event_id("main", key, event_type)

    async def state(self, eid: str, sub: str = "a") -> DeliveryState:
        """The state of a delivery in the store."""
        return DeliveryState.read(await self.redis.hget(keys.event(eid), sub) or b"")  # type: ignore[misc]

    async def until_state(self, eid: str, *statuses: str, sub: str = "a", timeout_s: float = 10) -> DeliveryState:
        """Wait until a delivery has one of the statuses."""
        return await eventually(
            lambda: self.state(eid, sub), lambda state: state.status in statuses, timeout_s=timeout_s
        )

    async def until_attempts(self, eid: str, attempts: int, sub: str = "a") -> DeliveryState:
        """Wait until so many attempts of a delivery are settled."""
        return await eventually(lambda: self.state(eid, sub), lambda state: state.attempts >= attempts)

    async def delivered_after_s(self, cid: str, since_s: float, *, event_type: str = "call.completed") -> float:
        """Wait for an event of a call at hook `a`; returns the seconds since `since_s` of the monotonic clock."""

        def arrivals() -> list[float]:
            wanted = (cid, event_type)
            return [each.monotonic_s for each in self.subscriber.arrivals("a") if (each.call_id, each.type) == wanted]

        await self.subscriber.until(lambda: bool(arrivals()), timeout_s=60)
        return arrivals()[0] - since_s

    async def until_delivered(self, hook: str, count: int, timeout_s: float = 10) -> None:
        """Wait until a hook has accepted so many events."""
        await self.subscriber.until(lambda: self.report(hook).accepted >= count, timeout_s=timeout_s)

    def report(self, hook: str = "a") -> HookReport:
        """What a hook has received."""
        return self.subscriber.report(hook)

    async def due_now(self, sub: str, ordering_key: str) -> None:
        """Make a waiting attempt due now."""
        await self.redis.zadd(queue_keys.waiting("deliver", sub), {ordering_key: 1})
        await self.runtime.lanes[LaneName.DELIVER].apply(LimitInFlight(sub, 10))  # rescores the partition
        self.runtime.wake_ups(LaneName.DELIVER)

    async def end_pause(self, sub: str) -> None:
        """End the pause of an open circuit."""
        await self.runtime.lanes[LaneName.DELIVER].apply(Pause(sub, 1))
        self.runtime.wake_ups(LaneName.DELIVER)


@contextlib.asynccontextmanager
async def relay_harness(
    redis: Redis,
    valkey_url: str,
    tmp_path: Path,
    subscriptions: dict[str, dict[str, Any]] | None = None,
    *,
    add_runners: Callable[[Runtime], None] = add_workers,
    **top: Any,
) -> AsyncIterator[RelayHarness]:
    """Run a worker whose subscriptions, one hook each, are named by `subscriptions` (default: one, `a`).

    `add_runners` hosts the lanes; it may replace what the sources are connected to.
    """
    subscriptions = subscriptions if subscriptions is not None else {"a": {}}
    subscriber = ScriptedSubscriber()
    for name in subscriptions:
        subscriber.add_hook(name, SECRET)
    keeps_every_write = any(each.get("delivery") == "at_most_once" for each in subscriptions.values())
    await redis.config_set("appendonly", "yes" if keeps_every_write else "no")
    await redis.config_set("appendfsync", "always")
    async with subscriber.serve() as base:
        ports = [9, int(base.rpartition(":")[2])]
        document: dict[str, Any] = {
            "data_dir": str(tmp_path),
            "delivery": {
                "allowed_networks": ["127.0.0.0/8"],
                "tenant_networks": {
                    tenant: [{"network": "127.0.0.0/8", "ports": ports}] for tenant in ("acme", "other")
                },
                "timeout_s": top.pop("timeout_s", 5),
            },
            "sources": {
                "main": {
                    "provider": "webfones",
                    "base_url": "http://127.0.0.1:9",
                    "api_key": "unused",
                    "contacts": False,
                    "recordings": False,
                }
            },
            "subscriptions": {
                name: {"url": f"{base}/hook/{name}", "secret": SECRET, **options}
                for name, options in subscriptions.items()
            },
            **top,
        }
        settings = read_settings(document)
        async with open_runtime(settings, redis_url=valkey_url, secret_keys=[KEY]) as runtime:
            add_runners(runtime)
            stop = asyncio.Event()
            running = asyncio.create_task(runtime.run(stop, drain_s=5))
            try:
                yield RelayHarness(runtime, subscriber, redis)
            finally:
                stop.set()
                await running


def _record(key: str, at: int, fields: dict[str, Any]) -> Record:
    values: dict[str, Any] = {
        "key": key,
        "started_at": datetime(2026, 11, 20, 12, 0, at % 60, tzinfo=UTC),
        "local_date": "2026-11-20",
        "direction": Direction.INBOUND,
        "outcome": Outcome.NO_ANSWER,
        "external": Party(number="+15551230001", raw="(555) 123-0001"),
    }
    return Record(**values | fields)


async def eventually(read: Callable[[], Awaitable[T]], holds: Callable[[T], bool], *, timeout_s: float = 10) -> T:
    """Read until the value holds; raises TimeoutError when it never does."""
    async with asyncio.timeout(timeout_s):
        while not holds(value := await read()):  # noqa: ASYNC110 - the store sends no notice
            await asyncio.sleep(0.01)
    return value


def read_settings(document: dict[str, Any]) -> Settings:
    """Read settings as the relay does, from a file."""
    import tempfile

    import yaml

    from relay.settings import load

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document, file)
        file.flush()
        return load(Path(file.name), {})
