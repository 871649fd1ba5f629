"""Clocks that are wrong, steps in time, and processes that slept past their leases: only the store's time decides."""

import pytest

from relay.store import keys
from tests.faults.harness import Lab, WrongClock, until

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("offset_s", [40.0, pytest.param(-40.0, marks=pytest.mark.long)])
def test_two_of_each_with_expired_leases_and_a_wrong_clock(lab: Lab, offset_s: float) -> None:
    """One worker is paused past its leases with posts in flight; the others, 40 s off, take over."""
    wrong = WrongClock(lab.folder, offset_s)
    _, first = lab.start_all("a", "b", timeout_s=15)
    second_poller = lab.start("poller", environ=wrong.environ)
    lab.simulator.script({"delay_s": 1.5, "times": 10}, hooks=["a"])
    lab.call(40)
    until(lambda: lab.delivered(hooks=["b"]) == 40 and lab.store.leased("deliver") == 10, "ten are in flight")
    lab.freeze_and_count(first)
    second = lab.start("worker", environ=wrong.environ)
    lab.store.expire_leases()
    until(lambda: lab.delivered() == 40, "the second worker delivers everything")
    first.resume()
    until(lambda: first.lines("settlement_refused"), "the first notices that its leases had expired")
    lab.call(20, recorded_share=0.2)

    figures = lab.finish(f"two of each, one past its leases, clocks off by {offset_s:g} s")

    assert figures.duplicates == 10, "the ten that the paused worker had in flight, and no other"
    assert not second.lines("settlement_refused")
    assert second_poller.runs


def test_process_clocks_that_jump_by_an_hour_change_nothing(lab: Lab) -> None:
    """The clocks of poller and worker step forward and back: calls go on, signatures verify, ids stay."""
    wrong = WrongClock(lab.folder)
    lab.start_simulator("a")
    lab.start_store()
    lab.configure()
    lab.start("poller", environ=wrong.environ)
    lab.start("worker", environ=wrong.environ)
    lab.await_first_poll()
    for offset_s in (3600.0, -3600.0, 0.0):
        lab.simulator.script({"delay_s": 0.3, "times": 5})
        lab.call(15)
        until(lambda: lab.simulator.in_flight() > 0, "some are in flight")
        wrong.step(offset_s)
        lab.call(15, recorded_share=0.2)
        until(lambda: lab.all_delivered(lab.store), f"everything is delivered, {offset_s:g} s off")

    figures = lab.finish("process clocks jump by an hour")

    assert figures.duplicates == 0


@pytest.mark.parametrize("step_s", [pytest.param(3600.0, id="forth"), pytest.param(-3600.0, id="back")])
def test_a_machine_whose_clock_is_set_by_an_hour_goes_on(lab: Lab, step_s: float) -> None:
    """Store, relay and subscriber share one machine; its clock steps, and new calls are delivered soon."""
    wrong = WrongClock(lab.folder)
    environ = wrong.preloaded()
    if environ is None:
        pytest.skip("needs Linux and a C compiler to give the store another clock")
    lab.start_simulator("a", environ=environ)
    lab.start_store(environ=environ)
    lab.configure(source={"contacts": False, "recordings": False})
    poller, worker = lab.start("poller", environ=environ), lab.start("worker", environ=environ)
    lab.await_first_poll()
    lab.simulator.script({"delay_s": 0.5, "times": 20})
    lab.call(40)
    until(lambda: lab.delivered() > 5, "a backlog is being delivered")
    lab.freeze_and_count(worker)
    wrong.step(step_s)
    worker.resume()
    lab.call(15)
    until(lambda: lab.delivered() == 55, "the backlog and the calls after the step are delivered", within_s=20)

    figures = lab.finish(f"the machine's clock steps by {step_s:g} s")

    assert figures.duplicates <= (10 if step_s > 0 else 0), (
        "leases expire early when the clock steps forward, never when it steps back"
    )
    assert bool(poller.lines("store_clock_stepped_back")) == (step_s < 0)


def test_a_store_clock_forty_days_ahead_deletes_nothing(lab: Lab) -> None:
    """The clock of the store's machine is wrong when a worker starts, and is corrected: recordings, calls and lists are
    there, and new calls are delivered."""
    wrong = WrongClock(lab.folder)
    environ = wrong.preloaded()
    if environ is None:
        pytest.skip("needs Linux and a C compiler to give the store another clock")
    lab.start_simulator("a")
    lab.start_store(environ=environ)
    lab.configure(source={"hold_for_contact_s": 2, "hold_for_recording_s": 2})
    lab.start("poller")
    worker = lab.start("worker")
    lab.await_first_poll()
    lab.call(6, recorded_share=1)
    until(lambda: lab.all_delivered(lab.store), "calls and recordings are delivered")
    audio = sorted(lab.folder.glob("data/**/*.wav")) + sorted(lab.folder.glob("data/**/*.mp3"))
    assert len(audio) == 6
    worker.stop()

    wrong.step(40 * 86_400.0)
    worker = lab.start("worker")
    until(lambda: worker.lines("retention_suspended"), "the worker's sweep deletes nothing")
    wrong.step(0.0)
    until(lambda: worker.lines("store_clock_stepped_back"), "the correction is noticed")
    lab.call(4)

    # A contact may still have to wait for the budget, which was used in what seemed to be the future.
    until(lambda: lab.delivered() == 10, "the calls after the correction are delivered", within_s=20)
    lab.figures(lab.store).assert_promises()
    assert [path for path in audio if not path.exists()] == []
    assert lab.store.client.zcard(keys.CALLS) == 10
    assert len(list(lab.store.client.scan_iter(f"{keys.call('')}*"))) == 10
