"""Clients that only hold connections open: polls, deliveries and probes go on, with few descriptors."""

import contextlib
import resource
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from tests.faults.harness import Lab, Process, until

pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

_LIMIT = 1024
_HEADERS = b"GET /v1/calls HTTP/1.1\r\nHost: relay\r\nX-Unfinished: "


@pytest.fixture
def up(lab: Lab) -> Iterator[Process]:
    """A relay that may open 1024 files; the test itself may open more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lab.start_simulator("a")
    lab.configure(timeout_s=2)
    process = lab.start("up", limit_open_files=_LIMIT)
    yield process
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ports(up: Process) -> tuple[int, int]:
    """The API's port and the internal one."""
    [api] = up.lines("api_started")
    [internal] = up.lines("internal_started")
    return api["port"], internal["port"]


def answers(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5) as response:
        return bool(response.status == 200)


def _unfinished(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(_HEADERS)
    return connection


@pytest.mark.timeout(180)
@pytest.mark.parametrize("attempts", [1_200, 5_000])
def test_half_open_connections_take_no_descriptors_from_work(lab: Lab, up: Process, attempts: int) -> None:
    """`ulimit -n 1024` and thousands of clients without a token: calls are delivered, /livez answers, SIGTERM ends."""
    lab.await_first_poll(lab.embedded())
    api, internal = ports(up)
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for start in range(0, attempts, 200):
            opened += [stack.enter_context(_unfinished(port)) for port in [api] * 180 + [internal] * 20]
            assert answers(api)
            assert answers(internal)
            if start % 600 == 0:
                lab.call(2)
        until(lambda: lab.delivered() == len(lab.expected), "calls are delivered during the flood", within_s=30)
        delivered_during = lab.delivered()
        used = up.open_files()
        started = time.monotonic()
        exit_code = up.stop(within_s=15)
        took_s = time.monotonic() - started
    sys.stdout.write(
        f"{len(opened)} half-open connections: {used} of {_LIMIT} files open, {delivered_during} calls delivered, "
        f"stopped in {took_s:.1f} s\n"
    )

    assert delivered_during == len(lab.expected) > 0
    assert used < _LIMIT / 2
    assert exit_code == 0
    assert not up.lines("work_failed")


@pytest.mark.timeout(120)
def test_a_connection_without_complete_headers_is_closed(lab: Lab, up: Process) -> None:
    """Ten seconds after it began, whether the client sends nothing or one byte a second."""
    api, _ = ports(up)
    silent = socket.create_connection(("127.0.0.1", api), timeout=20)
    dripping = _unfinished(api)
    started = time.monotonic()

    def closed(connection: socket.socket, byte: bytes) -> bool:
        try:
            if byte:
                connection.send(byte)
            connection.settimeout(0.5)
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    with silent, dripping:
        until(lambda: closed(dripping, b"x"), "the dripping client is disconnected", within_s=20)
        until(lambda: closed(silent, b""), "the silent client is disconnected", within_s=20)

    assert 8 < time.monotonic() - started < 20


@pytest.mark.timeout(180)
def test_missing_descriptors_count_as_no_attempt(lab: Lab) -> None:
    """200 deliveries at once and 96 descriptors: none of them loses an attempt, a lease or its circuit to that."""
    lab.start_simulator("a")
    lab.configure(timeout_s=10, subscription={"max_in_flight": 1_000})
    up = lab.start("up", limit_open_files=96)
    ledger = lab.embedded()
    lab.await_first_poll(ledger)
    lab.simulator.script({"delay_s": 2, "times": 100})
    lab.call(200)

    figures = lab.finish("without descriptors", ledger=ledger, within_s=120)

    assert figures.duplicates == 0
    assert up.lines("delivery_postponed")
    assert not up.lines("delivery_attempt_failed")
    assert not up.lines("subscription_circuit_opened")
    assert up.stop() == 0
