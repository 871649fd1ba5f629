"""Long-running work: the progress of a backfill, a replay or an erasure, and its cancellation."""

from typing import Literal

from pydantic import AwareDatetime, BaseModel, Field

from relay.api.auth import Caller
from relay.api.context import ApiContext
from relay.api.problems import Problem
from relay.domain.time import from_iso
from relay.store.jobs import Job, JobState

JobKind = Literal["backfill", "replay", "erase", "forget_source", "heal"]


class JobView(BaseModel):
    """A job and its progress; available for a week."""

    id: str
    kind: JobKind
    state: JobState
    done: float | None = Field(description="progress from 0 to 1, null while unknown")
    source: str | None
    subscription: str | None
    since: AwareDatetime | None
    until: AwareDatetime | None
    counts: dict[str, int] = Field(description="what was processed so far")
    error: str | None = Field(description="why it failed, or what it waits for")


def view(job: Job) -> JobView:
    return JobView.model_validate(
        {
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "done": job.share,
            "source": job.source,
            "subscription": job.subscription,
            "since": from_iso(job.since) if job.since else None,
            "until": from_iso(job.until) if job.until else None,
            "counts": job.counts,
            "error": job.error or None,
        }
    )


async def read_job(context: ApiContext, caller: Caller, job_id: str) -> JobView:
    """Read the progress of a job."""
    return view(await context.job(caller, job_id))


async def cancel_job(context: ApiContext, caller: Caller, job_id: str) -> JobView:
    """Cancel a job. It stops within seconds; what it did so far stays done."""
    job = await context.job(caller, job_id)
    if job.kind == "forget_source":
        raise Problem("already_over", "The removal of a source cannot be cancelled.")
    if job.state.ended:
        raise Problem("already_over", "The job has already ended.")
    await context.store.jobs.request_cancel(job_id)
    return view(await context.job(caller, job_id))
