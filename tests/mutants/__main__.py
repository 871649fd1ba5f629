"""Run the mutants of `mutants.toml`: `python -m tests.mutants [NAME …]` prints the ones that no test kills.

A mutant is data: the file, the text to replace (which must occur exactly once), its replacement, and the tests that
must fail. Each one runs in a copy of the tree, so that nothing here is ever modified and several can run at once. One
with `equivalent` is not run: it changes nothing that could be observed, and the entry says why.
Exit codes: 0 every mutant was killed, 1 some survived, 2 the list does not fit the code, or its tests fail without a
mutant.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".hypothesis", ".*_cache", "__pycache__")
# A mutant may hang; the slowest tests named take about 20 s.
TIMEOUT_S = 120

Result = Literal["killed", "timed out", "survived", "broken"]
# pytest's exit codes: some tests failed, all passed. All others mean that no test decided.
_RESULTS: dict[int, Result] = {1: "killed", 0: "survived"}


@dataclass(frozen=True)
class Mutant:
    """One change that must not go unnoticed; `tests` are pytest arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""


def load() -> list[Mutant]:
    """Read the list. Raises TypeError when an entry is incomplete."""
    entries = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())["mutant"]
    return [Mutant(**entry | {"tests": tuple(entry.get("tests", ()))}) for entry in entries]


def misfits(mutants: Sequence[Mutant]) -> Iterator[str]:
    """Name the mutants that cannot run: their text is not in the code exactly once, or their tests are gone."""
    names = [mutant.name for mutant in mutants]
    for mutant in mutants:
        path = ROOT / mutant.file
        count = path.read_text().count(mutant.old) if path.exists() else 0
        if names.count(mutant.name) > 1:
            yield f"{mutant.name}: the name is used twice"
        if count != 1:
            yield f"{mutant.name}: the text to replace occurs {count} times in {mutant.file}, not once"
        if mutant.old == mutant.new:
            yield f"{mutant.name}: the replacement changes nothing"
        if not mutant.tests and not mutant.equivalent:
            yield f"{mutant.name}: names no test"
        for test in mutant.tests:
            file, _, function = test.partition("[")[0].partition("::")
            if not (ROOT / file).exists() or (function and f"def {function}(" not in (ROOT / file).read_text()):
                yield f"{mutant.name}: the test {test} does not exist"


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED, symlinks=True)
        yield tree


def run_tests(tree: Path, tests: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
    """Run tests in a tree; return pytest's exit code and output. Raises TimeoutExpired."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException:
        # The tests' own servers belong to the same group, and would outlive pytest.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, output


def run(mutant: Mutant) -> tuple[Result, float]:
    """Run a mutant's tests against it; return the result and how long that took, s."""
    began_s = time.monotonic()
    with copy_of_tree() as tree:
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        try:
            code, _ = run_tests(tree, mutant.tests, timeout_s=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "timed out", time.monotonic() - began_s
    return _RESULTS.get(code, "broken"), time.monotonic() - began_s


def failures_without_a_mutant(mutants: Sequence[Mutant]) -> str:
    """Run all named tests on the code as it is, which they must pass, or they would seem to kill everything."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    if not tests:
        return ""
    with copy_of_tree() as tree:
        code, output = run_tests(tree, tests, timeout_s=30 * TIMEOUT_S)
    return output if code else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Run the mutants of mutants.toml.")
    parser.add_argument("names", nargs="*", help="run only mutants whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many run at once")
    parser.add_argument("--check", action="store_true", help="only check that the list fits the code")
    options = parser.parse_args()
    mutants = load()
    if problems := list(misfits(mutants)):
        print("\n".join(problems))
        return 2
    if options.check:
        print(f"{len(mutants)} mutants fit the code")
        return 0
    selected = [m for m in mutants if not options.names or any(name in m.name for name in options.names)]
    to_run = [mutant for mutant in selected if not mutant.equivalent]
    if output := failures_without_a_mutant(to_run):
        print(f"{output}\nThese tests fail without a mutant: repair them first.")
        return 2
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (mutant, (result, took_s)) in enumerate(zip(to_run, pool.map(run, to_run), strict=True), 1):
            results[mutant.name] = result
            print(f"[{number}/{len(to_run)}] {result:9} {took_s:5.0f} s  {mutant.name}", flush=True)
    for mutant in selected:
        if mutant.equivalent:
            print(f"equivalent: {mutant.name}: {mutant.equivalent}")
    survivors = [name for name, result in results.items() if result in ("survived", "broken")]
    equivalent = len(selected) - len(to_run)
    print(f"{len(to_run)} mutants run: {len(to_run) - len(survivors)} killed, {len(survivors)} survived")
    print(f"{equivalent} equivalent, not run")
    for name in survivors:
        print(f"  {results[name]}: {name}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
