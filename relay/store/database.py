"""The database that a relay runs on: reachable, on a server that keeps its data, ours, and of a layout that we know."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from relay.errors import StoreError, StoreInUse, StoreTooNew
from relay.store import keys

log = structlog.get_logger(__name__)

_PING_EVERY_S = 0.5
WATCH_EVERY_S = 5.0


async def wait_until_reachable(redis: Redis, *, timeout_s: float = 30) -> None:
    """Wait for the store, which may be starting too. Raises StoreError when it does not answer in time."""
    deadline = time.monotonic() + timeout_s
    waiting = False
    while True:
        try:
            await redis.ping()
        except (AuthenticationError, BusyLoadingError, RedisConnectionError, RedisTimeoutError, OSError) as error:
            address = redis.connection_pool.connection_kwargs
            place = address.get("path") or f"{address.get('host')}:{address.get('port')}"
            if isinstance(error, AuthenticationError) or time.monotonic() >= deadline:
                raise StoreError(f"the store at {place} cannot be used: {error}. Check RELAY_REDIS_URL.") from None
            if not waiting:
                waiting = True
                log.warning("store_unreachable", at=place, reason=str(error), waiting_s=timeout_s)
            await asyncio.sleep(_PING_EVERY_S)
        else:
            return


@dataclass(frozen=True, slots=True)
class Unsuitable:
    """Why a server would lose what the relay stores, or refuse it, and what to do."""

    reason: str
    action: str


def unsuitable(info: Mapping[str, Any]) -> Unsuitable | None:
    """Judge a server by its `INFO`; what it hides counts as right."""
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("cluster_enabled"):
        return Unsuitable("it is a Redis Cluster", "use a single primary, with a replica for fail-over if you like")
    if info.get("redis_mode") == "sentinel":
        return Unsuitable("it is a Sentinel", "set RELAY_REDIS_URL to the primary that it watches")
    if info.get("role") == "slave":
        return Unsuitable("it is a replica, which accepts no writes", "set RELAY_REDIS_URL to the primary")
    if policy != "noeviction":
        reason = f"it evicts calls and deliveries when its memory is full (maxmemory-policy {policy})"
        return Unsuitable(reason, "set maxmemory-policy noeviction")
    return None


async def require_suitable_server(redis: Redis) -> None:
    """Raise StoreError when the server would lose what the relay stores, or refuse it."""
    problem = unsuitable(await redis.info())
    if problem is not None:
        raise StoreError(f"the store cannot be used: {problem.reason}; {problem.action}.")


async def watch_server(redis: Redis) -> None:
    """Log, for ever, when the server becomes unsuitable: its settings are changed, or a fail-over leads to another."""
    before: Unsuitable | None = None
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        with contextlib.suppress(RedisError, OSError):
            problem = unsuitable(await redis.info())
            if problem is not None and problem != before:
                log.error("store_unsuitable", reason=problem.reason, action=problem.action)
            elif problem is None and before is not None:
                log.info("store_suitable_again")
            before = problem


async def claim_database(redis: Redis, fingerprints: Sequence[str]) -> None:
    """Make sure that the database is ours and that we understand its layout. `fingerprints` are those of our keys,
    newest first. Raises StoreInUse and StoreTooNew: two relays in one database would each lose the other's calls."""
    if await redis.get(keys.IDENTITY) is None:
        await redis.set(keys.IDENTITY, fingerprints[0], nx=True)
    await verify_database(redis, fingerprints)
    ours = {keys.IDENTITY: fingerprints[0], keys.SCHEMA: str(keys.SCHEMA_VERSION)}
    stored = dict(zip(ours, await redis.mget(list(ours)), strict=True))
    for name, value in ours.items():
        if stored[name] != value.encode():  # a store whose memory is full refuses writes, but the relay must start
            await redis.set(name, value)


async def verify_database(redis: Redis, fingerprints: Sequence[str]) -> None:
    """Raise StoreInUse when the database is another relay's, StoreTooNew when its layout is newer than ours."""
    owner = await redis.get(keys.IDENTITY)
    if owner is not None and owner.decode() not in fingerprints:
        raise StoreInUse(
            "this Redis database belongs to another relay (it was started with another RELAY_SECRET_KEY). "
            "Give this relay a database of its own, or the same key; after a rotation keep the old key as the second."
        )
    schema = int(await redis.get(keys.SCHEMA) or 0)
    if schema > keys.SCHEMA_VERSION:
        raise StoreTooNew(
            f"this Redis database was written by a newer release (layout {schema}; this release supports "
            f"{keys.SCHEMA_VERSION}). Start that release, or give this one a database of its own."
        )


async def is_durable(redis: Redis) -> bool:
    """Whether the store has each write on disk before it answers. A store that hides its configuration passes."""
    try:
        config = await redis.config_get("append*")
    except ResponseError:
        log.warning("store_durability_unknown", reason="it does not show its configuration; at_most_once relies on it")
        return True
    return bool(config.get("appendonly") == "yes" and config.get("appendfsync") == "always")


@contextlib.contextmanager
def explain_start_failure() -> Iterator[None]:
    """Raise StoreError, which can be shown, when the store becomes unavailable while a process starts."""
    try:
        yield
    except RedisError as error:
        raise StoreError(
            f"the store stopped answering while the relay was starting ({error}). Check the store's log."
        ) from error
