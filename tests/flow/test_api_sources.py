"""Sources over HTTP: created, changed, checked, paused and removed while the relay runs."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.api import sources as sources_module
from relay.api.options import MASK
from relay.domain.call import InvalidRow
from relay.domain.polling import TierFailure
from relay.domain.time import iso
from relay.errors import ProviderError
from relay.providers.base import Purpose, Window
from relay.providers.source import Source
from relay.queue import keys as queue_keys
from relay.store import keys
from relay.store.calls import LeaseLost
from tests.fakes.webfones import FaultyWebFones
from tests.flow.api import NAMES, SOURCE, ApiClient
from tests.flow.harness import eventually
from workers.runners import add_poller

KEY = "simulated-key"
OUTSIDE = {**SOURCE, "base_url": "https://api.webfones.com:2343"}


@pytest.fixture
async def provider() -> AsyncIterator[tuple[FaultyWebFones, str]]:
    """A simulated WebFones with one account."""
    simulator = FaultyWebFones()
    simulator.add_account(KEY)
    async with simulator.serve() as base_url:
        yield simulator, base_url


async def test_a_source_is_created_and_polled(api: ApiClient, provider: tuple[FaultyWebFones, str]) -> None:
    """Events are published for calls that start after the POST."""
    simulator, base_url = provider
    add_poller(api.relay.runtime)
    poller = asyncio.create_task(api.relay.runtime.runners[-1].run())
    options = {**SOURCE, "id": "new", "base_url": base_url, "api_key": KEY, "poll_interval_s": 1}

    made = await api.post("/v1/sources", options)
    await eventually(lambda: api.get("/v1/sources/new"), lambda view: view["health"]["cursor"] is not None)
    simulator.appear(KEY)
    await api.post("/v1/sources/new/poll")
    await api.relay.until_delivered("a", 1)

    assert (made["id"], made["provider"], made["origin"], made["state"]) == ("new", "webfones", "api", "working")
    (event,) = api.relay.subscriber.events("a")
    assert event["data"]["call"]["source_id"] == "new"
    read = await api.get("/v1/sources/new")
    assert read["health"]["last_poll_at"]
    assert read["health"]["requests_left"] > 0
    api.relay.runtime.runners[-1].stop(within_s=5)
    await poller


async def test_what_a_provider_could_not_list_is_shown_as_a_gap(api: ApiClient) -> None:
    """With its bounds, the reason, and when it is tried again; the source works."""
    await api.post("/v1/sources", {**OUTSIDE, "id": "new"})
    assert (await api.get("/v1/sources/new"))["health"]["gaps"] == []
    noon = datetime(2025, 7, 1, 12, tzinfo=UTC)
    failure = TierFailure(noon, noon + timedelta(hours=50), "WebFones answered 504", noon, 1, 9000, noon)

    await api.relay.runtime.store.sources.tier_failed("new", 280_800, failure)

    view = await api.get("/v1/sources/new")
    assert view["state"] == "working"
    assert view["health"]["gaps"] == [
        {
            "since": "2025-07-01T12:00:00Z",
            "until": "2025-07-03T14:00:00Z",
            "error": "WebFones answered 504",
            "failing_since": "2025-07-01T12:00:00Z",
            "next_attempt_at": "2025-07-01T12:00:00Z",
        }
    ]


async def test_the_key_is_masked_and_the_mask_keeps_it(api: ApiClient) -> None:
    """Responses never show it; a PUT with the mask keeps it."""
    await api.post("/v1/sources", {**OUTSIDE, "id": "new"})

    read = await api.get("/v1/sources/new")
    options = {name: value for name, value in read["options"].items() if not name.endswith("_file")}
    status, put = await api.request("PUT", "/v1/sources/new", {**options, "timezone": "Europe/Berlin"})

    assert read["options"]["api_key"] == MASK
    assert (status, put["options"]["timezone"]) == (200, "Europe/Berlin")
    kept = api.relay.runtime.sources["new"]
    assert kept.kind.credential(kept.options) == SOURCE["api_key"]


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "https://hooks.example.com"},
        {"base_url": "https://hooks.example.com", "api_key": MASK},
        {"base_url": "https://api.webfones.com:8443"},
    ],
)
async def test_a_secret_does_not_follow_a_changed_address(api: ApiClient, change: dict[str, Any]) -> None:
    """Whoever may change a source could otherwise have the key sent to a server of their own."""
    await api.post("/v1/sources", {**OUTSIDE, "id": "new", "base_url": "https://api.webfones.com"})
    whole = {**OUTSIDE, "base_url": "https://api.webfones.com", "api_key": MASK} | change

    patched, problem = await api.request("PATCH", "/v1/sources/new", change)
    put, _ = await api.request("PUT", "/v1/sources/new", whole)
    anew, _ = await api.request("PATCH", "/v1/sources/new", {**change, "api_key": "another-key"})

    assert (patched, put, anew) == (422, 422, 200)
    assert problem["errors"][0]["field"] == "api_key"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "provider"),
        ({"provider": "telefax"}, "provider"),
        ({**OUTSIDE, "api_key": MASK}, "api_key"),
        ({**OUTSIDE, "api_key_file": "/etc/passwd"}, "api_key_file"),
        ({**OUTSIDE, "timezone": "Mars"}, "timezone"),
        ({**OUTSIDE, "colour": "red"}, "colour"),
        ({**OUTSIDE, "id": "Not An Id"}, "id"),
        ({**OUTSIDE, "proxy_url": "ftp://hooks.example.com"}, "proxy_url"),
        ({**OUTSIDE, "proxy_url": "file:///etc/passwd"}, "proxy_url"),
        ({**OUTSIDE, "proxy_url": "ws://hooks.example.com"}, "proxy_url"),
        ({**OUTSIDE, "proxy_url": "http:"}, "proxy_url"),
        ({**OUTSIDE, "proxy_url": "http://hooks.example.com:3128", "base_url": "http://127.0.0.1:9"}, "base_url"),
        (
            {"provider": "nfon", "oauth": {"client_id": "x", "refresh_token_file": "/etc/passwd"}},
            "oauth.refresh_token_file",
        ),
    ],
)
async def test_an_invalid_source_is_refused_and_the_field_named(
    api: ApiClient, options: dict[str, Any], field: str
) -> None:
    """`…_file` is only for the configuration; nothing is read from the relay's disk."""
    status, problem = await api.request("POST", "/v1/sources", options)

    assert (status, problem["code"]) == (422, "invalid")
    assert problem["errors"][0]["field"] == field
    assert SOURCE["api_key"] not in str(problem)


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "https://10.0.0.1"},
        {"base_url": "http://api.webfones.com"},
        {"base_url": "https://inside.example.com"},
        {"base_url": "https://metadata.example.com"},
        {"proxy_url": "http://10.0.0.1:3128"},
        {"proxy_url": "http://inside.example.com:3128"},
    ],
)
async def test_no_forbidden_address_is_accepted(api: ApiClient, options: dict[str, Any]) -> None:
    """A source created over the API must not point into the internal network."""
    assert await api.problem("POST", "/v1/sources", {**OUTSIDE, **options}) == (422, "address_refused")


async def _read(source: Source) -> None:
    now = datetime.now(UTC)
    async for _ in source.provider.calls.pages(Window(now - timedelta(hours=1), now, Purpose.POLL)):
        pass


async def test_an_address_is_checked_again_when_it_is_dialled(
    api: ApiClient, provider: tuple[FaultyWebFones, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolved to a public address may resolve to an internal one later: no connection is made."""
    _, base_url = provider
    await api.post("/v1/sources", {**SOURCE, "id": "made", "base_url": base_url, "api_key": KEY})
    source = api.relay.runtime.sources["made"]
    guard = api.relay.runtime.egress.guard(None)

    with monkeypatch.context() as forbidding:
        forbidding.setattr(guard, "allowed_networks", ())
        refused = await api.post("/v1/sources/made/check")
        with pytest.raises(ProviderError):
            await _read(source)
    allowed = await api.post("/v1/sources/made/check")

    assert (refused["ok"], allowed["ok"]) == (False, True)


async def test_a_check_reports_what_is_wrong(api: ApiClient, provider: tuple[FaultyWebFones, str]) -> None:
    """An invalid key is a result, not an error."""
    _, base_url = provider
    await api.post("/v1/sources", {**SOURCE, "id": "right", "base_url": base_url, "api_key": KEY})
    await api.post("/v1/sources", {**SOURCE, "id": "wrong", "base_url": base_url, "api_key": "another"})

    right = await api.post("/v1/sources/right/check")
    wrong = await api.post("/v1/sources/wrong/check")

    assert right["ok"], right
    assert not wrong["ok"]
    assert wrong["lines"]


async def test_a_paused_source_is_not_polled_and_publishes_what_was_ingested(api: ApiClient) -> None:
    """Pausing removes it from the poll lane; events of calls that were ingested before are published."""
    await api.post("/v1/sources", {**SOURCE, "id": "new"})
    waiting = queue_keys.waiting("poll", "new")
    assert await api.relay.redis.zscore(waiting, "new") is not None

    paused = await api.post("/v1/sources/new/pause")
    out_of_lane = await api.relay.redis.zscore(waiting, "new")
    eid = await api.publish_call("new", "1")
    refused = await api.problem("POST", "/v1/sources/new/poll")
    resumed = await api.post("/v1/sources/new/resume")

    assert (paused["state"], out_of_lane) == ("paused", None)
    assert await api.relay.until_state(eid, "delivered")
    assert refused == (409, "source_paused")
    assert await api.problem("POST", "/v1/sources/main/pause") == (409, "declared_in_configuration")
    assert resumed["state"] == "working"
    assert await api.relay.redis.zscore(waiting, "new") is not None


async def test_a_dns_outage_does_not_prevent_pausing(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unchanged URL is not checked again; a changed one is."""
    await api.post("/v1/sources", {**OUTSIDE, "id": "new"})
    monkeypatch.delitem(NAMES, "api.webfones.com")
    api.relay.runtime.egress.guard(None).clear_cache()

    paused = await api.post("/v1/sources/new/pause")

    assert paused["state"] == "paused"
    other = {"base_url": "https://api.webfones.com:9", "api_key": "another-key"}
    assert await api.problem("PATCH", "/v1/sources/new", other) == (422, "address_refused")


async def test_quarantined_rows_are_shown(api: ApiClient) -> None:
    """With the reason and an excerpt."""
    await api.relay.runtime.store.sources.quarantine("main", [InvalidRow("has no start", "7", "{'rid': 7}")])

    read = await api.get("/v1/sources/main")

    assert read["health"]["quarantined"] == 1
    assert read["quarantine"] == [{"reason": "has no start", "key": "7", "excerpt": "{'rid': 7}"}]


async def test_patch_and_pages(api: ApiClient) -> None:
    """PATCH changes one option; lists are newest first and paged."""
    for number in range(3):
        await api.post("/v1/sources", {**OUTSIDE, "id": f"s{number}", "timezone": "Europe/Berlin"})

    status, view = await api.request("PATCH", "/v1/sources/s1", {"poll_interval_s": 60, "timezone": None})
    first = await api.get("/v1/sources?limit=3")
    second = await api.get(f"/v1/sources?limit=3&cursor={first['next_cursor']}")

    assert status == 200
    assert (view["options"]["poll_interval_s"], view["options"]["timezone"]) == (60, "UTC")
    assert {item["id"] for item in first["items"]} == {"s0", "s1", "s2"}
    assert [item["id"] for item in second["items"]] == ["main"]
    assert second["next_cursor"] is None
    assert await api.problem("PATCH", "/v1/sources/s1", {"provider": "nfon"}) == (422, "invalid")
    assert await api.problem("PATCH", "/v1/sources/main", {"timezone": "UTC"}) == (409, "declared_in_configuration")
    assert await api.problem("GET", "/v1/sources?cursor=nonsense") == (422, "invalid")


async def test_backfill_is_followed_and_cancelled(api: ApiClient, provider: tuple[FaultyWebFones, str]) -> None:
    """The job is returned at once; its progress can be read, and it can be cancelled."""
    _, base_url = provider
    await api.post("/v1/sources", {**SOURCE, "id": "new", "base_url": base_url, "api_key": KEY})
    since = iso(datetime.now(UTC) - timedelta(hours=2))

    job = await api.post("/v1/sources/new/backfill", {"from": since, "force": True})
    over = await api.wait_for_job(job["id"])

    assert (job["kind"], job["source"]) == ("backfill", "new")
    assert (over["state"], over["done"]) == ("done", 1)
    assert over["counts"]["rows"] == 0
    assert await api.problem("POST", f"/v1/jobs/{job['id']}/cancel") == (409, "already_over")
    assert await api.problem("GET", "/v1/jobs/backfill-unknown") == (404, "not_found")
    future = iso(datetime.now(UTC) + timedelta(hours=2))
    assert await api.problem("POST", "/v1/sources/new/backfill", {"from": future}) == (422, "invalid")


async def test_a_backfill_that_waits_is_cancelled(api: ApiClient) -> None:
    """It waits for a provider that is unavailable, until it is cancelled."""
    await api.post("/v1/sources", {**SOURCE, "id": "new", "base_url": "http://127.0.0.1:9"})

    job = await api.post("/v1/sources/new/backfill", {"from": "2026-01-01T00:00:00Z", "force": True})
    await eventually(lambda: api.get(f"/v1/jobs/{job['id']}"), lambda view: view["state"] == "waiting")
    await api.post(f"/v1/jobs/{job['id']}/cancel")

    assert (await api.wait_for_job(job["id"]))["state"] == "cancelled"


@pytest.mark.parametrize("by_job", [False, True])
async def test_deleting_a_source_leaves_nothing(api: ApiClient, monkeypatch: pytest.MonkeyPatch, by_job: bool) -> None:
    """204 when repeated; its calls, events, lanes, contacts and cursor are gone, other sources stay."""
    if by_job:
        monkeypatch.setattr(sources_module, "MAX_INLINE_KEYS", 0)
    runtime, redis = api.relay.runtime, api.relay.redis
    await api.post("/v1/sources", {**SOURCE, "id": "new"})
    eid = await api.publish_call("new", "1")
    await api.publish_call("main", "1")
    await runtime.store.sources.quarantine("new", [InvalidRow("odd", "7", "…")])
    await redis.set(keys.contact("new", 0, "+12025550123"), b"x")
    await api.relay.until_state(eid, "delivered")

    statuses = [(await api.request("DELETE", "/v1/sources/new"))[0] for _ in range(2)]
    recreated = await api.request("POST", "/v1/sources", {**SOURCE, "id": "new"})

    async def left() -> list[bytes]:
        return [name async for name in redis.scan_iter("*:new*") if name != keys.removing("new").encode()]

    assert statuses == [204, 204]
    assert recreated[0] == 409
    assert await eventually(left, lambda names: names == []) == []
    assert await api.problem("GET", f"/v1/events/{eid}") == (404, "not_found")
    assert len((await api.get("/v1/calls"))["items"]) == 1
    assert await redis.ttl(keys.removing("new")) <= 5


async def test_nothing_is_ingested_for_a_deleted_source(api: ApiClient) -> None:
    """A backfill that is still running is refused."""
    await api.post("/v1/sources", {**SOURCE, "id": "new"})
    await api.request("DELETE", "/v1/sources/new")

    with pytest.raises(LeaseLost):
        await api.ingest_call("new", "1")


async def test_what_the_configuration_declares_is_read_only(api: ApiClient) -> None:
    """409 says where to change it."""
    refused = (409, "declared_in_configuration")

    assert await api.problem("PUT", "/v1/sources/main", OUTSIDE) == refused
    assert await api.problem("DELETE", "/v1/sources/main") == refused
    assert await api.problem("POST", "/v1/sources", {**OUTSIDE, "id": "main"}) == (409, "id_not_available")
