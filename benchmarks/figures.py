"""A figure beside its target, and the table of all figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. Without a target it only explains another one. `note`: how it was measured in this run."""

    what: str
    measured: float
    unit: str
    target: float | None = None
    bound: Literal["at least", "at most"] = "at most"
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None when there is none."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.bound == "at least" else self.measured <= self.target

    @property
    def mark(self) -> str:
        """`ok` as a sign."""
        return {None: "", True: "✓", False: "✗"}[self.ok]

    @property
    def target_text(self) -> str:
        """The target as text: `≥ 0.55`."""
        if self.target is None:
            return ""
        return f"{'≥' if self.bound == 'at least' else '≤'} {short(self.target)}"


def short(value: float) -> str:
    """Write a number with three significant digits or so."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, by nearest rank."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def table(figures: Sequence[Figure]) -> Table:
    shown = Table(title="Call Relay: measured in this run", title_justify="left", show_lines=False)
    shown.add_column("what", ratio=5)
    shown.add_column("target", justify="right", no_wrap=True)
    shown.add_column("measured", justify="right", no_wrap=True)
    shown.add_column("unit", no_wrap=True)
    shown.add_column("", no_wrap=True)
    shown.add_column("how", ratio=4, style="dim")
    for figure in figures:
        style = {None: "dim", True: "", False: "bold red"}[figure.ok]
        shown.add_row(
            figure.what, figure.target_text, short(figure.measured), figure.unit, figure.mark, figure.note, style=style
        )
    return shown


def markdown(figures: Sequence[Figure]) -> str:
    """The table for the README."""
    lines = ["| what | target | measured | unit | | in this run |", "|---|--:|--:|---|---|---|"]
    for figure in figures:
        cells = (figure.what, figure.target_text, short(figure.measured), figure.unit, figure.mark, figure.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
