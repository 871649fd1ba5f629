"""A healthy source and subscription beside hundreds that hang, right after a restart (promise 5)."""

import sys
import time
from itertools import pairwise

import pytest

from tests.faults.harness import KEY, SECRET, Json, Lab, unresponsive_port, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

POLL_S = 1
HOLDS = {"hold_for_contact_s": 0, "hold_for_recording_s": 0}


def crowded_configuration(lab: Lab, port: int, *, dead: int, books: int, drips: int, hung: int) -> Json:
    """One healthy source and subscription, dead subscribers, hung address books, recordings and providers."""
    healthy = {"provider": "webfones", "base_url": lab.phones.provider_url, "budget_share": 1, **HOLDS}
    others = {"poll_interval_s": 10, "contacts": False, "recordings": False}
    accounts = [f"book{n}" for n in range(books)] + [f"drip{n}" for n in range(drips)]
    faults = [{"kind": "hang", "on": "search", "key": f"book{n}", "times": None} for n in range(books)]
    faults += [{"kind": "hang", "on": "recording", "key": f"drip{n}", "times": None} for n in range(drips)]
    lab.phones.provider(accounts=[{"key": key} for key in accounts], faults=faults)
    sources = {"main": {**healthy, "api_key": KEY, "poll_interval_s": POLL_S, "contacts": False}}
    for key in accounts:
        part = "contacts" if key.startswith("book") else "recordings"
        sources[key] = {**healthy, **others, "api_key": key, part: True}
    for n in range(hung):
        sources[f"hung{n}"] = {**healthy, **others, "api_key": f"hung{n}", "base_url": f"http://127.0.0.1:{port}"}
    urls = {"a": f"{lab.simulator.subscriber_url}/hook/a"}
    urls |= {f"dead{n}": f"http://127.0.0.1:{port}/dead{n}" for n in range(dead)}
    subscriptions = {name: {"url": url, "secret": SECRET} for name, url in urls.items()}
    return {"sources": sources, "subscriptions": subscriptions}


def bad_calls(count: int, prefix: str) -> list[Json]:
    """One call for each of the bad accounts: an answered one with audio, or one with a caller to look up."""
    audio = {"disposition": "ANSWERED", "recording_at": "2026-01-01T00:00:00Z", "recording_bytes": 2_044}
    answered = audio if prefix == "drip" else {"disposition": "NO ANSWER"}
    return [
        {"key": f"{prefix}{n}", "rid": 900_000 + n, "talk_s": 0, "outside_number": "(202) 555-0100", **answered}
        for n in range(count)
    ]


def recordings_delivered(lab: Lab) -> int:
    return int(lab.simulator.hook("a")["types"].get("call.recording.completed", 0))


def test_a_healthy_source_and_subscription_keep_their_pace_beside_hundreds_that_hang(lab: Lab) -> None:
    """200 dead subscribers, 200 hung address books, 50 hung transfers and 200 hung providers, right after a restart."""
    lab.start_simulator("a")
    lab.start_store(fsync="everysec")
    with unresponsive_port() as port:
        crowd = crowded_configuration(lab, port, dead=200, books=200, drips=50, hung=200)
        lab.configure(timeout_s=15, **crowd)
        roles = ("poller", "worker")
        processes = [lab.start(role) for role in roles]
        lab.await_first_poll()
        lab.call(1, recorded_share=1)
        until(lambda: recordings_delivered(lab) == 1, "source and subscription have a good record")
        bad = [f"book{n}" for n in range(200)] + [f"drip{n}" for n in range(50)]
        until(lambda: all(lab.store.polled(sid) for sid in bad), "their sources are polled")
        lab.phones.provider(calls=bad_calls(200, "book") + bad_calls(50, "drip"))
        until(lambda: lab.store.leased("deliver") >= 150, "the dead subscribers hold slots")
        until(lambda: lab.store.leased("contacts") >= 150, "the address books hold slots")
        until(lambda: lab.store.leased("record") >= 40, "the transfers hold slots")
        until(lambda: lab.store.leased("poll") >= 150, "the providers hold slots")
        former = lab.store.processes()
        for process in processes:
            process.kill()
        for role in roles:
            lab.start(role)
        until(lambda: not former & lab.store.processes(), "the former processes are found dead", within_s=10)

        waits_s, recording_waits_s, polls = [], [], set()
        for number in range(24):
            recorded = number % 6 == 0
            [rid] = lab.call(1, recorded_share=1 if recorded else 0)
            began = time.monotonic()

            def delivered(rid: str = rid) -> bool:
                polls.add(int(lab.store.polled("main") or 0))
                return rid in lab.simulator.hook("a")["completed"]

            until(delivered, "the call is delivered")
            waits_s.append(time.monotonic() - began)
            if recorded:
                count = len(recording_waits_s) + 2
                until(lambda count=count: recordings_delivered(lab) == count, "the recording is delivered")  # type: ignore[misc]
                recording_waits_s.append(time.monotonic() - began)

    poll_times = sorted(polls)
    late_s = max(after - before for before, after in pairwise(poll_times)) / 1000 - POLL_S
    figures = f"delivered {max(waits_s):.1f} s, recordings {max(recording_waits_s):.1f} s, polls {late_s:.1f} s late"
    sys.stdout.write(f"{figures}\n")
    assert max(waits_s) <= POLL_S + 3
    assert max(recording_waits_s) <= 8
    assert late_s <= 2
