"""What the sweep does to the store: which of its tasks are due, trimming, restoring, and what is measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from relay.queue import keys as queue_keys
from relay.store import connection, keys
from relay.store.lanes import LaneName
from relay.store.scripts import load_script

_TRIM_EVERY_S: Final = 3600
_SILENCE_CHECK_EVERY_S: Final = 300
_MOST_PARTITIONS: Final = 1000
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that the store uses and may use; a limit of 0 is none, or one that a managed store hides."""

    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Items of a lane that are due and may be claimed, and for how long the oldest of them has been due."""

    due: int
    oldest_s: float


class Upkeep:
    """Each process sweeps; what is done at intervals is claimed by one of them."""

    def __init__(self, redis: Redis, *, calls_ttl_s: int, events_ttl_s: int) -> None:
        self._redis = redis
        self._calls_ttl_s = calls_ttl_s
        self._events_ttl_s = events_ttl_s
        self._restore = load_script(redis, "restore")
        self._trim = load_script(redis, "trim")

    async def claim_trim(self) -> bool:
        """Whether lists and recordings are to be trimmed now: once an hour, by one process."""
        return bool(await self._redis.set(keys.TRIMMED, 1, nx=True, ex=_TRIM_EVERY_S))

    async def claim_silence_check(self) -> bool:
        """Whether sources are to be checked for unusual silence now: every five minutes, by one process."""
        return bool(await self._redis.set(keys.SILENCE_CHECKED, 1, nx=True, ex=_SILENCE_CHECK_EVERY_S))

    async def restore(self, lane: LaneName) -> int:
        """Put back what is owed and the lane has lost; returns how many items."""
        kind = "subscription" if lane is LaneName.DELIVER else "source"
        owing = await self._redis.smembers(keys.owed(lane))  # type: ignore[misc]  # both clients
        removed = await self._redis.hkeys(keys.removed(kind))  # type: ignore[misc]  # both clients
        partitions = [name.decode() for name in owing.difference(removed)]
        restored = 0
        for at in range(0, len(partitions), _PAGE):
            page = partitions[at : at + _PAGE]
            async with self._redis.pipeline(transaction=False) as pipe:
                for partition in page:
                    pipe.zcard(keys.owed_items(lane, partition))
                    pipe.zcard(queue_keys.waiting(lane, partition))
                    pipe.zcard(queue_keys.leased(lane, partition))
                sizes = await pipe.execute()
            for partition, owed, waiting, leased in zip(page, *(sizes[n::3] for n in range(3)), strict=True):
                # Each item of a lane is owed, so equal numbers mean that nothing is lost.
                if owed > waiting + leased:
                    restored += await self._restore_partition(lane, partition)
                elif waiting:
                    await self._restore(args=[lane, partition])  # should its place in the index be lost
        return restored

    async def restore_polls(self, sids: Sequence[str]) -> int:
        """Put back sources that the poll lane has lost; returns how many."""
        return int(await self._restore(args=[LaneName.POLL, "", *sids])) if sids else 0

    async def _restore_partition(self, lane: LaneName, partition: str) -> int:
        cursor, restored = 0, 0
        while True:
            cursor, items = await self._redis.zscan(keys.owed_items(lane, partition), cursor, count=_PAGE)
            args = [lane, partition, *(item for item, _ in items)]
            restored += int(await self._restore(args=args))
            if cursor == 0:
                return restored

    async def trim(self, *, wall_ms: int, sources: Iterable[str], subscriptions: Iterable[str]) -> None:
        """Delete calls and events whose retention is over, and remove them from every list."""
        sources = list(sources)
        calls = [*map(keys.calls_of, sources), *map(queue_keys.quarantine, LaneName)]
        events = [keys.DEAD, *map(keys.events_of, sources), *map(keys.deliveries_of, subscriptions)]
        for main, prefix, names, ttl_s in (
            (keys.CALLS, keys.call(""), calls, self._calls_ttl_s),
            (keys.EVENTS, keys.event(""), events, self._events_ttl_s),
        ):
            oldest_ms = wall_ms - ttl_s * 1000
            skip = 0
            while True:
                page: list[str | int] = [main, prefix, oldest_ms, keys.FALLBACK_TTL_S * 1000, skip, _PAGE]
                deleted, kept = await self._trim(args=page)
                skip += kept
                if deleted + kept < _PAGE:
                    break
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.zremrangebyscore(name, "-inf", oldest_ms)
                    # No sweep trims the list of a source that was removed.
                    pipe.expire(name, ttl_s + keys.FALLBACK_TTL_S)
                await pipe.execute()

    async def deletion_suspended_until_ms(self) -> int:
        """Until when nothing may be deleted by its age, because the store's clock has leapt (heartbeat.lua); else 0."""
        return int(await self._redis.hget(queue_keys.CLOCK, "suspended_until") or 0)  # type: ignore[misc]

    async def count_processes(self) -> int:
        """Count the processes whose heartbeat goes on."""
        return int(await self._redis.zcard(queue_keys.PROCESSES))

    async def memory(self) -> Memory:
        used_bytes = int((await self._redis.info("memory"))["used_memory"])
        try:
            limit_bytes = int((await self._redis.config_get("maxmemory")).get("maxmemory", 0))
        except ResponseError:
            limit_bytes = 0
        return Memory(used_bytes, limit_bytes)

    async def backlog(self, lane: LaneName) -> Backlog:
        """Measure a lane by its schedule: what waits for a circuit or a pause is not late."""
        now_ms = await connection.now_ms(self._redis)
        partitions: list[bytes] = []
        for standing in queue_keys.STANDINGS:
            for group in await self._redis.zrangebyscore(queue_keys.index(lane, standing), "-inf", now_ms):
                name = queue_keys.group(lane, group.decode())
                partitions += await self._redis.zrangebyscore(name, "-inf", now_ms, start=0, num=_MOST_PARTITIONS)
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition in partitions:
                name = queue_keys.waiting(lane, partition.decode())
                pipe.zcount(name, "-inf", now_ms)
                pipe.zrange(name, 0, 0, withscores=True)
            replies = await pipe.execute()
        oldest_ms = min((head[0][1] for head in replies[1::2] if head), default=now_ms)
        return Backlog(sum(replies[::2]), max((now_ms - oldest_ms) / 1000, 0))

    async def quarantined_items(self, lane: LaneName) -> int:
        """Count the items of a lane that no runner works on any more, because five processes died with them."""
        return int(await self._redis.zcard(queue_keys.quarantine(lane)))
