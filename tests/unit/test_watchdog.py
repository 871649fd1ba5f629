"""The watchdog: a process whose event loop stands still ends, one that was suspended does not."""

import json
import signal
import subprocess
import sys
import time

_SCRIPT = """
import asyncio, sys, time
from relay.log import configure
from relay.watchdog import watchdog

def stand_still():
    time.sleep(30)

async def main():
    with watchdog(limit_s=1):
        print("started", flush=True)
        if sys.argv[1] == "stall":
            stand_still()
        await asyncio.sleep(3)

configure("info", "json")
asyncio.run(main())
"""


def start(what: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, what], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_a_process_whose_event_loop_stands_still_ends_and_logs_where() -> None:
    """It exits with 70, so that a supervisor restarts it; the log has the stack of the loop."""
    with start("stall") as process:
        output, _ = process.communicate(timeout=20)

    [line] = [json.loads(line) for line in output.splitlines()]
    assert process.returncode == 70
    assert line["event"] == "event_loop_stalled"
    assert "stand_still" in line["stack"]


def test_a_process_that_was_suspended_goes_on() -> None:
    """SIGSTOP, or a paused machine, is not taken for a loop that stands still."""
    with start("sleep") as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=20)

    assert (process.returncode, output) == (0, "")
