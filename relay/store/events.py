"""Events: canonical documents by id, and lists of them."""

from collections.abc import Sequence

from redis.asyncio import Redis

from relay.domain.json import Json
from relay.store import keys
from relay.store.documents import unpack
from relay.store.listings import Listing


class EventStore:
    """Reads events."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def get(self, event_id: str) -> Json | None:
        """Read an event's document; None when it is not kept any more."""
        return (await self.get_many([event_id]))[0]

    async def get_many(self, event_ids: Sequence[str]) -> list[Json | None]:
        """Read documents; None for those that are not kept any more."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for event_id in event_ids:
                pipe.hget(keys.event(event_id), keys.BODY)
            return [unpack(packed) if packed else None for packed in await pipe.execute()]

    def all(self) -> Listing:
        """List every event, by when it was created."""
        return Listing(self._redis, (keys.EVENTS,))

    def of_sources(self, source_ids: Sequence[str]) -> Listing:
        """List the events about calls of some sources, by when they were created."""
        return Listing(self._redis, tuple(map(keys.events_of, source_ids)))
