"""`relay calls`: calls that the relay has ingested."""

from collections.abc import Callable
from typing import Annotated, Final

import typer

from relay.cli.client import path_of
from relay.cli.output import Column, time_at
from relay.cli.terminal import LimitOption, SinceOption, Terminal, UntilOption, api_time, command, new_app
from relay.domain.json import Json

app = new_app()

CallId = Annotated[str, typer.Argument(metavar="ID", help="ID of the call.")]


def party(side: str) -> Callable[[Json], str]:
    """Return the value of a column for one side: its number, else its extension or what the provider sent; its name."""

    def text(item: Json) -> str:
        party = item[side]
        number = party["number"] or party["extension"] or party["raw"] or ""
        return f"{number} {party['name']}" if party["name"] else str(number)

    return text


COLUMNS: Final = (
    Column("call", "id"),
    Column("started", time_at("started_at")),
    Column("source", "source_id"),
    Column("direction", "direction"),
    Column("outcome", "outcome"),
    Column("from", party("from")),
    Column("to", party("to")),
    Column("contact", "contact.name"),
    Column("recording", "recording.status"),
)


@command(app, "list")
def list_(
    term: Terminal,
    source: Annotated[str | None, typer.Option(help="Only of this source.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="inbound, outbound or internal.")] = None,
    outcome: Annotated[list[str] | None, typer.Option(help="answered, no_answer, busy, …")] = None,
    number: Annotated[str | None, typer.Option(help="A number or an extension on either side.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = 50,
) -> None:
    """List calls, newest first. --since and --until apply to when the relay first saw them."""
    page = term.api.newest(
        "/v1/calls",
        limit=limit,
        source=source,
        direction=direction,
        outcome=outcome,
        number=number,
        **{"from": api_time(since, name="--since"), "to": api_time(until, name="--until")},
    )
    term.out.table(page, COLUMNS, empty="No matching calls. `relay explain` says why a call is missing.")


@command(app, "show")
def show(term: Terminal, call_id: CallId) -> None:
    """Show a call, its events and their deliveries."""
    term.out.details(term.api.get(path_of("calls", call_id)))


@command(app, "recording")
def recording(term: Terminal, call_id: CallId) -> None:
    """Print a new link to the recording. Anyone who has the link can listen until it expires."""
    link = term.api.get(path_of("calls", call_id, "recording"))
    term.out.result(link, link["url"])
