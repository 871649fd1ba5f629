"""The poller is killed and overtaken between asking and admitting: every call is told, once."""

import pytest

from tests.faults.harness import Lab, until

pytestmark = pytest.mark.faults

NO_CONTACTS = {"contacts": False}
"""A contact that comes late is an event of its own: without them, events are calls."""


def test_a_poller_killed_between_fetch_and_admit_loses_no_call(lab: Lab) -> None:
    """The provider has answered, the store has not been told: the next poller asks again."""
    poller, _ = lab.start_all("a", source=NO_CONTACTS)
    lab.phones.provider(faults=[{"kind": "slow", "on": "records", "delay_s": 1.5}])
    lab.call(120)
    until(lambda: not lab.phones.provider()["faults"], "the slow request has come in")
    answered = lab.phones.answered("records")
    lab.store.running.pause()
    until(lambda: lab.phones.answered("records") > answered, "the provider has answered")
    poller.kill()
    lab.store.running.resume()
    assert lab.store.count("calls") == 0, "nothing was admitted yet"
    lab.store.end_leases("poll")
    lab.start("poller")

    figures = lab.finish("poller killed between fetch and admit")

    assert figures.events == 120
    assert figures.duplicates == 0


def test_a_poller_killed_while_the_provider_answers_is_replaced(lab: Lab) -> None:
    """The provider takes its time, the poller dies meanwhile: the next one has the source."""
    poller, _ = lab.start_all("a")
    lab.phones.provider(faults=[{"kind": "hang", "on": "records"}])
    lab.call(10)
    until(lambda: not lab.phones.provider()["faults"], "the provider hangs on a request")
    poller.kill()
    lab.store.end_leases("poll")
    lab.start("poller")

    figures = lab.finish("poller killed while the provider answers")

    assert figures.duplicates == 0


def test_a_poller_that_was_thought_dead_admits_nothing(lab: Lab) -> None:
    """Two pollers, one paused past its lease with an answer in its hands: its token is old, the other's holds."""
    first, _ = lab.start_all("a", source=NO_CONTACTS)
    lab.phones.provider(faults=[{"kind": "slow", "on": "records", "delay_s": 1.5}])
    lab.call(30)
    until(lambda: not lab.phones.provider()["faults"], "the slow request has come in")
    first.pause()
    lab.store.end_leases("poll")
    second = lab.start("poller")
    until(lambda: lab.heard() == 30, "the second poller tells all")
    first.resume()
    until(lambda: first.lines("poll_lease_lost"), "the first notices that it was overtaken")
    lab.call(10)

    figures = lab.finish("two pollers, one past its lease")

    assert figures.events == 40
    assert figures.duplicates == 0
    assert not second.lines("poll_lease_lost")


@pytest.mark.parametrize("rounds", [pytest.param(2, id="short"), pytest.param(40, id="long", marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_pollers_killed_at_random_admit_every_call_once(lab: Lab, rounds: int) -> None:
    """Wherever in its work a poller dies, half way through the chunks of a poll too, no call is lost or doubled."""
    poller, _ = lab.start_all("a", source=NO_CONTACTS)
    for _ in range(rounds):
        admitted = lab.store.count("calls")
        lab.call(200)
        most = lab.rng.randrange(200)
        until(lambda: lab.store.count("calls") - admitted >= most, "the poll has come so far")  # noqa: B023
        poller.kill()
        lab.store.end_leases("poll")
        poller = lab.start("poller")

    figures = lab.finish(f"pollers killed {rounds} times")

    assert figures.events == 200 * rounds
    assert figures.duplicates == 0
