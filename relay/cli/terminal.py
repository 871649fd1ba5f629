"""What every client command shares: how it finds the relay, `--json`, and how it ends.

A command is a function that takes a `Terminal` first and its own parameters after it; `command` adds it to a typer app,
with --url, --token, --config and --json.
"""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from relay.cli.client import ApiError, Client
from relay.cli.output import Output
from relay.cli.target import find_target
from relay.domain.time import iso, parse_instant
from relay.errors import SettingsError

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="RELAY_URL", help="Address of the relay, such as https://relay.example.com."),
]
TokenOption = Annotated[
    str | None,
    typer.Option("--token", envvar="RELAY_TOKEN", help="API token; the variable keeps it out of `ps`."),
]
LocalConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="relay.yaml of a relay on this machine, to use its address and token."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Default: RELAY_CONFIG, else relay.yaml here, else RELAY_… variables only."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="Maximum number of entries.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
SinceOption = Annotated[str | None, typer.Option("--since", help="Start: 2h or 3d ago, or 2026-11-20T10:00:00Z.")]
UntilOption = Annotated[str | None, typer.Option("--until", help="End, in the same form; default: now.")]

Work = TypeVar("Work", bound=Callable[..., None])


@dataclass(frozen=True)
class Terminal:
    """What a command works with: the API of a relay, and where to write."""

    api: Client
    out: Output

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something that cannot be undone; without a terminal only --yes will do."""
        if yes:
            return
        if self.out.as_json or not sys.stdin.isatty():
            raise SettingsError("this cannot be undone; confirm with --yes")
        typer.confirm(question, abort=True, err=True)


def _common(
    url: UrlOption = None, token: TokenOption = None, config: LocalConfigOption = None, as_json: JsonOption = False
) -> None:
    """Only the signature is used."""


def new_app() -> typer.Typer:
    return typer.Typer(no_args_is_help=True, add_completion=False)


def command(app: typer.Typer, name: str, *, endless: bool = False) -> Callable[[Work], Work]:
    """Add a function to an app as a command. Ctrl-C is the normal end of an `endless` one."""

    def register(work: Work) -> Work:
        _, *own = inspect.signature(work).parameters.values()
        common = inspect.signature(_common).parameters.values()
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *common)]

        def run(*, url: str | None, token: str | None, config: Path | None, as_json: bool, **options: Any) -> None:
            try:
                with Client(find_target(url, token, config, os.environ)) as api:
                    work(Terminal(api, Output(as_json=as_json)), **options)
            except ApiError as error:
                if error.is_usage_error:
                    raise SettingsError(str(error)) from error
                raise
            except KeyboardInterrupt:
                if not endless:
                    raise

        run.__doc__ = work.__doc__
        run.__annotations__ = {}
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]  # what typer reads
        app.command(name)(run)
        return work

    return register


def api_time(text: str | None, *, name: str) -> str | None:
    """Turn an option such as `2h` into a time of the API. Raises SettingsError."""
    return None if text is None else iso(parse_instant(text, name=name, now=datetime.now(UTC)))
