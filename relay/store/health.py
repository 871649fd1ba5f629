"""The health of a subscription as the store has it: since when it is not heard, and its breaker."""

from dataclasses import dataclass

from redis.asyncio import Redis

from relay.queue import keys as queue_keys
from relay.store.lanes import LaneName


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of a subscription's health; times are ms of the store's clock, 0 for never."""

    off: str = ""
    failing_since_ms: int = 0
    opened_ms: int = 0
    heard_ms: int = 0

    @property
    def breaker_open(self) -> bool:
        """Whether attempts are held back for now."""
        return self.opened_ms > 0


async def read_health(redis: Redis, sub: str) -> Health:
    """Read it."""
    names = ["disabled", "failing_since", "circuit_opened_at", "succeeded_at"]
    off, failing, opened, heard = await redis.hmget(queue_keys.partition(LaneName.DELIVER, sub), names)  # type: ignore[misc]
    return Health((off or b"").decode(), int(failing or 0), int(opened or 0), int(heard or 0))
