"""`relay calls`, and `relay erase`: what the relay knows of calls, and forgetting a person."""

from typing import Annotated, Any, Final

import typer

from relay.cli.jobs import watch, words
from relay.cli.output import Column, when
from relay.cli.terminal import Limit, Since, Terminal, Until, Yes, command, group, moment
from relay.domain.json import Json

app = group("calls", "Calls, as the relay knows them.")

CallId = Annotated[str, typer.Argument(metavar="ID", help="id of the call")]


def party(name: str) -> Any:
    """Make a column of one side: its number, else what the provider wrote, with its name."""

    def read(item: Json) -> str:
        side = item[name]
        number = side["number"] or side["extension"] or side["raw"] or ""
        return f"{number} {side['name']}" if side["name"] else str(number)

    return read


COLUMNS: Final = (
    Column("call", "id"),
    Column("started", when("started_at")),
    Column("source", "source_id"),
    Column("direction", "direction"),
    Column("outcome", "outcome"),
    Column("from", party("from")),
    Column("to", party("to")),
    Column("contact", "contact.name"),
    Column("audio", "recording.status"),
)


@command(app, "list")
async def list_(
    term: Terminal,
    source: Annotated[str | None, typer.Option(help="only of this source")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="inbound, outbound, internal")] = None,
    outcome: Annotated[list[str] | None, typer.Option(help="answered, no_answer, busy, …")] = None,
    number: Annotated[str | None, typer.Option(help="a number or an extension on either side")] = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 50,
) -> None:
    """List calls; --since and --until say when the relay saw them first."""
    page = await term.api.some(
        "/v1/calls",
        limit=limit,
        source=source,
        direction=direction,
        outcome=outcome,
        number=number,
        **{"from": moment(since, name="--since"), "to": moment(until, name="--until")},
    )
    term.out.table(page, COLUMNS, empty="No call is known like that; `relay explain` says why.")


@command(app, "show")
async def show(term: Terminal, call_id: CallId) -> None:
    """Show a call, what was told of it, and to whom."""
    from relay.cli.client import path_of

    term.out.details(await term.api.get(path_of("calls", call_id)))


@command(app, "recording")
async def recording(term: Terminal, call_id: CallId) -> None:
    """Make a fresh link to the audio; whoever has it may listen until it expires."""
    from relay.cli.client import path_of

    link = await term.api.get(path_of("calls", call_id, "recording"))
    term.out.answer(link, link["url"])


async def erase(
    term: Terminal, number: Annotated[str, typer.Argument(help="E.164, as +12025550123")], yes: Yes = False
) -> None:
    """Forget a person: calls, events, audio and kept contacts with this number, everywhere in the relay."""
    term.confirm("Erase all calls, events, audio and contacts of this number?", yes=yes)
    result = await term.api.post("/v1/erase", {"number": number})
    if result["job"] is not None:
        job = await watch(term, result["job"]["id"])
        result |= {"state": "done", "job": job}
        result |= {name: count for name, count in job["counts"].items() if name in result}
        term.out.answer(result, f"erased: {words(job)}")
        return
    counts = ", ".join(
        f"{name} {result[name]:,}" for name in ("calls", "events", "recordings", "contacts", "deliveries")
    )
    term.out.answer(result, f"erased: {counts}")
