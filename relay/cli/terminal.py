"""What every command has: how it finds the relay, `--json`, and how it ends.

A command is an async function that gets a `Terminal` first and its own parameters after it; `command` makes it one of
a typer app, with --url, --token, --config and --json added.
"""

import inspect
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from relay.errors import SettingsError

if TYPE_CHECKING:
    from relay.cli.client import Client, Target
    from relay.cli.output import Out

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="RELAY_URL", help="the relay's address, such as https://relay.example.com"),
]
Token = Annotated[
    str | None, typer.Option("--token", envvar="RELAY_TOKEN", help="a token; the variable keeps it out of `ps`")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="relay.yaml of a relay on this machine: its address and token are taken"),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else, for programs")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="most entries, newest first")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask whether it is meant")]
Since = Annotated[str | None, typer.Option("--since", help="from when on: 2h, 3d, or 2026-11-20T10:00:00Z")]
Until = Annotated[str | None, typer.Option("--until", help="up to when, likewise")]

Work = TypeVar("Work", bound=Callable[..., Awaitable[None]])


@dataclass(frozen=True)
class Terminal:
    """What a command works with: the relay, and where it writes."""

    api: "Client"
    out: "Out"

    def confirm(self, question: str, *, yes: bool) -> None:
        """Have something that cannot be undone confirmed."""
        if yes:
            return
        if self.out.as_json or not sys.stdin.isatty():
            raise SettingsError("this cannot be undone: say --yes")
        typer.confirm(question, abort=True, err=True)


def _common(url: Url = None, token: Token = None, config: Config = None, as_json: AsJson = False) -> None:
    """Only its signature is used."""


def group(name: str, help_: str) -> typer.Typer:
    """Make the commands of one noun."""
    return typer.Typer(name=name, help=help_, no_args_is_help=True)


def command(app: typer.Typer, name: str, *, endless: bool = False) -> Callable[[Work], Work]:
    """Make a function a command. Ctrl-C is how an `endless` one ends well."""

    def register(work: Work) -> Work:
        _, *own = inspect.signature(work).parameters.values()
        common = inspect.signature(_common).parameters.values()
        keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *common)]

        def run(*, url: str | None, token: str | None, config: Path | None, as_json: bool, **given: Any) -> None:
            import asyncio

            from relay.cli.client import find_target
            from relay.cli.output import Out

            out = Out(as_json=as_json)
            target = find_target(url, token, config, os.environ)
            try:
                asyncio.run(_work(target, out, work, given))
            except KeyboardInterrupt:
                if not endless:
                    raise

        run.__doc__ = work.__doc__
        run.__annotations__ = {}
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]  # what typer reads
        app.command(name)(run)
        return work

    return register


async def _work(target: "Target", out: "Out", work: Callable[..., Awaitable[None]], given: dict[str, Any]) -> None:
    from relay.cli.client import Refused, open_client

    async with open_client(target) as api:
        try:
            await work(Terminal(api, out), **given)
        except Refused as refused:
            if refused.asked_wrongly:
                raise SettingsError(str(refused)) from refused
            raise


def moment(text: str | None, *, name: str) -> str | None:
    """Read an instant as people write it, for the API."""
    if text is None:
        return None
    from datetime import UTC, datetime

    from relay.domain.time import iso, parse_instant

    return iso(parse_instant(text, name=name, now=datetime.now(UTC)))
