"""`relay replay`: deliver past events again, each in its place in the order of its call."""

from typing import Annotated, Literal

import typer

from relay.cli.client import path_of
from relay.cli.deliveries import RESULTS
from relay.cli.jobs import report
from relay.cli.terminal import SinceOption, Terminal, api_time, command, new_app
from relay.errors import SettingsError

app = new_app()


@command(app, "replay")
def replay(
    term: Terminal,
    subscription_id: Annotated[str, typer.Argument(metavar="SUBSCRIPTION", help="ID of the subscription.")],
    since: SinceOption = None,
    event: Annotated[str | None, typer.Option(help="Replay this one event.")] = None,
    status: Annotated[
        Literal["exhausted", "missing", "any"],
        typer.Option(
            help="With --since: deliveries whose retries are exhausted, those missed while the subscription was "
            "disabled, or any event that matches its filters."
        ),
    ] = "exhausted",
    force: Annotated[bool, typer.Option("--force", help="Include what was already delivered.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until all are queued, with a progress bar.")
    ] = True,
) -> None:
    """Either one event or those since a time. What was delivered is skipped, so running it twice does no harm."""
    if (since is None) == (event is None):
        raise SettingsError("pass either --since, such as 2h, or --event")
    path = path_of("subscriptions", subscription_id, "replay")
    if event is not None:
        result = term.api.post(path, {"event_id": event, "force": force})
        term.out.result(result, f"{event} {RESULTS[result['result']]}")
        return
    result = term.api.post(path, {"since": api_time(since, name="--since"), "status": status, "force": force})
    report(term, result["job"], wait=wait)
