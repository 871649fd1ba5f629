"""Where each source stands: its cursor, its tiers, its health, and the rows that nobody could believe."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import orjson
from redis.asyncio import Redis

from relay.domain.call import InvalidRow
from relay.domain.time import from_ms
from relay.polling.clock_skew import Delays
from relay.polling.window import PollState
from relay.queue import keys as queue_keys
from relay.store import keys
from relay.store.calls import LeaseLost
from relay.store.lanes import LaneName
from relay.store.scripts import load_script

_QUARANTINE_TTL_S = 7 * 86_400
_QUARANTINE_MOST = 100
_REMOVAL_TTL_S = 7 * 86_400
_REMOVED_TTL_S = 5


@dataclass(frozen=True, slots=True)
class SourceState:
    """A source as it was read. `zone_off_s` is None before enough calls were seen to judge the zone by; `quiet_since`
    is the time of the newest call of a source that always has some at this time of the week."""

    poll_state: PollState
    error: str = ""
    error_since_ms: int = 0
    error_told: bool = False
    failures: int = 0
    last_poll: datetime | None = None
    mark_due: datetime | None = None
    clock_noted: bool = False
    delays: Delays = field(default_factory=Delays)
    zone_off_s: int | None = None
    contacts_off: str = ""
    recordings_off: str = ""
    quiet_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """A source's state with what stands beside it. `next_poll_ms` is 0 while it is being polled, or is not at all."""

    state: SourceState
    next_poll_ms: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Failing:
    """A stretch of failed polls: how many in a row, since when, and whether it began or was told before."""

    failures: int
    since_ms: int
    told: bool
    known: bool


class SourceStore:
    """Reads and writes what is known of sources. The cursor itself only moves with an admission."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._fail = load_script(redis, "poll_failed")

    async def read(self, sid: str) -> SourceState:
        """Read the state of one; an unknown source has none."""
        return _read_state(await self._redis.hgetall(keys.source(sid)))  # type: ignore[misc]  # both clients

    async def read_many(self, sids: Sequence[str]) -> list[SourceState]:
        """Read the states of several in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for sid in sids:
                pipe.hgetall(keys.source(sid))
            return [_read_state(fields) for fields in await pipe.execute()]

    async def summaries(self, sids: Sequence[str]) -> list[SourceSummary]:
        """Read states with the next poll and the number of quarantined rows, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for sid in sids:
                pipe.hgetall(keys.source(sid))
                pipe.zscore(queue_keys.waiting(LaneName.POLL, ""), sid)
                pipe.hlen(keys.quarantine(sid))
            rows = await pipe.execute()
        return [
            SourceSummary(_read_state(fields), int(due_ms or 0), quarantined)
            for fields, due_ms, quarantined in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        ]

    async def begin_removal(self, sid: str, *, tenant: str | None) -> None:
        """Ingest nothing more of a source, and keep its id from being used again, until its removal has ended."""
        await self._redis.set(keys.removing(sid), tenant or "", ex=_REMOVAL_TTL_S)

    async def end_removal(self, sid: str) -> None:
        """Release the id, some seconds from now: by then every process has read of the removal."""
        await self._redis.expire(keys.removing(sid), _REMOVED_TTL_S)

    async def being_removed(self, sid: str) -> bool:
        return bool(await self._redis.exists(keys.removing(sid)))

    async def begin(self, sid: str, started_at: datetime, *, cursor: datetime | None = None) -> PollState:
        """Write down when the relay began with a source, once; gives what stands. `cursor` is that of a marker."""
        name = keys.source(sid)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hsetnx(name, "started_at", str(int(started_at.timestamp() * 1000)))
            if cursor is not None:
                pipe.hsetnx(name, "cursor", str(int(cursor.timestamp() * 1000)))
            await pipe.execute()
        return (await self.read(sid)).poll_state

    async def failed(self, sid: str, error: str, *, token: bytes) -> Failing:
        """Write an error down, under the poll's lease. Raises LeaseLost: another poller has the source."""
        answer = await self._fail(args=[sid, token, error[:500]])
        if answer is None:
            raise LeaseLost
        failures, since_ms, told, known = answer
        return Failing(failures, since_ms, told=bool(told), known=bool(known))

    async def note(self, sid: str, **fields: str | int) -> None:
        """Write fields of a source."""
        await self._redis.hset(keys.source(sid), mapping=dict(fields))  # type: ignore[misc]

    async def polled(
        self, sid: str, *, rows: int, bad: int, too_old: int, new: int, notes: Mapping[str, str | float]
    ) -> None:
        """Count what a poll brought, and write what was noticed with it."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(keys.source(sid), mapping={"last_rows": rows, **notes})
            for name, count in (("bad_rows", bad), ("too_old", too_old), ("new", new)):
                if count:
                    pipe.hincrby(keys.source(sid), name, count)
            await pipe.execute()

    async def quarantine(self, sid: str, rows: Sequence[InvalidRow]) -> int:
        """Keep rows that cannot be believed where a person finds them, the same row once; gives how many are new."""
        name = keys.quarantine(sid)
        entries: dict[str, str] = {}
        for row in rows:
            if len(entries) == _QUARANTINE_MOST:
                break
            excerpt = row.excerpt.encode("utf-8", "replace").decode()  # half a character is no JSON
            fingerprint = hashlib.sha256(f"{row.key}\x1f{row.reason}\x1f{excerpt}".encode()).hexdigest()[:12]
            entries[fingerprint] = orjson.dumps({"reason": row.reason, "key": row.key, "excerpt": excerpt}).decode()
        if not entries:
            return 0
        room = _QUARANTINE_MOST - await self._redis.hlen(name)  # type: ignore[misc]
        known = await self._redis.hmget(name, list(entries))  # type: ignore[misc]
        fresh = [(print_, entry) for (print_, entry), value in zip(entries.items(), known, strict=True) if not value]
        async with self._redis.pipeline(transaction=False) as pipe:
            for fingerprint, entry in fresh[: max(room, 0)]:
                pipe.hsetnx(name, fingerprint, entry)
            pipe.expire(name, _QUARANTINE_TTL_S)
            await pipe.execute()
        return len(fresh[: max(room, 0)])

    async def quarantined(self, sid: str) -> list[dict[str, str | None]]:
        """List the rows put aside."""
        values = await self._redis.hvals(keys.quarantine(sid))  # type: ignore[misc]
        return [orjson.loads(value) for value in values]


def _read_state(fields: Mapping[bytes, bytes]) -> SourceState:
    def instant(name: bytes) -> datetime | None:
        value = fields.get(name)
        return from_ms(int(value)) if value else None

    reached = {int(name[5:]): from_ms(int(value)) for name, value in fields.items() if name.startswith(b"tier:")}
    return SourceState(
        poll_state=PollState(
            started_at=instant(b"started_at"),
            cursor=instant(b"cursor"),
            reached=reached or None,
            heavy=fields.get(b"heavy") == b"1",
        ),
        error=fields.get(b"error", b"").decode(),
        error_since_ms=int(fields.get(b"error_since") or 0),
        error_told=fields.get(b"error_told") == b"1",
        failures=int(fields.get(b"failures") or 0),
        last_poll=instant(b"last_poll"),
        mark_due=instant(b"mark_due"),
        clock_noted=bool(fields.get(b"clock_ahead_s")),
        delays=Delays(int(fields.get(b"delay_calls") or 0), float(fields.get(b"delay_least_s") or "inf")),
        zone_off_s=int(fields[b"zone_off_s"]) if fields.get(b"zone_off_s") else None,
        contacts_off=fields.get(b"contacts_off", b"").decode(),
        recordings_off=fields.get(b"recordings_off", b"").decode(),
        quiet_since=instant(b"quiet_since"),
    )


class Progress:
    """How far a long job has come, for whoever watches; forgotten after a week."""

    def __init__(self, redis: Redis, job: str) -> None:
        self._redis = redis
        self._name = keys.progress(job)

    async def write(self, **fields: str | float) -> None:
        """Write fields of it."""
        await self._redis.hset(self._name, mapping={name: str(value) for name, value in fields.items()})  # type: ignore[misc]
        await self._redis.expire(self._name, _QUARANTINE_TTL_S)

    async def read(self) -> dict[str, str]:
        """Read all of it."""
        fields: dict[bytes, bytes] = await self._redis.hgetall(self._name)  # type: ignore[misc]
        return {name.decode(): value.decode() for name, value in fields.items()}
