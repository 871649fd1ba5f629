"""Which configurations the processes run with, and which of them is the newest: it decides what all processes share."""

from collections.abc import Iterable
from typing import Final, Literal

import orjson
from redis.asyncio import Redis

from relay.store import keys
from relay.store.scripts import load_script

Kind = Literal["source", "subscription"]
Name = tuple[Kind, str]
_KINDS: Final[tuple[Kind, Kind]] = ("source", "subscription")

# A process announces its configuration every second; one that is silent for longer is gone.
_HOLDS_MS: Final = 15_000
# What no configuration has declared for so long was removed: longer than a rolling restart of one role takes.
_REMOVED_AFTER_MS: Final = 600_000
_FORGOTTEN_MS: Final = 86_400_000


class Configurations:
    """Announces this process's configuration and reads those of the others."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._announce = load_script(redis, "announce")
        self._retire = load_script(redis, "retire")
        self._names: dict[str, frozenset[Name]] = {}

    async def announce(self, version: str, names: Iterable[Name], *, former: str = "") -> frozenset[Name]:
        """Announce a configuration, in place of the `former` one; returns what newer ones, in use now, declare.

        `names` is what it declares, `former` what this process announced before.
        """
        args: list[str | int | bytes] = [version, _HOLDS_MS, _FORGOTTEN_MS, former]
        newer = await self._announce(args=args)
        if newer is None:
            newer = await self._announce(args=[*args, orjson.dumps(sorted(names))])
        self._names = {other.decode(): await self._names_of(other.decode()) for other in newer}
        return frozenset().union(*self._names.values())

    async def retire(self) -> list[Name]:
        """Leave a tombstone of what no configuration declares any more, and return it."""
        reply = [value.decode() for value in await self._retire(args=[_REMOVED_AFTER_MS])]
        return [(kind, name) for kind in _KINDS for of, name in zip(reply[::2], reply[1::2], strict=True) if of == kind]

    async def removed_before(self, before_ms: int) -> list[Name]:
        """List what was removed before a moment of the store's clock."""
        removed: list[Name] = []
        for kind in _KINDS:
            times = await self._redis.hgetall(keys.removed(kind))  # type: ignore[misc]  # both clients
            removed += [(kind, name.decode()) for name, at_ms in times.items() if int(at_ms) < before_ms]
        return removed

    async def forget_removed(self, kind: Kind, name: str) -> None:
        """Delete a tombstone, once nothing is left of what was removed."""
        await self._redis.hdel(keys.removed(kind), name)  # type: ignore[misc]  # both clients

    async def is_declared(self, kind: Kind, name: str) -> bool:
        """Whether any process's configuration declares it, or the API."""
        configured = await self._redis.sismember(keys.configured(kind), name)  # type: ignore[misc]  # both clients
        return bool(configured or await self._redis.hexists(keys.declared(kind), name))  # type: ignore[misc]

    async def _names_of(self, version: str) -> frozenset[Name]:
        if version in self._names:
            return self._names[version]
        names = await self._redis.hget(keys.configuration(version), "names")  # type: ignore[misc]  # both clients
        return frozenset((kind, name) for kind, name in orjson.loads(names or "[]"))
