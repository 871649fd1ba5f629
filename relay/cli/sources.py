"""`relay sources`: accounts at providers."""

from typing import Annotated, Final

import typer

from relay.cli import arguments, csv_import
from relay.cli.jobs import watched
from relay.cli.output import Column, when
from relay.cli.terminal import Limit, Terminal, Until, Yes, command, group, moment
from relay.errors import RelayError

app = group("sources", "Accounts at providers.")

SourceId = Annotated[str, typer.Argument(metavar="ID", help="id of the source")]
COLUMNS: Final = (
    Column("source", "id"),
    Column("provider", "provider"),
    Column("state", "state"),
    Column("from", "origin"),
    Column("tenant", "tenant"),
    Column("last poll", when("health.last_poll_at")),
    Column("read up to", when("health.cursor")),
    Column("requests left", "health.requests_left"),
    Column("put aside", lambda item: item["health"]["quarantined"] or ""),
    Column("error", "health.error"),
)


class NotWell(RelayError):
    """The provider does not do what it should."""


@command(app, "list")
async def list_(
    term: Terminal,
    provider: Annotated[str | None, typer.Option(help="only accounts at this provider")] = None,
    limit: Limit = 50,
) -> None:
    """List the sources and how they are."""
    page = await term.api.some("/v1/sources", limit=limit, provider=provider)
    term.out.table(page, COLUMNS, empty="There are no sources: `relay sources create`, or sources: in relay.yaml.")


@command(app, "show")
async def show(term: Terminal, source_id: SourceId) -> None:
    """Show a source, its health, and the rows that were put aside."""
    from relay.cli.client import path_of

    term.out.details(await term.api.get(path_of("sources", source_id)))


@command(app, "create")
async def create(
    term: Terminal,
    provider: Annotated[str, typer.Argument(help="webfones, unpod, cinnox or nfon")],
    source_id: Annotated[str | None, typer.Option("--id", help="an id of your own; absent: one is made")] = None,
    tenant: Annotated[str | None, typer.Option(help="whose it is")] = None,
    settings: arguments.Set = None,
    file: arguments.File = None,
) -> None:
    """Add an account; calls that start from now on are told. The key: --set api_key=@file, or @- for stdin."""
    body = arguments.options(settings, file) | {"provider": provider}
    body |= {name: value for name, value in (("id", source_id), ("tenant", tenant)) if value is not None}
    made = await term.api.post("/v1/sources", body)
    term.out.answer(made, f"{made['id']} is made; `relay sources check {made['id']}` tries its credential")


@command(app, "update")
async def update(
    term: Terminal, source_id: SourceId, settings: arguments.Set = None, file: arguments.File = None
) -> None:
    """Change some options; --set name=null gives one back to its default."""
    from relay.cli.client import path_of

    _, changed = await term.api.ask("PATCH", path_of("sources", source_id), body=arguments.options(settings, file))
    term.out.answer(changed, f"{source_id} is changed")


@command(app, "delete")
async def delete(term: Terminal, source_id: SourceId, yes: Yes = False) -> None:
    """Remove a source with its calls, events and audio."""
    from relay.cli.client import path_of

    term.confirm(f"Remove {source_id} with all its calls, events and audio?", yes=yes)
    await term.api.ask("DELETE", path_of("sources", source_id))
    term.out.answer({"id": source_id, "deleted": True}, f"{source_id} is gone")


@command(app, "check")
async def check(term: Terminal, source_id: SourceId) -> None:
    """Try the credential: at most two requests."""
    from relay.cli.client import path_of

    result = await term.api.post(path_of("sources", source_id, "check"))
    term.out.answer(result, *result["lines"])
    if not result["ok"]:
        raise NotWell(f"{source_id} is not well")


@command(app, "poll")
async def poll(term: Terminal, source_id: SourceId) -> None:
    """Ask the provider now."""
    from relay.cli.client import path_of

    queued = await term.api.post(path_of("sources", source_id, "poll"))
    term.out.answer(queued, f"{source_id} is asked now")


@command(app, "pause")
async def pause(term: Terminal, source_id: SourceId) -> None:
    """Ask the provider nothing more."""
    from relay.cli.client import path_of

    paused = await term.api.post(path_of("sources", source_id, "pause"))
    term.out.answer(paused, f"{source_id} is paused")


@command(app, "resume")
async def resume(term: Terminal, source_id: SourceId) -> None:
    """Ask the provider again; what happened meanwhile is told, as far as it still lists it."""
    from relay.cli.client import path_of

    resumed = await term.api.post(path_of("sources", source_id, "resume"))
    term.out.answer(resumed, f"{source_id} is asked again")


@command(app, "backfill")
async def backfill(
    term: Terminal,
    source_id: SourceId,
    since: Annotated[str, typer.Option(help="from when on: 2h, 3d, or 2026-11-20T10:00:00Z")],
    until: Until = None,
    force: Annotated[bool, typer.Option("--force", help="also rows too old to be told apart from known ones")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="until it has ended, with a bar")] = True,
) -> None:
    """Read a range again and tell the calls that were never told; the same as `relay backfill`, from anywhere."""
    from relay.cli.client import path_of

    body = {"from": moment(since, name="--since"), "to": moment(until, name="--until"), "force": force}
    job = await term.api.post(path_of("sources", source_id, "backfill"), body)
    await watched(term, job["id"], wait=wait)


@command(app, "import")
async def import_(
    term: Terminal,
    file: Annotated[str, typer.Argument(help="YAML, JSON or CSV; - is stdin, then with --format")],
    format_: Annotated[csv_import.Format | None, typer.Option("--format", help="absent: by the file's name")] = None,
    provider: Annotated[str | None, typer.Option(help="of the entries that name none")] = None,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="requests at the same time")] = 8,
) -> None:
    """Make or replace many sources. Each is whole or not at all; what fails is listed, and the rest goes on.

    The file is a map by id, a list of maps with an `id`, or a table with one column for each option. Running it
    again does no harm.
    """
    await csv_import.import_sources(term, file, format_=format_, provider=provider, at_once=at_once)
