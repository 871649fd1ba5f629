"""`relay backfill`: read a range of calls again."""

from typing import Annotated

import typer

from relay.cli.client import path_of
from relay.cli.jobs import report
from relay.cli.terminal import Terminal, UntilOption, api_time, command, new_app
from relay.errors import SettingsError

app = new_app()


@command(app, "backfill")
def backfill(
    term: Terminal,
    source_id: Annotated[str, typer.Argument(metavar="SOURCE", help="ID of the source.")],
    since: Annotated[str, typer.Option(help="Start of the range: 2h or 3d ago, or 2026-11-20T10:00:00Z.")],
    until: UntilOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Include calls that are too old to be compared with known ones.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done, with a progress bar.")] = True,
) -> None:
    """Calls keep their event IDs, so nothing that was published before is published again. The cursor does not move."""
    start, end = api_time(since, name="--since"), api_time(until, name="--until")
    if start is not None and end is not None and start >= end:
        raise SettingsError(f"--since {start} must be before --until {end}")
    job = term.api.post(path_of("sources", source_id, "backfill"), {"from": start, "to": end, "force": force})
    report(term, job["id"], wait=wait)
