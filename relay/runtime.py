"""Everything that a process opens once: handed to the stages, closed in reverse.

`Runtime` is the same in every role. It starts nothing by itself but the runners and services that it is given.
"""

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any

import aiohttp
from arq.connections import ArqRedis
from redis.asyncio import Redis

from relay import descriptors
from relay.delivery.egress import UNGRANTED, Egress, open_egress
from relay.delivery.guard import Guard
from relay.delivery.lifecycle import Lifecycle
from relay.domain.numbers import load_metadata
from relay.domain.time import from_ms
from relay.enrichment.contacts import AddressBook
from relay.errors import SettingsError
from relay.events.operations import Operations
from relay.providers.source import Source
from relay.queue.process import Process
from relay.queue.runner import Runner
from relay.queue.wake_ups import WakeUps
from relay.reconcile import Reconciler
from relay.recordings.links import LinkIssuer
from relay.recordings.markers import Markers
from relay.recordings.storage import RecordingStorage, open_storage
from relay.registry import Registry
from relay.secrets import SecretBox
from relay.settings import Settings, SubscriptionOptions
from relay.store import connection, database
from relay.store.lanes import LaneName, open_lanes
from relay.store.store import Store
from relay.tasks import cancel
from relay.watchdog import watchdog

DAY_S = 86_400
QUEUE = "relay:arq"


class Runtime:
    """The connections, the store and the stages of one process."""

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        arq: ArqRedis,
        box: SecretBox,
        http: aiohttp.ClientSession,
        egress: Egress,
        storage: RecordingStorage,
    ) -> None:
        self.settings = settings
        self.arq = arq
        self.box = box
        self.http = http
        self.egress = egress
        self.storage = storage
        self.markers = Markers(storage)
        self.wake_ups = WakeUps()
        calls_ttl_s, events_ttl_s = settings.retention.calls_days * DAY_S, settings.retention.events_days * DAY_S
        self.store = Store(
            redis,
            box,
            calls_ttl_s=calls_ttl_s,
            events_ttl_s=events_ttl_s,
            keep_raw=lambda: any(each.options.include_raw for each in self.subscriptions.values()),
        )
        self.process = Process(redis)
        self.book = AddressBook(self.store.contacts)
        self.lanes = open_lanes(redis, self.process, events_ttl_s=events_ttl_s)
        self.registry = Registry(
            settings,
            self.store.declarations,
            self.store.configurations,
            http,
            self.store.budget,
            guarded=egress.session,
            credentials_of=self.store.credentials,
            version_key=box.signing_keys("configuration")[0],
        )
        self.subscriptions = self.registry.subscriptions
        self.operations = Operations(self.store.events, self.subscriptions)
        self.links = LinkIssuer(
            storage,
            self.store.calls.get,
            kind=settings.recording_links,
            public_url=settings.public_url,
            key=box.signing_keys("recording-links")[0],
        )
        self.lifecycle = Lifecycle(
            self.lanes[LaneName.DELIVER], self.store.subscriptions, self.subscriptions, self.operations, egress
        )
        self.reconciler = Reconciler(
            self.lanes,
            self.registry,
            self.store.subscriptions,
            self.lifecycle,
            wake_poll=lambda: self.wake_ups(LaneName.POLL),
        )
        self.runners: list[Runner] = []
        self._services: dict[str, Callable[[], Awaitable[None]]] = {}

    @property
    def sources(self) -> dict[str, Source]:
        return self.registry.sources

    def store_now(self) -> datetime:
        return from_ms(self.process.clock.wall_ms)

    def add_runner(self, runner: Runner) -> None:
        self.runners.append(runner)
        self.wake_ups.listen(runner.lane.name, runner.wake)

    def add_service(self, name: str, service: Callable[[], Awaitable[None]]) -> None:
        """Host a task that goes on until it is cancelled, to be started with `run`."""
        self._services[name] = service

    async def run(self, stop: asyncio.Event, *, drain_s: float) -> None:
        """Run runners and services until `stop` is set; running work then has `drain_s` to finish."""
        # Objects from start-up stay, and hundreds of concurrent attempts make many that are soon garbage: collecting as
        # often as a small program does costs a third of the throughput.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        beating = asyncio.create_task(self.process.beats(), name="heartbeat")
        runners = [asyncio.create_task(runner.run(), name=f"runner:{runner.lane.name}") for runner in self.runners]
        services = [asyncio.create_task(_run(service), name=name) for name, service in self._services.items()]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopping, beating, *runners, *services], return_when=asyncio.FIRST_COMPLETED)
            for task in (beating, *runners, *services):
                if task.done() and not stop.is_set():
                    task.result()  # none of them ends by itself: raise its error
        finally:
            stopping.cancel()
            for runner in self.runners:
                runner.stop(within_s=drain_s)
            await cancel(*services)
            await asyncio.gather(*runners, return_exceptions=True)
            await cancel(beating)
            with contextlib.suppress(*connection.STORE_ERRORS):
                await self.process.leave()

    async def require_durability(self, subscriptions: Mapping[str, SubscriptionOptions]) -> None:
        """Refuse `at_most_once` on a store that can lose what it answered: an intent must survive everything."""
        at_most_once = [sub for sub, options in subscriptions.items() if options.delivery == "at_most_once"]
        if at_most_once and not await self.store.is_durable():
            raise SettingsError(
                f"subscriptions.{at_most_once[0]}.delivery: at_most_once needs a store that keeps every answered "
                "write; set `appendonly yes` and `appendfsync always` on Redis, or use the embedded store"
            )

    async def aclose(self) -> None:
        await self.lifecycle.aclose()
        await self.wake_ups.aclose()


@contextlib.asynccontextmanager
async def open_runtime(settings: Settings, *, redis_url: str, secret_keys: Sequence[str]) -> AsyncIterator[Runtime]:
    """Open what a process needs. Raises StoreError, also as StoreInUse and StoreTooNew, and SettingsError."""
    load_metadata()
    descriptors.raise_limit()
    async with AsyncExitStack() as stack:
        stack.enter_context(watchdog())
        redis = connection.connect(redis_url)
        stack.push_async_callback(redis.aclose)
        arq = ArqRedis(
            connection.connection_pool(redis_url),
            default_queue_name=QUEUE,
            job_serializer=_to_json,
            job_deserializer=json.loads,
        )
        stack.push_async_callback(arq.aclose, close_connection_pool=True)
        box = SecretBox(secret_keys)
        await database.wait_until_reachable(redis)
        with database.explain_start_failure():
            await database.require_suitable_server(redis)
            await database.claim_database(redis, box.fingerprints())
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, ttl_dns_cache=30)
        http = await stack.enter_async_context(_session(connector))
        egress = await stack.enter_async_context(open_egress(_guards(settings), _guarded_session))
        storage = open_storage(settings.storage_url)
        stack.push_async_callback(storage.aclose)
        runtime = Runtime(settings, redis, arq, box, http, egress, storage)
        stack.push_async_callback(runtime.aclose)
        with database.explain_start_failure():
            await runtime.registry.load()
            await runtime.require_durability({sub: each.options for sub, each in runtime.subscriptions.items()})
            await runtime.reconciler.everything()
        following = asyncio.create_task(runtime.registry.follow(runtime.reconciler.everything), name="registry")
        watching = asyncio.create_task(database.watch_server(redis), name="store")
        try:
            yield runtime
        finally:
            await cancel(following, watching)


async def _run(service: Callable[[], Awaitable[None]]) -> None:
    await service()


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


def _guards(settings: Settings) -> dict[str | None, Guard]:
    guards: dict[str | None, Guard] = {None: Guard(settings.delivery.allowed_networks), UNGRANTED: Guard()}
    for tenant, grants in settings.delivery.tenant_networks.items():
        ports = {grant.network: grant.ports for grant in grants}
        guards[tenant] = Guard(tuple(ports), ports=ports)
    return guards


def _guarded_session(guard: Guard, plain: bool) -> aiohttp.ClientSession:
    """For sources created through the API: it dials nothing that the guard refuses."""
    return _session(
        aiohttp.TCPConnector(
            limit=0,
            limit_per_host=0,
            resolver=guard.resolver(plain=plain),
            use_dns_cache=False,
            socket_factory=guard.socket_factory(plain=plain),
        )
    )


def _to_json(job: dict[str, Any]) -> bytes:
    return json.dumps(job).encode()
