"""What every benchmark needs: a folder, a store like that of `relay up`, processes that end with the run, and /proc."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from redis.asyncio import Redis
from rich.progress import Progress, TaskID

from relay.runtime import Runtime, open_runtime
from relay.settings import Settings, load
from relay.store.embedded import EmbeddedStore

ROOT = Path(__file__).parent.parent
SECRET = "whsec_YmVuY2htYXJrLXNlY3JldC0wMTIzNDU2Nzg5YWJjZGU="
RELAY_KEY = "a-key-for-the-benchmarks-with-enough-characters"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Bench:
    """One run: its folder, whether it is a quick one, and its progress display."""

    root: Path
    quick: bool
    progress: Progress
    _task: TaskID | None = None
    _count: int = field(default=0)

    def scaled(self, full: int, quick: int) -> int:
        """Choose the size of something for this run."""
        return quick if self.quick else full

    def folder(self, name: str) -> Path:
        """Create a new folder."""
        self._count += 1
        path = self.root / f"{self._count:02d}-{name}"
        path.mkdir()
        return path

    def begin(self, name: str, steps: int) -> None:
        """Start a line of progress."""
        self._task = self.progress.add_task(name, total=steps, completed=-1, doing="")

    def step(self, doing: str) -> None:
        """Show what is done now; the previous step is finished."""
        assert self._task is not None
        self.progress.update(self._task, doing=doing, advance=1)

    def end(self) -> None:
        """Finish the line."""
        assert self._task is not None
        task = next(task for task in self.progress.tasks if task.id == self._task)
        self.progress.update(self._task, completed=task.total, doing="")


@contextlib.asynccontextmanager
async def embedded(folder: Path, *, fsync: str = "always") -> AsyncIterator[str]:
    """A Valkey as `relay up` starts it, optionally with another `fsync` for comparison."""
    async with EmbeddedStore(folder) as store:
        if fsync != "always":
            async with Redis.from_url(store.url) as redis:
                await redis.config_set("appendfsync", fsync)
        yield store.url


class Process:
    """A process of the run: `python -m …`, its log in a file, its results on stdout as lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def line(self, *, within_s: float = 30) -> dict[str, Any]:
        """Read the next line of JSON."""
        assert self._process.stdout is not None
        async with asyncio.timeout(within_s):
            text = await self._process.stdout.readline()
        if not text:
            raise RuntimeError(f"process {self.pid} exited without a result; see its log")
        result: dict[str, Any] = json.loads(text)
        return result

    async def stop(self) -> None:
        """Terminate it and wait."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(40):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


@contextlib.asynccontextmanager
async def running(
    module: str, *arguments: str, log: Path, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run `python -m module arguments` until the block ends."""
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=out,
            cwd=ROOT,
            env={**os.environ, **(environ or {})},
            limit=64 * 1024 * 1024,
        )
    started = Process(process)
    try:
        yield started
    finally:
        await started.stop()


@dataclass(frozen=True, slots=True)
class Sink:
    """The subscriber of a run: a process that answers 204 and records arrival times."""

    url: str
    _http: aiohttp.ClientSession

    async def report(self) -> dict[str, Any]:
        """Counts since the last reset: count, distinct, first_s, last_s, and the same by group of paths."""
        report: dict[str, Any] = await self._get("/report")
        return report

    async def reset(self) -> None:
        """Forget all arrivals."""
        await self._get("/reset")

    async def arrivals(self, group: str = "ok") -> dict[str, float]:
        """First arrival of each `path webhook-id` in a group of paths, by this machine's monotonic clock."""
        arrivals: dict[str, float] = await self._get(f"/arrivals/{group}")
        return arrivals

    async def reached(self, count: int, *, group: str = "ok", within_s: float = 90) -> dict[str, Any]:
        """Wait for so many posts; gives the report of the group."""
        async with asyncio.timeout(within_s):
            while True:
                report: dict[str, Any] = (await self.report()).get(group, {"count": 0})
                if report["count"] >= count:
                    return report
                await asyncio.sleep(0.03)

    async def _get(self, path: str) -> Any:
        async with self._http.get(self.url + path) as response:
            return json.loads(await response.read())


@contextlib.asynccontextmanager
async def sink(folder: Path) -> AsyncIterator[Sink]:
    async with (
        running("benchmarks.sink", log=folder / "sink.log") as process,
        aiohttp.ClientSession() as http,
    ):
        port = (await process.line())["port"]
        yield Sink(f"http://127.0.0.1:{port}", http)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(folder: Path, **settings: Any) -> Path:
    """Write relay.yaml, as JSON, which is YAML."""
    tree = {
        "data_dir": str(folder / "data"),
        "storage_url": str(folder / "recordings"),
        "public_url": "https://relay.example.com",
        "api": {"port": free_port()},
        "internal": {"port": free_port()},
        "log": {"format": "json"},
        "delivery": {"allowed_networks": ["127.0.0.0/8"]},
        **settings,
    }
    path = folder / "relay.yaml"
    path.write_text(json.dumps(tree))
    return path


def subscription(url: str, **options: Any) -> dict[str, Any]:
    return {"url": url, "secret": SECRET, **options}


def subscriptions(base_url: str, names: Sequence[str], *, group: str = "ok", **options: Any) -> dict[str, Any]:
    """One subscription per name, each with its own path below the group's."""
    return {name: subscription(f"{base_url}/{group}/{name}", **options) for name in names}


def role_environ(redis_url: str) -> dict[str, str]:
    """The environment of a role that runs in a process of its own."""
    return {"RELAY_REDIS_URL": redis_url, "RELAY_SECRET_KEY": RELAY_KEY}


def settings_of(config: Path) -> Settings:
    """Load relay.yaml as the processes do."""
    return load(config, {"RELAY_SECRET_KEY": RELAY_KEY})


@contextlib.asynccontextmanager
async def runtime_on(config: Path, redis_url: str) -> AsyncIterator[Runtime]:
    """Open the relay's runtime in this process, without runners."""
    async with open_runtime(settings_of(config), redis_url=redis_url, secret_keys=[RELAY_KEY]) as runtime:
        yield runtime


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, all threads."""
    # schedstat counts nanoseconds; stat counts ticks of 10 ms.
    spent = [int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(spent) / 1e9


def children(pid: int) -> list[int]:
    """The ids of a process's child processes."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += [int(child) for child in (task / "children").read_text().split()]
    return pids
