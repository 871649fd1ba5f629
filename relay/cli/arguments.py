"""Options of sources and subscriptions as they are given at a terminal: `--set name=value`, and a file with many.

A value is text, and the relay makes of it what the option is; `null`, and what begins with `[`, `{` or `"`, is JSON.
`@path` is what a file holds and `@-` what stdin does, so that a secret stands neither in `ps` nor in the history.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from relay.domain.json import Json
from relay.errors import SettingsError

_LARGEST_CHARS: Final = 1024 * 1024

Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="an option; @file reads the value, null gives it back"),
]
File = Annotated[str | None, typer.Option("--file", "-f", help="options as a YAML or JSON map; - is stdin")]


def options(settings: Sequence[str] | None, file: str | None) -> Json:
    """Put what is given together; `--set` goes before the file."""
    document: Json = {} if file is None else _map(file)
    for each in settings or ():
        name, equals, text = each.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"--set: {name[:40]!r} is no NAME=VALUE")
        place(document, name.strip(), value(text, name=f"--set {name}"))
    return document


def value(text: str, *, name: str) -> Any:
    """Read one value."""
    if text.startswith("@"):
        return read(text[1:], name=name).strip()
    return literal(text, name=name)


def literal(text: str, *, name: str) -> Any:
    """Read a value that stands for itself: text, or JSON where it begins like JSON."""
    if text != "null" and text[:1] not in ("[", "{", '"'):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise SettingsError(f"{name}: begins like JSON and is none; a text can stand in double quotes") from None


def read(path: str, *, name: str, most_chars: int = _LARGEST_CHARS) -> str:
    """Read a text file, or stdin."""
    try:
        if path == "-":
            text = sys.stdin.read(most_chars + 1)
        else:
            with Path(path).expanduser().open(encoding="utf-8-sig") as file:
                text = file.read(most_chars + 1)
    except OSError as error:
        raise SettingsError(f"{name}: {path} cannot be read: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: {path} is not UTF-8 text") from None
    if len(text) > most_chars:
        raise SettingsError(f"{name}: {path} is larger than {most_chars} characters")
    return text


def _map(path: str) -> Json:
    from relay.settings.file import parse

    problems: list[str] = []
    document = parse(read(path, name="--file"), "stdin" if path == "-" else path, problems)
    if problems:
        raise SettingsError("\n".join(problems))
    if not isinstance(document, dict):
        raise SettingsError("--file: must be a map of option names to values")
    return document


def place(document: Json, path: str, given: Any) -> None:
    """Put a value under a name, `oauth.client_id` into the map `oauth`."""
    *outer, name = path.split(".")
    for each in outer:
        inner = document.setdefault(each, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{path[:64]}: {each} is a value and a map at once")
        document = inner
    document[name] = given
