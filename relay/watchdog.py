"""Ends a process whose event loop stands still, so that its supervisor starts it again.

Such a process would hold its leases for as long as its threads renew them, answer no probe and ignore SIGTERM. The time
is counted in the watchdog's own turns: a process that was suspended is not taken for one that stands still.
"""

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

log = structlog.get_logger(__name__)

LIMIT_S: Final = 60.0
# EX_SOFTWARE of sysexits.h.
EXIT_CODE: Final = 70
_LOG_TIMEOUT_S: Final = 5.0


@contextmanager
def watchdog(*, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Watch the running event loop; one that does not run for `limit_s` ends the process with EXIT_CODE."""
    loop = asyncio.get_running_loop()
    loop_thread = threading.get_ident()
    interval_s = limit_s / 60
    alive, stopping = threading.Event(), threading.Event()
    handle: asyncio.TimerHandle | None = None

    def beat() -> None:
        nonlocal handle
        alive.set()
        handle = loop.call_later(interval_s, beat)

    def watch() -> None:
        silent_turns = 0
        while not stopping.wait(interval_s):
            silent_turns = 0 if alive.is_set() else silent_turns + 1
            alive.clear()
            if silent_turns * interval_s >= limit_s:
                _end(loop_thread, limit_s)

    beat()
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        stopping.set()
        if handle is not None:
            handle.cancel()


def _end(loop_thread: int, limit_s: float) -> None:
    frame = sys._current_frames().get(loop_thread)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""

    def report() -> None:
        log.critical("event_loop_stalled", limit_s=limit_s, stack=stack, action="the process ends; restart it")

    # In a thread of its own: the loop may hold the lock of the log, or wait for a reader of the log.
    reporting = threading.Thread(target=report, daemon=True)
    reporting.start()
    reporting.join(_LOG_TIMEOUT_S)
    os._exit(EXIT_CODE)
