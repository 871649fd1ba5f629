"""The poller is killed and overtaken between request and ingest: every call is published, once."""

import pytest

from tests.faults.harness import Lab, until

pytestmark = pytest.mark.faults

NO_CONTACTS = {"contacts": False}
"""A late contact is an event of its own: without contacts, there is one event a call."""


def test_a_poller_killed_between_fetch_and_ingest_loses_no_call(lab: Lab) -> None:
    """The provider has answered, nothing is ingested: the next poller requests it again."""
    poller, _ = lab.start_all("a", source=NO_CONTACTS)
    lab.phones.provider(faults=[{"kind": "slow", "on": "records", "delay_s": 1.5}])
    lab.call(120)
    until(lambda: not lab.phones.provider()["faults"], "the slow request has arrived")
    answered = lab.phones.answered("records")
    lab.store.running.pause()
    until(lambda: lab.phones.answered("records") > answered, "the provider has answered")
    poller.kill()
    lab.store.running.resume()
    assert lab.store.count("calls") == 0, "nothing is ingested yet"
    lab.store.expire_leases("poll")
    lab.start("poller")

    figures = lab.finish("poller killed between fetch and ingest")

    assert figures.events == 120
    assert figures.duplicates == 0


def test_a_poller_killed_while_the_provider_answers_is_replaced(lab: Lab) -> None:
    """The poller dies while the provider is slow: the next one polls the source."""
    poller, _ = lab.start_all("a")
    lab.phones.provider(faults=[{"kind": "hang", "on": "records"}])
    lab.call(10)
    until(lambda: not lab.phones.provider()["faults"], "the provider hangs on a request")
    poller.kill()
    lab.store.expire_leases("poll")
    lab.start("poller")

    figures = lab.finish("poller killed while the provider answers")

    assert figures.duplicates == 0


def test_a_poller_that_was_paused_past_its_lease_ingests_nothing(lab: Lab) -> None:
    """Two pollers, one paused past its lease with a response in memory: its token is refused."""
    first, _ = lab.start_all("a", source=NO_CONTACTS)
    lab.phones.provider(faults=[{"kind": "slow", "on": "records", "delay_s": 1.5}])
    lab.call(30)
    until(lambda: not lab.phones.provider()["faults"], "the slow request has arrived")
    first.pause()
    lab.store.expire_leases("poll")
    second = lab.start("poller")
    until(lambda: lab.delivered() == 30, "the calls that the second poller ingested are delivered")
    first.resume()
    until(lambda: first.lines("poll_lease_lost"), "the first notices that it was overtaken")
    lab.call(10)

    figures = lab.finish("two pollers, one past its lease")

    assert figures.events == 40
    assert figures.duplicates == 0
    assert not second.lines("poll_lease_lost")


@pytest.mark.parametrize("rounds", [pytest.param(2, id="short"), pytest.param(40, id="long", marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_pollers_killed_at_random_ingest_every_call_once(lab: Lab, rounds: int) -> None:
    """Wherever a poller dies, in the middle of a poll too, no call is lost or duplicated."""
    poller, _ = lab.start_all("a", source=NO_CONTACTS)
    for _ in range(rounds):
        ingested = lab.store.count("calls")
        lab.call(200)
        most = lab.rng.randrange(200)
        until(lambda: lab.store.count("calls") - ingested >= most, "so many calls are ingested")  # noqa: B023
        poller.kill()
        lab.store.expire_leases("poll")
        poller = lab.start("poller")

    figures = lab.finish(f"pollers killed {rounds} times")

    assert figures.events == 200 * rounds
    assert figures.duplicates == 0
