"""`relay jobs`: long work in the relay, and watching it with a bar. Who stops watching stops nothing."""

import time
from typing import Annotated, Final

import typer

from relay.cli.terminal import Terminal, command, group
from relay.domain.json import Json
from relay.errors import RelayError

LOOK_EVERY_S: Final = 0.3
_PATIENCE_S: Final = 60.0
_NOTED_AFTER_S: Final = 15.0
_ENDED: Final = frozenset({"done", "failed", "cancelled"})
_WORDS: Final = {
    "looked_at": "looked at",
    "waiting": "waiting already",
    "delivered": "delivered already",
    "too_old": "too old to be told apart from known ones (--force takes them too)",
    "bad": "unreadable",
}

app = group("jobs", "Long work: backfills, replays, erasures.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="as it was told when the work began")]


class JobFailed(RelayError):
    """The work ended before it was done."""


def words(job: Json) -> str:
    """Say how far a job is, or what it came to."""
    counts = ", ".join(f"{count:,} {_WORDS.get(name, name)}" for name, count in job["counts"].items() if count)
    return counts or "nothing so far"


async def watch(term: Terminal, job_id: str) -> Json:
    """Show how far a job is until it ends; gives how it ended. Raises JobFailed."""
    import asyncio

    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from relay.cli.client import Refused, Unanswered

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[words]}"))
    shown = term.out.notes.is_terminal
    with Bar(*columns, TimeElapsedColumn(), console=term.out.notes, transient=True, disable=not shown) as bar:
        task = bar.add_task("queued", total=None, words="")
        began_s = heard_s = time.monotonic()
        noted = False
        while True:
            try:
                job = await read(term, job_id)
                heard_s = time.monotonic()
            except (Refused, Unanswered) as error:
                gone = isinstance(error, Refused) and error.status < 500
                if gone or time.monotonic() - heard_s > _PATIENCE_S:
                    raise
                await asyncio.sleep(1)
                continue
            state = job["state"]
            total = 1.0 if job["done"] is not None else None
            words_ = words(job) + (f" ({job['error']})" if state == "waiting" and job["error"] else "")
            bar.update(task, description=state, total=total, completed=job["done"] or 0, words=words_)
            if state in _ENDED:
                break
            if state == "queued" and not noted and time.monotonic() - began_s > _NOTED_AFTER_S:
                noted = True
                term.out.note("Nobody has taken it up so far: is a worker running? It stays queued until then.")
            await asyncio.sleep(LOOK_EVERY_S)
    if job["state"] == "failed":
        raise JobFailed(f"the {job['kind']} failed after {words(job)}: {job['error'] or 'no reason given'}")
    if job["state"] == "cancelled":
        raise JobFailed(f"the {job['kind']} was cancelled after {words(job)}")
    return job


async def read(term: Terminal, job_id: str) -> Json:
    """Read how far a job is."""
    from relay.cli.client import path_of

    job: Json = await term.api.get(path_of("jobs", job_id))
    return job


async def watched(term: Terminal, job_id: str, *, wait: bool) -> None:
    """Watch a job that was just queued, unless nobody wants to, and give what it came to."""
    import asyncio

    if not wait:
        job = await read(term, job_id)
        term.out.answer(job, f"{job_id} is queued; relay jobs show {job_id} --watch shows it")
        return
    try:
        job = await watch(term, job_id)
    except asyncio.CancelledError:
        term.out.note(f"No longer watching; {job_id} goes on in the relay. relay jobs cancel {job_id} ends it.")
        raise
    term.out.answer(job, f"{job['kind']} done: {words(job)}")


@command(app, "show")
async def show(
    term: Terminal,
    job_id: JobId,
    watch_it: Annotated[bool, typer.Option("--watch", "-w", help="with a bar, until it ends")] = False,
) -> None:
    """Show how far long work is."""
    if watch_it:
        await watched(term, job_id, wait=True)
    else:
        term.out.details(await read(term, job_id))


@command(app, "cancel")
async def cancel(term: Terminal, job_id: JobId) -> None:
    """End long work; what it did so far stays done."""
    from relay.cli.client import path_of

    job = await term.api.post(path_of("jobs", job_id, "cancel"))
    term.out.answer(job, f"{job_id} ends within seconds")
