"""Lists of the store by time: one or several of its indexes, read as one."""

import heapq
from collections.abc import AsyncIterator
from dataclasses import dataclass

from redis.asyncio import Redis

# When it was added (ms) and its id.
Entry = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Listing:
    """Entries of some indexes (ZSETs by time), each entry once."""

    redis: Redis
    indexes: tuple[str, ...]

    async def newest_first(
        self, *, after: Entry | None = None, newest_ms: int | None = None, oldest_ms: int | None = None, batch: int
    ) -> AsyncIterator[list[Entry]]:
        """Walk from behind the entry `after` to the oldest, about `batch` entries at a time."""
        position = after
        if newest_ms is not None and (position is None or position[0] > newest_ms):
            position = (newest_ms, "\U0010ffff")
        lowest: float | str = "-inf" if oldest_ms is None else oldest_ms
        while entries := await self._below(position, lowest, batch):
            yield entries
            position = entries[-1]

    async def _below(self, position: Entry | None, lowest: float | str, limit: int) -> list[Entry]:
        """Read the `limit` entries that follow a position; those of the very same ms are ordered by id, descending."""
        highest: float | str = "+inf" if position is None else position[0]
        offsets = dict.fromkeys(self.indexes, 0)
        entries: dict[str, list[Entry]] = {index: [] for index in self.indexes}
        while offsets:
            async with self.redis.pipeline(transaction=False) as pipe:
                for index, offset in offsets.items():
                    pipe.zrevrangebyscore(index, highest, lowest, start=offset, num=limit, withscores=True)
                replies = await pipe.execute()
            unfinished: dict[str, int] = {}
            for (index, offset), rows in zip(offsets.items(), replies, strict=True):
                read = [(int(score), member.decode()) for member, score in rows]
                entries[index] += [entry for entry in read if position is None or entry < position]
                if len(entries[index]) < limit and len(rows) == limit:
                    unfinished[index] = offset + limit  # some of them stand before the position, in its very ms
            offsets = unfinished
        merged: list[Entry] = []
        for entry in heapq.merge(*entries.values(), reverse=True):
            if not merged or merged[-1] != entry:
                merged.append(entry)
            if len(merged) == limit:
                break
        return merged

    async def oldest_first(self, from_ms: int, *, until_ms: int | None = None, limit: int) -> tuple[int, list[Entry]]:
        """Read at most `limit` entries of each index from a time on; returns the store's time (ms) with them."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for index in self.indexes:
                until: float | str = "+inf" if until_ms is None else until_ms
                pipe.zrangebyscore(index, from_ms, until, start=0, num=limit, withscores=True)
            (seconds, micros), *replies = await pipe.execute()
        entries = {(int(score), member.decode()) for rows in replies for member, score in rows}
        return int(seconds) * 1000 + int(micros) // 1000, sorted(entries)

    async def added_ms(self, entry_id: str) -> int | None:
        """When an entry was added; None when it is not in the list."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for index in self.indexes:
                pipe.zscore(index, entry_id)
            scores = await pipe.execute()
        return next((int(score) for score in scores if score is not None), None)

    async def count_after(self, at_ms: int) -> int:
        """Count the entries that were added after a time."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for index in self.indexes:
                pipe.zcount(index, f"({at_ms}", "+inf")
            return sum(await pipe.execute())
