"""The command line: starts the processes and answers the operator. Exit codes: 0 well, 1 not well, 2 asked wrongly."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

import relay
from relay.errors import RelayError, SettingsError

app = typer.Typer(
    name="relay",
    help="Call Relay: phone systems are asked, subscribers are told, nothing is lost on the way.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="relay.yaml; absent: RELAY_CONFIG, or RELAY_…")]


def main(args: list[str] | None = None) -> None:
    """Run a command; a RelayError is a sentence on stderr, not a traceback."""
    try:
        app(args)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except RelayError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _run(main_: Coroutine[Any, Any, Any]) -> Any:
    if sys.platform == "win32":
        return asyncio.run(main_)
    import uvloop

    return uvloop.run(main_)


def _read(config: Path | None) -> Any:
    from relay.settings import load

    return load(config, os.environ)


def _settings(config: Path | None) -> Any:
    from relay.log import configure

    settings = _read(config)
    configure(settings.log.level, settings.log.format)
    return settings


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"call-relay {relay.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def up(config: Config = None) -> None:
    """Run everything in one process; without RELAY_REDIS_URL on an embedded store in data_dir."""
    from relay import processes
    from workers.runners import add_runners
    from workers.settings import host

    settings = _settings(config)

    async def run() -> None:
        stop = processes.stop_on_signals()
        await processes.up(
            settings,
            add_runners,
            lambda runtime: host(runtime, poll_delay_s=0.5),
            stop,
            read=lambda: _read(config),
        )

    _run(run())


@app.command()
def poller(config: Config = None) -> None:
    """Run the poller alone."""
    _role(config, "poller")


@app.command()
def worker(config: Config = None) -> None:
    """Run a worker alone: the same as `python -m workers`."""
    _role(config, "worker")


@app.command()
def api(config: Config = None) -> None:
    """Run the API alone: recording links and management."""
    _role(config, "api")


def _role(config: Path | None, name: str) -> None:
    from relay import processes
    from workers.runners import add_runners
    from workers.settings import host

    settings = _settings(config)
    processes.needs_of_a_role(settings)

    async def run() -> None:
        stop = processes.stop_on_signals()
        if name == "worker":
            await processes.role(settings, name, stop, add_runners=add_runners, host=host, read=lambda: _read(config))
        else:
            await processes.role(settings, name, stop, read=lambda: _read(config))

    _run(run())


@app.command()
def healthcheck(config: Config = None) -> None:
    """Ask the internal port of a role on this machine whether it is ready; for container health checks."""
    import urllib.error
    import urllib.request

    from relay.settings import load

    options = load(config, os.environ).internal
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host  # noqa: S104 - compared, not bound
    try:
        with urllib.request.urlopen(f"http://{host}:{options.port}/readyz", timeout=3) as answer:
            typer.echo(answer.read().decode().strip())
    except (urllib.error.URLError, OSError) as error:
        typer.echo(f"not ready: {getattr(error, 'reason', error)}", err=True)
        raise typer.Exit(1) from None
