"""What a command of the client costs: processor time of the whole process, against a running relay."""

import asyncio
import os
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import Figure, median
from benchmarks.house import ROOT, Bench, running, write_config

COMMANDS = (
    "--help",
    "sources list",
    "sources show main",
    "subscriptions list",
    "deliveries list --json",
    "healthcheck",
)


async def run(bench: Bench) -> list[Figure]:
    """Run each command several times, as `relay … --config relay.yaml` beside `relay up`."""
    rounds = bench.scaled(9, 2)
    bench.begin("commands", 2)
    folder = bench.room("commands")
    account = {"provider": "webfones", "api_key": "unused", "base_url": "http://127.0.0.1:9"}
    config = write_config(folder, sources={"main": account})
    async with running("relay", "up", "-c", str(config), log=folder / "relay.log"):
        bench.step("the relay starts")
        await _until_ready(config)
        bench.step(f"{rounds} of each command")
        spent_ms = {
            command: median([await asyncio.to_thread(_spent_ms, command, config) for _ in range(rounds)])
            for command in COMMANDS
        }
    bench.end()
    slowest = max(spent_ms, key=lambda command: spent_ms[command])
    note = "; ".join(f"{command} {ms:.0f}" for command, ms in spent_ms.items())
    return [Figure("processor time of a client command, the slowest", spent_ms[slowest], "ms", 400, note=f"ms: {note}")]


def _spent_ms(command: str, config: Path) -> float:
    """Run a command that must succeed; return the user and system time of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _relay(command, config).check_returncode()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) * 1000


def _relay(command: str, config: Path) -> subprocess.CompletedProcess[bytes]:
    arguments = [sys.executable, "-m", "relay", *command.split()]
    environ = {**os.environ, "RELAY_CONFIG": str(config)}
    return subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, check=False)


async def _until_ready(config: Path) -> None:
    async with asyncio.timeout(60):
        while (await asyncio.to_thread(_relay, "healthcheck", config)).returncode:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.2)
