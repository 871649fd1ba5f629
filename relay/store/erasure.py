"""Deleting what the store has of a person, a source or a subscription, with everything that depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from redis.asyncio import Redis

from relay.domain.json import Json
from relay.domain.time import from_ms
from relay.queue import keys as queue_keys
from relay.store import keys
from relay.store.calls import StoredCall, days_around
from relay.store.connection import scan
from relay.store.lanes import LaneName
from relay.store.scripts import load_script

_BATCH: Final = 200
_SEEN_DAYS: Final = 400
_CONTACT_GENERATIONS: Final = 5


@dataclass(frozen=True, slots=True)
class ErasedEvents:
    """How many events lost their document, and how many pending deliveries ended as expired."""

    events: int
    deliveries: int


class ErasureStore:
    """Erases, a bounded step at a time."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._erase = load_script(redis, "erase")
        self._remove_subscription = load_script(redis, "remove_subscription")

    async def call(self, call: StoredCall) -> ErasedEvents | None:
        """Erase a call with its events; None when it has changed since it was read: read it again."""
        days = days_around(from_ms(call.started_ms).date().isoformat())
        return await self._run(call.id, call.version, call.id, call.source_id, call.events, days)

    async def event(self, event_id: str, document: Json | None, *, source_id: str) -> ErasedEvents:
        """Erase an event whose call is not kept any more; `source_id` is empty when it is not known."""
        call = document["data"].get("call") if document else None
        erased = await self._run("", "", call["id"] if call else event_id, source_id, [event_id])
        return erased or ErasedEvents(0, 0)

    async def _run(
        self,
        call_id: str,
        version: int | str,
        ordering_key: str,
        source_id: str,
        event_ids: Sequence[str],
        days: Sequence[str] = (),
    ) -> ErasedEvents | None:
        args: list[Any] = [call_id, version, ordering_key, source_id, len(event_ids), *event_ids, len(days), *days]
        reply = await self._erase(args=args)
        return None if reply == -1 else ErasedEvents(*reply)

    async def contact(self, source_id: str, number: str) -> int:
        """Erase what is cached of a number; returns the number of entries."""
        generation = int(await self._redis.hget(keys.contacts(source_id), "generation") or 0)  # type: ignore[misc]
        recent = range(max(generation - _CONTACT_GENERATIONS, 0), generation + 1)
        return int(await self._redis.delete(*(keys.contact(source_id, each, number) for each in recent)))

    async def source(self, source_id: str) -> None:
        """Delete all state of a source: lists, lane items, `seen`, quarantine, credentials and cached contacts."""
        while call_ids := await self._redis.zrange(keys.calls_of(source_id), 0, _BATCH - 1):
            await self._redis.zrem(keys.calls_of(source_id), *call_ids)
            await self._redis.zrem(keys.CALLS, *call_ids)
        today = datetime.now(UTC).date()
        days = [(today + timedelta(days=2 - back)).isoformat() for back in range(_SEEN_DAYS)]
        groups = {
            lane: await self._redis.hget(queue_keys.partition(lane, source_id), "group")  # type: ignore[misc]
            for lane in LaneName
            if lane is not LaneName.DELIVER
        }
        async with self._redis.pipeline(transaction=True) as pipe:
            for lane in groups:
                if group := groups[lane]:
                    pipe.zrem(queue_keys.group(lane, group.decode()), source_id)
                pipe.delete(
                    queue_keys.waiting(lane, source_id),
                    queue_keys.leased(lane, source_id),
                    queue_keys.leases(lane, source_id),
                    queue_keys.partition(lane, source_id),
                    keys.owed_items(lane, source_id),
                )
                pipe.srem(keys.owed(lane), source_id)
            pipe.delete(*(keys.seen(source_id, day) for day in days))
            pipe.delete(keys.source(source_id), keys.quarantine(source_id), keys.shown(source_id))
            pipe.delete(keys.calls_of(source_id), keys.events_of(source_id))
            pipe.hdel(keys.COMPLETENESS, source_id)
            pipe.delete(keys.credentials(source_id), keys.credentials_lock(source_id), keys.listener(source_id))
            await pipe.execute()
        async for names in scan(self._redis, f"{keys.contacts(source_id)}:*"):
            await self._redis.delete(*names)
        await self._redis.delete(keys.contacts(source_id))

    async def subscription(self, subscription: str) -> None:
        """Drop every delivery of a subscription, which is disabled as removed before."""
        while await self._remove_subscription(args=[subscription, _BATCH]):
            pass
