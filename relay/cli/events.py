"""`relay events`: events that the relay has published."""

from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from relay.cli.client import path_of
from relay.cli.output import Column, at, time_at
from relay.cli.terminal import LimitOption, SinceOption, Terminal, UntilOption, api_time, command, new_app
from relay.domain.json import Json

app = new_app()

EventId = Annotated[str, typer.Argument(metavar="ID", help="ID of the event.")]
TypesOption = Annotated[list[str] | None, typer.Option("--type", "-t", help="Only these types; * is a wildcard.")]
SourceOption = Annotated[str | None, typer.Option("--source", help="Only of this source.")]
SubscriptionOption = Annotated[
    str | None, typer.Option("--subscription", help="Only those that match this subscription.")
]


def of_call(path: str) -> Callable[[Json], Any]:
    """Return the value of a column from the event's call; None where it has none."""
    return lambda item: at(item["data"].get("call"), path)


COLUMNS: Final = (
    Column("event", "id"),
    Column("published", time_at("timestamp")),
    Column("type", "type"),
    Column("source", of_call("source_id")),
    Column("direction", of_call("direction")),
    Column("outcome", of_call("outcome")),
    Column("call", of_call("id")),
)


@command(app, "list")
def list_(
    term: Terminal,
    types: TypesOption = None,
    source: SourceOption = None,
    call: Annotated[str | None, typer.Option(help="Only of this call.")] = None,
    subscription: SubscriptionOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = 50,
) -> None:
    """List events, newest first."""
    page = term.api.newest(
        "/v1/events",
        limit=limit,
        type=types,
        source=source,
        call=call,
        subscription=subscription,
        **{"from": api_time(since, name="--since"), "to": api_time(until, name="--until")},
    )
    term.out.table(page, COLUMNS, empty="No matching events.")


@command(app, "show")
def show(term: Terminal, event_id: EventId) -> None:
    """Show an event."""
    term.out.details(term.api.get(path_of("events", event_id)))


@command(app, "types")
def types(term: Terminal) -> None:
    """List event types; --json includes the schema and a sample of each."""
    event_types = term.api.get("/v1/event-types")
    if term.out.as_json:
        term.out.result(event_types)
    else:
        columns = (Column("type", "type"), Column("published when", "description"))
        term.out.table({"items": event_types}, columns, empty="")
