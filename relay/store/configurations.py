"""Which configurations the processes run with, and which of them is the newest: it decides what all processes share."""

from collections.abc import Iterable
from typing import Final, Literal

import orjson
from redis.asyncio import Redis

from relay.store import keys
from relay.store.scripts import load_script

Kind = Literal["source", "subscription"]
Name = tuple[Kind, str]

_HOLDS_MS: Final = 15_000
"""A process announces its configuration every second; one that is silent for longer is gone."""
_REMOVED_AFTER_MS: Final = 600_000
"""What no configuration has declared for so long was removed: longer than a rolling restart of one role takes."""
_FORGOTTEN_MS: Final = 86_400_000


class Configurations:
    """Announces this process's configuration and reads those of the others."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._announce = load_script(redis, "announce")
        self._retire = load_script(redis, "retire")
        self._names: dict[str, frozenset[Name]] = {}

    async def announce(self, version: str, names: Iterable[Name]) -> frozenset[Name]:
        """Announce a configuration with the names that it declares; returns what newer ones, in use now, declare."""
        args: list[str | int | bytes] = [version, _HOLDS_MS, _FORGOTTEN_MS]
        newer = await self._announce(args=args)
        if newer is None:
            newer = await self._announce(args=[*args, orjson.dumps(sorted(names))])
        self._names = {other.decode(): await self._names_of(other.decode()) for other in newer}
        return frozenset().union(*self._names.values())

    async def retire(self) -> list[Name]:
        """Leave a tombstone of what no configuration declares any more, and return it."""
        reply = [value.decode() for value in await self._retire(args=[_REMOVED_AFTER_MS])]
        return list(zip(reply[::2], reply[1::2], strict=True))

    async def _names_of(self, version: str) -> frozenset[Name]:
        if version in self._names:
            return self._names[version]
        names = await self._redis.hget(keys.configuration(version), "names")  # type: ignore[misc]  # both clients
        return frozenset((kind, name) for kind, name in orjson.loads(names or "[]"))
