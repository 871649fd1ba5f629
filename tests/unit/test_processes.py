"""What a process says when it starts."""

from pathlib import Path

import structlog

from relay.processes import warn_of_addresses
from relay.settings import Settings, load

WHSEC = "whsec_" + "A" * 32


def settings(folder: Path, url: str, *networks: str) -> Settings:
    path = folder / "relay.yaml"
    path.write_text(
        f"delivery: {{allowed_networks: {list(networks)}}}\nsubscriptions: {{crm: {{url: '{url}', secret: {WHSEC}}}}}\n"
    )
    return load(path, {})


def test_a_subscriber_that_is_never_dialled_is_named_at_the_start(tmp_path: Path) -> None:
    """Not only after the first call, when an event is already waiting for it."""
    with structlog.testing.capture_logs() as logs:
        warn_of_addresses(settings(tmp_path, "https://10.0.0.5/hook"))
        warn_of_addresses(settings(tmp_path, "http://crm.example.com/hook"))

    assert [(each["event"], each["subscription"]) for each in logs] == [("subscriber_is_never_dialled", "crm")] * 2
    assert "10.0.0.5" in logs[0]["why"]
    assert "use https" in logs[1]["why"]


def test_a_subscriber_that_may_be_dialled_is_not_spoken_of(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        warn_of_addresses(settings(tmp_path, "https://crm.example.com/hook"))
        warn_of_addresses(settings(tmp_path, "http://10.0.0.5/hook", "10.0.0.0/8"))

    assert logs == []
