"""The relay of the demo: `relay up` in a process of its own, restarted whenever it was killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from relay.domain.json import Json
from relay.store.embedded import EmbeddedStore

_STOP_S: Final = 20.0


class RelayProcess:
    """`relay up` in a directory, with `config` as its relay.yaml."""

    def __init__(self, folder: Path, config: Json) -> None:
        self._folder = folder
        self._config = folder / "relay.yaml"
        self._config.write_text(json.dumps(config, indent=1), encoding="utf-8")
        self._log = (folder / "relay.log").open("ab")
        self._store = EmbeddedStore(folder / "data")
        self._process = self._start()
        self._was_killed = False
        self.crashed = False

    def restart_if_ended(self) -> bool:
        """Start the relay again if it has ended; whether it had. `crashed` is set when it was not killed here."""
        if self._process.poll() is None:
            return False
        self.crashed |= not self._was_killed
        self._was_killed = False
        self._process = self._start()
        return True

    def kill(self) -> None:
        """Kill the relay with SIGKILL. Its store outlives it, and the next relay takes that over."""
        self._was_killed = True
        self._process.kill()
        self._process.wait()

    def kill_store(self) -> bool:
        """Kill the store with SIGKILL; False when it is not running just now."""
        pid = self._store.running_pid()
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._store.shut_down()  # a relay that was killed has left its store running

    def log_tail(self) -> str:
        return "\n".join((self._folder / "relay.log").read_text(errors="replace").splitlines()[-15:])

    def _start(self) -> "subprocess.Popen[bytes]":
        # Settings that are meant for the person's own relay must not reach this one.
        environ = {name: value for name, value in os.environ.items() if not name.upper().startswith("RELAY_")}
        return subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "relay", "up", "--config", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environ,
            start_new_session=True,
        )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
