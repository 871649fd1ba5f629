"""Stores for tests that need no whole runtime."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.queue.lane import Lane
from relay.secrets import SecretBox
from relay.store.calls import CallStore, Row
from relay.store.codes import RowOutcome
from relay.store.store import Store


def open_store(redis: Redis, *, calls_ttl_s: int = 3000, events_ttl_s: int = 1000, keep_raw: bool = False) -> Store:
    box = SecretBox(["k" * 40])
    return Store(redis, box, calls_ttl_s=calls_ttl_s, events_ttl_s=events_ttl_s, keep_raw=lambda: keep_raw)


async def prove(redis: Redis, lane: str, *partitions: str) -> None:
    """Let partitions be proven: their last attempt succeeded. They may then have more than one item leased."""
    for partition in partitions:
        await redis.hset(queue_keys.partition(lane, partition), "succeeded_at", str(10**14))  # type: ignore[misc]
        await Lane(redis, lane).drop(partition, "unknown")  # the index follows


class WatchedCalls(CallStore):
    """Remembers what became of each row that was ingested."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, ttl_s=30 * 86_400, keep_raw=lambda: False)
        self.outcomes: list[tuple[str, RowOutcome]] = []

    async def ingest(self, source_id: str, rows: Sequence[Row], **options: Any) -> list[RowOutcome]:
        outcomes = await super().ingest(source_id, rows, **options)
        self.outcomes += [(row.record.key, outcome) for row, outcome in zip(rows, outcomes, strict=True)]
        return outcomes

    def count(self, wanted: RowOutcome) -> Counter[str]:
        """How often each row was ingested with this outcome."""
        return Counter(key for key, outcome in self.outcomes if outcome is wanted)
