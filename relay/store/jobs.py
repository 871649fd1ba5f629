"""Long work (backfill, replay, erasure): its state and progress, for those who watch it and to resume it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from redis.asyncio import Redis

from relay.store import keys

_TTL_S: Final = 7 * 86_400
_COUNTS: Final = (
    "rows", "new", "changed", "seeded", "bad", "too_old",
    "looked_at", "queued", "waiting", "delivered", "gone",
    "scanned", "calls", "events", "recordings", "contacts", "deliveries",
)  # fmt: skip


class JobState(StrEnum):
    """How far a job is."""

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
    """A job as it was read. `share` is from 0 to 1; `error` is why it failed, or what it waits for."""

    id: str
    kind: str
    state: JobState
    tenant: str | None = None
    source: str | None = None
    subscription: str | None = None
    since: str | None = None
    until: str | None = None
    share: float | None = None
    error: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    cancel_requested: bool = False


class JobStore:
    """Reads and writes jobs; one is forgotten a week after its last step."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def create(self, job: Job) -> None:
        """Record a job that is about to be queued."""
        about = {
            "state": job.state.value,
            "kind": job.kind,
            "tenant": job.tenant,
            "source": job.source,
            "subscription": job.subscription,
            "since": job.since,
            "until": job.until,
        }
        await self._write(job.id, {name: value for name, value in about.items() if value is not None})

    async def get(self, job_id: str) -> Job | None:
        """Read a job; None when it is not known, or not any more."""
        raw: dict[bytes, bytes] = await self._redis.hgetall(keys.progress(job_id))  # type: ignore[misc]  # both clients
        if not raw:
            return None
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        state = JobState(fields.get("state", "queued"))
        cancel_requested = bool(fields.get("cancel"))
        return Job(
            id=job_id,
            kind=fields.get("kind") or job_id.partition("-")[0],
            state=JobState.CANCELLED if cancel_requested and state is JobState.FAILED else state,
            tenant=fields.get("tenant") or None,
            source=fields.get("source"),
            subscription=fields.get("subscription"),
            since=fields.get("since") or None,
            until=fields.get("until") or None,
            share=float(fields["done"]) if fields.get("done") else None,
            error=fields.get("error", ""),
            counts={name: int(fields[name]) for name in _COUNTS if name in fields},
            cancel_requested=cancel_requested,
        )

    async def request_cancel(self, job_id: str) -> None:
        """Ask the worker that runs a job to end it; it does within seconds."""
        await self._write(job_id, {"cancel": "1"})

    async def _write(self, job_id: str, fields: Mapping[str, str]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(keys.progress(job_id), mapping=dict(fields))
            pipe.expire(keys.progress(job_id), _TTL_S)
            await pipe.execute()
