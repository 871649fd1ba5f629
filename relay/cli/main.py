"""The `relay` command. Exit codes: 0 success, 1 failure, 2 usage error.

A command's module is imported when the command runs, and not before: each command then pays only for what it uses, and
every module has its imports at the top.
"""

import importlib
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import relay
from relay.errors import RelayError, SettingsError


class LazyCommand(TyperCommand):
    """Stands for a command until it runs or completes: `module`, or `module:command` of an app with several."""

    def __init__(self, name: str, target: str, help_: str) -> None:
        super().__init__(name, help=help_)
        self.target = target

    def load(self) -> Any:
        """Import the command; its docstring, if any, adds to the help."""
        module, _, member = self.target.partition(":")
        loaded: Any = get_command(importlib.import_module(module).app)
        if member:
            loaded = loaded.commands[member]
        loaded.help = "\n\n".join(filter(None, (self.help, loaded.help)))
        return loaded

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.load().make_context(info_name, args, parent, **extra)


COMMANDS: Final = (
    LazyCommand("init", "relay.cli.init", "Write a commented relay.yaml, asking a few questions, then check it."),
    LazyCommand("check", "relay.cli.check", "Check everything the relay depends on, and say what to fix."),
    LazyCommand("up", "relay.cli.roles:up", "Run everything in one process."),
    LazyCommand("poller", "relay.cli.roles:poller", "Run the poller only."),
    LazyCommand("worker", "relay.cli.roles:worker", "Run a worker only; the same as `python -m workers`."),
    LazyCommand("api", "relay.cli.roles:api", "Run the API only: management and recording links."),
    LazyCommand("healthcheck", "relay.cli.healthcheck", "Check whether a role on this machine is ready."),
    LazyCommand(
        "demo", "relay.cli.demo.command", "Run the whole relay against simulated providers and a verifying subscriber."
    ),
    LazyCommand("backfill", "relay.cli.backfill", "Read a range of calls again and publish those never published."),
    LazyCommand("explain", "relay.cli.explain", "Explain why a call was or was not delivered."),
    LazyCommand(
        "completeness", "relay.cli.completeness", "Find and repair missing calls and deliveries, by source and day."
    ),
    LazyCommand("tail", "relay.cli.tail", "Print events as they are published."),
    LazyCommand("listen", "relay.cli.listen", "Forward events to a program under development, signed."),
    LazyCommand("replay", "relay.cli.replay", "Deliver past events to a subscription again."),
    LazyCommand("erase", "relay.cli.erase", "Erase a person's calls, events, recordings and contacts."),
    LazyCommand("sources", "relay.cli.sources", "Manage accounts at providers."),
    LazyCommand("subscriptions", "relay.cli.subscriptions", "Subscribers: where events are delivered."),
    LazyCommand("calls", "relay.cli.calls", "Calls that the relay has ingested."),
    LazyCommand("events", "relay.cli.events", "Events that the relay has published."),
    LazyCommand("deliveries", "relay.cli.deliveries", "Deliveries of events to subscriptions."),
    LazyCommand("jobs", "relay.cli.jobs", "Background jobs: backfills, replays, erasures."),
    LazyCommand("tokens", "relay.cli.tokens", "API tokens."),
)


class RelayGroup(TyperGroup):
    """`relay` itself, with all its commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in COMMANDS:
            self.add_command(command)


app = typer.Typer(name="relay", cls=RelayGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def main(args: list[str] | None = None) -> None:
    """Run a command; a RelayError is a message on stderr, not a traceback."""
    try:
        app(args)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except RelayError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"call-relay {relay.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Call Relay polls phone-system call records and delivers signed webhooks."""
