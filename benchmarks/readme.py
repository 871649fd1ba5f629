"""The table in README.md, rewritten from a run."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.figures import Figure, markdown

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def machine() -> str:
    """Describe the machine."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{cores} cores, {memory_gib:.0f} GiB of memory, {system}"


def write(figures: Sequence[Figure]) -> None:
    """Replace what is between the marks with the table and the machine it was measured on."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    README.write_text(
        f"{before}{BEGIN}\nMeasured on {date}: {machine()}.\n\n{markdown(figures)}\n{END}{after}", encoding="utf-8"
    )
