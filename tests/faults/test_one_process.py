"""`relay up` and its embedded store: each is killed under load, and two of them never share a directory."""

import contextlib
import os
import signal

import pytest

from tests.faults.harness import Lab, Ledger, Process, until

pytestmark = pytest.mark.faults

LOAD = [pytest.param(60, id="short"), pytest.param(1_000, id="long", marks=pytest.mark.long)]


@pytest.fixture
def up(lab: Lab) -> Process:
    lab.start_simulator("a", "b")
    lab.configure(timeout_s=2)
    return lab.start("up")


@pytest.fixture
def embedded(lab: Lab, up: Process) -> Ledger:
    ledger = lab.embedded()
    lab.await_first_poll(ledger)
    return ledger


@pytest.fixture(autouse=True)
def _no_orphan(lab: Lab) -> object:
    """Stop a server that outlived the relay of a test."""
    yield
    with contextlib.suppress(OSError, ValueError):
        os.kill(store_pid(lab), signal.SIGKILL)


def store_pid(lab: Lab) -> int:
    return int((lab.folder / "data" / "store" / "valkey.pid").read_text())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", LOAD)
def test_the_embedded_store_killed_under_load_restarts_with_everything(
    lab: Lab, up: Process, embedded: Ledger, count: int
) -> None:
    """`kill -9` of the store: the relay restarts it and goes on; unsent settlements are not lost."""
    lab.simulator.script({"delay_s": 0.05}, hooks=["a", "b"])
    for killed in (1, 2):
        delivered = lab.delivered()
        lab.call(count)
        until(lambda: lab.delivered() > delivered, "some are delivered")  # noqa: B023
        os.kill(store_pid(lab), signal.SIGKILL)
        until(lambda: len(up.lines("store_restarted")) == killed, "the store has restarted")  # noqa: B023
    lab.simulator.script(hooks=["a", "b"])
    lab.expire_dead_claims(embedded)

    figures = lab.finish("embedded store killed under load", ledger=embedded, within_s=150)

    assert figures.duplicates == 0, "attempts went on, and their settlements waited for the store"
    assert up.stop() == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", LOAD)
def test_a_killed_relay_restarts_on_the_same_directory(lab: Lab, up: Process, embedded: Ledger, count: int) -> None:
    """`kill -9` of `relay up` leaves its store running; the next start takes it over and delivers the rest."""
    lab.simulator.script({"kind": "act_then_hang", "times": 4}, hooks=["b"])
    lab.call(count)
    until(lambda: lab.simulator.in_flight() >= 4, "four are processed and not answered")
    orphan = store_pid(lab)
    up.pause()
    lab.in_flight += embedded.leased("deliver")
    up.kill()
    os.kill(orphan, 0)
    embedded.expire_leases()
    again = lab.start("up")

    assert again.lines("store_orphan_stopped")
    assert store_pid(lab) != orphan
    lab.finish("relay up killed and started again", ledger=embedded, within_s=150)
    assert again.stop() == 0


def test_a_second_start_on_a_directory_is_refused(lab: Lab, up: Process, embedded: Ledger) -> None:
    """Two relays on one directory would each deliver everything: the second exits with code 1 and names the first."""
    second = lab.start("up", ready=False)

    assert second.wait() == 1
    assert f"is in use by another relay (process {up.pid}). Stop that one" in second.written()
    assert "Traceback" not in second.written()
    lab.call(3)
    lab.finish("the first goes on", ledger=embedded)
    assert up.stop() == 0


def test_control_c_drains_and_leaves_nothing_running(lab: Lab, up: Process, embedded: Ledger) -> None:
    """SIGINT: what is in flight is answered and settled, the store is shut down, the exit code is 0."""
    lab.simulator.script({"delay_s": 1.0}, hooks=["a"])
    lab.call(20)
    until(lambda: lab.simulator.in_flight() == 10, "ten are in flight")
    store = store_pid(lab)
    os.kill(up.pid, signal.SIGINT)

    assert up.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(store, 0)
    assert "Traceback" not in up.written()
    lab.simulator.script(hooks=["a"])
    lab.start("up")
    figures = lab.finish("relay up stopped and started", ledger=embedded)
    assert figures.duplicates == 0
