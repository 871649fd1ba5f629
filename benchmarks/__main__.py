"""`python -m benchmarks [names…]`: one table, everything in it measured now. Exit code 1 when a target is missed."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import (
    backlog,
    client,
    fairness,
    footprint,
    latency,
    lists,
    loss,
    polling,
    readme,
    stream,
    throughput,
)
from benchmarks.figures import Figure, table
from benchmarks.harness import Bench

BENCHMARKS: dict[str, Callable[[Bench], Awaitable[list[Figure]]]] = {
    "throughput": throughput.run,
    "latency": latency.run,
    "stream": stream.run,
    "fairness": fairness.run,
    "guard": fairness.guard,
    "backlog": backlog.run,
    "requests": footprint.requests,
    "recording": footprint.recording,
    "memory": footprint.memory,
    "idle": footprint.idle,
    "client": client.run,
    "lists": lists.run,
    "page": polling.page,
    "fleet": polling.fleet,
    "loss": loss.run,
}


async def measure(names: list[str], *, quick: bool, console: Console) -> tuple[list[Figure], list[str]]:
    """Run the named benchmarks one after the other; gives the figures, and the names of those that failed."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}", style="dim"),
    )
    figures: list[Figure] = []
    failed: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    with Progress(*columns, console=console) as progress:
        bench = Bench(folder, quick, progress)
        for name in names:
            try:
                figures += await BENCHMARKS[name](bench)
            except Exception as error:
                failed.append(name)
                console.print(f"{name} failed: {type(error).__name__} {error}; its logs are in {folder}")
    if not failed:
        shutil.rmtree(folder)
    return figures, failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"what to measure: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small smoke run, whose figures mean little")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark: {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    if arguments.write and (arguments.quick or arguments.names):
        parser.error("--write needs a whole run: use it without --quick and without names")
    console = Console(stderr=True)
    figures, failed = asyncio.run(measure(arguments.names or list(BENCHMARKS), quick=arguments.quick, console=console))
    Console(width=None if sys.stdout.isatty() else 160).print(table(figures))
    if failed:
        return 1
    if arguments.write:
        readme.write(figures)
    return 1 if any(figure.ok is False for figure in figures) and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
