"""How the demo is shown: live tables on a terminal, a line for each thing elsewhere."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from relay.cli.demo.measure import DeliveredEvent, ListedCall, Measurements, percentile

_MIN_ROWS, _MAX_ROWS = 3, 20
# Two lines of head, three rules, the note, and the one that a live display needs to itself.
_FIXED_LINES = 7


@dataclass(frozen=True, slots=True)
class Note:
    at: datetime
    text: str
    is_kill: bool = False


Entry = ListedCall | DeliveredEvent | Note


class Screen(Protocol):
    def add(self, entries: Sequence[Entry]) -> None: ...

    def refresh(self, measurements: Measurements, status: str) -> None: ...


class Lines:
    """A line for each thing: for logs, CI, and terminals without colours."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def add(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._console.print(_line(entry), markup=False, highlight=False, soft_wrap=True)

    def refresh(self, measurements: Measurements, status: str) -> None:
        """Nothing to redraw."""


class Tables:
    """Two tables that move, calls above and events below; they fit a terminal of 80 × 24."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console = console
        self._live = live
        self._note: Note | None = None

    def add(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if isinstance(entry, Note):
                self._note = entry

    def refresh(self, measurements: Measurements, status: str) -> None:
        several = measurements.several
        link = _recording_link(measurements)
        link_lines = len(link.wrap(self._console, self._console.width)) if link else 0
        free = self._console.height - _FIXED_LINES - several - link_lines
        rows = max(min(free // 2, _MAX_ROWS), _MIN_ROWS)
        parts: list[RenderableType] = [
            *_head(measurements, status),
            *([_sources(measurements)] if several else []),
            Rule("calls at the providers" if several else "calls at the provider", style="dim"),
            _calls_table(list(measurements.calls.values())[-rows:], several=several),
            Rule("events at the subscriber", style="dim"),
            _events_table(measurements.events[-rows:]),
            Rule(style="dim"),
            *([link] if link else []),
            *([_one_line(self._note.text, "red" if self._note.is_kill else "dim")] if self._note else []),
        ]
        self._live.update(Group(*parts))


@contextlib.contextmanager
def open_screen(console: Console) -> Iterator[Screen]:
    if not console.is_terminal or os.environ.get("NO_COLOR"):
        yield Lines(console)
        return
    with Live(console=console, refresh_per_second=5, transient=True) as live:
        yield Tables(console, live)


def _line(entry: Entry) -> str:
    match entry:
        case Note():
            return f"{_clock(entry.at)} demo   {entry.text}"
        case ListedCall():
            plan = entry.plan
            provider = f"  {entry.account.name}"
            return (
                f"{_clock(plan.visible_at)} call   {_arrow(entry)} {plan.outside_number:<15} "
                f"{plan.outside_name:<15} {entry.outcome:<9}{provider}"
            )
        case DeliveredEvent():
            words = (entry.detail, _origin(entry), entry.url)
            details = "".join(f"  {word}" for word in words if word)
            return f"{_clock(entry.at)} event  {_mark(entry)} {entry.type:<25} {_seconds(entry.latency_s):>8}{details}"


def _head(measurements: Measurements, status: str) -> Sequence[Text]:
    report = measurements.report()
    delivered = len(measurements.calls) - len(report.lost(measurements.calls))
    problems = report.problems()
    totals = Text(no_wrap=True, overflow="ellipsis")
    totals.append(f"{delivered} of {len(measurements.calls)} calls delivered · {report.events} events")
    p50_s = percentile(measurements.latencies_s(), 50)
    if p50_s is not None:
        totals.append(f" · p50 {p50_s:.2f} s")
    if measurements.kills:
        totals.append(f" · {measurements.kills} × kill -9", "red")
    if problems:
        totals.append(f" · {len(problems)} problems", "bold red")
    title = Text.assemble(("call relay demo", "bold"), f" · {status}", no_wrap=True, overflow="ellipsis")
    return title, totals


def _sources(measurements: Measurements) -> Text:
    return _one_line(" · ".join(f"{t.provider} {t.delivered}/{t.listed}" for t in measurements.totals()), "dim")


def _calls_table(calls: Sequence[ListedCall], *, several: bool) -> Table:
    table = _grid("time", "arrow", "number", "*name", "outcome", *(["provider"] if several else []), "mark")
    for call in calls:
        outcome = Text(call.outcome, "green" if call.outcome == "answered" else "yellow")
        mark = Text("✓", "green") if call.latency_s is not None else Text("…", "dim")
        name = Text(call.contact) if call.contact else Text(call.plan.outside_name, "dim")
        provider = [Text(call.account.name, "dim")] if several else []
        table.add_row(
            _clock(call.plan.visible_at), _arrow(call), call.plan.outside_number, name, outcome, *provider, mark
        )
    return table


def _events_table(events: Sequence[DeliveredEvent]) -> Table:
    table = _grid("time", "mark", "type", "latency", "*detail", "origin")
    for event in events:
        detail = Text("listen", f"link {event.url} underline blue") if event.url else Text(event.detail)
        mark = Text(_mark(event), "yellow" if event.repeated else "green")
        table.add_row(
            _clock(event.at), mark, event.type, _seconds(event.latency_s), detail, Text(_origin(event), "dim")
        )
    return table


def _grid(*columns: str) -> Table:
    """A table without lines whose rows never wrap; the column with a star takes the room that is left."""
    table = Table.grid(padding=(0, 1), expand=True)
    for column in columns:
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if column.startswith("*") else None)
    return table


def _recording_link(measurements: Measurements) -> Text | None:
    """The newest recording as a link to click, whole, so that it can be copied too."""
    url = measurements.recording_url()
    return Text.assemble("newest recording: ", (url, f"link {url} blue"), overflow="fold") if url else None


def _one_line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _arrow(call: ListedCall) -> str:
    return "←" if call.plan.direction == "INCOMING" else "→"


def _mark(event: DeliveredEvent) -> str:
    return "≡" if event.repeated else "✓"


def _origin(event: DeliveredEvent) -> str:
    return " ".join(filter(None, (event.provider, "by stream" if event.via_stream else "")))


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s"


def _clock(at: datetime) -> str:
    return at.astimezone().strftime("%H:%M:%S")
