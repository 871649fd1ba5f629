"""The store is restarted, put back, paused, and filled up: work goes on where it was, and outcomes are kept."""

import resource
import time

import pytest

from tests.faults.harness import Lab, Store, until

pytestmark = pytest.mark.faults


def test_the_store_restarts_while_a_worker_drains(lab: Lab) -> None:
    """A worker was told to stop and the store goes away meanwhile: outcomes wait for it, and the exit code is 0."""
    _, worker = lab.start_all("a", timeout_s=6)
    lab.simulator.script({"delay_s": 2, "times": 10})
    lab.call(20)
    until(lambda: lab.simulator.in_flight() == 10, "ten are being answered")
    worker.terminate()
    until(lambda: worker.lines("process_stopping"), "the worker drains")
    lab.store.kill()
    until(lambda: lab.simulator.in_flight() == 0, "all are answered while the store is away")
    lab.store.start()

    assert worker.wait() == 0
    assert lab.store.leased("deliver") == 0, "all is settled"
    lab.start("worker")
    figures = lab.finish("store restarted during a drain")
    assert figures.duplicates == 0


def test_the_store_restarts_in_the_middle_of_a_backlog(lab: Lab) -> None:
    """Poller and worker live through restarts of the store, kind and unkind; nothing is told twice."""
    lab.start_all("a", "b", timeout_s=1)
    lab.simulator.script({"delay_s": 0.1}, hooks=["a", "b"])
    for rude in (False, True):
        heard = lab.heard()
        lab.call(60)
        until(lambda: lab.heard() > heard + 10, "the backlog is being told")  # noqa: B023
        if rude:
            lab.store.kill()
        else:
            lab.store.running.stop()
        lab.store.start()
    lab.outlive_dead_claims()

    figures = lab.finish("store restarted in a backlog")

    assert figures.duplicates == 0


def test_a_store_copy_one_second_old_repeats_only_what_it_forgot(lab: Lab) -> None:
    """A backup is put back: calls it does not know are found again, with the same ids; what it forgot is repeated."""
    lab.start_all("a", "b", timeout_s=1)
    lab.simulator.script({"delay_s": 0.1}, hooks=["a", "b"])
    lab.call(60)
    until(lambda: lab.heard() > 10, "the first are told")
    before = lab.accepted()
    copied = lab.store.copy()
    lab.call(20)
    until(lambda: lab.accepted() > before + 60 and lab.store.count("calls") == 80, "the store is ahead of its copy")
    lab.store.running.pause()
    until(lambda: lab.simulator.in_flight() == 0, "what the worker held is answered")
    forgotten = lab.accepted() - before
    lab.store.kill()
    lab.store.put_back(copied)
    lab.store.start()
    lab.in_flight += forgotten + lab.store.end_leases("deliver")
    lab.store.end_leases("enrich")

    figures = lab.finish("store copy put back")

    assert figures.duplicates > 0, "the copy was behind, or this shows nothing"


def test_a_full_store_keeps_outcomes_and_goes_on_when_there_is_room(lab: Lab) -> None:
    """Memory is full: what is in flight is settled all the same; new calls wait and are told when there is room."""
    poller, _ = lab.start_all("a", source={"contacts": False})
    lab.simulator.script({"delay_s": 1.0, "times": 10})
    lab.call(10)
    until(lambda: lab.simulator.in_flight() == 10, "ten are being answered")
    lab.store.client.config_set("maxmemory", 1)
    until(lambda: lab.store.leased("deliver") == 0 and not lab.store.waiting("deliver"), "their outcomes are kept")
    lab.call(15)
    until(lambda: poller.lines("work_interrupted"), "the poller meets a full store")
    assert lab.store.count("calls") == 10, "nothing was half admitted"
    lab.store.client.config_set("maxmemory", 0)

    figures = lab.finish("store full and freed")

    assert figures.events == 25
    assert figures.duplicates == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs a file size limit set from outside (Linux)")
def test_a_full_disk_stops_the_store_not_the_truth(lab: Lab) -> None:
    """The store cannot write its log and refuses writes: outcomes wait in the worker, calls at the provider."""
    lab.start_simulator("a")
    lab.start_store(fsync="everysec")
    lab.configure(timeout_s=10)
    poller, _ = lab.start("poller"), lab.start("worker")
    lab.await_first_poll()
    lab.simulator.script({"delay_s": 1.5, "times": 10})
    lab.call(10)
    until(lambda: lab.simulator.in_flight() == 10, "ten are being answered")
    pid = lab.store.running.pid
    written = max(path.stat().st_size for path in lab.store.folder.rglob("*.aof"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))
    until(lambda: lab.simulator.in_flight() == 0, "all are answered")
    lab.call(15)
    until(lambda: refuses_writes(lab.store), "the store refuses to write")
    until(lambda: poller.lines("work_interrupted") or poller.lines("store_unavailable"), "the poller meets it")
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
def test_a_store_that_stands_still_loses_and_repeats_nothing(lab: Lab, pause_s: float) -> None:
    """SIGSTOP under load: attempts end meanwhile, and their outcomes are written when the store is back."""
    lab.start_all("a", "b", timeout_s=15)
    lab.simulator.script({"delay_s": 0.1}, hooks=["a", "b"])
    lab.call(80)
    until(lambda: lab.heard() > 10, "the backlog is being told")
    paused = lab.store.running
    paused.pause()
    time.sleep(pause_s)  # what is tried is the length of the pause
    paused.resume()

    figures = lab.finish(f"store paused for {pause_s} s", within_s=120)

    assert figures.duplicates == 0
