"""What is written: tables and sentences for people, or JSON for programs, and then nothing else on stdout."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from relay.domain.json import Json

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_PIPED_WIDTH: Final = 10_000
_LAST_COLUMN: Final = 30
_NOTHING: Final[tuple[Any, ...]] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, and where its value is (`health.error`) or how it is made."""

    title: str
    value: str | Callable[[Json], Any]

    def text(self, item: Json) -> str:
        """Write the value of one row."""
        return plain(at(item, self.value) if isinstance(self.value, str) else self.value(item))


def at(item: Any, path: str) -> Any:
    """Read a value by its path; None where there is none."""
    for name in path.split("."):
        item = item.get(name) if isinstance(item, dict) else None
    return item


def plain(value: Any) -> str:
    """Write a value as text that cannot command a terminal."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(plain(each) for each in value)
        case dict():
            return plain(json.dumps(value, ensure_ascii=False))
        case _:
            return _CONTROL.sub("\ufffd", str(value))


def when(path: str) -> Callable[[Json], str]:
    """Make the value of a column of times: `2026-11-20 12:00:03`, UTC."""

    def read(item: Json) -> str:
        return time_text(at(item, path))

    return read


def time_text(text: str | None) -> str:
    """Write a time of the API for people: to the second, in UTC."""
    return "" if text is None else re.sub(r"(\.\d+)?(Z|\+00:00)$", "", text).replace("T", " ")


class Out:
    """Where a command writes."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @cached_property
    def console(self) -> "Console":
        """Write for people; nothing in it is taken for markup, and a pipe gets whole lines."""
        return _console(sys.stdout.isatty())

    @cached_property
    def notes(self) -> "Console":
        """Write what is not the answer: to stderr."""
        return _console(sys.stderr.isatty(), stderr=True)

    def answer(self, value: Any, *words: str) -> None:
        """Give the whole answer: the document for programs, the words for people."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
            sys.stdout.flush()
        else:
            for each in words:
                self.console.print(plain(each), soft_wrap=True)

    def line(self, value: Json, words: str, *, style: str | None = None) -> None:
        """Give one line of a stream."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
            sys.stdout.flush()
        else:
            self.console.print(plain(words), soft_wrap=True, style=style)
            self.console.file.flush()

    def note(self, words: str) -> None:
        """Say something beside the answer, to people."""
        self.notes.print(plain(words), soft_wrap=True)

    def table(self, page: Json, columns: Sequence[Column], *, empty: str) -> None:
        """Give a list. Columns that are empty in all rows are left out; where the terminal is too narrow for a line a
        row, each row is a few lines. Only the last column may be broken."""
        if self.as_json:
            self.answer(page)
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
            self.note("There are more: --limit shows them.")

    def _lines(self, titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for number, title in enumerate(titles, 1):
            table.add_column(title, overflow="fold", no_wrap=number < len(titles))
        for row in cells:
            table.add_row(*row)
        self.console.print(table)

    def _blocks(self, titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        wide = max(len(title) for title in titles)
        for number, row in enumerate(cells):
            if number:
                self.console.print()
            for title, cell in zip(titles, row, strict=True):
                if cell:
                    self.console.print(f"{title:{wide}}  {cell}", soft_wrap=True)

    def details(self, document: Json, *, leave_out: Sequence[str] = ()) -> None:
        """Give one thing, a line for each of its values; what is empty is left out."""
        if self.as_json:
            self.answer(document)
            return
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in flattened({k: v for k, v in document.items() if k not in leave_out}):
            table.add_row(plain(name), plain(value))
        self.console.print(table)


def _fits(titles: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> bool:
    """Whether all columns but the last, and a part of that, have room in one line."""
    wide = [max(len(row[number]) for row in (titles, *cells)) for number in range(len(titles))]
    return sum(wide[:-1]) + min(wide[-1], _LAST_COLUMN) + 3 * (len(wide) - 1) <= width


def flattened(document: Mapping[str, Any], under: str = "") -> list[tuple[str, Any]]:
    """List the values of a document by their paths, without those that say nothing."""
    found: list[tuple[str, Any]] = []
    for name, value in document.items():
        if value in _NOTHING:
            continue
        if isinstance(value, dict):
            found += flattened(value, f"{under}{name}.")
        elif isinstance(value, list) and isinstance(value[0], dict):
            for number, each in enumerate(value):
                found += flattened(each, f"{under}{name}.{number}.")
        else:
            found.append((f"{under}{name}", value))
    return found


def _console(is_terminal: bool, *, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(
        stderr=stderr, markup=False, emoji=False, highlight=False, width=None if is_terminal else _PIPED_WIDTH
    )
