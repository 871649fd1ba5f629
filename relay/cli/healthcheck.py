"""`relay healthcheck`: whether a role is ready. Containers run it every few seconds, so it imports little."""

import os
from http.client import HTTPException

import typer

from relay.cli.client import connect, why_unreachable
from relay.cli.target import read_local_relay
from relay.cli.terminal import LocalConfigOption, new_app
from relay.domain.url import parse_url

_TIMEOUT_S = 3.0

app = new_app()


@app.command()
def healthcheck(config: LocalConfigOption = None) -> None:
    """Asks the internal port for /readyz."""
    url = parse_url(read_local_relay(config, os.environ).internal_url())
    try:
        connection = connect(url, timeout_s=_TIMEOUT_S)
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = response.read().decode("utf-8", "replace").strip()
    except (HTTPException, OSError) as error:
        reason = why_unreachable(error) if isinstance(error, OSError) else type(error).__name__
        typer.echo(f"not ready: {reason}", err=True)
        raise typer.Exit(1) from None
    if response.status != 200:
        typer.echo(f"not ready: {response.status} {body}", err=True)
        raise typer.Exit(1)
    typer.echo(body)
