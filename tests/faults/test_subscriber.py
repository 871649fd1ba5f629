"""Subscribers that are slow, hostile or gone: what they do to one delivery stays contained."""

import pytest

from tests.faults.harness import Json, Lab, unresponsive_port, until

pytestmark = pytest.mark.faults

HOSTILE: dict[str, Json] = {
    "hang": {"kind": "hang"},
    "drip_head": {"kind": "drip_head", "every_s": 0.2},
    "drip": {"kind": "drip", "status": 500, "every_s": 0.2},
    "reset": {"kind": "reset"},
    "half_head": {"kind": "half_head"},
    "endless": {"kind": "endless", "status": 500},
    "gzip_bomb": {"kind": "gzip_bomb", "status": 500, "size_bytes": 4_000_000_000},
    "gigabyte": {"kind": "big", "status": 500},
    "redirect": {"status": 302, "headers": {"Location": "http://169.254.169.254/latest/meta-data"}},
    "fail": {"status": 500},
}
RUDE_BUT_HEARD: dict[str, Json] = {
    "endless": {"kind": "endless"},
    "gigabyte": {"kind": "big"},
    "gzip_bomb": {"kind": "gzip_bomb", "size_bytes": 4_000_000_000},
}
MOST_GROWTH_MB = 80


def test_hostile_responses_cost_one_attempt_each(lab: Lab) -> None:
    """Whatever a subscriber answers, it gets the event later, others get theirs at once, and memory is bounded."""
    _, worker = lab.start_all("kind", *HOSTILE, timeout_s=1)
    lab.call(2)
    until(lambda: lab.delivered() == 2, "every endpoint has received a call")
    before_mb = worker.resident_mb()
    for name, way in HOSTILE.items():
        lab.simulator.script({**way, "times": 2}, hooks=[name])
    lab.call(4)
    until(lambda: lab.delivered(hooks=["kind"]) == 6, "the well-behaved subscriber gets everything", within_s=10)
    until(lambda: not lab.store.leased("deliver") and not lab.store.due("deliver"), "each has failed twice")
    lab.store.make_due()

    figures = lab.finish("hostile answers")

    assert figures.duplicates == 0
    retries = {name: lab.simulator.hook(name)["retries"] for name in HOSTILE}
    assert retries == dict.fromkeys(HOSTILE, 2), "one attempt was lost on each"
    assert worker.resident_mb() - before_mb < MOST_GROWTH_MB


def test_a_2xx_counts_however_the_response_goes_on(lab: Lab) -> None:
    """The status was 2xx: the event is delivered, however long the body, and is not sent again."""
    _, worker = lab.start_all("a", timeout_s=2)
    lab.call(3)
    until(lambda: lab.delivered() == 3, "every endpoint has received a call")
    before_mb = worker.resident_mb()
    lab.simulator.script(*({**way, "times": 2} for way in RUDE_BUT_HEARD.values()))
    lab.call(2 * len(RUDE_BUT_HEARD))

    figures = lab.finish("rude thanks")

    assert figures.duplicates == 0
    assert worker.resident_mb() - before_mb < MOST_GROWTH_MB


STORMS = [
    pytest.param(20, 7, id="short"),
    pytest.param(300, 20, id="long", marks=[pytest.mark.long, pytest.mark.timeout(300)]),
]


@pytest.mark.parametrize(("count", "wait_s"), STORMS)
def test_a_storm_of_429_is_waited_out(lab: Lab, count: int, wait_s: int) -> None:
    """Nothing is sent again before `Retry-After` is over, and then everything is delivered."""
    lab.start_all("a", "b")
    lab.simulator.script({"status": 429, "headers": {"Retry-After": str(wait_s)}, "times": count}, hooks=["a"])
    lab.call(count)
    until(lambda: lab.delivered(hooks=["b"]) == count, "the other subscriber gets everything")

    figures = lab.finish(f"{count} answers 429", within_s=wait_s * 2 + 60)

    assert figures.duplicates == 0
    first: dict[str, float] = {}
    for arrival in lab.simulator.arrivals("a"):
        asked_s = first.setdefault(arrival["event_id"], arrival["monotonic_s"])
        if arrival["accepted"]:
            waited_s = arrival["monotonic_s"] - asked_s
            assert waited_s == 0 or waited_s >= wait_s - 0.1, f"asked to wait {wait_s} s, waited {waited_s:.2f} s"
    assert lab.simulator.hook("a")["retries"] == count


BACKLOGS = [pytest.param(40, id="short"), pytest.param(1_000, id="long", marks=pytest.mark.long)]


@pytest.mark.parametrize("count", BACKLOGS)
def test_a_410_in_the_middle_of_a_backlog_stops_that_subscriber_only(lab: Lab, count: int) -> None:
    """It gets no more than was in flight, the rest stays listed for it, and the others get everything."""
    poller, worker = lab.start_all("a", "b")
    lab.simulator.script({"delay_s": 0.02, "times": count // 4}, {"status": 410}, hooks=["a"])
    lab.call(count)
    until(lambda: lab.delivered(hooks=["b"]) == count, "the other subscriber gets everything")
    until(lambda: worker.lines("subscription_disabled"), "the subscription is disabled")
    until(lambda: lab.store.leased("deliver") == 0, "nothing is in flight")
    seen = lab.simulator.hook("a")
    lab.call(5)
    until(lambda: lab.delivered(hooks=["b"]) == count + 5, "the other gets later calls")

    assert seen["accepted"] == count // 4
    assert seen["received"] - seen["accepted"] <= 10, "no more than was in flight was received"
    assert lab.simulator.hook("a")["received"] == seen["received"], "no further post"
    states = list(lab.store.states("a").values())
    assert states.count("delivered") == count // 4
    assert len(states) == count + 5, "what was not delivered is listed"
    assert states.count("missing") == 5, "what was published while it was disabled is marked as missing"
    lab.hooks = ("b",)
    figures = lab.figures(lab.store)
    figures.assert_promises()
    assert (poller.runs, worker.runs) == (True, True)


SLOWNESS = [
    pytest.param(60, 2.0, 1.6, 30, id="short"),
    pytest.param(400, 15.0, 14.0, 50, id="long", marks=[pytest.mark.long, pytest.mark.timeout(400)]),
]


@pytest.mark.parametrize(("count", "timeout_s", "delay_s", "at_once"), SLOWNESS)
def test_a_slow_subscriber_with_a_backlog_gets_nothing_twice(
    lab: Lab, count: int, timeout_s: float, delay_s: float, at_once: int
) -> None:
    """Responses take almost the timeout, hundreds wait, and no lease expires before its attempt is settled."""
    lab.start_all("a", "b", timeout_s=timeout_s, subscription={"max_in_flight": at_once})
    lab.simulator.script({"delay_s": delay_s}, hooks=["a"])
    lab.call(count)
    until(lambda: lab.delivered(hooks=["b"]) == count, "the fast subscriber gets everything")
    assert lab.delivered(hooks=["a"]) < count, "long before the slow one"

    figures = lab.finish(f"{count} waiting for answers of {delay_s} s", within_s=count / at_once * delay_s + 90)

    assert figures.duplicates == 0
    hook = lab.simulator.hook("a")
    assert hook["retries"] == 0
    assert hook["in_flight_peak"] <= at_once


def test_a_subscriber_that_reads_nothing_delays_no_other(lab: Lab) -> None:
    """One subscriber accepts connections and reads nothing; the other gets every call without delay."""
    lab.start_simulator("b")
    lab.start_store()
    with unresponsive_port() as port:
        urls = {"deaf": f"http://127.0.0.1:{port}/", "b": f"{lab.simulator.subscriber_url}/hook/b"}
        lab.configure(urls=urls, timeout_s=15)
        lab.start("poller")
        worker = lab.start("worker")
        lab.await_first_poll()
        lab.call(60)
        until(lambda: lab.delivered() == 60, "the other subscriber gets everything", within_s=14)

        assert lab.store.leased("deliver") == 1, "a subscription that never answered has one attempt at a time"
        figures = lab.figures(lab.store)
        figures.assert_promises()
        assert figures.duplicates == 0
        worker.kill()


def test_a_subscriber_without_tls_gets_everything_once_its_url_is_right(lab: Lab) -> None:
    """The URL says https and the port speaks http: nothing is sent, nothing is lost, and the other gets everything."""
    lab.start_simulator("a", "b")
    lab.start_store()
    urls = {name: f"{lab.simulator.subscriber_url}/hook/{name}" for name in ("a", "b")}
    lab.configure(urls=urls | {"a": urls["a"].replace("http:", "https:")})
    lab.start("poller")
    worker = lab.start("worker")
    lab.await_first_poll()
    lab.call(4)
    until(lambda: lab.delivered(hooks=["b"]) == 4, "the other subscriber gets everything")
    failed = until(lambda: worker.lines("delivery_attempt_failed"), "the first attempt fails")
    assert failed[0]["reason"] == "the subscriber does not speak TLS on this port"
    lab.configure(urls=urls)
    assert worker.stop() == 0
    lab.start("worker")
    lab.store.make_due()

    figures = lab.finish("https that is none")

    assert figures.duplicates == 0
