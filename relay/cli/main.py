"""The command line: starts the processes and answers the operator. Exit codes: 0 well, 1 not well, 2 asked wrongly."""

import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import relay
from relay.cli import calls, deliveries, events, explain, init, jobs, listen, replay, sources, subscriptions, tokens
from relay.cli.terminal import command
from relay.errors import RelayError, SettingsError

app = typer.Typer(
    name="relay",
    help="Call Relay: phone systems are asked, subscribers are told, nothing is lost on the way.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Shown = Literal["webfones", "unpod", "cinnox", "nfon", "all"]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="relay.yaml; absent: RELAY_CONFIG, else the one here, and RELAY_…")
]


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
    import asyncio

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
    from workers.runners import add_poller_and_workers
    from workers.settings import host

    settings = _settings(config)

    async def run() -> None:
        stop = processes.stop_on_signals()
        await processes.up(
            settings,
            add_poller_and_workers,
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
    from workers.runners import add_poller, add_workers
    from workers.settings import host

    settings = _settings(config)
    processes.require_connection(settings)

    async def run() -> None:
        stop = processes.stop_on_signals()
        await processes.role(
            settings,
            name,
            stop,
            add_runners={"poller": add_poller, "worker": add_workers}.get(name),
            host=host if name == "worker" else None,
            read=lambda: _read(config),
        )

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


@app.command()
def demo(
    duration: Annotated[
        str | None, typer.Option("--for", help="how long calls are made, such as 20s; without it: until Ctrl-C")
    ] = None,
    provider: Annotated[
        Shown,
        typer.Option(help="which provider is simulated; all: one relay with a source at each"),
    ] = "webfones",
    calls_per_minute: Annotated[float, typer.Option(min=0.1, max=600, help="at each provider")] = 30,
    chaos: Annotated[bool, typer.Option("--chaos", help="kill -9 the relay and its store now and then")] = False,
    seed: Annotated[int, typer.Option(help="another seed makes other calls")] = 1,
) -> None:
    """Show the whole relay at work, with simulated providers and a verifying subscriber, all on this machine."""
    from relay.cli.demo.run import DemoOptions, run
    from relay.domain.time import parse_duration_s
    from relay.simulator.accounts import PROVIDER_NAMES

    for_s = None if duration is None else parse_duration_s(duration, name="--for")
    providers = PROVIDER_NAMES if provider == "all" else (provider,)
    options = DemoOptions(providers, for_s=for_s, calls_per_minute=calls_per_minute, chaos=chaos, seed=seed)
    if not _run(run(options)):
        raise typer.Exit(1)


@app.command()
def check(
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document, for programs")] = False,
) -> None:
    """Look at everything that the relay needs, and say what to fix; works beside a running relay."""
    import json

    from relay.cli import check as checking
    from relay.log import configure
    from relay.settings import load

    settings = load(config, os.environ)
    configure("error", settings.log.format)

    async def run() -> bool:
        findings = []
        async for finding in checking.check(settings):
            findings.append(finding)
            if not as_json:
                typer.echo(finding.line())
        typer.echo(json.dumps(checking.verdict(findings), indent=2) if as_json else checking.closing(findings))
        return bool(checking.verdict(findings)["ok"])

    if not _run(run()):
        raise typer.Exit(1)


@app.command()
def backfill(
    source: Annotated[str, typer.Argument(help="id of the source to read again")],
    since: Annotated[str, typer.Option(help="from when on: 2h, 3d, or 2026-11-20T10:00:00Z")],
    until: Annotated[str | None, typer.Option(help="up to when, likewise; absent: now")] = None,
    force: Annotated[bool, typer.Option("--force", help="also rows too old to be told apart from known ones")] = False,
    config: Config = None,
) -> None:
    """Have the running relay read a range again, and tell the calls that were never told."""
    from datetime import UTC, datetime

    from relay.cli import backfill as filling
    from relay.settings import load

    settings = load(config, os.environ)
    wanted = filling.asked_for(source, since=since, until=until, force=force, now=datetime.now(UTC))
    _run(filling.run(settings, wanted))


app.command()(init.init)
command(app, "explain")(explain.explain)
command(app, "tail", endless=True)(events.tail)
command(app, "listen", endless=True)(listen.listen)
command(app, "replay")(replay.replay)
command(app, "erase")(calls.erase)
for noun in (sources, subscriptions, calls, events, deliveries, jobs, tokens):
    app.add_typer(noun.app)
