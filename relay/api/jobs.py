"""Long work over HTTP: how far a backfill, a replay, an erasure is, and ending it."""

from typing import Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, Field

from relay.api.auth import Caller
from relay.api.context import Api
from relay.api.problems import Problem, not_found
from relay.domain.time import from_iso
from relay.store.sources import Progress

JobKind = Literal["backfill", "replay", "erase", "forget_source"]
JobState = Literal["queued", "running", "waiting", "done", "failed", "cancelled"]
_STATES: Final = frozenset({"queued", "running", "waiting", "done", "failed"})
_COUNTS: Final = (
    "rows", "new", "changed", "seeded", "bad", "too_old",
    "looked_at", "queued", "waiting", "delivered", "gone",
    "scanned", "calls", "events", "recordings", "contacts", "deliveries",
)  # fmt: skip


class JobView(BaseModel):
    """How far long work is; kept for a week."""

    id: str
    kind: JobKind
    state: JobState
    done: float | None = Field(description="from 0 to 1, where it can be known")
    source: str | None
    subscription: str | None
    since: AwareDatetime | None
    until: AwareDatetime | None
    counts: dict[str, int] = Field(description="what it came to so far")
    error: str | None = Field(description="why it failed, or what it waits for")


def view(job: str, fields: dict[str, str]) -> JobView:
    """Show what the job has written down."""
    state: Any = fields.get("state", "queued")
    if fields.get("cancel") and state in ("failed", "done"):
        state = "cancelled" if state == "failed" else "done"
    return JobView(
        id=job,
        kind=_kind(job, fields),
        state=state if state in _STATES or state == "cancelled" else "queued",
        done=float(fields["done"]) if fields.get("done") else None,
        source=fields.get("source"),
        subscription=fields.get("subscription"),
        since=from_iso(fields["since"]) if fields.get("since") else None,
        until=from_iso(fields["until"]) if fields.get("until") else None,
        counts={name: int(fields[name]) for name in _COUNTS if name in fields},
        error=fields.get("error") or None,
    )


def _kind(job: str, fields: dict[str, str]) -> JobKind:
    kind: Any = fields.get("kind") or job.partition("-")[0]
    return kind if kind in ("backfill", "replay", "erase", "forget_source") else "backfill"


async def start_backfill(api: Api, caller: Caller, source_id: str, since: str, until: str, *, force: bool) -> JobView:
    """Queue a backfill."""
    job = await api.start(
        "backfill", source_id, since, until, caller=caller, after=(force,), source=source_id, since=since, until=until
    )
    return await read_job(api, caller, job)


async def read_job(api: Api, caller: Caller, job_id: str) -> JobView:
    """Read how far a job is."""
    return view(job_id, await _fields(api, caller, job_id))


async def cancel_job(api: Api, caller: Caller, job_id: str) -> JobView:
    """End a job; what it did so far stays done. It stops within seconds."""
    shown = view(job_id, await _fields(api, caller, job_id))
    if shown.kind == "forget_source":
        raise Problem("already_over", "A source that is being removed cannot be kept halfway.")
    if shown.state in ("done", "failed", "cancelled"):
        raise Problem("already_over", "The job has ended.")
    await Progress(api.runtime.redis, job_id).write(cancel="1")
    return await read_job(api, caller, job_id)


async def _fields(api: Api, caller: Caller, job: str) -> dict[str, str]:
    fields = await Progress(api.runtime.redis, job).read()
    if not fields or not _may_see(api, caller, fields):
        raise not_found("job")
    return fields


def _may_see(api: Api, caller: Caller, fields: dict[str, str]) -> bool:
    if caller.tenant is None:
        return True
    if fields.get("tenant"):
        return fields["tenant"] == caller.tenant
    source = api.runtime.sources.get(fields.get("source", ""))
    subscription = api.runtime.subscriptions.get(fields.get("subscription", ""))
    owner = source or subscription
    return owner is not None and owner.tenant == caller.tenant
