"""The cache of contact look-ups. A change of an address book starts a new generation, which hides the former one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from relay.domain.json import Json
from relay.store import connection, keys
from relay.store.documents import pack, unpack

_MATCHED_TTL_S: Final = 24 * 3600
_UNMATCHED_TTL_S: Final = 3600
_BOOK_TTL_S: Final = 30 * 86_400


@dataclass(frozen=True, slots=True)
class BookState:
    """An address book: the generation of its cache, its version at the provider, and how old that knowledge is."""

    generation: int
    version: int
    checked_s_ago: float


class ContactStore:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def book(self, source_id: str) -> BookState:
        names = ["generation", "version", "checked_at"]
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.contacts(source_id), names)
            pipe.time()
            values, (seconds, _) = await pipe.execute()
        generation, version, checked_at = (int(value or 0) for value in values)
        return BookState(generation, version, int(seconds) - checked_at)

    async def checked(self, source_id: str, book: BookState, *, version: int, changed: bool) -> None:
        """Record that the address book was asked for changes just now; a change starts a new generation."""
        fields = {"version": version, "checked_at": await connection.wall_ms(self._redis) // 1000}
        if changed:
            fields["generation"] = book.generation + 1
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(keys.contacts(source_id), mapping=fields)
            pipe.expire(keys.contacts(source_id), _BOOK_TTL_S)
            await pipe.execute()

    async def cached(self, source_id: str, generation: int, numbers: Sequence[str]) -> dict[str, Json]:
        if not numbers:
            return {}
        values = await self._redis.mget([keys.contact(source_id, generation, number) for number in numbers])
        return {number: unpack(value) for number, value in zip(numbers, values, strict=True) if value}

    async def cache(self, source_id: str, generation: int, parts: Mapping[str, Json]) -> None:
        """Keep `contact` parts by number: 24 h where there is a contact, 1 h where there is none."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for number, part in parts.items():
                ttl_s = _MATCHED_TTL_S if part["lookup_status"] == "matched" else _UNMATCHED_TTL_S
                pipe.set(keys.contact(source_id, generation, number), pack(part), ex=ttl_s)
            await pipe.execute()
