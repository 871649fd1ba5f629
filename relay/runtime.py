"""Everything that is opened once: handed to the stages, closed in reverse.

`Runtime` is what one process has, whatever its role. It starts nothing by itself but the runners it is given.
"""

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp
import structlog
from arq.connections import ArqRedis
from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from relay.delivery.guard import Guard
from relay.delivery.send import Sender
from relay.delivery.subscriptions import Subscription
from relay.domain.time import from_ms, iso
from relay.enrichment.contacts import AddressBook
from relay.errors import SettingsError, StoreError, StoreInUse, StoreTooNew
from relay.events.operations import Operations
from relay.events.publisher import Publisher
from relay.polling.poller import Poller, Reader
from relay.polling.stream import Streams
from relay.polling.window import Tier, first_offset_s
from relay.providers.source import Source
from relay.queue import keys as queue_keys
from relay.queue.lane import Lane
from relay.queue.runner import Runner
from relay.recordings.links import LinkIssuer
from relay.recordings.markers import Markers
from relay.recordings.storage import RecordingStorage, open_storage
from relay.registry import Registry
from relay.secrets import SecretBox
from relay.settings import Settings
from relay.store import keys
from relay.store.calls import Ledger
from relay.store.health import read_health
from relay.store.lanes import LaneName
from relay.store.store import Store
from relay.tasks import end

log = structlog.get_logger(__name__)

DAY_S = 86_400
QUEUE = "relay:arq"
CONFIGURED_OFF = "enabled: false in the configuration"
_WAKE_EVERY_S = 0.005
_AT_ONCE = 500


@dataclass
class WakeUps:
    """Says in this process, and to the workers of others, that a lane has fresh work.

    A wake-up only saves waiting: a runner looks at its lane at least once a second.
    """

    _local: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    _arq: ArqRedis | None = None
    _sending: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)

    def listen(self, lane: str, wake: Callable[[], None]) -> None:
        """Have a runner woken."""
        self._local.setdefault(lane, []).append(wake)

    def send_through(self, arq: ArqRedis) -> None:
        """Wake the workers of other processes too."""
        self._arq = arq

    def hear(self, lane: str) -> None:
        """Wake the runners of this process."""
        for wake in self._local.get(lane, ()):
            wake()

    def __call__(self, lane: str) -> None:
        """Wake whoever works on a lane."""
        self.hear(lane)
        if self._arq is not None and (lane not in self._sending or self._sending[lane].done()):
            self._sending[lane] = asyncio.create_task(self._send(lane))

    async def _send(self, lane: str) -> None:
        assert self._arq is not None  # noqa: S101 - asked before
        await asyncio.sleep(_WAKE_EVERY_S)  # many at once become one
        with contextlib.suppress(Exception):  # the lane is looked at every second in any case
            await self._arq.enqueue_job("wake", lane)

    async def aclose(self) -> None:
        """Wait for what is being sent."""
        await asyncio.gather(*self._sending.values(), return_exceptions=True)


class Runtime:
    """One process of the relay: its connections and its stages."""

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        arq: ArqRedis,
        box: SecretBox,
        http: aiohttp.ClientSession,
        sender: Sender,
        storage: RecordingStorage,
        guarded: Mapping[bool, aiohttp.ClientSession],
    ) -> None:
        self.settings = settings
        self.redis = redis
        self.arq = arq
        self.box = box
        self.http = http
        self.sender = sender
        self.storage = storage
        self.wake_ups = WakeUps()
        retention = settings.retention
        self.ledger = Ledger(
            redis,
            calls_ttl_s=retention.calls_days * DAY_S,
            events_ttl_s=retention.events_days * DAY_S,
            keep_raw=lambda: any(each.options.include_raw for each in self.subscriptions.values()),
        )
        self.store = Store(
            redis,
            box,
            calls_ttl_s=retention.calls_days * DAY_S,
            events_ttl_s=retention.events_days * DAY_S,
        )
        self.lanes: dict[LaneName, Lane] = {
            LaneName.POLL: Lane(redis, LaneName.POLL, lease_s=120),
            LaneName.ENRICH: Lane(redis, LaneName.ENRICH, lease_s=45),
            LaneName.RECORD: Lane(redis, LaneName.RECORD, lease_s=120, most=8),
            LaneName.DELIVER: Lane(
                redis,
                LaneName.DELIVER,
                lease_s=2 * settings.delivery.timeout_s + 15,
                event_ttl_s=retention.events_days * DAY_S,
            ),
        }
        self.states = self.store.sources
        self.budget = self.store.budget
        self.registry = Registry(
            settings,
            self.store.declarations,
            http,
            self.budget,
            guarded=guarded,
            credentials_of=self.store.credentials,
        )
        self.subscriptions = self.registry.subscriptions
        self.operations = Operations(self.ledger, self.subscriptions)
        self.book = AddressBook(redis)
        self.markers = Markers(storage)
        self.links = LinkIssuer(
            storage,
            self.ledger.call,
            kind=settings.recording_links,
            public_url=settings.public_url,
            key=box.signing_keys("recording-links")[0],
        )
        self.runners: list[Runner] = []
        self.streams: Streams | None = None
        self._goodbyes: set[asyncio.Task[None]] = set()

    @property
    def sources(self) -> dict[str, Source]:
        """The sources in force, by id."""
        return self.registry.sources

    def add_runner(self, runner: Runner) -> Runner:
        """Host a runner, to be started with `run`."""
        self.runners.append(runner)
        self.wake_ups.listen(runner.lane.name, runner.wake)
        return runner

    def add_poller(self) -> None:
        """Host the poll lane's runner, and the streams of sources that have one."""
        tiers = [Tier(int(tier.every_s), int(tier.depth_s)) for tier in self.settings.poll.tiers]
        poller = Poller(
            self.ledger,
            self.states,
            lambda: self.sources,
            self.operations,
            self.markers,
            tiers=tiers,
            wake=self._fresh_calls,
            now=self._store_now,
        )
        self.streams = Streams(
            self.redis,
            Reader(self.ledger, self.states),
            self.states,
            lambda: self.sources,
            now=self._store_now,
            catch_up=self._poll_soon,
            fresh_calls=self._fresh_calls,
        )
        poller.runner = self.add_runner(Runner(self.lanes[LaneName.POLL], poller.work, at_once=100, needs_s=70))

    def _store_now(self) -> datetime:
        return from_ms(self.lanes[LaneName.POLL].store_now_ms)

    async def _poll_soon(self, sid: str) -> None:
        await self.lanes[LaneName.POLL].put("", sid)
        self.wake_ups.hear(LaneName.POLL)

    def _fresh_calls(self) -> None:
        self.wake_ups(LaneName.ENRICH)
        self.wake_ups(LaneName.RECORD)

    def publisher(self) -> Publisher:
        """Build the publisher of events about calls."""
        return Publisher(
            self.ledger,
            self.subscriptions,
            now_ms=lambda: self.lanes[LaneName.ENRICH].store_now_ms,
            on_deliveries=lambda: self.wake_ups(LaneName.DELIVER),
        )

    async def arrange(self) -> None:
        """Write into the store what the configuration says of lanes: each source is polled, each cap holds."""
        await self.lanes[LaneName.POLL].change(
            [
                ("new", "", sid, self._first_wait_ms(sid, source))
                for sid, source in self.sources.items()
                if not source.paused
            ]
        )
        await self.lanes[LaneName.ENRICH].change([("cap", sid, 500, 0) for sid in self.sources])
        await self.lanes[LaneName.RECORD].change([("cap", sid, 4, 0) for sid in self.sources])
        everyone = list(self.subscriptions.items())
        for at in range(0, len(everyone), _AT_ONCE):
            some = everyone[at : at + _AT_ONCE]
            await self.lanes[LaneName.DELIVER].change([rule for _, each in some for rule in each.rules()])
            async with self.redis.pipeline(transaction=False) as pipe:
                for sid, _ in some:
                    pipe.hget(queue_keys.partition(LaneName.DELIVER, sid), "off")
                switches = await pipe.execute()
            for (sid, each), off in zip(some, switches, strict=True):
                await self._heed_switch(sid, each, (off or b"").decode())

    def _first_wait_ms(self, sid: str, source: Source) -> int:
        if len(self.sources) <= 20:
            return 0
        return int(first_offset_s(_spread(sid), source.options.poll_interval_s) * 1000)

    async def arrange_source(self, sid: str) -> None:
        """Do for one source what `arrange` does for all; one that is paused is not polled any more."""
        source = self.sources[sid]
        await self.lanes[LaneName.POLL].change([("drop", "", sid, 0) if source.paused else ("new", "", sid, 0)])
        await self.lanes[LaneName.ENRICH].cap(sid, 500)
        await self.lanes[LaneName.RECORD].cap(sid, 4)
        self.wake_ups(LaneName.POLL)

    async def arrange_subscription(self, sid: str) -> None:
        """Do for one subscription what `arrange` does for all."""
        subscription = self.subscriptions[sid]
        await self.lanes[LaneName.DELIVER].change(subscription.rules())
        await self._heed_switch(sid, subscription, (await read_health(self.redis, sid)).off)

    async def _heed_switch(self, sid: str, subscription: Subscription, off: str) -> None:
        """What the configuration switches off is off; switching it on there undoes only that."""
        if not subscription.options.enabled and not off:
            await self.lanes[LaneName.DELIVER].off(sid, CONFIGURED_OFF)
        elif subscription.options.enabled and off == CONFIGURED_OFF:
            await self.lanes[LaneName.DELIVER].off(sid, None)

    async def require_durability(self) -> None:
        """Refuse `at_most_once` on a store that can forget what it answered: an intent must outlive everything."""
        wanting = [sid for sid, each in self.subscriptions.items() if each.options.delivery == "at_most_once"]
        if wanting and not await keeps_every_write(self.redis):
            raise SettingsError(
                f"subscriptions.{wanting[0]}.delivery: at_most_once needs a store that keeps every answered write; "
                "set `appendonly yes` and `appendfsync always` on Redis, or use the embedded store"
            )

    async def disable(self, sub: str, why: str, *, gone: bool = False) -> None:
        """Stop a subscription: nothing new is queued for it, what is queued waits behind a closed gate.

        `gone` says that the subscriber asked for it, and need not be told.
        """
        await self.lanes[LaneName.DELIVER].off(sub, why)
        log.error("subscription_disabled", subscription=sub, why=why)
        subscription = self.subscriptions.get(sub)
        if subscription is not None and not gone:
            await self.say_goodbye(subscription)
        await self.operations.publish(
            "subscription.disabled",
            {"subscription": {"id": sub, "reason": why}},
            about=sub,
            occurrence=str(self.lanes[LaneName.DELIVER].store_now_ms),
            tenant=subscription.tenant if subscription else None,
        )

    async def say_goodbye(self, subscription: Subscription) -> None:
        """Tell a Zapier hook, once, that it is not told any more, so that the Zap shows it: DELETE to its URL."""
        if not subscription.unsubscribes:
            return
        if not await self.redis.hsetnx(queue_keys.partition(LaneName.DELIVER, subscription.id), "goodbye", "1"):  # type: ignore[misc]
            return
        task = asyncio.create_task(self._goodbye(subscription))
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)

    async def _goodbye(self, subscription: Subscription) -> None:
        outcome = await self.sender.unsubscribe(subscription.url)
        log.info("hook_unsubscribed", subscription=subscription.id, host=subscription.host, answer=outcome.message)

    async def aclose(self) -> None:
        """Let what was begun in passing end."""
        await asyncio.gather(*self._goodbyes, return_exceptions=True)
        await self.wake_ups.aclose()

    async def failing(self, sub: str, why: str, disables_at: datetime) -> None:
        """Say `subscription.failing`, once a day for each subscription."""
        if await self.redis.set(keys.told(sub), 1, nx=True, ex=DAY_S):
            log.warning("subscription_failing", subscription=sub, why=why, disables_at=iso(disables_at))
            about = {"id": sub, "reason": why, "disables_at": iso(disables_at)}
            now_ms = self.lanes[LaneName.DELIVER].store_now_ms
            subscription = self.subscriptions.get(sub)
            await self.operations.publish(
                "subscription.failing",
                {"subscription": about},
                about=sub,
                occurrence=str(now_ms),
                tenant=subscription.tenant if subscription else None,
            )

    async def run(self, stop: asyncio.Event, *, drain_s: float) -> None:
        """Run the runners until told to stop, then let them finish what they hold, for `drain_s` at most."""
        # What start-up made stays, and hundreds of attempts at once make much that soon goes: looking through it all
        # as often as a small program does costs a third of the throughput.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        tasks = [asyncio.create_task(runner.run(), name=f"runner:{runner.lane.name}") for runner in self.runners]
        streaming = [asyncio.create_task(self.streams.run(), name="streams")] if self.streams is not None else []
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopping, *tasks, *streaming], return_when=asyncio.FIRST_COMPLETED)
            for task in (*tasks, *streaming):
                if task.done() and not stop.is_set():
                    task.result()  # neither ends by itself: let its error out
        finally:
            stopping.cancel()
            for runner in self.runners:
                runner.stop(within_s=drain_s)
            await end(*streaming)
            await asyncio.gather(*tasks, return_exceptions=True)


def _spread(sid: str) -> int:
    return int.from_bytes(sid.encode()[-6:], "big") * 2654435761 % 10_000


@contextlib.asynccontextmanager
async def open_runtime(settings: Settings, *, redis_url: str, secret_keys: Sequence[str]) -> AsyncIterator[Runtime]:
    """Open what a process needs. Raises StoreInUse and StoreTooNew."""
    async with AsyncExitStack() as stack:
        redis = Redis.from_url(redis_url, **_REDIS)
        stack.push_async_callback(redis.aclose)
        arq = ArqRedis(
            ConnectionPool.from_url(redis_url, **_REDIS),
            default_queue_name=QUEUE,
            job_serializer=_to_json,
            job_deserializer=json.loads,
        )
        stack.push_async_callback(arq.aclose, close_connection_pool=True)
        box = SecretBox(secret_keys)
        await reach(redis)
        with _a_sentence():
            await claim_database(redis, box.fingerprints())
        http = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, limit_per_host=0, ttl_dns_cache=30),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        )
        guard = Guard(tuple(settings.delivery.allowed_networks))
        sender = await stack.enter_async_context(Sender(guard))
        guarded = {plain: await stack.enter_async_context(_guarded_session(guard, plain)) for plain in (False, True)}
        storage = open_storage(settings.storage_url)
        stack.push_async_callback(storage.aclose)
        runtime = Runtime(settings, redis, arq, box, http, sender, storage, guarded)
        stack.push_async_callback(runtime.aclose)
        with _a_sentence():
            await runtime.registry.load()
            await runtime.require_durability()
            await runtime.arrange()
        following = asyncio.create_task(runtime.registry.follow(runtime.arrange), name="directory")
        try:
            yield runtime
        finally:
            await end(following)


@contextlib.contextmanager
def _a_sentence() -> Iterator[None]:
    """Say it in words when the store goes away while a process starts."""
    try:
        yield
    except RedisError as error:
        raise StoreError(
            f"the store stopped answering while the relay was starting ({error}): look at its log"
        ) from error


def _guarded_session(guard: Guard, plain: bool) -> aiohttp.ClientSession:
    """Make the session for sources that came through the API: it dials nothing that the guard refuses."""
    connector = aiohttp.TCPConnector(
        limit=0,
        limit_per_host=0,
        resolver=guard.resolver(plain=plain),
        use_dns_cache=False,
        socket_factory=guard.socket_factory(plain=plain),
    )
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


_REDIS: dict[str, Any] = {"socket_timeout": 15, "socket_connect_timeout": 5, "health_check_interval": 30}


def _to_json(job: dict[str, Any]) -> bytes:
    return json.dumps(job).encode()


async def keeps_every_write(redis: Redis) -> bool:
    """Whether the store has each write on disk before it answers. One that hides its configuration is believed."""
    try:
        found = await redis.config_get("append*")
    except ResponseError:
        log.warning("durability_unknown", why="the store does not show its configuration; at_most_once relies on it")
        return True
    return bool(found.get("appendonly") == "yes" and found.get("appendfsync") == "always")


async def reach(redis: Redis, *, patience_s: float = 30) -> None:
    """Wait for the store, which may be starting too. Raises StoreError when it does not answer in time."""
    until = time.monotonic() + patience_s
    waiting = False
    while True:
        try:
            await redis.ping()
        except (AuthenticationError, BusyLoadingError, RedisConnectionError, RedisTimeoutError, OSError) as error:
            where = redis.connection_pool.connection_kwargs
            place = where.get("path") or f"{where.get('host')}:{where.get('port')}"
            if isinstance(error, AuthenticationError) or time.monotonic() >= until:
                raise StoreError(f"the store at {place} cannot be used: {error}. Look at RELAY_REDIS_URL.") from None
            if not waiting:
                waiting = True
                log.warning("waiting_for_the_store", at=place, why=str(error), for_s=patience_s)
            await asyncio.sleep(0.5)
        else:
            return


async def claim_database(redis: Redis, fingerprints: Sequence[str]) -> None:
    """Make sure that the database is ours and that we understand it. Two relays in one would each lose the other's."""
    owner = await redis.get(keys.IDENTITY)
    if owner is None:
        await redis.set(keys.IDENTITY, fingerprints[0], nx=True)
        owner = await redis.get(keys.IDENTITY)
    if owner.decode() not in fingerprints:
        raise StoreInUse(
            "this Redis database belongs to another relay (it was started with another RELAY_SECRET_KEY). "
            "Give this relay a database of its own, or the same key; after a rotation keep the old key as the second."
        )
    if owner.decode() != fingerprints[0]:
        await redis.set(keys.IDENTITY, fingerprints[0])
    schema = int(await redis.get(keys.SCHEMA) or 0)
    if schema > keys.SCHEMA_VERSION:
        raise StoreTooNew(
            f"this Redis database was written by a newer release (layout {schema}, this one knows "
            f"{keys.SCHEMA_VERSION}). Start that release, or give this one a database of its own."
        )
    if schema < keys.SCHEMA_VERSION:
        await redis.set(keys.SCHEMA, keys.SCHEMA_VERSION)
