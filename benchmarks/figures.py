"""What a benchmark says: a figure beside its target, and the one table of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. Without a target it only explains another one. `note` says how it came about, in this run."""

    what: str
    measured: float
    unit: str
    target: float | None = None
    kept: Literal["at least", "at most"] = "at most"
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None when there is none."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.kept == "at least" else self.measured <= self.target

    @property
    def mark(self) -> str:
        """The verdict as a sign."""
        return {None: "", True: "✓", False: "✗"}[self.ok]

    @property
    def wanted(self) -> str:
        """The target as text: `≥ 0.55`."""
        if self.target is None:
            return ""
        return f"{'≥' if self.kept == 'at least' else '≤'} {short(self.target)}"


def short(value: float) -> str:
    """Write a number with as many digits as say something."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values are, the nearest rank."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def table(figures: Sequence[Figure]) -> Table:
    """The table for a terminal."""
    shown = Table(title="Call Relay: measured in this run", title_justify="left", show_lines=False)
    shown.add_column("what", ratio=5)
    shown.add_column("target", justify="right", no_wrap=True)
    shown.add_column("measured", justify="right", no_wrap=True)
    shown.add_column("unit", no_wrap=True)
    shown.add_column("", no_wrap=True)
    shown.add_column("how", ratio=4, style="dim")
    for each in figures:
        style = {None: "dim", True: "", False: "bold red"}[each.ok]
        shown.add_row(each.what, each.wanted, short(each.measured), each.unit, each.mark, each.note, style=style)
    return shown


def markdown(figures: Sequence[Figure]) -> str:
    """The same table for the README."""
    lines = ["| what | target | measured | unit | | in this run |", "|---|--:|--:|---|---|---|"]
    lines += [
        f"| {each.what} | {each.wanted} | {short(each.measured)} | {each.unit} | {each.mark} | {each.note} |"
        for each in figures
    ]
    return "\n".join(lines)
