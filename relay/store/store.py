"""The store in domain terms: what everything outside `store` and `queue` knows of Redis."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from relay.domain.json import Json
from relay.secrets import SecretBox
from relay.store import connection, database, keys
from relay.store.budget import BudgetStore
from relay.store.calls import CallStore
from relay.store.completeness import CompletenessStore
from relay.store.configurations import Configurations
from relay.store.contacts import ContactStore
from relay.store.credentials import StoredCredentials
from relay.store.declarations import Declarations
from relay.store.deliveries import DeliveryStore
from relay.store.erasure import ErasureStore
from relay.store.events import EventStore
from relay.store.jobs import JobStore
from relay.store.sources import SourceStore
from relay.store.streams import StreamLeases
from relay.store.subscriptions import SubscriptionStore
from relay.store.upkeep import Upkeep


class Store:
    """Opened once from a Redis client and handed to whatever needs it."""

    def __init__(
        self, redis: Redis, box: SecretBox, *, calls_ttl_s: int, events_ttl_s: int, keep_raw: Callable[[], bool]
    ) -> None:
        """`keep_raw` says whether calls keep their provider's row as it came."""
        self._redis = redis
        self._box = box
        longest_calls_s, longest_events_s = calls_ttl_s + keys.FALLBACK_TTL_S, events_ttl_s + keys.FALLBACK_TTL_S
        self.calls = CallStore(redis, ttl_s=longest_calls_s, keep_raw=keep_raw)
        self.events = EventStore(redis, ttl_s=longest_events_s, calls_ttl_s=longest_calls_s)
        self.deliveries = DeliveryStore(redis, events_ttl_s=longest_events_s)
        self.completeness = CompletenessStore(redis)
        self.sources = SourceStore(redis)
        self.subscriptions = SubscriptionStore(redis)
        self.declarations = Declarations(redis, box)
        self.configurations = Configurations(redis)
        self.jobs = JobStore(redis)
        self.contacts = ContactStore(redis)
        self.erasure = ErasureStore(redis)
        self.upkeep = Upkeep(redis, calls_ttl_s=calls_ttl_s, events_ttl_s=events_ttl_s)
        self.budget = BudgetStore(redis)
        self.stream_leases = StreamLeases(redis, holder=secrets.token_hex(8))
        self.credentials: Callable[[str], StoredCredentials] = lambda sid: StoredCredentials(redis, box, sid)

    async def ping(self) -> None:
        await self._redis.ping()

    async def verify(self) -> None:
        """Raise StoreInUse when the database is another relay's, StoreTooNew when its layout is newer than ours."""
        await database.verify_database(self._redis, self._box.fingerprints())

    async def test_write(self) -> None:
        """Write something; raises one of STORE_ERRORS when that is not possible."""
        await self._redis.set(keys.WRITE_TEST, 1, ex=10)

    async def server_info(self) -> Json:
        """Read what the server reports of itself, as far as it shows its configuration."""
        info: Json = await self._redis.info()
        with contextlib.suppress(ResponseError):  # hosted Redis services often forbid CONFIG
            info |= await self._redis.config_get("hash-max-listpack-value")
        return info

    async def unsuitable(self) -> database.Unsuitable | None:
        """Say why the server would lose what the relay stores, or refuse it; None when it does neither."""
        return database.unsuitable(await self._redis.info())

    async def is_durable(self) -> bool:
        """Whether each write is on disk before it is answered."""
        return await database.is_durable(self._redis)

    async def now_ms(self) -> int:
        """Read the relay's clock, by which lists are ordered and work is scheduled."""
        return await connection.now_ms(self._redis)

    async def wall_ms(self) -> int:
        """Read the time of day at the store, which all processes share."""
        return await connection.wall_ms(self._redis)

    async def size(self) -> int:
        """Count the keys: how much there is to search."""
        return int(await self._redis.dbsize())


@asynccontextmanager
async def open_store(url: str, box: SecretBox, *, calls_ttl_s: int, events_ttl_s: int) -> AsyncIterator[Store]:
    """Open a store by its URL, to look at it: it ingests nothing, and gives up after 5 s without an answer."""
    redis = connection.connect(url, socket_timeout=5)
    try:
        yield Store(redis, box, calls_ttl_s=calls_ttl_s, events_ttl_s=events_ttl_s, keep_raw=lambda: False)
    finally:
        await redis.aclose()
