"""Where each source stands: its cursor, its tiers, its health, and the rows that nobody could believe."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson
from redis.asyncio import Redis

from relay.ledger import keys
from relay.poll.window import Standing
from relay.providers.base import BadRow

_QUARANTINE_TTL_S = 7 * 86_400
_QUARANTINE_MOST = 100


@dataclass(frozen=True, slots=True)
class SourceState:
    """A source as it was read."""

    standing: Standing
    error: str = ""
    error_since_ms: int = 0
    error_told: bool = False
    failures: int = 0
    last_poll: datetime | None = None
    marked_at: datetime | None = None
    clock_noted: bool = False
    contacts_off: str = ""
    recordings_off: str = ""


class SourceStates:
    """Reads and writes what is known of sources. The cursor itself only moves with an admission."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def read(self, sid: str) -> SourceState:
        """Read one; an unknown source stands nowhere."""
        fields: dict[bytes, bytes] = await self._redis.hgetall(keys.source(sid))  # type: ignore[misc]  # both clients

        def instant(name: bytes) -> datetime | None:
            value = fields.get(name)
            return datetime.fromtimestamp(int(value) / 1000, UTC) if value else None

        reached = {
            int(name[5:]): datetime.fromtimestamp(int(value) / 1000, UTC)
            for name, value in fields.items()
            if name.startswith(b"tier:")
        }
        return SourceState(
            standing=Standing(
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
            marked_at=instant(b"marked_at"),
            clock_noted=b"clock_ahead_s" in fields,
            contacts_off=fields.get(b"contacts_off", b"").decode(),
            recordings_off=fields.get(b"recordings_off", b"").decode(),
        )

    async def begin(self, sid: str, started_at: datetime) -> datetime:
        """Write down when the relay began with a source, once; gives what stands."""
        name = keys.source(sid)
        await self._redis.hsetnx(name, "started_at", str(int(started_at.timestamp() * 1000)))  # type: ignore[misc]
        stands = await self._redis.hget(name, "started_at")  # type: ignore[misc]
        return datetime.fromtimestamp(int(stands or 0) / 1000, UTC)

    async def failed(self, sid: str, error: str, *, failures: int) -> int:
        """Write an error down; gives since when there is one, ms."""
        name = keys.source(sid)
        seconds, micros = await self._redis.time()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        async with self._redis.pipeline(transaction=True) as pipe:
            if failures == 1:
                pipe.hset(name, mapping={"error_since": str(now_ms), "error_told": "0"})
            pipe.hset(name, mapping={"error": error[:500], "failures": failures})
            pipe.hget(name, "error_since")
            answers = await pipe.execute()
        return int(answers[-1] or now_ms)

    async def note(self, sid: str, **fields: str | int) -> None:
        """Write fields of a source."""
        await self._redis.hset(keys.source(sid), mapping=dict(fields))  # type: ignore[misc]

    async def polled(self, sid: str, *, rows: int, bad: int, too_old: int, new: int) -> None:
        """Count what a poll brought."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(keys.source(sid), "last_rows", str(rows))
            for name, count in (("bad_rows", bad), ("too_old", too_old), ("new", new)):
                if count:
                    pipe.hincrby(keys.source(sid), name, count)
            await pipe.execute()

    async def quarantine(self, sid: str, row: BadRow) -> None:
        """Keep a row that cannot be believed where a person finds it; the same row once."""
        name = keys.quarantine(sid)
        fingerprint = hashlib.sha256(f"{row.key}\x1f{row.reason}\x1f{row.excerpt}".encode()).hexdigest()[:12]
        entry = orjson.dumps({"reason": row.reason, "key": row.key, "excerpt": row.excerpt})
        if await self._redis.hlen(name) < _QUARANTINE_MOST:  # type: ignore[misc]
            await self._redis.hsetnx(name, fingerprint, entry)  # type: ignore[misc,arg-type]
        await self._redis.expire(name, _QUARANTINE_TTL_S)

    async def quarantined(self, sid: str) -> list[dict[str, str | None]]:
        """List the rows put aside."""
        values = await self._redis.hvals(keys.quarantine(sid))  # type: ignore[misc]
        return [orjson.loads(value) for value in values]


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
