"""What the store knows of a subscription besides its options: health, its circuit, notices sent, its removal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.store import connection, keys
from relay.store.lanes import LaneName

# The reason under which a removed subscription is disabled; publish.lua queues nothing at all for such a one.
REMOVED: Final = "deleted"
_NOTICE_EVERY_S: Final = 86_400
_TOMBSTONE_TTL_S: Final = 60


@dataclass(frozen=True, slots=True)
class SubscriptionHealth:
    """How deliveries to a subscription go. Times are ms of the store's clock, 0 for never."""

    disabled_reason: str = ""
    failing_since_ms: int = 0
    circuit_opened_ms: int = 0
    delivered_ms: int = 0

    @property
    def circuit_open(self) -> bool:
        """Whether attempts are held back for now."""
        return self.circuit_opened_ms > 0


class SubscriptionStore:
    """Reads and writes the state of subscriptions; what they are is in the configuration and in `declarations`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def health(self, subscription: str) -> SubscriptionHealth:
        return (await self.healths([subscription]))[0]

    async def healths(self, subscriptions: Sequence[str]) -> list[SubscriptionHealth]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for subscription in subscriptions:
                pipe.hmget(
                    queue_keys.partition(LaneName.DELIVER, subscription),
                    ["disabled", "failing_since", "circuit_opened_at", "succeeded_at"],
                )
            rows = await pipe.execute()
        return [
            SubscriptionHealth((reason or b"").decode(), int(failing or 0), int(opened or 0), int(delivered or 0))
            for reason, failing, opened, delivered in rows
        ]

    async def claim_failing_notice(self, subscription: str) -> bool:
        """Whether `subscription.failing` is to be published now: once a day, by one process."""
        return bool(await self._redis.set(keys.failing_notice(subscription), 1, nx=True, ex=_NOTICE_EVERY_S))

    async def claim_unsubscribe_notice(self, subscription: str) -> bool:
        """Whether the subscriber is to be notified now that it was disabled: once, by one process."""
        name = queue_keys.partition(LaneName.DELIVER, subscription)
        return bool(await self._redis.hsetnx(name, "unsubscribe_sent", "1"))  # type: ignore[misc]  # both clients

    async def reset_notices(self, subscription: str) -> None:
        """Allow both notices again, after the subscription was enabled."""
        await self._redis.hdel(queue_keys.partition(LaneName.DELIVER, subscription), "unsubscribe_sent")  # type: ignore[misc]
        await self._redis.delete(keys.failing_notice(subscription))

    async def note_filters(self, filters: Mapping[str, str]) -> None:
        """Note since when each subscription has its present filters; a removed one that returns starts anew."""
        now_ms = await connection.now_ms(self._redis)
        noted: dict[bytes, bytes] = await self._redis.hgetall(keys.FILTERS)  # type: ignore[misc]  # both clients
        removed: list[bytes] = await self._redis.hkeys(keys.removed("subscription"))  # type: ignore[misc]  # both clients
        digests = {name: keys.digest(text) for name, text in filters.items()}
        changed = {
            name: f"{digest} {now_ms}"
            for name, digest in digests.items()
            if noted.get(name.encode(), b"").split(b" ")[0] != digest.encode()
        }
        gone = [name.decode() for name in removed if name in noted and name.decode() not in filters]
        async with self._redis.pipeline(transaction=False) as pipe:
            if gone:
                pipe.hdel(keys.FILTERS, *gone)
            if changed:
                pipe.hset(keys.FILTERS, mapping=dict(changed))
            await pipe.execute()

    async def filters_since(self, subscriptions: Sequence[str]) -> dict[str, int]:
        """Read since when (ms) each subscription has its present filters, as far as that is known."""
        if not subscriptions:
            return {}
        noted: list[bytes | None] = await self._redis.hmget(keys.FILTERS, list(subscriptions))  # type: ignore[misc]
        return {name: int(value.split(b" ")[1]) for name, value in zip(subscriptions, noted, strict=True) if value}

    async def mark_removed(self, subscription: str, *, tenant: str | None) -> None:
        """Leave a tombstone of a removed subscription for a minute: by then every process has read of the removal."""
        partition = queue_keys.partition(LaneName.DELIVER, subscription)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(partition, queue_keys.leases(LaneName.DELIVER, subscription), keys.failing_notice(subscription))
            pipe.hset(partition, mapping={"disabled": REMOVED, "paused_until": "inf", "tenant": tenant or ""})
            pipe.expire(partition, _TOMBSTONE_TTL_S)
            pipe.hdel(keys.FILTERS, subscription)
            await pipe.execute()

    async def reuse(self, subscription: str, *, tenant: str | None) -> bool:
        """Clear the tombstone so that a new subscription can have this id; False when it was another tenant's."""
        name = queue_keys.partition(LaneName.DELIVER, subscription)
        reason, owner = await self._redis.hmget(name, ["disabled", "tenant"])  # type: ignore[misc]  # both clients
        if reason != REMOVED.encode():
            return True
        if (owner or b"").decode() != (tenant or ""):
            return False
        await self._redis.delete(name)
        return True
