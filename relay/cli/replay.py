"""`relay replay`: deliver again, in the old place of each call's order."""

from enum import StrEnum
from typing import Annotated

import typer

from relay.cli.deliveries import WORDS
from relay.cli.jobs import watched
from relay.cli.terminal import Terminal, moment
from relay.errors import SettingsError


class Status(StrEnum):
    """Which deliveries: given up, never queued because it was off, or all it would want."""

    EXHAUSTED = "exhausted"
    MISSING = "missing"
    ANY = "any"


async def replay(
    term: Terminal,
    subscription_id: Annotated[str, typer.Argument(metavar="SUBSCRIPTION", help="id of the subscription")],
    since: Annotated[str | None, typer.Option(help="events from when on: 2h, 3d, or 2026-11-20T10:00:00Z")] = None,
    event: Annotated[str | None, typer.Option(help="this one event")] = None,
    status: Annotated[
        Status, typer.Option(help="with --since: given up; missing while it was off; or any that it would want")
    ] = Status.EXHAUSTED,
    force: Annotated[bool, typer.Option("--force", help="also what was delivered")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="until all are queued, with a bar")] = True,
) -> None:
    """Deliver events again: one, or those since a time. What was heard is left alone, so twice does no harm."""
    from relay.cli.client import path_of

    if (since is None) == (event is None):
        raise SettingsError("say either --since, such as 2h, or --event")
    path = path_of("subscriptions", subscription_id, "replay")
    if event is not None:
        result = await term.api.post(path, {"event_id": event, "force": force})
        term.out.answer(result, f"{event} {WORDS[result['result']]}")
        return
    body = {"since": moment(since, name="--since"), "status": status.value, "force": force}
    result = await term.api.post(path, body)
    await watched(term, result["job"], wait=wait)
