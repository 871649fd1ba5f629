"""What commands write: tables and text for people, or JSON and nothing else on stdout for programs."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from relay.domain.json import Json

# C0 and C1 controls without tab and newline, and the marks that reorder text: what could command a terminal.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
# A program that reads a table must not find its lines wrapped.
_PIPE_WIDTH: Final = 10_000
_LAST_COLUMN_MIN_WIDTH: Final = 30
_EMPTY: Final[tuple[Any, ...]] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its title, and the path (`health.error`) or function that gives its value."""

    title: str
    value: str | Callable[[Json], Any]

    def text(self, item: Json) -> str:
        return plain(at(item, self.value) if isinstance(self.value, str) else self.value(item))


def at(item: Any, path: str) -> Any:
    for name in path.split("."):
        item = item.get(name) if isinstance(item, dict) else None
    return item


def plain(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(plain(item) for item in value)
        case dict():
            return plain(json.dumps(value, ensure_ascii=False))
        case _:
            return _CONTROL.sub("\ufffd", str(value))


def time_at(path: str) -> Callable[[Json], str]:
    return lambda item: local_time(at(item, path))


def local_time(text: str | None) -> str:
    """Return a time of the API to the second, in the local zone and with its name: `2026-11-20 13:00:03 CET`."""
    if text is None:
        return ""
    local = datetime.fromisoformat(text).astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S} {local.tzname()}"


class Output:
    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @cached_property
    def console(self) -> Console:
        """Stdout, for people: text is never taken for markup, and a pipe gets whole lines."""
        return _console(sys.stdout.isatty())

    @cached_property
    def notes(self) -> Console:
        return _console(sys.stderr.isatty(), stderr=True)

    def result(self, value: Any, *lines: str) -> None:
        """Write the whole result: the document for programs, the lines for people."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
            sys.stdout.flush()
        else:
            for line in lines:
                self.console.print(plain(line), soft_wrap=True)

    def line(self, value: Json, text: str, *, style: str | None = None) -> None:
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
            sys.stdout.flush()
        else:
            self.console.print(plain(text), soft_wrap=True, style=style)
            self.console.file.flush()

    def note(self, text: str) -> None:
        self.notes.print(plain(text), soft_wrap=True)

    def table(self, page: Json, columns: Sequence[Column], *, empty: str) -> None:
        """Write a list, without columns that are empty in all rows.

        Where a row does not fit into a line of the terminal, each becomes a block of lines; only the last column wraps.
        """
        if self.as_json:
            self.result(page)
            return
        rows = [[column.text(item) for column in columns] for item in page["items"]]
        if not rows:
            self.console.print(empty, soft_wrap=True)
            return
        used = [number for number in range(len(columns)) if any(row[number] for row in rows)]
        titles = [columns[number].title for number in used]
        cells = [[row[number] for number in used] for row in rows]
        if _fits(titles, cells, self.console.width):
            self._lines(titles, cells)
        else:
            self._blocks(titles, cells)
        if page.get("next_cursor"):
            self.note("There are more entries; --limit shows them.")

    def _lines(self, titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for number, title in enumerate(titles, 1):
            table.add_column(title, overflow="fold", no_wrap=number < len(titles))
        for row in cells:
            table.add_row(*row)
        self.console.print(table)

    def _blocks(self, titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        width = max(len(title) for title in titles)
        for number, row in enumerate(cells):
            if number:
                self.console.print()
            for title, cell in zip(titles, row, strict=True):
                if cell:
                    self.console.print(f"{title:{width}}  {cell}", soft_wrap=True)

    def details(self, document: Json) -> None:
        """Write one thing, a line for each of its values; empty ones are left out."""
        if self.as_json:
            self.result(document)
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in flattened(document):
            table.add_row(plain(name), plain(value))
        self.console.print(table)


def _fits(titles: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> bool:
    widths = [max(len(row[number]) for row in (titles, *cells)) for number in range(len(titles))]
    return sum(widths[:-1]) + min(widths[-1], _LAST_COLUMN_MIN_WIDTH) + 3 * (len(widths) - 1) <= width


def flattened(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of a document by their dotted paths, without empty ones."""
    pairs: list[tuple[str, Any]] = []
    for name, value in document.items():
        if value in _EMPTY:
            continue
        if isinstance(value, dict):
            pairs += flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list) and isinstance(value[0], dict):
            for number, item in enumerate(value):
                pairs += flattened(item, f"{prefix}{name}.{number}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs


def _console(is_terminal: bool, *, stderr: bool = False) -> Console:
    return Console(
        stderr=stderr, markup=False, emoji=False, highlight=False, width=None if is_terminal else _PIPE_WIDTH
    )
