"""Who was on the call: at most one request for a batch of calls, and an answer that is never guessed.

Answers are kept per source (24 h when somebody was found, 1 h when nobody was). A batch whose numbers are all kept asks
only whether the address book changed, at most once a minute; a batch with an unknown number looks all of its numbers up
at once, the kept ones too, so it needs no such question.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from redis.asyncio import Redis

from relay.domain.call import Contact
from relay.domain.json import Json
from relay.events.payload import NO_CONTACT
from relay.providers.base import ContactSource
from relay.store import keys
from relay.store.documents import pack, unpack

_FOUND_TTL_S = 24 * 3600
_NONE_TTL_S = 3600
_BOOK_TTL_S = 30 * 86_400
CHECK_EVERY_S = 60
LADDER_S = (1, 3, 15, 60, 300, 1800, 7200)
"""After each look-up that failed: seconds to the next; after the last one the contact stays `unavailable`."""


class AddressBook:
    """Looks numbers up at a source's provider, through what is kept of earlier answers."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def find(self, sid: str, source: ContactSource, numbers: Iterable[str]) -> dict[str, Json]:
        """Give the `contact` part of each E.164 number. Raises ProviderError and OverBudget."""
        wanted = sorted(set(numbers))
        book = await self._book(sid)
        kept = await self._kept(sid, book["generation"], wanted)
        if len(kept) == len(wanted) and await self._unchanged(sid, source, book):
            return kept
        found: dict[str, Json] = {}
        for at in range(0, len(wanted), source.batch):
            answer = await source.search(wanted[at : at + source.batch])
            found |= {number: contact_part(answer[number]) for number in wanted[at : at + source.batch]}
        await self._keep(sid, (await self._book(sid))["generation"], found)
        return found

    async def _book(self, sid: str) -> dict[str, int]:
        names = ["generation", "version", "checked_at"]
        values = await self._redis.hmget(keys.contacts(sid), names)  # type: ignore[misc]  # typed for both clients
        return {name: int(value or 0) for name, value in zip(names, values, strict=True)}

    async def _kept(self, sid: str, generation: int, numbers: Sequence[str]) -> dict[str, Json]:
        if not numbers:
            return {}
        values = await self._redis.mget([keys.contact(sid, generation, number) for number in numbers])
        return {number: unpack(value) for number, value in zip(numbers, values, strict=True) if value}

    async def _unchanged(self, sid: str, source: ContactSource, book: Mapping[str, int]) -> bool:
        """Ask whether the address book changed; a change ends everything that was kept."""
        seconds, _ = await self._redis.time()
        now = int(seconds)
        if now - book["checked_at"] < CHECK_EVERY_S:
            return True
        changes = await source.changes_after(book["version"])
        # The first answer only says where the book stands: what was kept before it may be older than that.
        fields: dict[str, Any] = {"version": changes.version, "checked_at": now}
        if changes.changed:
            fields["generation"] = book["generation"] + 1
        name = keys.contacts(sid)
        await self._redis.hset(name, mapping=fields)  # type: ignore[misc]  # typed for both clients
        await self._redis.expire(name, _BOOK_TTL_S)
        return not changes.changed

    async def _keep(self, sid: str, generation: int, found: Mapping[str, Json]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for number, part in found.items():
                ttl_s = _FOUND_TTL_S if part["lookup_status"] == "matched" else _NONE_TTL_S
                pipe.set(keys.contact(sid, generation, number), pack(part), ex=ttl_s)
            await pipe.execute()


def contact_part(matches: Sequence[Contact]) -> Json:
    """Build the `contact` of a call: the first match, the others (at most ten) listed beside it."""
    if not matches:
        return NO_CONTACT | {"lookup_status": "none"}
    first, *others = matches
    return NO_CONTACT | {
        "lookup_status": "matched",
        "count": len(matches),
        **asdict(first),
        "others": [asdict(other) for other in others[:10]],
    }
