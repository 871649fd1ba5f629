"""The state of sources: cursor, tiers, errors, what was noticed about them, and their quarantined rows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypedDict, Unpack

import orjson
from redis.asyncio import Redis

from relay.domain.call import InvalidRow
from relay.domain.polling import Delays, PollState, TierFailure
from relay.domain.time import from_ms
from relay.queue import keys as queue_keys
from relay.store import keys
from relay.store.lanes import LaneName
from relay.store.scripts import load_script

_QUARANTINE_TTL_S: Final = 7 * 86_400
_QUARANTINE_MOST: Final = 100
_REMOVAL_STEP_TTL_S: Final = 120
_REMOVED_TTL_S: Final = 5


class LeaseLost(Exception):
    """Another poller has the source now, or it is being removed; nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CursorUpdate:
    """What a successful look writes with its last rows. Only the near tier's moves the cursor and ends errors.

    `reached` and `failing` are the tiers that change, by depth in seconds; None removes one. `heavy` and `known_since`
    are None when they do not change. `forget_days` are the days of `seen` to drop.
    """

    polled_at: datetime
    cursor: datetime | None = None
    known_since: datetime | None = None
    reached: Mapping[int, datetime | None] = field(default_factory=dict)
    failing: Mapping[int, TierFailure | None] = field(default_factory=dict)
    heavy: bool | None = None
    forget_days: Sequence[str] = ()

    def fields(self) -> dict[str, str | int | bytes]:
        """The fields of the source's HASH."""
        fields: dict[str, str | int | bytes] = {}
        for depth_s, reached in self.reached.items():
            fields[f"tier:{depth_s}"] = "" if reached is None else _ms(reached)
        for depth_s, failure in self.failing.items():
            fields[f"failing:{depth_s}"] = "" if failure is None else orjson.dumps(failure)
        if self.known_since is not None:
            fields["known_since"] = _ms(self.known_since)
        if self.heavy is not None:
            fields["heavy"] = int(self.heavy)
        if self.cursor is not None:
            fields |= {"cursor": _ms(self.cursor), "last_poll": _ms(self.polled_at), "error": "", "failures": 0}
        return fields


class SourceNote(TypedDict, total=False):
    """What may be noted of a source at any time, by the names that `SourceState` has. None and "" take a note back."""

    error_published: bool
    marker_due: datetime
    clock_ahead_s: int | None
    delays: Delays
    zone_off_s: int
    contacts_off: str
    recordings_off: str
    quiet_since: datetime | None
    stream: str


@dataclass(frozen=True, slots=True)
class SourceState:
    """A source as it was read.

    `marker_due` is when its marker is to be written again, `clock_ahead_s` by how much its provider's clock is wrong.
    `zone_off_s` is None before enough calls were seen to judge the time zone. `contacts_off` and `recordings_off` say
    why the extra is off. `quiet_since` is the time of the newest call of a source that usually has calls by now.
    """

    poll_state: PollState
    error: str = ""
    error_since_ms: int = 0
    error_published: bool = False
    failures: int = 0
    last_poll: datetime | None = None
    marker_due: datetime | None = None
    clock_ahead_s: int | None = None
    delays: Delays = field(default_factory=Delays)
    zone_off_s: int | None = None
    contacts_off: str = ""
    recordings_off: str = ""
    quiet_since: datetime | None = None


def _read_state(fields: Mapping[bytes, bytes]) -> SourceState:
    def instant(name: bytes) -> datetime | None:
        value = fields.get(name)
        return from_ms(int(value)) if value else None

    def number(name: bytes) -> int | None:
        value = fields.get(name)
        return int(value) if value else None

    reached: dict[int, datetime] = {}
    failing: dict[int, TierFailure] = {}
    for name, value in fields.items():
        kind, _, depth_s = name.partition(b":")
        if kind == b"tier" and value:
            reached[int(depth_s)] = from_ms(int(value))
        elif kind == b"failing" and value:
            failing[int(depth_s)] = _read_failure(orjson.loads(value))
    return SourceState(
        poll_state=PollState(
            started_at=instant(b"started_at"),
            cursor=instant(b"cursor"),
            known_since=instant(b"known_since"),
            reached=reached,
            failing=failing,
            heavy=fields.get(b"heavy") == b"1",
        ),
        error=fields.get(b"error", b"").decode(),
        error_since_ms=number(b"error_since") or 0,
        error_published=fields.get(b"error_published") == b"1",
        failures=number(b"failures") or 0,
        last_poll=instant(b"last_poll"),
        marker_due=instant(b"marker_due"),
        clock_ahead_s=number(b"clock_ahead_s"),
        delays=Delays(number(b"delay_calls") or 0, float(fields.get(b"delay_least_s") or "inf")),
        zone_off_s=number(b"zone_off_s"),
        contacts_off=fields.get(b"contacts_off", b"").decode(),
        recordings_off=fields.get(b"recordings_off", b"").decode(),
        quiet_since=instant(b"quiet_since"),
    )


def _read_failure(fields: dict[str, Any]) -> TierFailure:
    instants = ("since", "until", "failing_since", "next_attempt")
    return TierFailure(**fields | {name: datetime.fromisoformat(fields[name]) for name in instants})


def _write_note(note: SourceNote) -> dict[str, str | float]:
    fields: dict[str, str | float] = {}
    for name, value in note.items():
        match value:
            case Delays():
                fields |= {"delay_calls": value.calls, "delay_least_s": value.least_s}
            case datetime():
                fields[name] = _ms(value)
            case bool():
                fields[name] = int(value)
            case str() | int():
                fields[name] = value
            case _:
                fields[name] = ""
    return fields


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """A source's state, next poll and quarantined rows. `next_poll_ms` is 0 while it is being polled, or is paused."""

    state: SourceState
    next_poll_ms: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Failing:
    """Failed polls in a row: since when (ms), and whether the error is new or was published before."""

    failures: int
    since_ms: int
    new: bool
    published: bool


class SourceStore:
    """Reads and writes the state of sources. The cursor itself only moves with an ingest."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._poll_failed = load_script(redis, "poll_failed")

    async def read(self, sid: str) -> SourceState:
        """Read the state of a source; one that was never polled has an empty state."""
        return (await self.read_many([sid]))[0]

    async def read_many(self, sids: Sequence[str]) -> list[SourceState]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for sid in sids:
                pipe.hgetall(keys.source(sid))
            return [_read_state(fields) for fields in await pipe.execute()]

    async def summaries(self, sids: Sequence[str]) -> list[SourceSummary]:
        """Read states with the next poll and the number of quarantined rows, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for sid in sids:
                pipe.hgetall(keys.source(sid))
                pipe.zscore(queue_keys.waiting(LaneName.POLL, sid), sid)
                pipe.hlen(keys.quarantine(sid))
            rows = await pipe.execute()
        return [
            SourceSummary(_read_state(fields), int(due_ms or 0), quarantined)
            for fields, due_ms, quarantined in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        ]

    async def begin(self, sid: str, started_at: datetime, *, cursor: datetime | None = None) -> PollState:
        """Record when the relay began with a source, unless that is recorded; `cursor` is that of a marker."""
        name = keys.source(sid)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hsetnx(name, "started_at", str(_ms(started_at)))
            if cursor is not None:
                pipe.hsetnx(name, "cursor", str(_ms(cursor)))
            await pipe.execute()
        return (await self.read(sid)).poll_state

    async def poll_failed(self, sid: str, error: str, *, token: bytes) -> Failing:
        """Record a failed poll, under its lease. Raises LeaseLost."""
        reply = await self._poll_failed(args=[sid, token, error[:500]])
        if reply is None:
            raise LeaseLost
        failures, since_ms, published, had_error = reply
        return Failing(failures, since_ms, new=not had_error, published=bool(published))

    async def tier_failed(self, sid: str, depth_s: int, failure: TierFailure) -> None:
        """Record what a tier owes."""
        # Without a token: whatever a poller that has lost its lease writes here is paid by the next complete look.
        await self._redis.hset(keys.source(sid), f"failing:{depth_s}", orjson.dumps(failure).decode())  # type: ignore[misc]

    async def look_succeeded(self, sid: str, *, invalid: int, too_old: int, new: int, note: SourceNote) -> None:
        """Count the rows of a look, with what was noticed about the source."""
        async with self._redis.pipeline(transaction=False) as pipe:
            if note:
                pipe.hset(keys.source(sid), mapping=_write_note(note))
            for name, count in (("invalid", invalid), ("too_old", too_old), ("new", new)):
                if count:
                    pipe.hincrby(keys.source(sid), name, count)
            await pipe.execute()

    async def note(self, sid: str, **note: Unpack[SourceNote]) -> None:
        await self._redis.hset(keys.source(sid), mapping=_write_note(note))  # type: ignore[misc]  # both clients

    async def changed_credentials(self, credentials: Mapping[str, str]) -> list[str]:
        """List the sources whose credential differs from the accepted one; the first is accepted at once."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for sid, credential in credentials.items():
                pipe.hsetnx(keys.source(sid), "credential", keys.digest(credential))
                pipe.hget(keys.source(sid), "credential")
            rows = await pipe.execute()
        return [
            sid
            for (sid, credential), accepted in zip(credentials.items(), rows[1::2], strict=True)
            if accepted.decode() != keys.digest(credential)
        ]

    async def accept_credential(self, sid: str, credential: str) -> None:
        """Remember a credential, by its digest, and turn on again the extras that the former one was refused."""
        fields = {"credential": keys.digest(credential), "contacts_off": "", "recordings_off": ""}
        await self._redis.hset(keys.source(sid), mapping=fields)  # type: ignore[misc]  # both clients

    async def quarantine(self, sid: str, rows: Sequence[InvalidRow]) -> int:
        """Keep invalid rows for inspection, each once and at most 100; returns how many are new."""
        name = keys.quarantine(sid)
        entries: dict[str, str] = {}
        for row in rows:
            if len(entries) == _QUARANTINE_MOST:
                break
            excerpt = row.excerpt.encode("utf-8", "replace").decode()  # a lone surrogate is not valid JSON
            fingerprint = hashlib.sha256(f"{row.key}\x1f{row.reason}\x1f{excerpt}".encode()).hexdigest()[:12]
            entries[fingerprint] = orjson.dumps({"reason": row.reason, "key": row.key, "excerpt": excerpt}).decode()
        if not entries:
            return 0
        room = _QUARANTINE_MOST - await self._redis.hlen(name)  # type: ignore[misc]  # both clients
        present = await self._redis.hmget(name, list(entries))  # type: ignore[misc]  # both clients
        fresh = [entry for entry, value in zip(entries.items(), present, strict=True) if not value][: max(room, 0)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for fingerprint, entry in fresh:
                pipe.hsetnx(name, fingerprint, entry)
            pipe.expire(name, _QUARANTINE_TTL_S)
            await pipe.execute()
        return len(fresh)

    async def quarantined(self, sid: str) -> list[InvalidRow]:
        values = await self._redis.hvals(keys.quarantine(sid))  # type: ignore[misc]  # both clients
        return [InvalidRow(**orjson.loads(value)) for value in values]

    async def begin_removal(self, sid: str, *, tenant: str | None) -> None:
        """Ingest nothing more of a source, and keep its id from being used again, until its removal has ended."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.REMOVALS, sid, tenant or "")
            pipe.set(keys.removing(sid), 1, ex=_REMOVAL_STEP_TTL_S)
            await pipe.execute()

    async def continue_removal(self, sid: str) -> None:
        """Note that a removal goes on, so that no other process resumes it."""
        await self._redis.set(keys.removing(sid), 1, ex=_REMOVAL_STEP_TTL_S)

    async def abandoned_removals(self) -> list[tuple[str, str | None]]:
        """Take over the removals that no process works on any more; returns sources with their tenants."""
        removals = await self._redis.hgetall(keys.REMOVALS)  # type: ignore[misc]  # both clients
        return [
            (sid.decode(), tenant.decode() or None)
            for sid, tenant in removals.items()
            if await self._redis.set(keys.removing(sid.decode()), 1, nx=True, ex=_REMOVAL_STEP_TTL_S)
        ]

    async def end_removal(self, sid: str) -> None:
        """Release the id, some seconds from now: by then every process has read of the removal."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(keys.removing(sid), 1, ex=_REMOVED_TTL_S)
            pipe.hdel(keys.REMOVALS, sid)
            await pipe.execute()

    async def being_removed(self, sid: str) -> bool:
        removal = await self._redis.hexists(keys.REMOVALS, sid)  # type: ignore[misc]  # both clients
        return bool(removal or await self._redis.exists(keys.removing(sid)))
