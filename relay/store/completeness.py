"""What completeness is judged by: the rows that the last deep look showed of each day, and what became of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.time import from_ms
from relay.store import connection, keys
from relay.store.calls import days_around
from relay.store.codes import DeliveryFate, SeenFlag
from relay.store.documents import pack, unpack
from relay.store.scripts import load_script

# Calls that one step examines: a few milliseconds of the store.
CHUNK: Final = 100
_TTL_S: Final = 90 * 86_400
_INVALID_MOST: Final = 500
_CHECK_EVERY_S: Final = 60

# An invalid row: its key, the reason, and a masked excerpt.
InvalidEntry = tuple[str | None, str, str]


@dataclass(slots=True)
class ShownRows:
    """The rows of one day that a reading showed, by their keys; `read_at` is when the day was last read as a whole."""

    keys: set[str] = field(default_factory=set)
    too_old: set[str] = field(default_factory=set)
    invalid: set[InvalidEntry] = field(default_factory=set)
    read_at: datetime | None = None

    def add(self, other: "ShownRows") -> None:
        self.keys |= other.keys
        self.too_old |= other.too_old
        self.invalid |= other.invalid

    def write(self) -> bytes:
        invalid = sorted(self.invalid, key=str)[:_INVALID_MOST]
        return pack([sorted(self.keys), sorted(self.too_old), invalid])

    @classmethod
    def read(cls, stored: bytes | None, read_ms: bytes | None) -> "ShownRows":
        shown, too_old, invalid = unpack(stored) if stored else ([], [], [])
        read_at = from_ms(int(read_ms)) if read_ms else None
        return cls(set(shown), set(too_old), {(key, reason, excerpt) for key, reason, excerpt in invalid}, read_at)


@dataclass(frozen=True, slots=True)
class EventFacts:
    """An event of a call: whether its document is stored, and the fate of each delivery that there is."""

    id: str
    document: bool
    deliveries: Mapping[str, DeliveryFate]


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What became of one row. `flag` is what `seen` has of it, None when it has nothing; `other_day`: under another day
    than the one that was asked for; `held`: a lane holds it, so that something is about to be published."""

    key: str
    id: str
    flag: SeenFlag | None
    other_day: bool = False
    stored: bool = False
    finished: bool = False
    held: bool = False
    events: Sequence[EventFacts] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """How much was missing of a source when it was checked last (ms)."""

    missing: int
    at_ms: int


class CompletenessStore:
    """Remembers what readings showed, and examines what became of it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._examine = load_script(redis, "completeness")

    async def remember(
        self, source_id: str, days: Mapping[str, ShownRows], *, covered: Sequence[str], read_at: datetime
    ) -> None:
        """Remember what a reading showed. It replaces what is known of the days that it covers, and adds to others."""
        names = sorted({*days, *covered})
        if not names:
            return
        name = keys.shown(source_id)
        stored: list[bytes | None] = await self._redis.hmget(name, names)  # type: ignore[misc]  # both clients
        fields: dict[str, str | bytes | int] = {}
        for day, before in zip(names, stored, strict=True):
            rows = ShownRows()
            if day not in covered:
                rows = ShownRows.read(before, None)
            rows.add(days.get(day, ShownRows()))
            if (packed := rows.write()) != before:
                fields[day] = packed
            if day in covered:
                fields[f"{day}@"] = int(read_at.timestamp() * 1000)
        if fields:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(name, mapping=dict(fields))
                pipe.expire(name, _TTL_S)
                await pipe.execute()

    async def shown(self, source_id: str) -> dict[str, ShownRows]:
        """Read what readings showed, by day; an invalid row without a date counts on the first day that has it."""
        fields: dict[bytes, bytes] = await self._redis.hgetall(keys.shown(source_id))  # type: ignore[misc]  # both clients
        days = sorted({name.decode().removesuffix("@") for name in fields})
        shown: dict[str, ShownRows] = {}
        earlier: set[InvalidEntry] = set()
        for day in days:
            rows = ShownRows.read(fields.get(day.encode()), fields.get(f"{day}@".encode()))
            rows.invalid -= earlier
            earlier |= rows.invalid
            shown[day] = rows
        return shown

    async def examine(
        self, source_id: str, day: str, shown: ShownRows, subscriptions: Sequence[str]
    ) -> list[CallFacts]:
        """Read what became of every row of a day: of those that were shown, and of those that `seen` has."""
        remembered: list[bytes] = await self._redis.hkeys(keys.seen(source_id, day))  # type: ignore[misc]  # both clients
        rows = sorted({*(key.decode() for key in remembered), *shown.keys, *shown.too_old})
        facts: list[CallFacts] = []
        for start in range(0, len(rows), CHUNK):
            chunk = [(key, ids.call_id(source_id, key)) for key in rows[start : start + CHUNK]]
            args: list[Any] = [source_id, *days_around(day), len(subscriptions), *subscriptions, len(chunk)]
            for pair in chunk:
                args += pair
            replies = await self._examine(args=args)
            facts += [
                _facts(key, call_id, reply, subscriptions) for (key, call_id), reply in zip(chunk, replies, strict=True)
            ]
        return facts

    async def claim_check(self) -> bool:
        """Whether sources are to be checked now: once a minute, by one process."""
        return bool(await self._redis.set(keys.COMPLETENESS_CHECKED, 1, nx=True, ex=_CHECK_EVERY_S))

    async def note_check(self, source_id: str, missing: int) -> None:
        check = f"{missing} {await connection.now_ms(self._redis)}"
        await self._redis.hset(keys.COMPLETENESS, source_id, check)  # type: ignore[misc]  # both clients

    async def checks(self) -> dict[str, Check]:
        """Read the last check of each source."""
        stored: dict[bytes, bytes] = await self._redis.hgetall(keys.COMPLETENESS)  # type: ignore[misc]  # both clients
        return {name.decode(): Check(*map(int, value.split(b" "))) for name, value in stored.items()}


def _facts(key: str, call_id: str, reply: Sequence[Any], subscriptions: Sequence[str]) -> CallFacts:
    flag, other_day, stored, finished, held, *events = reply
    return CallFacts(
        key,
        call_id,
        SeenFlag(flag.decode()) if flag else None,
        other_day=bool(other_day),
        stored=bool(stored),
        finished=bool(finished),
        held=bool(held),
        events=[_event(text.decode().split(" "), subscriptions) for text in events],
    )


def _event(words: Sequence[str], subscriptions: Sequence[str]) -> EventFacts:
    event_id, document, *fates = words
    deliveries = {
        subscription: DeliveryFate(fate) for subscription, fate in zip(subscriptions, fates, strict=True) if fate != "-"
    }
    return EventFacts(event_id, document == "1", deliveries)
