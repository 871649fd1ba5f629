"""What a command of the command line costs: processor time of `relay sources list` against a running relay."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import Figure, median
from benchmarks.harness import ROOT, Bench, running, subscriptions, write_config

COMMAND = ("sources", "list")


async def run(bench: Bench) -> list[Figure]:
    """Run the command several times, as an operator does: with a new interpreter each time."""
    runs = bench.scaled(11, 3)
    bench.begin("client", 1)
    folder = bench.folder("client")
    config = write_config(
        folder,
        sources={"main": {"provider": "webfones", "api_key": "unused", "base_url": "http://127.0.0.1:9"}},
        subscriptions=subscriptions("http://127.0.0.1:9", ["crm"]),
    )
    async with running("relay", "up", "-c", str(config), log=folder / "relay.log"):
        await _wait_until_it_answers(config)
        bench.step(f"{runs} × relay {' '.join(COMMAND)}")
        times_s = [await asyncio.to_thread(_cpu_s, config) for _ in range(runs)]
    bench.end()
    note = f"user and system time, median of {runs} runs, each with a new interpreter; slowest {max(times_s):.2f} s"
    return [Figure("client command: processor time of `relay sources list`", median(times_s), "s", 0.4, note=note)]


async def _wait_until_it_answers(config: Path) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(lambda: _start(config).wait()):  # noqa: ASYNC110 - another process answers
            await asyncio.sleep(0.2)


def _cpu_s(config: Path) -> float:
    process = _start(config)
    # wait4 gives the usage of exactly this child, not of all that have ended.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"relay {' '.join(COMMAND)} exited with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def _start(config: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "relay", *COMMAND, "--config", str(config)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
