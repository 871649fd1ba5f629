"""Connections to Redis or Valkey: the only place outside the embedded store that opens them."""

from collections.abc import AsyncIterator
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError

from relay.queue.keys import CLOCK

# What every operation of the store may raise while the server is unavailable; for `except STORE_ERRORS`.
STORE_ERRORS: Final = (RedisError, OSError)

_OPTIONS: Final[dict[str, Any]] = {"socket_timeout": 15, "socket_connect_timeout": 5, "health_check_interval": 30}


def connect(url: str, **options: Any) -> Redis:
    """Make a client; it dials with its first command. `options` are redis-py's."""
    client: Redis = Redis.from_url(url, **_OPTIONS | options)
    return client


def connection_pool(url: str, **options: Any) -> ConnectionPool:
    """Make a pool of connections, for the arq client."""
    return ConnectionPool.from_url(url, **_OPTIONS | options)


async def now_ms(redis: Redis) -> int:
    """Read the relay's clock (see lane.lua), which all processes share."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.hmget(CLOCK, ["last", "offset"])
        (seconds, micros), (last, offset) = await pipe.execute()
    return max(int(seconds * 1000 + micros / 1000 + float(offset or 0)), int(float(last or 0)))


async def wall_ms(redis: Redis) -> int:
    """Read the store's time of day, which people read; see StoreClock."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def scan(redis: Redis, pattern: str, *, batch: int = 200) -> AsyncIterator[list[str]]:
    """Walk over the keys of a pattern: every key that exists from beginning to end, perhaps twice."""
    cursor = 0
    while True:
        cursor, names = await redis.scan(cursor, match=pattern, count=1000)
        for at in range(0, len(names), batch):
            yield [name.decode() for name in names[at : at + batch]]
        if cursor == 0:
            return
