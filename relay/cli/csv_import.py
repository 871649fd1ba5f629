"""`relay sources import`: thousands of sources from one file, several at a time, with a report of what failed.

Every entry is one PUT under its own ID, so an interrupted run is simply repeated: what exists is replaced. An entry
that fails does not affect the others.
"""

import csv
import io
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from relay.cli import arguments
from relay.cli.client import ApiError, Client, RelayUnreachable, UnexpectedServer, path_of
from relay.cli.output import Column
from relay.cli.target import ApiTarget
from relay.cli.terminal import Terminal
from relay.domain.json import Json
from relay.errors import RelayError, SettingsError

# A relay that restarts, or sheds load, is back within these waits.
_RETRY_AFTER_S: Final = (0.2, 0.5, 1.5, 4.0, 10.0)
_LONGEST_RETRY_AFTER_S: Final = 30.0
_MAX_CELL_CHARS: Final = 128 * 1024
_MAX_FILE_CHARS: Final = 256 * 1024 * 1024


class FileFormat(StrEnum):
    YAML = "yaml"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One source of the file; with `problem` it is not sent. `where` is its line, number or ID."""

    where: str
    id: str
    options: Json = field(repr=False)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EntryFailed:
    """Why an entry is not in the relay: `code` is the API's, or `unreadable`."""

    code: str
    message: str


# Whether the source was new, or why it failed.
EntryResult = bool | EntryFailed


@dataclass(slots=True)
class ImportReport:
    """How many entries were created, replaced, failed, or not tried."""

    total: int
    created: int = 0
    replaced: int = 0
    failed: list[Json] = field(default_factory=list)

    @property
    def not_tried(self) -> int:
        return self.total - self.created - self.replaced - len(self.failed)

    def add(self, entry: SourceEntry, result: EntryResult) -> None:
        match result:
            case EntryFailed(code, message):
                self.failed.append({"where": entry.where, "id": entry.id, "code": code, "why": message})
            case True:
                self.created += 1
            case False:
                self.replaced += 1

    def to_json(self) -> Json:
        return {
            "total": self.total,
            "created": self.created,
            "replaced": self.replaced,
            "not_tried": self.not_tried,
            "failed": self.failed,
        }


class ImportIncomplete(RelayError):
    """Some sources of the file are not in the relay."""


def entries(text: str, file_format: FileFormat, *, name: str, provider: str | None) -> list[SourceEntry]:
    """Parse a file. Raises SettingsError when none of it can be read; a bad entry has a `problem` instead."""
    match file_format:
        case FileFormat.CSV:
            parsed = list(_table(text, name))
        case FileFormat.JSON:
            parsed = list(_listed(_json(text, name), name))
        case FileFormat.YAML:
            parsed = list(_listed(arguments.yaml_document(text, name=name), name))
    first_seen: dict[str, str] = {}
    checked: list[SourceEntry] = []
    for entry in parsed:
        problem = entry.problem
        if not problem and not entry.id:
            problem = "has no id; with one it stays the same source when it is imported again"
        if not problem and entry.id in first_seen:
            problem = f"has the same id as {first_seen[entry.id]}"
        first_seen.setdefault(entry.id, entry.where)
        options = entry.options
        if provider is not None and options.get("provider") is None:
            options = {**options, "provider": provider}
        checked.append(SourceEntry(entry.where, entry.id, options, problem))
    return checked


def _json(text: str, name: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> Json:
        document = dict(pairs)
        if len(document) < len(pairs):
            duplicate = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise SettingsError(f"{name}: {duplicate[:64]!r} is given twice in one map")
        return document

    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{name}: line {error.lineno}, column {error.colno}: not valid JSON") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{name}: not valid JSON") from None


def _listed(document: Any, name: str) -> Iterator[SourceEntry]:
    """Yield the entries of a map by ID, of a list, or of either under `sources`."""
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


def _entry(where: str, id_: str, options: Any) -> SourceEntry:
    if not isinstance(options, dict):
        return SourceEntry(where, id_, {}, "must be a map of option names to values")
    return SourceEntry(where, id_, options)


def _table(text: str, name: str) -> Iterator[SourceEntry]:
    first = text.partition("\n")[0]
    # Spreadsheets write ; where the decimal separator is a comma.
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(_MAX_CELL_CHARS)
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
        raise SettingsError(f"{name}: line {reader.line_num}: this is not a valid table: {error}") from None


def _check_header(header: Sequence[str], name: str) -> None:
    if "id" not in header:
        raise SettingsError(f"{name}: the first line must name the columns, including `id`")
    if not all(header) or len(set(header)) < len(header):
        raise SettingsError(f"{name}: the first line must give each column a different name")


def _row(where: str, header: Sequence[str], cells: Sequence[str]) -> SourceEntry:
    id_ = dict(zip(header, cells, strict=False)).get("id", "")
    if len(cells) > len(header):
        return SourceEntry(where, id_, {}, f"has {len(cells)} values for {len(header)} columns")
    options: Json = {}
    try:
        for column, cell in zip(header, cells, strict=False):
            if column != "id" and cell:
                arguments.place(options, column, arguments.literal(cell, name=column))
    except SettingsError as error:
        return SourceEntry(where, id_, {}, str(error))
    return SourceEntry(where, id_, options)


def import_sources(
    term: Terminal, file: str, *, file_format: FileFormat | None, provider: str | None, concurrency: int
) -> None:
    """Send every entry and write a report. Raises ImportIncomplete unless all of them succeed."""
    sources = entries(
        arguments.read(file, name="FILE", max_chars=_MAX_FILE_CHARS),
        file_format or _format_of(file),
        name="stdin" if file == "-" else file,
        provider=provider,
    )
    if not sources:
        raise SettingsError("FILE: no sources in it")
    report = ImportReport(len(sources))
    columns = (TextColumn("sources"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}"))
    is_terminal = term.out.notes.is_terminal
    with (
        Progress(
            *columns, TimeRemainingColumn(), console=term.out.notes, transient=True, disable=not is_terminal
        ) as progress,
        _Sender(term.api.target, concurrency=concurrency) as sender,
    ):
        task = progress.add_task("", total=len(sources), failed="")
        for entry, result in sender.send(sources):
            report.add(entry, result)
            failed = f"{len(report.failed)} failed" if report.failed else ""
            progress.update(task, completed=report.total - report.not_tried, failed=failed)
    _write(term, report)
    if sender.stopped_by is not None:
        raise ImportIncomplete(
            f"{sender.stopped_by}\n{report.not_tried} sources were not tried. "
            "Run the same command again; sources that exist are replaced"
        )
    if report.failed:
        raise ImportIncomplete(f"{len(report.failed)} of {report.total} sources were not imported")


class _Sender:
    """Sends entries from a few threads, each with its own connection, until an error that every entry would get."""

    def __init__(self, target: ApiTarget, *, concurrency: int) -> None:
        self.stopped_by: str | None = None
        self._target = target
        self._stop = threading.Event()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(concurrency)

    def __enter__(self) -> "_Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # after Ctrl-C nothing that is queued starts any more
        self._pool.shutdown(cancel_futures=True)

    def send(self, sources: Sequence[SourceEntry]) -> Iterator[tuple[SourceEntry, EntryResult]]:
        """Yield the results in the order of the file, without the entries that were not tried."""
        for entry, result in zip(sources, self._pool.map(self._send, sources), strict=True):
            if result is not None:
                yield entry, result

    def _send(self, entry: SourceEntry) -> EntryResult | None:
        if self._stop.is_set():
            return None
        if entry.problem:
            return EntryFailed("unreadable", entry.problem)
        try:
            return self._put(entry)
        except ApiError as error:
            if error.status not in (401, 403):
                return EntryFailed(error.code, str(error))
            self._stop_all(error)
        except SettingsError as error:
            return EntryFailed("unreadable", str(error))
        except (RelayUnreachable, UnexpectedServer) as error:
            self._stop_all(error)
        return None

    def _stop_all(self, error: RelayError) -> None:
        self.stopped_by = str(error)
        self._stop.set()

    def _put(self, entry: SourceEntry) -> bool:
        """Return whether the source is new; retries while the relay is busy or unreachable for a moment."""
        if not hasattr(self._local, "api"):
            self._local.api = Client(self._target)
        path = path_of("sources", entry.id)
        for wait_s in _RETRY_AFTER_S:
            try:
                status, _ = self._local.api.request("PUT", path, body=entry.options)
            except ApiError as error:
                if error.status not in (429, 503):
                    raise
                self._stop.wait(min(max(wait_s, error.retry_after_s or 0), _LONGEST_RETRY_AFTER_S))
            except RelayUnreachable:
                self._stop.wait(wait_s)
            else:
                return bool(status == 201)
        status, _ = self._local.api.request("PUT", path, body=entry.options)
        return bool(status == 201)


def _write(term: Terminal, report: ImportReport) -> None:
    if report.failed and not term.out.as_json:
        columns = (Column("id", "id"), Column("where", "where"), Column("problem", "why"))
        term.out.table({"items": report.failed}, columns, empty="")
    counts = [f"{report.created:,} created", f"{report.replaced:,} replaced"]
    counts += [f"{len(report.failed):,} failed"] if report.failed else []
    counts += [f"{report.not_tried:,} not tried"] if report.not_tried else []
    term.out.result(report.to_json(), f"{report.total:,} sources: {', '.join(counts)}")


def _format_of(file: str) -> FileFormat:
    extension = file.rpartition(".")[2].lower()
    formats = {
        "yaml": FileFormat.YAML,
        "yml": FileFormat.YAML,
        "json": FileFormat.JSON,
        "csv": FileFormat.CSV,
        "tsv": FileFormat.CSV,
    }
    if extension not in formats:
        raise SettingsError("FILE: the format is not clear from its name; pass --format yaml, json or csv")
    return formats[extension]
