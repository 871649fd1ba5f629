"""`relay demo` on the command line."""

import asyncio
from typing import Annotated, Literal

import typer

from relay.cli.demo.run import DemoOptions, run
from relay.cli.terminal import new_app
from relay.domain.time import parse_duration_s
from relay.simulator.accounts import PROVIDER_NAMES

app = new_app()

ProviderName = Literal["webfones", "unpod", "cinnox", "nfon", "all"]


@app.command()
def demo(
    duration: Annotated[
        str | None, typer.Option("--for", help="Make calls for this long, such as 20s; default: until Ctrl-C.")
    ] = None,
    provider: Annotated[
        ProviderName, typer.Option(help="Provider to simulate; all: one relay with a source at each.")
    ] = "webfones",
    calls_per_minute: Annotated[float, typer.Option(min=0.1, max=600, help="Calls per minute at each provider.")] = 30,
    chaos: Annotated[bool, typer.Option("--chaos", help="kill -9 the relay and its store now and then.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the simulated calls.")] = 1,
) -> None:
    """Everything runs on this machine. Exits with 1 when a call was lost."""
    for_s = None if duration is None else parse_duration_s(duration, name="--for")
    providers = PROVIDER_NAMES if provider == "all" else (provider,)
    options = DemoOptions(providers, for_s=for_s, calls_per_minute=calls_per_minute, chaos=chaos, seed=seed)
    if not asyncio.run(run(options)):
        raise typer.Exit(1)
