"""Options of sources and subscriptions on the command line: `--set name=value`, and a file with many.

A value is text, which the relay converts; `null`, and what begins with `[`, `{` or `"`, is JSON. `@path` reads the
value from a file and `@-` from stdin, so that a secret is neither in `ps` nor in the shell's history.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from relay.config_file import parse
from relay.domain.json import Json
from relay.errors import SettingsError

_MAX_CHARS: Final = 1024 * 1024

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option; @file reads the value, null resets it."),
]
FileOption = Annotated[str | None, typer.Option("--file", "-f", help="Options as a YAML or JSON map; - is stdin.")]


def options(settings: Sequence[str] | None, file: str | None) -> Json:
    """Return the options of `--file`, overridden by those of `--set`. Raises SettingsError."""
    document: Json = {} if file is None else _map(file)
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"--set: {name[:40]!r} is not NAME=VALUE")
        place(document, name.strip(), value(text, name=f"--set {name}"))
    return document


def value(text: str, *, name: str) -> Any:
    """Return the value of an option; `@path` is read. Raises SettingsError."""
    if text.startswith("@"):
        return read(text[1:], name=name).strip()
    return literal(text, name=name)


def literal(text: str, *, name: str) -> Any:
    """Return text as it is, or parsed where it begins like JSON. Raises SettingsError."""
    if text != "null" and text[:1] not in ("[", "{", '"'):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise SettingsError(f"{name}: looks like JSON but is not valid; put text in double quotes") from None


def read(path: str, *, name: str, max_chars: int = _MAX_CHARS) -> str:
    """Return the content of a text file, or of stdin for `-`. Raises SettingsError."""
    try:
        if path == "-":
            text = sys.stdin.read(max_chars + 1)
        else:
            with Path(path).expanduser().open(encoding="utf-8-sig") as file:
                text = file.read(max_chars + 1)
    except OSError as error:
        raise SettingsError(f"{name}: {path} cannot be read: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: {path} is not UTF-8 text") from None
    if len(text) > max_chars:
        raise SettingsError(f"{name}: {path} is larger than {max_chars} characters")
    return text


def yaml_document(text: str, *, name: str) -> Any:
    problems: list[str] = []
    document = parse(text, name, problems)
    if problems:
        raise SettingsError("\n".join(problems))
    return document


def _map(path: str) -> Json:
    document = yaml_document(read(path, name="--file"), name="stdin" if path == "-" else path)
    if not isinstance(document, dict):
        raise SettingsError("--file: must be a map of option names to values")
    return document


def place(document: Json, path: str, option: Any) -> None:
    """Set an option in a document; `oauth.client_id` goes into the map `oauth`."""
    *outer, name = path.split(".")
    for section in outer:
        inner = document.setdefault(section, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{path[:64]}: {section} is both a value and a map")
        document = inner
    document[name] = option
