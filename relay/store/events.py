"""Events: publishing them in one step with their deliveries, and reading them."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from relay.domain.json import Json
from relay.store import keys
from relay.store.calls import StoredCall, write_parts
from relay.store.connection import scan
from relay.store.deliveries import DeliveryState
from relay.store.documents import pack, unpack
from relay.store.listings import Listing
from relay.store.scripts import load_script

_UNFILTERED = DeliveryState(unfiltered=True).write()


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be published: its canonical document, and the subscriptions that get a delivery. Those that are
    `unfiltered` get one that is subject to their filters, which only another process knows."""

    id: str
    document: Json
    subscriptions: Sequence[str]
    unfiltered: Collection[str] = ()


class EventStore:
    def __init__(self, redis: Redis, *, ttl_s: int, calls_ttl_s: int) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self._calls_ttl_s = calls_ttl_s
        self._publish = load_script(redis, "publish")

    async def publish(self, event: NewEvent, *, ordering_key: str | None = None) -> int:
        """Publish an event without a call, in order with others of its `ordering_key` (default: with none).

        Returns the number of new deliveries.
        """
        return await self._run(["", 0, ordering_key or event.id], {}, [event])

    async def publish_call(
        self, call: StoredCall, parts: Mapping[str, Json | None], events: Sequence[NewEvent]
    ) -> int | None:
        """Write parts of a call (None removes one) and publish events about it, in one step.

        Returns the number of new deliveries, or None when the call has changed since it was read: read it again.
        """
        created = await self._run([call.id, call.version, call.id], write_parts(call, parts), events)
        return None if created < 0 else created

    async def _run(self, call: list[Any], fields: Mapping[str, Json | None], events: Sequence[NewEvent]) -> int:
        args = [*call, self._calls_ttl_s, self._ttl_s, len(fields)]
        for name, value in fields.items():
            args += (name, b"" if value is None else pack(value))
        args.append(len(events))
        for event in events:
            states = dict.fromkeys(event.unfiltered, _UNFILTERED) | dict.fromkeys(event.subscriptions, b"")
            args += (event.id, pack(event.document), len(states))
            for subscription, state in states.items():
                args += (subscription, state)
        return int(await self._publish(args=args))

    async def get(self, event_id: str) -> Json | None:
        return (await self.get_many([event_id]))[0]

    async def get_many(self, event_ids: Sequence[str]) -> list[Json | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for event_id in event_ids:
                pipe.hget(keys.event(event_id), keys.BODY)
            return [unpack(packed) if packed else None for packed in await pipe.execute()]

    async def every(self) -> AsyncIterator[list[tuple[str, Json | None]]]:
        """Walk over every event that the store has, in batches. Unlike `all`, this finds events that no list has."""
        async for names in scan(self._redis, keys.event("*")):
            event_ids = [name.removeprefix(keys.event("")) for name in names]
            yield list(zip(event_ids, await self.get_many(event_ids), strict=True))

    def all(self) -> Listing:
        return Listing(self._redis, (keys.EVENTS,))

    def of_sources(self, source_ids: Sequence[str]) -> Listing:
        """List the events about calls of some sources, by when they were created."""
        return Listing(self._redis, tuple(map(keys.events_of, source_ids)))
