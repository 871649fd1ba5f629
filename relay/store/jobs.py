"""Long work (backfill, replay, erasure): its state, for those who watch it, and where to resume it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import orjson
from arq.constants import in_progress_key_prefix
from redis.asyncio import Redis

from relay.domain.json import Json
from relay.store import keys

_TTL_S: Final = 7 * 86_400


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was read. `share` is from 0 to 1; `error` is why it failed, or what it waits for; `position` is where
    it goes on after an interruption, as it wrote that itself. `since` and `until` are ISO 8601."""

    id: str
    kind: str
    state: JobState = JobState.QUEUED
    tenant: str | None = None
    source: str | None = None
    subscription: str | None = None
    since: str | None = None
    until: str | None = None
    share: float | None = None
    error: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    position: Json = field(default_factory=dict)
    cancel_requested: bool = False


class JobStore:
    """Reads and writes jobs; a job expires a week after its last step."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def create(self, job: Job) -> None:
        about = {
            "kind": job.kind,
            "tenant": job.tenant,
            "source": job.source,
            "subscription": job.subscription,
            "since": job.since,
            "until": job.until,
        }
        await self._write(job.id, {"state": job.state, **{name: value for name, value in about.items() if value}})

    async def get(self, job_id: str) -> Job | None:
        raw: dict[bytes, bytes] = await self._redis.hgetall(keys.job(job_id))  # type: ignore[misc]  # both clients
        if not raw:
            return None
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        return Job(
            id=job_id,
            kind=fields.get("kind") or job_id.partition("-")[0],
            state=JobState(fields.get("state", "queued")),
            tenant=fields.get("tenant"),
            source=fields.get("source"),
            subscription=fields.get("subscription"),
            since=fields.get("since"),
            until=fields.get("until"),
            share=float(fields["share"]) if "share" in fields else None,
            error=fields.get("error", ""),
            counts=orjson.loads(fields.get("counts", "{}")),
            position=orjson.loads(fields.get("position", "{}")),
            cancel_requested="cancel" in fields,
        )

    async def update(
        self,
        job_id: str,
        state: JobState | None = None,
        *,
        share: float | None = None,
        error: str | None = None,
        counts: Mapping[str, int] | None = None,
        position: Json | None = None,
    ) -> None:
        """Write how far a job has come; what is None stays as it was."""
        fields: dict[str, str | float] = {}
        if state is not None:
            fields["state"] = state
        if share is not None:
            fields["share"] = round(min(max(share, 0.0), 1.0), 3)
        if error is not None:
            fields["error"] = error
        if counts is not None:
            fields["counts"] = orjson.dumps(dict(counts)).decode()
        if position is not None:
            fields["position"] = orjson.dumps(position).decode()
        await self._write(job_id, fields)

    async def request_cancel(self, job_id: str) -> None:
        """Ask the worker that runs a job to end it; it does within seconds."""
        await self._write(job_id, {"cancel": "1"})

    async def cancel_requested(self, job_id: str) -> bool:
        return bool(await self._redis.hexists(keys.job(job_id), "cancel"))  # type: ignore[misc]  # both clients

    async def hold(self, arq_job_id: str, *, ttl_ms: int) -> None:
        """Let arq take a running job for abandoned `ttl_ms` from now, unless it is held again before."""
        await self._redis.pexpire(in_progress_key_prefix + arq_job_id, ttl_ms)

    async def _write(self, job_id: str, fields: Mapping[str, str | float]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(keys.job(job_id), mapping=dict(fields))
            pipe.expire(keys.job(job_id), _TTL_S)
            await pipe.execute()
