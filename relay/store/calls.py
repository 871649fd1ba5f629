"""Calls and events as the ledger keeps them: the only place that knows their fields."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Record
from relay.domain.json import Json
from relay.queue.claim import Claim
from relay.store import keys
from relay.store.codes import SeenMark
from relay.store.deliveries import DeliveryState
from relay.store.documents import pack, unpack, unpack_bytes
from relay.store.listings import Listing
from relay.store.scripts import load_script

CHUNK = 50
"""Rows in one admission: 50 new ones hold the store for about 1 ms, 1,000 for about 90."""


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call as it was read; `version` is what a publish must still find. Times are ms of the store's clock."""

    id: str
    source_id: str
    key: str
    version: int
    finished: bool
    started_ms: int
    first_seen_ms: int
    ready_ms: int
    via: str
    record: Json
    contact: Json | None = None
    lookup: Json | None = None
    recording: Json | None = None
    said: Json | None = None
    fetch: Json | None = None
    raw_packed: bytes = b""
    events: Sequence[str] = ()

    @property
    def raw(self) -> Json | None:
        """The provider's row as it came, where a subscription wants such."""
        return unpack(self.raw_packed) if self.raw_packed else None


def read_call(cid: str, flat: Sequence[bytes] | Mapping[bytes, bytes]) -> StoredCall:
    """Read the call HASH, flat as a script answers it or as a mapping."""
    fields = flat if isinstance(flat, Mapping) else dict(zip(flat[::2], flat[1::2], strict=True))

    def part(name: bytes) -> Json | None:
        packed = fields.get(name)
        return unpack(packed) if packed else None

    record, contact, said = unpack(fields[b"record"]), part(b"contact"), part(b"said")
    return StoredCall(
        id=cid,
        source_id=fields[b"source"].decode(),
        key=fields[b"key"].decode(),
        version=int(fields[b"version"]),
        finished=fields[b"finished"] == b"1",
        started_ms=int(fields[b"started"]),
        first_seen_ms=int(fields[b"first_seen"]),
        ready_ms=int(fields[b"ready"]),
        via=fields[b"via"].decode(),
        record=record,
        contact=contact,
        lookup=part(b"lookup"),
        recording=part(b"recording"),
        said=_in_full(said, part(b"was") or record, contact) if said else None,
        fetch=part(b"fetch"),
        raw_packed=fields.get(b"raw", b""),
        events=fields.get(b"events", b"").decode().split(),
    )


# What was said repeats the call nearly always, and would be a fifth of what a call costs. So its content is kept only
# where it differs from what stands beside it: the record (`was`, once another one has come) and the contact.


def _without_repetition(said: Json, record: Json, contact: Json | None) -> Json:
    content = dict(said["content"])
    told = content.pop("contact")
    if content != record:
        return said
    kept = {name: value for name, value in said.items() if name != "content"}
    return kept if told == _published(contact) else {**kept, "contact": told}


def _in_full(kept: Json, record: Json, contact: Json | None) -> Json:
    if "content" in kept:
        return kept
    said = {"content": {**record, "contact": _published(contact)}, **kept}
    if "contact" in said:
        said["content"]["contact"] = said.pop("contact")
    return said


def _published(contact: Json | None) -> Json | None:
    """The contact as events have it: without the number that it was looked up for."""
    return contact and {name: value for name, value in contact.items() if name != "number"}


@dataclass(frozen=True, slots=True)
class Row:
    """A record on its way into the ledger. `seed` = to be known, not told."""

    record: Record
    hash: str
    seed: bool = False


@dataclass(frozen=True, slots=True)
class CursorUpdate:
    """What the last chunk of a poll moves: fields of the source, and the days of `seen` that may be forgotten."""

    fields: Mapping[str, str | int] = field(default_factory=dict)
    forget_days: Sequence[str] = ()


class LeaseLost(Exception):
    """Somebody else polls this source now; nothing was taken in."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that is to be published: its id, its canonical document, and who is to hear it."""

    id: str
    document: Json
    subscriptions: Sequence[str]


class CallStore:
    """Reads calls, and what `seen` has of rows."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def get(self, call_id: str) -> StoredCall | None:
        return (await self.get_many([call_id]))[0]

    async def get_many(self, call_ids: Sequence[str]) -> list[StoredCall | None]:
        """Read calls; None for those that are not kept any more."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for call_id in call_ids:
                pipe.hgetall(keys.call(call_id))
            rows = await pipe.execute()
        return [read_call(call_id, fields) if fields else None for call_id, fields in zip(call_ids, rows, strict=True)]

    def all(self) -> Listing:
        """List every call, by when it was first seen."""
        return Listing(self._redis, (keys.CALLS,))

    def of_sources(self, source_ids: Sequence[str]) -> Listing:
        """List the calls of some sources, by when they were first seen."""
        return Listing(self._redis, tuple(map(keys.calls_of, source_ids)))

    async def seen(self, source_id: str, row_key: str, days: Sequence[str]) -> tuple[str, SeenMark] | None:
        """Find what is remembered of a row, with the day it is filed under; `days` are ISO dates, likeliest first."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for day in days:
                pipe.hget(keys.seen(source_id, day), row_key)
            marks = await pipe.execute()
        return next(((day, SeenMark.parse(mark)) for day, mark in zip(days, marks, strict=True) if mark), None)


class Ledger:
    """Takes records in and gives events out, each in one step of the store."""

    def __init__(self, redis: Redis, *, calls_ttl_s: int, events_ttl_s: int, keep_raw: Callable[[], bool]) -> None:
        self.redis = redis
        self.calls_ttl_s = calls_ttl_s
        self.events_ttl_s = events_ttl_s
        self.keep_raw = keep_raw
        self._ingest = load_script(redis, "ingest")
        self._publish = load_script(redis, "publish")
        self._replay = load_script(redis, "replay")

    async def unknown(self, sid: str, rows: Sequence[Row], *, mapping: int, untold_too: bool = False) -> list[Row]:
        """Leave out the rows that `seen` has exactly as they are: with deep overlap more than 99 % are repeats.

        With `untold_too` rows that were seeded, and so never told, are not left out. One HMGET a day. Only saves work:
        `ingest` decides.
        """
        by_day: dict[str, list[Row]] = {}
        for row in rows:
            by_day.setdefault(row.record.local_date, []).append(row)
        async with self.redis.pipeline(transaction=False) as pipe:
            for day, members in by_day.items():
                pipe.hmget(keys.seen(sid, day), [row.record.key for row in members])
            answers = await pipe.execute()
        prefix = str(mapping).encode()
        fresh: list[Row] = []
        for members, values in zip(by_day.values(), answers, strict=True):
            for row, value in zip(members, values, strict=True):
                end = len(prefix) + 1
                known = value is not None and value[:-17] == prefix and value[end:] == row.hash.encode()
                if not known or (untold_too and value[end - 1 : end] != b"e"):
                    fresh.append(row)
        return fresh

    async def ingest(
        self, sid: str, rows: Sequence[Row], *, token: bytes, mapping: int, via: str, last: CursorUpdate | None = None
    ) -> str:
        """Take at most `CHUNK` rows in: a letter a row, see ingest.lua. Raises LeaseLost; a backfill has no token."""
        keep_raw = self.keep_raw()
        args: list[Any] = [sid, token, mapping, via, self.calls_ttl_s, len(rows)]
        for row in rows:
            record = row.record
            day, before, after = _days_around(record.local_date)
            args += (
                record.key,
                day,
                before,
                after,
                ids.call_id(sid, record.key),
                row.hash,
                int(row.seed),
                int(record.finished),
                int(record.audio),
                int(record.started_at.timestamp() * 1000),
                pack(record.content()),
                pack(record.raw) if keep_raw else b"",
            )
        if last is None:
            args.append(0)
        else:
            args += (1, len(last.fields))
            for name, value in last.fields.items():
                args += (name, value)
            args += (len(last.forget_days), *last.forget_days)
        answer = await self._ingest(args=args)
        if answer is None:
            raise LeaseLost
        return b"".join(answer).decode()

    async def publish(
        self, call: StoredCall | None, fields: Mapping[str, Any], events: Sequence[NewEvent], *, subject: str = ""
    ) -> int | None:
        """Write parts of a call and say events, in one step. None: the call changed since it was read, read again.

        `fields` are parts by name; a value of None removes the part.
        """
        fields = dict(fields)
        if call is not None:
            said = fields.get("said", call.said)
            if said is not None and fields.keys() & {"said", "contact"}:
                fields["said"] = _without_repetition(said, call.record, fields.get("contact", call.contact))
                fields["was"] = None
        args: list[Any] = [
            call.id if call else "",
            call.version if call else 0,
            call.id if call else subject,
            self.calls_ttl_s,
            self.events_ttl_s,
            len(fields),
        ]
        for name, value in fields.items():
            args += (name, b"" if value is None else pack(value))
        args.append(len(events))
        for event in events:
            args += (event.id, pack(event.document), len(event.subscriptions), *event.subscriptions)
        made = await self._publish(args=args)
        return None if made < 0 else int(made)

    async def replay(self, eid: str, subject: str, subscriptions: Sequence[str], *, at_ms: int, force: bool) -> str:
        """Queue an event again in its old place; a letter a subscription, see replay.lua. Its schedule begins anew."""
        state = DeliveryState(restarted_ms=at_ms).write()
        args: list[Any] = [eid, subject, int(force), self.events_ttl_s, state, len(subscriptions), *subscriptions]
        letters = {b"queued": "q", b"waiting": "w", b"delivered": "d", b"disabled": "o", b"gone": "g"}
        return "".join(letters[reply] for reply in await self._replay(args=args))

    async def call(self, cid: str) -> StoredCall | None:
        """Read one call."""
        fields: dict[bytes, bytes] = await self.redis.hgetall(keys.call(cid))  # type: ignore[misc]  # typed for both clients
        return read_call(cid, fields) if fields else None

    async def event(self, eid: str) -> Json | None:
        """Read one event; None when it is not kept any more."""
        return (await self.events([eid]))[0]

    async def events(self, eids: Sequence[str]) -> list[Json | None]:
        """Read events; None for those that are not kept any more."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for eid in eids:
                pipe.hget(keys.event(eid), keys.BODY)
            return [unpack(packed) if packed else None for packed in await pipe.execute()]


def claimed_call(claim: Claim) -> StoredCall:
    """Read the call that comes with a claim of the enrich and record lanes."""
    return read_call(claim.item, claim.payload[0])


@dataclass(frozen=True, slots=True)
class ClaimedEvent:
    """What comes with a claim of the deliver lane: the head of the subject's pending events. `body` is None when the
    event is gone from the store."""

    id: str
    body: bytes | None
    state: bytes


def claimed_event(claim: Claim) -> ClaimedEvent:
    """Read it."""
    eid, packed, state = claim.payload
    return ClaimedEvent(eid.decode(), unpack_bytes(packed) if packed else None, state)


def _days_around(day: str) -> tuple[str, str, str]:
    there = date.fromisoformat(day)
    return day, (there - timedelta(days=1)).isoformat(), (there + timedelta(days=1)).isoformat()
