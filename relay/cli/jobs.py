"""`relay jobs`: background jobs, and following them with a progress bar. Ctrl-C stops the following, not the job."""

import time
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from relay.cli.client import ApiError, RelayUnreachable, path_of
from relay.cli.terminal import Terminal, command, new_app
from relay.domain.json import Json
from relay.errors import RelayError

POLL_EVERY_S: Final = 0.3
# A rolling restart of the relay is over within this.
_UNREACHABLE_FOR_S: Final = 60.0
_QUEUED_NOTE_AFTER_S: Final = 15.0
_FINISHED: Final = frozenset({"done", "failed", "cancelled"})
_COUNT_NAMES: Final = {
    "looked_at": "examined",
    "waiting": "already waiting",
    "delivered": "already delivered",
    "seeded": "known from before the relay started",
    "too_old": "too old to compare with known calls (--force includes them)",
    "bad": "invalid (`relay sources show` has the reasons)",
}

app = new_app()

JobId = Annotated[str, typer.Argument(metavar="ID", help="ID of the job, printed when it was queued.")]


class JobFailed(RelayError):
    """The job failed or was cancelled."""


def counts_text(job: Json) -> str:
    """Return what a job has done so far: `12 rows, 3 new`."""
    counts = ", ".join(f"{count:,} {_COUNT_NAMES.get(name, name)}" for name, count in job["counts"].items() if count)
    return counts or "nothing so far"


def follow(term: Terminal, job_id: str) -> Json:
    """Show the progress of a job until it is finished and return it. Raises JobFailed.

    A relay that restarts meanwhile is waited for.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[counts]}"))
    is_terminal = term.out.notes.is_terminal
    with Progress(
        *columns, TimeElapsedColumn(), console=term.out.notes, transient=True, disable=not is_terminal
    ) as progress:
        task = progress.add_task("queued", total=None, counts="")
        started_s = answered_s = time.monotonic()
        queued_noted = False
        while True:
            try:
                job = read(term, job_id)
                answered_s = time.monotonic()
            except (ApiError, RelayUnreachable) as error:
                final = isinstance(error, ApiError) and error.status < 500
                if final or time.monotonic() - answered_s > _UNREACHABLE_FOR_S:
                    raise
                time.sleep(1)
                continue
            state = job["state"]
            counts = counts_text(job) + (f" ({job['error']})" if state == "waiting" and job["error"] else "")
            total = 1.0 if job["done"] is not None else None
            progress.update(task, description=state, total=total, completed=job["done"] or 0, counts=counts)
            if state in _FINISHED:
                break
            if state == "queued" and not queued_noted and time.monotonic() - started_s > _QUEUED_NOTE_AFTER_S:
                queued_noted = True
                term.out.note("No worker has started the job yet; it stays queued. Is a worker running?")
            time.sleep(POLL_EVERY_S)
    if job["state"] == "failed":
        raise JobFailed(f"the {job['kind']} failed after {counts_text(job)}: {job['error'] or 'no reason given'}")
    if job["state"] == "cancelled":
        raise JobFailed(f"the {job['kind']} was cancelled after {counts_text(job)}")
    return job


def read(term: Terminal, job_id: str) -> Json:
    job: Json = term.api.get(path_of("jobs", job_id))
    return job


def report(term: Terminal, job_id: str, *, wait: bool) -> None:
    """Write the result of a job that was just queued, after following it where `wait` is set."""
    if not wait:
        term.out.result(read(term, job_id), f"{job_id} is queued; `relay jobs show {job_id} --watch` follows it")
        return
    try:
        job = follow(term, job_id)
    except KeyboardInterrupt:
        term.out.note(f"{job_id} continues in the relay; `relay jobs cancel {job_id}` stops it.")
        raise
    term.out.result(job, f"{job['kind']} done: {counts_text(job)}")


@command(app, "show")
def show(
    term: Terminal,
    job_id: JobId,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it with a progress bar until it ends.")] = False,
) -> None:
    """Show the progress of a job."""
    if watch:
        report(term, job_id, wait=True)
    else:
        term.out.details(read(term, job_id))


@command(app, "cancel")
def cancel(term: Terminal, job_id: JobId) -> None:
    """Stop a job. What it has done so far is kept."""
    job = term.api.post(path_of("jobs", job_id, "cancel"))
    term.out.result(job, f"{job_id} stops within seconds")
