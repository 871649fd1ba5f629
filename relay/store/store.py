"""The store in domain terms: what everything outside `store` and `queue` knows of Redis."""

from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from relay.secrets import SecretBox
from relay.store import connection
from relay.store.budget import BudgetStore
from relay.store.calls import CallStore
from relay.store.credentials import StoredCredentials
from relay.store.declarations import Declarations
from relay.store.deliveries import DeliveryStore
from relay.store.events import EventStore
from relay.store.jobs import JobStore
from relay.store.sources import SourceStore
from relay.store.subscriptions import SubscriptionStore


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that the store uses and may use; a limit of 0 is none, or one that a managed store hides."""

    used_bytes: int
    limit_bytes: int


class Store:
    """Opened once from a Redis client and handed to whatever needs it."""

    def __init__(self, redis: Redis, box: SecretBox, *, calls_ttl_s: int, events_ttl_s: int) -> None:
        self._redis = redis
        self.calls = CallStore(redis)
        self.events = EventStore(redis)
        self.deliveries = DeliveryStore(redis, events_ttl_s=events_ttl_s)
        self.sources = SourceStore(redis)
        self.subscriptions = SubscriptionStore(redis)
        self.declarations = Declarations(redis, box)
        self.jobs = JobStore(redis)
        self.budget = BudgetStore(redis)
        self.credentials: Callable[[str], StoredCredentials] = lambda sid: StoredCredentials(redis, box, sid)

    async def ping(self) -> None:
        """Raise one of STORE_ERRORS when the store does not answer."""
        await self._redis.ping()

    async def now_ms(self) -> int:
        """Read the store's clock, which all processes share."""
        return await connection.now_ms(self._redis)

    async def size(self) -> int:
        """Count the keys: how much there is to search."""
        return int(await self._redis.dbsize())

    async def memory(self) -> Memory:
        used_bytes = int((await self._redis.info("memory"))["used_memory"])
        try:
            limit_bytes = int((await self._redis.config_get("maxmemory")).get("maxmemory", 0))
        except ResponseError:
            limit_bytes = 0
        return Memory(used_bytes, limit_bytes)
