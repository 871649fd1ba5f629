"""SIGTERM ends every process within its drain time, whatever else is unavailable (promise 11)."""

import pytest

from tests.faults.harness import SECRET, Lab, until, without_dns

pytestmark = pytest.mark.faults

DRAIN_S = 4
CLOSING_S = 6
"""What a process may need beyond its drain time, to close."""


@pytest.mark.parametrize("started_as", ["up", "worker", "poller", "python -m workers", "arq"])
def test_a_process_ends_without_dns_and_store(lab: Lab, started_as: str) -> None:
    """Look-ups of a provider and a subscriber hang, and the store is gone: SIGTERM still ends the process in time."""
    environ = without_dns(lab.folder)
    if environ is None:
        pytest.skip("needs a C compiler, on Linux")
    lab.start_simulator("a")
    lab.configure(source={"contacts": False})
    away = {"provider": "webfones", "base_url": "http://phones.unresolvable:80", "api_key": "x", "poll_interval_s": 1}
    lab.config["sources"] |= {"away": away}
    lab.config["subscriptions"] |= {"away": {"url": "http://crm.unresolvable/hook", "secret": SECRET}}
    lab.config["delivery"]["allowed_networks"] += ["0.0.0.0/0"]
    lab.config["drain_s"] = DRAIN_S
    lab.write_config("relay.yaml", lab.config)
    if started_as == "up":
        process, ledger = lab.start("up", environ=environ), lab.embedded()
    else:
        ledger = lab.start_store()
        process = lab.start(started_as, environ=environ)
        if started_as != "poller":
            lab.start("poller")
    lab.await_first_poll(ledger)
    lab.call(3)
    if started_as != "poller":
        until(lambda: lab.accepted() >= 3, "deliveries are made", within_s=20)
    if started_as == "up":
        ledger.client.shutdown(nosave=True)
    else:
        lab.store.kill()

    process.terminate()
    code = process.wait(within_s=DRAIN_S + CLOSING_S)

    if started_as != "arq":  # which itself fails to delete its health key then
        assert code == 0, process.written()[-2000:]
    assert not process.lines("process_exit_forced")
