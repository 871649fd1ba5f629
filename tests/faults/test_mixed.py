"""Processes with different configurations, as in every rollout and after a forgotten reload; and lost lane items."""

import time
from pathlib import Path

import pytest

from tests.faults.harness import Lab, until

pytestmark = pytest.mark.faults

_OLDER = Path(__file__).parent / "older"

COUNTS = [
    pytest.param(25, id="short"),
    pytest.param(2_000, id="long", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
]


def start_mixed(lab: Lab) -> tuple[dict[str, str], dict[str, str]]:
    """Start a provider, a subscriber and a store; returns the environments of the older and the newer configuration.
    The older one does not have the source."""
    lab.start_simulator("a")
    lab.start_store()
    lab.configure(source={"contacts": False})
    newer = lab.write_config("newer.yaml", lab.config)
    older = lab.write_config("older.yaml", lab.config | {"sources": {}})
    return older, newer


@pytest.mark.parametrize("count", COUNTS)
def test_calls_wait_for_a_worker_that_knows_their_source(lab: Lab, count: int) -> None:
    """The poller has the new relay.yaml, the worker the old one: calls and recordings wait until it is reloaded."""
    older, newer = start_mixed(lab)
    worker = lab.start("worker", environ=older)
    lab.start("poller", environ=newer)
    lab.await_first_poll()
    lab.call(count, recorded_share=10 / count)  # more would use up the budget, of which polls take what is left
    until(lambda: lab.store.count("calls") == count, "all are ingested")
    until(lambda: lab.store.due("enrich") == 0 and lab.store.due("record") == 0, "the worker has seen them")
    assert lab.delivered() == 0

    lab.write_config("older.yaml", lab.config)
    worker.reload()

    figures = lab.finish("worker with an older configuration", within_s=120)
    assert figures.calls == count
    assert figures.duplicates == 0


def test_a_subscription_that_the_worker_does_not_know_yet_misses_nothing(lab: Lab) -> None:
    """The worker has a relay.yaml without the second subscription: its deliveries wait until the worker is reloaded."""
    lab.start_simulator("a", "b")
    lab.start_store()
    lab.configure(source={"contacts": False})
    former = lab.config | {"subscriptions": {"a": lab.config["subscriptions"]["a"]}}
    worker = lab.start("worker", environ=lab.write_config("older.yaml", former))
    lab.start("poller", environ=lab.write_config("newer.yaml", lab.config))
    lab.await_first_poll()
    until(lambda: worker.lines("configuration_outdated"), "the worker has read of the newer configuration")
    lab.call(25)
    until(lambda: lab.delivered(hooks=["a"]) == 25, "the subscription that it knows gets everything")
    assert lab.delivered(hooks=["b"]) == 0

    lab.write_config("older.yaml", lab.config)
    worker.reload()

    figures = lab.finish("worker without a subscription", within_s=120)
    assert figures.deliveries == 50
    assert figures.duplicates == 0


@pytest.mark.parametrize("count", COUNTS)
def test_a_rolling_upgrade_under_load_loses_nothing(lab: Lab, count: int) -> None:
    """Worker N-1 cannot read the new configuration and keeps its own; worker N is started beside it, under load."""
    older, newer = start_mixed(lab)
    former = lab.start("worker", environ=older | {"PYTHONPATH": f"{_OLDER}:{Path(__file__).parent.parent.parent}"})
    lab.write_config("older.yaml", lab.config)
    former.reload()
    until(lambda: former.lines("configuration_reload_failed"), "N-1 cannot read the new configuration")
    lab.start("poller", environ=newer)
    lab.await_first_poll()
    lab.call(count, recorded_share=0.1)
    until(lambda: lab.store.count("calls") > 0, "calls come in")

    lab.start("worker", environ=newer)
    lab.call(count, recorded_share=0.1)
    until(lambda: lab.delivered() > count, "worker N works while N-1 does")
    former.stop()

    figures = lab.finish("rolling upgrade N-1/N", within_s=120)
    assert figures.duplicates == 0


def test_a_source_that_is_removed_and_added_again_loses_nothing(lab: Lab) -> None:
    """SIGHUP without the source and SIGHUP with it, while its calls are on their way."""
    older, newer = start_mixed(lab)
    path = lab.folder / "newer.yaml"
    roles = [lab.start(role, environ=newer) for role in ("poller", "worker")]
    lab.await_first_poll()
    for rounds in (1, 2):
        lab.call(40, recorded_share=0.2)
        until(lambda: lab.store.count("calls") == 40 * rounds, "the calls are ingested")  # noqa: B023
        for content in (Path(older["RELAY_CONFIG"]).read_text(), path.read_text()):
            path.write_text(content)
            for role in roles:
                role.reload()
            time.sleep(2)  # as long as a person needs to notice

    figures = lab.finish("source removed and added again", within_s=120)
    assert figures.calls == 80
    assert figures.duplicates == 0


LOSSES = [
    pytest.param(60, 10, id="short", marks=[pytest.mark.timeout(240)]),
    pytest.param(2_000, 100, id="long", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
]


@pytest.mark.parametrize(("count", "rounds"), LOSSES)
def test_lane_items_deleted_at_random_under_load_are_a_delay(lab: Lab, count: int, rounds: int) -> None:
    """Waiting and leased items of all lanes vanish while calls come in: everything is delivered, nothing twice."""
    lab.start_all("a", "b", source={"contacts": False}, timeout_s=5)
    lab.simulator.script({"delay_s": 0.5}, hooks=["a", "b"])
    lost = 0
    for _ in range(rounds):
        lab.call(count // rounds, recorded_share=0.1)
        for _ in range(8):
            lost += lab.lose_items("enrich", "record", "deliver", share=0.3)
            time.sleep(0.1)
    lost += lab.lose_items("poll", share=1)
    lab.call(5)
    assert lost > count // 10, f"only {lost} items were lost, so this shows little"

    figures = lab.finish(f"{lost} lane items deleted", within_s=180)

    assert figures.duplicates == 0
