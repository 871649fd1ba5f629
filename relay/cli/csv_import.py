"""`relay sources import`: thousands of sources from one file, some at a time, with a report of what failed.

Every entry is one PUT under its own id: one that was made already is written again, so a run that broke off is simply
repeated. What is wrong with one entry stops no other.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from relay.cli import arguments
from relay.cli.output import Column
from relay.cli.terminal import Terminal
from relay.domain.json import Json
from relay.errors import RelayError, SettingsError

_WAITS_S: Final = (0.2, 0.5, 1.5, 4.0, 10.0)
_LONGEST_WAIT_S: Final = 30.0
_LARGEST_CELL_CHARS: Final = 128 * 1024


class Format(StrEnum):
    """How a file is written."""

    YAML = "yaml"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class Entry:
    """One source as the file has it: where, its id, its options; with `problem` it cannot be sent."""

    where: str
    id: str
    options: Json = field(repr=False)
    problem: str = ""


@dataclass(slots=True)
class Report:
    """What became of the entries."""

    total: int
    created: int = 0
    replaced: int = 0
    failed: list[Json] = field(default_factory=list)

    @property
    def not_tried(self) -> int:
        """Entries that were not reached."""
        return self.total - self.created - self.replaced - len(self.failed)

    def fail(self, entry: Entry, code: str, why: str) -> None:
        """Note an entry that failed."""
        self.failed.append({"where": entry.where, "id": entry.id, "code": code, "why": why})

    def to_json(self) -> Json:
        """Write it for programs."""
        return {
            "total": self.total,
            "created": self.created,
            "replaced": self.replaced,
            "not_tried": self.not_tried,
            "failed": self.failed,
        }


class ImportIncomplete(RelayError):
    """Some entries are not in the relay."""


def entries(text: str, format_: Format, *, name: str, provider: str | None) -> list[Entry]:
    """Read a file; a SettingsError when it cannot be read at all, entries with a `problem` for the rest."""
    match format_:
        case Format.CSV:
            found = list(_table(text, name))
        case Format.JSON:
            found = list(_listed(_json(text, name), name))
        case Format.YAML:
            found = list(_listed(_yaml(text, name), name))
    seen: dict[str, str] = {}
    checked: list[Entry] = []
    for entry in found:
        problem = entry.problem
        if not problem and not entry.id:
            problem = "has no id: give it one, so that it stays one source when it is imported again"
        if not problem and entry.id in seen:
            problem = f"has the id of {seen[entry.id]}"
        seen.setdefault(entry.id, entry.where)
        options = entry.options
        if provider is not None and options.get("provider") is None:
            options = {**options, "provider": provider}
        checked.append(Entry(entry.where, entry.id, options, problem))
    return checked


def _yaml(text: str, name: str) -> Any:
    from relay.settings.file import parse

    problems: list[str] = []
    document = parse(text, name, problems)
    if problems:
        raise SettingsError("\n".join(problems))
    return document


def _json(text: str, name: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> Json:
        document = dict(pairs)
        if len(document) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise SettingsError(f"{name}: {twice[:64]!r} is given twice in one map")
        return document

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{name}: line {error.lineno}, column {error.colno}: this is not JSON") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{name}: this is not JSON that can be read") from None


def _listed(document: Any, name: str) -> Iterator[Entry]:
    """List the entries of a map by id, of a list, or of either under `sources`."""
    if isinstance(document, dict) and isinstance(document.get("sources"), dict | list):
        document = document["sources"]
    match document:
        case dict():
            for id_, options in document.items():
                yield _entry(str(id_), str(id_), options)
        case list():
            for number, options in enumerate(document, 1):
                id_ = options.get("id") if isinstance(options, dict) else None
                rest = {k: v for k, v in options.items() if k != "id"} if isinstance(options, dict) else options
                yield _entry(f"entry {number}", "" if id_ is None else str(id_), rest)
        case _:
            raise SettingsError(f"{name}: must be a map of sources by id, or a list of them")


def _entry(where: str, id_: str, options: Any) -> Entry:
    if not isinstance(options, dict):
        return Entry(where, id_, {}, "must be a map of option names to values")
    return Entry(where, id_, options)


def _table(text: str, name: str) -> Iterator[Entry]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(_LARGEST_CELL_CHARS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if header is None:
                header = cells
                _check_header(header, name)
            else:
                yield _row(f"line {reader.line_num}", header, cells)
    except csv.Error as error:
        raise SettingsError(f"{name}: line {reader.line_num}: this is no table: {error}") from None


def _check_header(header: Sequence[str], name: str) -> None:
    if "id" not in header:
        raise SettingsError(f"{name}: the first line must name the columns, `id` among them")
    if not all(header) or len(set(header)) < len(header):
        raise SettingsError(f"{name}: each column needs a name of its own in the first line")


def _row(where: str, header: Sequence[str], cells: Sequence[str]) -> Entry:
    id_ = dict(zip(header, cells, strict=False)).get("id", "")
    if len(cells) > len(header):
        return Entry(where, id_, {}, f"has {len(cells)} values for {len(header)} columns")
    options: Json = {}
    try:
        for column, cell in zip(header, cells, strict=False):
            if column != "id" and cell:
                arguments.place(options, column, arguments.literal(cell, name=column))
    except SettingsError as error:
        return Entry(where, id_, {}, str(error))
    return Entry(where, id_, options)


async def import_sources(
    term: Terminal, file: str, *, format_: Format | None, provider: str | None, at_once: int
) -> None:
    """Send every entry; raises ImportIncomplete when not all of them are in the relay then."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    found = entries(
        arguments.read(file, name="FILE", most_chars=256 * 1024 * 1024),
        format_ or _format_of(file),
        name="stdin" if file == "-" else file,
        provider=provider,
    )
    if not found:
        raise SettingsError("there is no source in it")
    report = Report(len(found))
    columns = (TextColumn("sources"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}"))
    shown = term.out.notes.is_terminal
    with Bar(*columns, TimeRemainingColumn(), console=term.out.notes, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=len(found), failed="")

        def step() -> None:
            failed = f"{len(report.failed)} failed" if report.failed else ""
            bar.update(task, completed=report.total - report.not_tried, failed=failed)

        stopped = await _send_all(term, found, report, at_once=at_once, step=step)
    _tell(term, report)
    if stopped is not None:
        raise ImportIncomplete(
            f"{stopped}\n{report.not_tried} sources were not tried. Run the same again: what is there is written again"
        )
    if report.failed:
        raise ImportIncomplete(f"{len(report.failed)} of {report.total} sources are not in the relay")


async def _send_all(term: Terminal, found: Sequence[Entry], report: Report, *, at_once: int, step: Any) -> str | None:
    """Send some at a time; gives why it stopped before the end, when no other entry would have fared better."""
    import asyncio

    from relay.cli.client import NotARelay, Refused, Unanswered

    waiting = iter(found)
    stopped: list[str] = []

    async def send() -> None:
        for entry in waiting:
            if stopped:
                return
            try:
                if entry.problem:
                    report.fail(entry, "unreadable", entry.problem)
                elif await _put(term, entry):
                    report.created += 1
                else:
                    report.replaced += 1
            except Refused as refused:
                if refused.status in (401, 403):
                    stopped.append(str(refused))
                    return
                report.fail(entry, refused.code, str(refused))
            except SettingsError as error:
                report.fail(entry, "unreadable", str(error))
            except (Unanswered, NotARelay) as error:
                stopped.append(str(error))
                return
            step()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(found))):
            group.create_task(send())
    if stopped:
        return stopped[0]
    return None


async def _put(term: Terminal, entry: Entry) -> bool:
    """Send one, again while the relay is busy or away for a moment; True when it was new."""
    import asyncio

    from relay.cli.client import Refused, Unanswered, path_of

    path = path_of("sources", entry.id)
    for wait_s in _WAITS_S:
        try:
            status, _ = await term.api.ask("PUT", path, body=entry.options)
            return status == 201
        except Refused as refused:
            if refused.status not in (429, 503):
                raise
            await asyncio.sleep(min(max(wait_s, refused.retry_after_s or 0), _LONGEST_WAIT_S))
        except Unanswered:
            await asyncio.sleep(wait_s)
    status, _ = await term.api.ask("PUT", path, body=entry.options)
    return status == 201


def _tell(term: Terminal, report: Report) -> None:
    order = {"id": "id", "where": "where", "what is wrong": "why"}
    if term.out.as_json:
        term.out.answer(report.to_json())
        return
    if report.failed:
        columns = [Column(title, path) for title, path in order.items()]
        term.out.table({"items": report.failed}, columns, empty="")
    parts = [f"{report.created:,} made", f"{report.replaced:,} replaced"]
    parts += [f"{len(report.failed):,} failed"] if report.failed else []
    parts += [f"{report.not_tried:,} not tried"] if report.not_tried else []
    term.out.answer({}, f"{report.total:,} sources: {', '.join(parts)}")


def _format_of(file: str) -> Format:
    ending = file.rpartition(".")[2].lower()
    known = {"yaml": Format.YAML, "yml": Format.YAML, "json": Format.JSON, "csv": Format.CSV, "tsv": Format.CSV}
    if ending not in known:
        raise SettingsError("FILE: its name does not say how it is written; give --format yaml, json or csv")
    return known[ending]
