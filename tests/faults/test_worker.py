"""A worker is killed, paused and stopped, wherever it is in its work: nothing is lost, hardly anything repeats."""

import signal

import pytest

from tests.faults.harness import Lab, unresponsive_port, until

pytestmark = pytest.mark.faults

SLOW = {"delay_s": 1.5}


def test_a_worker_killed_before_its_posts_are_read_repeats_nothing(lab: Lab) -> None:
    """The worker has claimed and connected, the subscriber has read nothing: after the kill each event comes once."""
    lab.start_simulator("a")
    lab.start_store()
    with unresponsive_port() as port:
        lab.configure(urls={"a": f"http://127.0.0.1:{port}/hook/a"}, timeout_s=15)
        lab.start("poller")
        worker = lab.start("worker")
        lab.await_first_poll()
        lab.call(8)
        until(lambda: lab.store.leased("deliver") == 8, "all are claimed")
        assert lab.kill_worker(worker) == 8
    lab.start_simulator("a", subscriber_port=port)
    lab.start("worker")

    figures = lab.finish("worker killed between claim and POST")

    assert figures.duplicates == 0


def test_a_worker_killed_before_it_settles_repeats_only_what_was_in_flight(lab: Lab) -> None:
    """The subscriber has processed and not answered yet when the worker dies: these may repeat, nothing else."""
    _, worker = lab.start_all("a", "b")
    lab.call(5)
    until(lambda: lab.delivered() == 5, "the first are delivered")
    lab.simulator.script({"kind": "act_then_hang", "times": 6}, hooks=["a"])
    lab.call(6)
    until(lambda: lab.simulator.in_flight() == 6, "six are processed and not answered")
    until(lambda: lab.store.leased("deliver") == 6, "the others are settled")
    lab.kill_worker(worker)
    lab.start("worker")

    figures = lab.finish("worker killed between POST and settle")

    assert figures.in_flight == 6
    assert figures.duplicates == 6, "what was processed and not settled is delivered again, with the same id"


def test_a_worker_killed_during_a_contact_look_up_loses_no_call(lab: Lab) -> None:
    """Calls that are being looked up when the worker dies are published by the next one."""
    _, worker = lab.start_all("a", source={"hold_for_contact_s": 60})
    lab.phones.provider(faults=[{"kind": "hang", "on": "search", "times": 1}])
    lab.call(5)
    until(lambda: lab.store.leased("contacts") == 5 and lab.phones.asked("search"), "the calls are being looked up")
    lab.kill_worker(worker)
    lab.start("worker")

    figures = lab.finish("worker killed during a look-up")

    assert figures.duplicates == 0


def test_a_worker_killed_while_fetching_audio_publishes_the_recording_once(lab: Lab) -> None:
    """A transfer that dies with the worker is repeated, and published once."""
    _, worker = lab.start_all("a", source={"contacts": False})
    lab.phones.provider(faults=[{"kind": "slow", "on": "recording", "delay_s": 20, "times": 3}])
    lab.call(3, recorded_share=1)
    until(lambda: lab.phones.asked("recording") == 3 and lab.delivered() == 3, "three recordings are being fetched")
    lab.kill_worker(worker)
    lab.start("worker")

    figures = lab.finish("worker killed while it fetches audio")

    assert figures.events == 6
    assert figures.duplicates == 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_leases_of_a_killed_worker_expire_by_themselves(lab: Lab) -> None:
    """What a killed worker had leased is claimed again when its lease expires, on the real clock."""
    _, worker = lab.start_all("a", timeout_s=1)
    lab.simulator.script({"kind": "act_then_hang", "times": 4})
    lab.call(4)
    until(lambda: lab.store.leased("deliver") == 4 and lab.simulator.in_flight() == 4, "four are in flight")
    lab.freeze_and_count(worker)
    worker.kill()
    lab.start("worker")

    figures = lab.finish("leases of a killed worker end", within_s=120)

    assert figures.duplicates == 4


@pytest.mark.parametrize("started_as", ["worker", "python -m workers", "arq"])
def test_a_stopped_worker_finishes_what_it_holds(lab: Lab, started_as: str) -> None:
    """SIGTERM in the middle of deliveries: they are answered and settled, the exit code is 0, however it started."""
    lab.start_simulator("a")
    lab.start_store()
    lab.configure(timeout_s=5)
    lab.start("poller")
    worker = lab.start(started_as)
    lab.await_first_poll()
    lab.simulator.script({**SLOW, "times": 10})
    lab.call(25)
    until(lambda: lab.simulator.in_flight() == 10, "ten are in flight")

    code = worker.stop()

    assert code == 0, worker.written()[-2000:]
    assert lab.accepted() == 10, "what was in flight was answered, nothing else was started"
    assert lab.store.leased("deliver") == 0, "everything it had leased is settled or returned"
    assert "Traceback" not in worker.written()
    lab.start(started_as)
    figures = lab.finish(f"{started_as} stopped in the middle")
    assert figures.duplicates == 0


def test_a_second_signal_ends_a_worker_at_once(lab: Lab) -> None:
    """Ctrl-C pressed twice does not drain; what was in flight is delivered again by the next worker."""
    _, worker = lab.start_all("a", timeout_s=15)
    lab.simulator.script({"kind": "act_then_hang", "times": 3})
    lab.call(3)
    until(lambda: lab.simulator.in_flight() == 3, "three are in flight")
    lab.in_flight += 3
    worker.terminate()
    until(lambda: worker.lines("process_stopping"), "the first signal is handled")

    code = worker.stop(within_s=5)

    assert code == -signal.SIGTERM
    lab.store.expire_leases()
    lab.start("worker")
    lab.finish("worker stopped by two signals")
