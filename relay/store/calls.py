"""Calls: ingesting rows, reading calls, and what is remembered of rows (`seen`)."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Final

from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Record
from relay.domain.json import Json
from relay.queue.claim import Claim
from relay.store import keys
from relay.store.codes import RowOutcome, SeenFlag, SeenMark
from relay.store.connection import scan
from relay.store.documents import pack, unpack
from relay.store.listings import Entry, Listing
from relay.store.scripts import load_script
from relay.store.sources import CursorUpdate, LeaseLost

# Most rows that one ingest takes: 50 new ones keep the store busy for about 1 ms, 1,000 for about 90.
CHUNK: Final = 50


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
    published: Json | None = None
    fetch: Json | None = None
    raw_packed: bytes = b""
    events: Sequence[str] = ()

    @property
    def raw(self) -> Json | None:
        """The provider's row as it came, kept only while a subscription asks for it."""
        return unpack(self.raw_packed) if self.raw_packed else None


def read_call(call_id: str, flat: Sequence[bytes] | Mapping[bytes, bytes]) -> StoredCall:
    """Parse the call HASH, flat as a script replies it or as a mapping."""
    fields = flat if isinstance(flat, Mapping) else dict(zip(flat[::2], flat[1::2], strict=True))

    def part(name: bytes) -> Json | None:
        packed = fields.get(name)
        return unpack(packed) if packed else None

    record, contact, published = unpack(fields[b"record"]), part(b"contact"), part(b"published")
    return StoredCall(
        id=call_id,
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
        published=_in_full(published, part(b"published_record") or record, contact) if published else None,
        fetch=part(b"fetch"),
        raw_packed=fields.get(b"raw", b""),
        events=fields.get(b"events", b"").decode().split(),
    )


# What was published nearly always repeats the call, and would be a fifth of its size. So its content is stored only
# where it differs from the call's parts: the record (`published_record`, once a newer one has come; see ingest.lua) and
# the contact.


def write_parts(call: StoredCall, parts: Mapping[str, Json | None]) -> dict[str, Json | None]:
    """Choose the fields of the call HASH that change with `parts`; a value of None removes the field."""
    published = parts.get("published", call.published)
    if published is None or not parts.keys() & {"published", "contact"}:
        return dict(parts)
    contact = parts.get("contact", call.contact)
    return {
        **parts,
        "published": _without_repetition(published, call.record, contact),
        "published_record": None,
    }


def _without_repetition(published: Json, record: Json, contact: Json | None) -> Json:
    content = dict(published["content"])
    published_contact = content.pop("contact")
    if content != record:
        return published
    short = {name: value for name, value in published.items() if name != "content"}
    return short if published_contact == _as_published(contact) else {**short, "contact": published_contact}


def _in_full(stored: Json, record: Json, contact: Json | None) -> Json:
    if "content" in stored:
        return stored
    published = {"content": {**record, "contact": _as_published(contact)}, **stored}
    if "contact" in published:
        published["content"]["contact"] = published.pop("contact")
    return published


def _as_published(contact: Json | None) -> Json | None:
    """Leave out the number that a contact was looked up for: events do not have it."""
    return contact and {name: value for name, value in contact.items() if name != "number"}


def claimed_call(claim: Claim) -> StoredCall:
    """Read the call that comes with a claim of the enrich, contacts and record lanes."""
    return read_call(claim.item, claim.payload[0])


@dataclass(frozen=True, slots=True)
class Row:
    """A record to be ingested. A `seed` is only remembered, so that it is not published. `restore` makes the call again
    where the store has lost it."""

    record: Record
    hash: str
    seed: bool = False
    restore: bool = False


class CallStore:
    def __init__(self, redis: Redis, *, ttl_s: int, keep_raw: Callable[[], bool]) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self._keep_raw = keep_raw
        self._ingest = load_script(redis, "ingest")

    async def get(self, call_id: str) -> StoredCall | None:
        return (await self.get_many([call_id]))[0]

    async def get_many(self, call_ids: Sequence[str]) -> list[StoredCall | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for call_id in call_ids:
                pipe.hgetall(keys.call(call_id))
            rows = await pipe.execute()
        return [read_call(call_id, fields) if fields else None for call_id, fields in zip(call_ids, rows, strict=True)]

    async def every(self) -> AsyncIterator[list[StoredCall]]:
        """Walk over every call, in batches. Unlike `all`, this finds calls that outlived their place in the lists."""
        async for names in scan(self._redis, keys.call("*")):
            call_ids = [name.removeprefix(keys.call("")) for name in names]
            yield [call for call in await self.get_many(call_ids) if call is not None]

    def all(self) -> Listing:
        """List every call, by when it was first seen."""
        return Listing(self._redis, (keys.CALLS,))

    def of_sources(self, source_ids: Sequence[str]) -> Listing:
        """List the calls of some sources, by when they were first seen."""
        return Listing(self._redis, tuple(map(keys.calls_of, source_ids)))

    async def newest(self, source_ids: Sequence[str]) -> list[Entry | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id in source_ids:
                pipe.zrevrange(keys.calls_of(source_id), 0, 0, withscores=True)
            rows = await pipe.execute()
        return [(int(row[0][1]), row[0][0].decode()) if row else None for row in rows]

    async def count_first_seen(self, source_id: str, spans: Sequence[tuple[datetime, datetime]]) -> list[int]:
        """Count, for each span of time, the calls of a source that were first seen in it."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for begin, end in spans:
                pipe.zcount(keys.calls_of(source_id), begin.timestamp() * 1000, end.timestamp() * 1000)
            return [int(count) for count in await pipe.execute()]

    async def seen(self, source_id: str, row_key: str, days: Sequence[str]) -> tuple[str, SeenMark] | None:
        """Find what is remembered of a row, with the day it is filed under; `days` are ISO dates, likeliest first."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for day in days:
                pipe.hget(keys.seen(source_id, day), row_key)
            marks = await pipe.execute()
        return next(((day, SeenMark.parse(mark)) for day, mark in zip(days, marks, strict=True) if mark), None)

    async def identities(self, call_ids: Sequence[str]) -> list[tuple[int, Json] | None]:
        """Read the start (ms) and the record of calls: what tells whether a row is about the same call."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for call_id in call_ids:
                pipe.hmget(keys.call(call_id), ["started", "record"])
            return [(int(started), unpack(record)) if record else None for started, record in await pipe.execute()]

    async def unseen(
        self, source_id: str, rows: Sequence[Row], *, mapping: int, with_seeded: bool = False
    ) -> list[Row]:
        """Leave out the rows that `seen` has exactly as they are: with deep overlap more than 99 % are repeats.

        With `with_seeded`, rows that were only seeded, so never published, stay in. One HMGET a day. This only saves
        work: `ingest` decides.
        """
        by_day: dict[str, list[Row]] = {}
        for row in rows:
            by_day.setdefault(row.record.local_date, []).append(row)
        async with self._redis.pipeline(transaction=False) as pipe:
            for day, members in by_day.items():
                pipe.hmget(keys.seen(source_id, day), [row.record.key for row in members])
            replies = await pipe.execute()
        flags = (SeenFlag.INGESTED, SeenFlag.ERASED) if with_seeded else tuple(SeenFlag)
        prefixes = [SeenMark(mapping, flag, hash="").write() for flag in flags]  # built once: a poll has many rows
        return [
            row
            for members, marks in zip(by_day.values(), replies, strict=True)
            for row, mark in zip(members, marks, strict=True)
            if mark is None or not any(mark == prefix + row.hash.encode() for prefix in prefixes)
        ]

    async def ingest(
        self,
        source_id: str,
        rows: Sequence[Row],
        *,
        token: bytes,
        mapping: int,
        via: str,
        cursor_update: CursorUpdate | None = None,
    ) -> list[RowOutcome]:
        """Ingest at most `CHUNK` rows in one step, see ingest.lua. `token` is the poll's lease; a backfill has none.

        Raises LeaseLost when another poller has the source, or when the source is being removed.
        """
        keep_raw = self._keep_raw()
        args: list[Any] = [source_id, token, mapping, via, self._ttl_s, len(rows)]
        for row in rows:
            record = row.record
            args += (
                record.key,
                *days_around(record.local_date),
                ids.call_id(source_id, record.key),
                row.hash,
                record.source_hash(),
                "r" if row.restore else int(row.seed),
                int(record.finished),
                int(record.audio),
                int(record.started_at.timestamp() * 1000),
                pack(record.content()),
                pack(record.raw) if keep_raw else b"",
            )
        if cursor_update is None:
            args.append(0)
        else:
            fields = cursor_update.fields()
            args += (1, len(fields))
            for name, value in fields.items():
                args += (name, value)
            args += (len(cursor_update.forget_days), *cursor_update.forget_days)
        reply = await self._ingest(args=args)
        if reply is None:
            raise LeaseLost
        return [RowOutcome(outcome.decode()) for outcome in reply]


def days_around(day: str) -> tuple[str, str, str]:
    """The day itself first, then its neighbours: under one of them a row is filed whose start was corrected."""
    at = date.fromisoformat(day)
    return day, (at - timedelta(days=1)).isoformat(), (at + timedelta(days=1)).isoformat()
