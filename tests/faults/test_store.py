"""The store is restarted, restored, frozen and filled: work goes on where it was, and no settlement is lost."""

import resource
import sys
import time

import pytest

from tests.faults.harness import Lab, Store, until

pytestmark = pytest.mark.faults


def test_the_store_restarts_while_a_worker_drains(lab: Lab) -> None:
    """The store becomes unavailable while a worker stops: settlements wait for it, and the exit code is 0."""
    _, worker = lab.start_all("a", timeout_s=6)
    lab.simulator.script({"delay_s": 2, "times": 10})
    lab.call(20)
    until(lambda: lab.simulator.in_flight() == 10, "ten are in flight")
    worker.terminate()
    until(lambda: worker.lines("process_stopping"), "the worker drains")
    lab.store.kill()
    until(lambda: lab.simulator.in_flight() == 0, "all are answered while the store is unavailable")
    lab.store.start()

    assert worker.wait() == 0
    assert lab.store.leased("deliver") == 0, "everything is settled"
    lab.start("worker")
    figures = lab.finish("store restarted during a drain")
    assert figures.duplicates == 0


def test_the_store_restarts_in_the_middle_of_a_backlog(lab: Lab) -> None:
    """Poller and worker survive restarts of the store, by SIGTERM and SIGKILL; nothing is delivered twice."""
    lab.start_all("a", "b", timeout_s=1)
    lab.simulator.script({"delay_s": 0.1}, hooks=["a", "b"])
    for rude in (False, True):
        delivered = lab.delivered()
        lab.call(60)
        until(lambda: lab.delivered() > delivered + 10, "the backlog is being delivered")  # noqa: B023
        if rude:
            lab.store.kill()
        else:
            lab.store.running.stop()
        lab.store.start()
    lab.expire_dead_claims()

    figures = lab.finish("store restarted in a backlog")

    assert figures.duplicates == 0


def test_a_restored_store_one_second_old_repeats_only_what_it_lost(lab: Lab) -> None:
    """A backup is restored: calls it lacks are polled again, with the same ids; deliveries it lacks are repeated."""
    lab.start_all("a", "b", timeout_s=1)
    lab.simulator.script({"delay_s": 0.1}, hooks=["a", "b"])
    lab.call(60)
    until(lambda: lab.delivered() > 10, "the first are delivered")
    before = lab.accepted()
    copied = lab.store.copy()
    lab.call(20)
    until(lambda: lab.accepted() > before + 60 and lab.store.count("calls") == 80, "the store is ahead of its copy")
    lab.store.running.pause()
    until(lambda: lab.simulator.in_flight() == 0, "what the worker had in flight is answered")
    forgotten = lab.accepted() - before
    lab.store.kill()
    lab.store.restore(copied)
    lab.store.start()
    lab.in_flight += forgotten + lab.store.expire_leases("deliver")
    lab.store.expire_leases("enrich")

    figures = lab.finish("store restored from a copy")

    assert figures.duplicates > 0, "the copy was behind, or this shows nothing"


def test_a_full_store_accepts_settlements_and_goes_on_when_there_is_space(lab: Lab) -> None:
    """Memory is full: what is in flight is settled all the same; new calls wait until there is space."""
    poller, _ = lab.start_all("a", source={"contacts": False})
    lab.simulator.script({"delay_s": 1.0, "times": 10})
    lab.call(10)
    until(lambda: lab.simulator.in_flight() == 10, "ten are in flight")
    lab.store.client.config_set("maxmemory", 1)
    until(
        lambda: lab.store.leased("deliver") == 0 and not lab.store.waiting("deliver"), "their settlements are accepted"
    )
    lab.call(15)
    until(lambda: poller.lines("work_interrupted"), "the poller meets a full store")
    assert lab.store.count("calls") == 10, "no poll was ingested in part"
    lab.store.client.config_set("maxmemory", 0)

    figures = lab.finish("store full and freed")

    assert figures.events == 25
    assert figures.duplicates == 0


FULL = [
    pytest.param(20, id="short", marks=[pytest.mark.timeout(180)]),
    pytest.param(300, id="long", marks=[pytest.mark.long, pytest.mark.timeout(1_200)]),
]


@pytest.mark.parametrize("full_s", FULL)
def test_a_store_that_is_full_for_a_while_delays_calls_and_loses_none(lab: Lab, full_s: int) -> None:
    """Calls end, with and without recordings, before the memory is full and while it is."""
    lab.start_all("a", "b", source={"contacts": False})
    lab.simulator.script({"delay_s": 0.2}, hooks=["b"])
    lab.call(40, recorded_share=0.3)
    until(lambda: lab.accepted() > 5, "the first are being delivered")
    lab.store.client.config_set("maxmemory", 1)
    ends = time.monotonic() + full_s
    while time.monotonic() < ends:
        lab.call(2, recorded_share=0.3)
        time.sleep(2)  # what is tried is how long it is full
    lab.store.client.config_set("maxmemory", 0)
    freed = time.monotonic()

    figures = lab.finish(f"store full for {full_s} s", within_s=full_s + 100)

    sys.stdout.write(f"everything was delivered {time.monotonic() - freed:.0f} s after there was space\n")
    assert figures.duplicates == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs a file size limit set from outside (Linux)")
def test_a_full_disk_stops_the_store_and_loses_nothing(lab: Lab) -> None:
    """The store cannot write its log and refuses writes: settlements wait in the worker, calls at the provider."""
    lab.start_simulator("a")
    lab.start_store(fsync="everysec")
    lab.configure(timeout_s=10)
    poller, _ = lab.start("poller"), lab.start("worker")
    lab.await_first_poll()
    lab.simulator.script({"delay_s": 1.5, "times": 10})
    lab.call(10)
    until(lambda: lab.simulator.in_flight() == 10, "ten are in flight")
    pid = lab.store.running.pid
    written = max(path.stat().st_size for path in lab.store.folder.rglob("*.aof"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))
    until(lambda: lab.simulator.in_flight() == 0, "all are answered")
    lab.call(15)
    until(lambda: refuses_writes(lab.store), "the store refuses to write")
    until(lambda: poller.lines("work_interrupted") or poller.lines("store_unavailable"), "the poller notices")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    figures = lab.finish("disk full and freed")

    assert figures.duplicates == 0


def refuses_writes(store: Store) -> bool:
    return bool(store.client.info("persistence")["aof_last_write_status"] == "err")


PAUSES = [
    pytest.param(4, id="short"),
    pytest.param(20, id="long", marks=[pytest.mark.long, pytest.mark.timeout(300)]),
]


@pytest.mark.parametrize("pause_s", PAUSES)
def test_a_frozen_store_loses_and_repeats_nothing(lab: Lab, pause_s: float) -> None:
    """SIGSTOP under load: attempts end meanwhile, and are settled once the store answers."""
    lab.start_all("a", "b", timeout_s=15)
    lab.simulator.script({"delay_s": 0.1}, hooks=["a", "b"])
    lab.call(80)
    until(lambda: lab.delivered() > 10, "the backlog is being delivered")
    paused = lab.store.running
    paused.pause()
    time.sleep(pause_s)  # what is tried is the length of the pause
    paused.resume()

    figures = lab.finish(f"store paused for {pause_s} s", within_s=120)

    assert figures.duplicates == 0
