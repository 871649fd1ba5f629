"""`relay check` finds what would lose calls, and says what to fix; it sends few requests and no events."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.cli import check
from relay.cli.check import Finding
from relay.cli.main import main
from relay.domain.call import InvalidRow
from relay.errors import SettingsError
from relay.queue import keys as queue_keys
from relay.secrets import SecretBox, load_or_create
from relay.settings import Settings, load
from relay.simulator.webfones import WebFonesEndpoint
from relay.store import keys
from relay.store.embedded import EmbeddedStore
from relay.store.sources import SourceStore
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.subscriber import ScriptedSubscriber
from tests.fakes.webfones import FaultyWebFones

KEY = "simulated-key"
SECRET = "whsec_c2ltdWxhdG9yLXNlY3JldC0wMTIzNDU2Nzg5"
OWN_KEY = "k" * 40
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@dataclass
class Place:
    """A configuration whose provider and subscriber are simulated."""

    folder: Path
    provider: FaultyWebFones
    subscriber: ScriptedSubscriber
    config: dict[str, Any]
    environ: dict[str, str]

    def path(self) -> Path:
        path = self.folder / "relay.yaml"
        path.write_text(json.dumps(self.config))
        return path

    def settings(self) -> Settings:
        return load(self.path(), self.environ)

    async def findings(self) -> list[Finding]:
        return [finding async for finding in check.check_all(self.settings())]

    async def of(self, what: str) -> Finding:
        """The one finding about a thing."""
        found = [finding for finding in await self.findings() if finding.what == what]
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
async def place(redis: Redis, valkey_url: str, tmp_path: Path) -> AsyncIterator[Place]:
    """Every check passes here; each test breaks one thing."""
    provider, subscriber = FaultyWebFones(), ScriptedSubscriber()
    provider.add_account(KEY)
    provider.appear(KEY, talk_s=180)
    subscriber.add_hook("a", SECRET)
    async with provider.serve() as provider_url, subscriber.serve() as subscriber_url:
        config = {
            "public_url": "https://relay.example.com",
            "data_dir": "data",
            "delivery": {"allowed_networks": ["127.0.0.0/8"]},
            "sources": {"main": {"provider": "webfones", "base_url": provider_url, "api_key": KEY}},
            "subscriptions": {"crm": {"url": f"{subscriber_url}/hook/a", "secret": SECRET}},
        }
        environ = {"RELAY_REDIS_URL": valkey_url, "RELAY_SECRET_KEY": OWN_KEY}
        yield Place(tmp_path, provider, subscriber, config, environ)


async def test_a_check_that_passes_sends_three_requests_and_no_event(place: Place) -> None:
    findings = await place.findings()

    # The test's Redis has no append-only file and default encodings, both of which deserve a warning.
    assert {finding.what for finding in findings if finding.status != "ok"} == {"store durability", "store compactness"}
    assert {finding.what for finding in findings} >= {
        "store",
        "source main",
        "source main zone",
        "source main budget",
        "recording storage",
        "recording links",
        "subscription crm",
    }
    assert sum(place.provider.requests.values()) == 3
    assert place.subscriber.received("a") == 0
    assert check.report(findings)["ok"] is True


async def test_the_age_of_the_newest_call_is_reported(place: Place) -> None:
    assert (await place.of("source main zone")).text == "the newest call started 3 minutes ago, read as UTC"


async def test_a_rejected_key_fails_with_what_to_set(place: Place) -> None:
    place.config["sources"]["main"]["api_key"] = "another"

    finding = await place.of("source main")

    assert finding.status == "fail"
    assert "rejected the key" in finding.text
    assert finding.fix == "set a valid api_key, or put one into the source's api_key_file"
    assert "another" not in finding.line()


async def test_an_unreachable_provider_is_reported_once(place: Place) -> None:
    place.config["sources"]["main"]["base_url"] = "http://127.0.0.1:1"

    finding = await place.of("source main")

    assert finding.status == "fail"
    assert "failed for" in finding.text


async def test_a_zone_that_puts_calls_into_the_future_fails(place: Place) -> None:
    """The account is in Berlin, the source says UTC: calls seem to start in an hour."""
    place.provider.add_account("berlin", zone="Europe/Berlin")
    place.provider.appear("berlin", talk_s=30)
    place.config["sources"]["main"]["api_key"] = "berlin"

    finding = await place.of("source main zone")

    assert finding.status == "fail"
    assert "in the future" in finding.text
    assert "timezone" in finding.fix


async def test_a_skewed_clock_is_reported(place: Place) -> None:
    place.provider.clock_skew_s = 400

    finding = await place.of("source main clock")

    assert finding.status == "fail"
    assert "ahead of" in finding.text


async def test_invalid_rows_are_reported_with_their_reasons(place: Place, redis: Redis) -> None:
    states = SourceStore(redis)
    invalid = [
        InvalidRow("the row has no rid", None, "{}"),
        InvalidRow("call_timestamp is not a valid time", "7", "{}"),
    ]
    await states.quarantine("main", invalid)
    place.provider.inject(Fault(kind=FaultKind.GARBAGE, on=WebFonesEndpoint.RECORDS))

    findings = [finding for finding in await place.findings() if finding.what == "source main rows"]

    assert [finding.status for finding in findings] == ["warn", "warn"]
    assert "are invalid" in findings[0].text
    assert "2 rows of the last 7 days" in findings[1].text
    assert "the row has no rid" in findings[1].text
    assert "call_timestamp is not a valid time" in findings[1].text


async def test_what_the_relay_has_recorded_about_a_source_is_reported(place: Place, redis: Redis) -> None:
    states = SourceStore(redis)
    await redis.hset(keys.source("main"), mapping={"error": "WebFones rejected the key", "error_since": 1})  # type: ignore[misc]
    await states.note("main", zone_off_s=18_000)
    await states.note("main", contacts_off="WebFones rejected the key for the contacts (403)")
    await states.note("main", quiet_since=datetime.now(UTC) - timedelta(hours=5))

    by_name = {finding.what: finding for finding in await place.findings()}

    assert by_name["source main polls"].status == "fail"
    assert "WebFones rejected the key" in by_name["source main polls"].text
    assert by_name["source main contacts"].status == "warn"
    assert by_name["source main delays"].text == "calls are first seen 5 hours late"
    assert "UTC-05:00" in by_name["source main delays"].fix
    assert by_name["source main calls"].status == "warn"
    assert by_name["source main calls"].text.startswith("no calls for 5 hours")


async def test_a_used_up_budget_is_a_warning_and_other_checks_continue(place: Place, redis: Redis) -> None:
    place.config["sources"]["main"]["budget_share"] = 0.001

    findings = await place.findings()

    assert not [finding for finding in findings if finding.status == "fail"]
    assert [finding for finding in findings if finding.status == "warn" and "limit is used up" in finding.text]


async def test_a_subscriber_at_a_private_address_is_rejected_with_the_setting_that_allows_it(place: Place) -> None:
    place.config["delivery"] = {}
    place.config["subscriptions"]["crm"]["url"] = "https://10.1.2.3/hook/very-secret"

    with pytest.raises(SettingsError) as caught:
        await place.findings()

    assert 'to allow it: delivery.allowed_networks: ["10.1.2.3/32"]' in str(caught.value)
    assert "very-secret" not in str(caught.value)


async def test_a_subscriber_whose_name_does_not_resolve_fails(place: Place) -> None:
    place.config["subscriptions"]["crm"]["url"] = "https://unknown.invalid/hook"

    finding = await place.of("subscription crm")

    assert finding.status == "fail"
    assert "unknown.invalid" in finding.text


async def test_a_disabled_subscription_fails_with_the_reason(place: Place, redis: Redis) -> None:
    await redis.hset(queue_keys.partition("deliver", "crm"), mapping={"disabled": "it answered 410"})  # type: ignore[misc]

    finding = await place.of("subscription crm")

    assert finding.status == "fail"
    assert "it answered 410" in finding.text


async def test_an_unreachable_store_fails_and_other_checks_continue(place: Place) -> None:
    place.environ["RELAY_REDIS_URL"] = "redis://:hunter2hunter2@127.0.0.1:1/0"

    by_name = {finding.what: finding for finding in await place.findings()}

    assert by_name["store"].status == "fail"
    assert "hunter2" not in by_name["store"].line()
    assert by_name["source main"].status == "ok"
    assert by_name["subscription crm"].status == "ok"


async def test_a_database_of_another_relay_fails_and_is_not_written_to(place: Place, redis: Redis) -> None:
    await redis.set(keys.IDENTITY, SecretBox(["x" * 40]).fingerprints()[0])

    finding = await place.of("store")

    assert finding.status == "fail"
    assert "belongs to another relay" in finding.text
    assert await redis.keys("*") == [keys.IDENTITY.encode()]


async def test_a_storage_that_cannot_be_written_fails(place: Place) -> None:
    place.folder.joinpath("a-file").write_text("in the way")
    place.config["storage_url"] = "a-file/recordings"

    finding = await place.of("recording storage")

    assert finding.status == "fail"
    assert finding.fix == "correct storage_url"


async def test_nothing_is_left_in_the_storage(place: Place) -> None:
    await place.findings()

    assert [path for path in place.folder.joinpath("data", "recordings").rglob("*") if path.is_file()] == []


async def test_presigned_links_need_an_object_store(place: Place) -> None:
    place.config["recording_links"] = "presigned"

    finding = await place.of("presigned links")

    assert finding.status == "fail"
    assert "a directory cannot sign" in finding.text


@pytest.mark.parametrize(
    ("public_url", "status", "words"),
    [
        (None, "warn", "are null in every event"),
        ("http://127.0.0.1:8080", "warn", "cannot be reached from outside"),
        ("http://localhost:8080", "warn", "cannot be reached from outside"),
        ("https://relay.example.com/phones", "ok", "start with https://relay.example.com/phones"),
    ],
)
def test_recording_links_are_reported(public_url: str | None, status: str, words: str) -> None:
    finding = check.links(load(None, {"RELAY_PUBLIC_URL": public_url or ""}))

    assert finding.status == status
    assert words in finding.text


async def test_an_embedded_store_is_started_for_the_check_and_stopped(place: Place) -> None:
    place.environ = {}

    finding = await place.of("store")
    again = EmbeddedStore(place.folder / "data")

    assert finding.status == "ok"
    assert "started for this check" in finding.text
    assert not again.socket.exists()


async def test_a_check_uses_the_embedded_store_of_a_running_relay(place: Place) -> None:
    """The directory is locked by the relay; the check connects to the same server and leaves it running."""
    place.environ = {}
    load_or_create(place.folder / "data")
    async with EmbeddedStore(place.folder / "data") as store:
        finding = await place.of("store")
        client = Redis.from_url(store.url)
        alive = await client.ping()
        await client.aclose()

    assert finding.status == "ok"
    assert f"the running relay (process {os.getpid()})" in finding.text
    assert alive


async def test_the_command_exits_with_1_when_a_check_fails(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in place.environ.items():
        monkeypatch.setenv(name, value)
    path = str(place.path())

    await asyncio.to_thread(main_ends, ["check", "-c", path], 0)
    passing = capsys.readouterr().out
    place.config["sources"]["main"]["api_key"] = "another"
    path = str(place.path())
    await asyncio.to_thread(main_ends, ["check", "-c", path], 1)
    failing = capsys.readouterr().out
    await asyncio.to_thread(main_ends, ["check", "-c", path, "--json"], 1)
    document = json.loads(capsys.readouterr().out)

    assert "✓ store: " in passing
    assert "✗ source main: " in failing
    assert "    → set a valid api_key, or put one into the source's api_key_file" in failing
    assert document["ok"] is False
    assert {"what", "status", "text", "fix"} == set(document["findings"][0])


def main_ends(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_an_invalid_setting_is_a_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("sources: {main: {provider: webfone, api_key: k}}")

    main_ends(["check", "-c", str(path)], 2)

    assert "did you mean webfones?" in capsys.readouterr().err


def starts(*ages: timedelta) -> list[datetime]:
    return sorted(NOW - age for age in ages)


BUSY = [timedelta(minutes=2 * number) for number in range(30)]


@pytest.mark.parametrize(
    ("calls", "zone", "status", "words"),
    [
        (starts(timedelta(minutes=3)), "UTC", "ok", "started 3 minutes ago, read as UTC"),
        (starts(timedelta(days=2)), "UTC", "ok", "started 2 days ago"),
        (starts(timedelta(seconds=-60)), "UTC", "ok", ""),
        (starts(timedelta(hours=-1)), "UTC", "fail", "like UTC+01:00; set the source's timezone to the account's own"),
        (starts(timedelta(hours=-5, minutes=-28)), "UTC", "fail", "UTC+05:30"),
        (starts(timedelta(hours=-5, minutes=2)), "America/New_York", "fail", "for example UTC"),
        (starts(*[timedelta(hours=5, minutes=1) + age for age in BUSY]), "UTC", "warn", "America/New_York"),
        (starts(*[timedelta(hours=5, minutes=17) + age for age in BUSY]), "UTC", "ok", "5 hours 17 minutes ago"),
        (starts(*[timedelta(minutes=4) + age for age in BUSY]), "UTC", "ok", "4 minutes ago"),
        (starts(*[timedelta(hours=5) + 9 * age for age in BUSY]), "UTC", "ok", "5 hours ago"),
    ],
)
def test_a_wrong_zone_is_detected(calls: list[datetime], zone: str, status: str, words: str) -> None:
    """Calls in the future are wrong; whole hours without calls are suspicious where calls are frequent only."""
    finding = check.zone("zone", calls, zone, now=NOW)

    assert finding.status == status
    assert words in finding.line()


@pytest.mark.parametrize(
    ("info", "names"),
    [
        ({"maxmemory": 0, "maxmemory_policy": "noeviction", "aof_enabled": 1}, []),
        ({"maxmemory": 0, "maxmemory_policy": "allkeys-lru", "aof_enabled": 1}, ["store"]),
        ({"maxmemory": 10**9, "maxmemory_policy": "allkeys-lru", "aof_enabled": 1}, ["store"]),
        ({"maxmemory": 0, "maxmemory_policy": "noeviction", "aof_enabled": 0}, ["store durability"]),
        ({"hash-max-listpack-value": "64"}, ["store compactness"]),
        ({"hash-max-listpack-value": "1024"}, []),
        ({"cluster_enabled": 1}, ["store"]),
        ({"role": "slave"}, ["store"]),
        ({}, []),
    ],
)
def test_a_redis_that_loses_data_or_wastes_memory_is_reported(info: dict[str, Any], names: list[str]) -> None:
    assert [finding.what for finding in check.durability(info)] == names


@pytest.mark.parametrize(
    ("ahead_s", "status"), [(0, None), (-4, None), (30, "warn"), (-30, "warn"), (241, "fail"), (-3600, "fail")]
)
def test_clock_skew_is_compared_with_the_tolerance_of_signatures(ahead_s: float, status: str | None) -> None:
    findings = check.skew("clock", "the store's clock", ahead_s)

    assert [finding.status for finding in findings] == ([] if status is None else [status])
