"""Subscriptions over HTTP: as automation platforms, scripts and people use them."""

import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from relay.api.options import MASK
from relay.events.payload import FLAT_FIELDS
from relay.queue import keys as queue_keys
from relay.store import keys
from tests.fakes.subscriber import ScriptedReply
from tests.flow.api import NAMES, OUTSIDE, ApiClient
from tests.flow.harness import SECRET, eventually

OWN_SECRET = "whsec_" + base64.b64encode(b"o" * 32).decode()


async def test_a_hook_subscribes_and_gets_events(api: ApiClient) -> None:
    """POST {url, events} returns an id and a secret, and the next event is delivered, signed with it."""
    created = await api.subscribe("crm", events=["call.*"])

    await api.publish_call("main", "1")
    await api.relay.until_delivered("crm", 1)

    assert (created["id"], created["state"], created["origin"]) == ("crm", "enabled", "api")
    assert api.relay.report("crm").problems() == ()


async def test_url_and_events_are_enough(api: ApiClient) -> None:
    """As Zapier sends them; id and secret are generated, and no challenge is sent."""
    created = await api.post("/v1/subscriptions", {"url": OUTSIDE, "events": ["call.completed"]})

    assert created["id"].startswith("sub_")
    assert created["secret"].startswith("whsec_")
    assert created["options"]["events"] == ["call.completed"]


async def test_several_subscriptions_for_one_url_coexist(api: ApiClient) -> None:
    """Two Zaps with the same hook are two subscriptions."""
    first = await api.post("/v1/subscriptions", {"url": OUTSIDE})
    second = await api.post("/v1/subscriptions", {"url": OUTSIDE})

    assert first["id"] != second["id"]


async def test_secrets_are_masked_and_masks_keep_the_secrets(api: ApiClient) -> None:
    """Responses show the host and masks; sending them back changes only what was edited."""
    options = {"id": "crm", "url": OUTSIDE, "secret": OWN_SECRET, "headers": {"X-Key": "hidden-value"}}
    created = await api.post("/v1/subscriptions", options)

    read = await api.get("/v1/subscriptions/crm")
    status, put = await api.request("PUT", "/v1/subscriptions/crm", {**read["options"], "description": "ours"})

    assert created["secret"] == OWN_SECRET
    assert not any(word in str(read) for word in ("secret-path", "hidden-value", OWN_SECRET))
    assert read["options"]["secret"] == MASK
    assert (status, put["options"]["description"]) == (200, "ours")
    subscription = api.relay.runtime.subscriptions["crm"]
    assert (subscription.url, dict(subscription.headers)) == (OUTSIDE, {"X-Key": "hidden-value"})
    assert subscription.options.secret.get_secret_value() == OWN_SECRET


async def test_what_is_stored_is_sealed(api: ApiClient) -> None:
    """The store contains neither the URL nor the secret in plain text."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE, "secret": OWN_SECRET})

    stored = await api.relay.redis.hget(keys.declared("subscription"), "crm")  # type: ignore[misc]

    assert stored is not None
    assert b"secret-path" not in stored
    assert OWN_SECRET.encode() not in stored


async def test_put_creates_then_replaces(api: ApiClient) -> None:
    """The first PUT returns 201 with the secret, the second 200 without, and the secret stays."""
    first_status, first = await api.request("PUT", "/v1/subscriptions/crm", {"url": OUTSIDE})
    second_status, second = await api.request(
        "PUT", "/v1/subscriptions/crm", {"url": OUTSIDE, "events": "call.completed"}
    )

    assert (first_status, second_status) == (201, 200)
    assert "secret" not in second
    subscription = api.relay.runtime.subscriptions["crm"]
    assert subscription.options.secret.get_secret_value() == first["secret"]
    assert subscription.options.events == ("call.completed",)


async def test_patch_changes_some_and_null_resets_to_the_default(api: ApiClient) -> None:
    """Other options stay as they are."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE, "direction": ["inbound"], "max_in_flight": 3})

    status, view = await api.request("PATCH", "/v1/subscriptions/crm", {"direction": None, "payload": "flat"})

    assert status == 200
    options = view["options"]
    assert (options["direction"], options["payload"], options["max_in_flight"]) == (None, "flat", 3)
    assert await api.relay.redis.hget(queue_keys.partition("deliver", "crm"), "cap") == b"3"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"url": None}, "url"),
        ({"colour": "red"}, "colour"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"events": ["call.finished"]}, "events[0]"),
        ({"payload": {"map": {"name": "data.call.["}}}, "payload.map"),
        ({"delivery": "at_most_once"}, "delivery"),
        ({"secret": "hunter2"}, "secret"),
        ({"headers": {"Host": "x"}}, "headers"),
    ],
)
async def test_an_invalid_option_is_refused_and_named(api: ApiClient, change: dict[str, Any], field: str) -> None:
    """422 names the field and repeats no value; nothing changes."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE})

    status, problem = await api.request("PATCH", "/v1/subscriptions/crm", change)

    assert (status, problem["code"]) == (422, "invalid")
    assert problem["errors"][0]["field"] == field
    assert "hunter2" not in str(problem)
    assert api.relay.runtime.subscriptions["crm"].url == OUTSIDE


async def test_a_dns_outage_does_not_prevent_disabling(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unchanged URL is not checked again; a changed one is."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE})
    monkeypatch.delitem(NAMES, "hooks.example.com")
    api.relay.runtime.egress.guard(None).clear_cache()

    status, view = await api.request("PATCH", "/v1/subscriptions/crm", {"enabled": False})

    assert (status, view["state"]) == (200, "disabled")
    other = {"url": OUTSIDE + "/2"}
    assert await api.problem("PATCH", "/v1/subscriptions/crm", other) == (422, "address_refused")


@pytest.mark.parametrize(
    "url",
    [
        "https://10.0.0.1/hook",
        "https://inside.example.com/hook",
        "https://169.254.169.254/latest",
        "https://metadata.example.com/latest",
        "https://0x7f.1.example/",
        "http://hooks.example.com/hook",
        "https://unknown.example.com/hook",
        "https://[::ffff:10.0.0.1]/",
    ],
)
async def test_no_forbidden_address_is_accepted(api: ApiClient, url: str) -> None:
    """Addresses are checked when a subscription is saved, those of names too."""
    assert await api.problem("POST", "/v1/subscriptions", {"url": url}) == (422, "address_refused")
    assert await api.problem("PUT", "/v1/subscriptions/x", {"url": url}) == (422, "address_refused")


async def test_a_tenant_learns_nothing_of_the_internal_network(api: ApiClient) -> None:
    """A tenant does not learn what a name resolves to in the operator's network."""
    token = await api.issue_token("admin", "acme")

    _, problem = await api.request("POST", "/v1/subscriptions", {"url": "https://inside.example.com/"}, token=token)
    _, to_operator = await api.request("POST", "/v1/subscriptions", {"url": "https://inside.example.com/"})

    assert "10.1.2.3" not in problem["detail"]
    assert "10.1.2.3" in to_operator["detail"]


async def test_what_the_configuration_declares_is_read_only(api: ApiClient) -> None:
    """409 says where to change it."""
    refused = (409, "declared_in_configuration")

    assert await api.problem("PUT", "/v1/subscriptions/a", {"url": OUTSIDE}) == refused
    assert await api.problem("PATCH", "/v1/subscriptions/a", {"payload": "flat"}) == refused
    assert await api.problem("DELETE", "/v1/subscriptions/a") == refused
    assert await api.problem("POST", "/v1/subscriptions/a/rotate-secret") == refused
    assert await api.problem("POST", "/v1/subscriptions", {"id": "a", "url": OUTSIDE}) == (409, "id_not_available")
    assert (await api.get("/v1/subscriptions/a"))["origin"] == "configuration"


async def test_an_id_is_unique(api: ApiClient) -> None:
    """A second POST with the same id does not replace the first."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE})

    assert await api.problem("POST", "/v1/subscriptions", {"id": "crm", "url": OUTSIDE}) == (409, "id_not_available")
    assert await api.problem("PUT", "/v1/subscriptions/No%20Id", {"url": OUTSIDE}) == (422, "invalid")


async def test_unsubscribing_can_be_repeated(api: ApiClient) -> None:
    """DELETE is 204 every time, nothing more is sent, and nothing of it stays in the store."""
    await api.subscribe("crm")
    api.relay.subscriber.script("crm", ScriptedReply(status=500))
    eid = await api.publish_call("main", "1")
    await api.relay.until_attempts(eid, 1, sub="crm")

    statuses = [(await api.request("DELETE", "/v1/subscriptions/crm"))[0] for _ in range(3)]
    received_before = api.relay.report("crm").received
    await api.publish_call("main", "2")
    await api.relay.until_delivered("a", 2)

    assert statuses == [204, 204, 204]
    assert api.relay.report("crm").received == received_before
    assert await api.problem("GET", "/v1/subscriptions/crm") == (404, "not_found")
    left = [name async for name in api.relay.redis.scan_iter("*:crm*")]
    assert left == [queue_keys.partition("deliver", "crm").encode()]
    assert 0 < await api.relay.redis.ttl(queue_keys.partition("deliver", "crm")) <= 60
    assert not await api.relay.redis.hexists(keys.event(eid), "crm")  # type: ignore[misc]


async def test_an_id_can_be_used_again_after_unsubscribing(api: ApiClient) -> None:
    """The new subscription starts fresh and gets events."""
    await api.subscribe("crm")
    await api.request("DELETE", "/v1/subscriptions/crm")

    await api.subscribe("crm")
    await api.publish_call("main", "1")
    await api.relay.until_delivered("crm", 1)

    assert (await api.get("/v1/subscriptions/crm"))["state"] == "enabled"


async def test_rotation_keeps_the_previous_secret_for_a_day(api: ApiClient) -> None:
    """Both secrets sign until then, so a subscriber with the old one keeps working."""
    created = await api.subscribe("crm")

    rotated = await api.post("/v1/subscriptions/crm/rotate-secret")
    await api.publish_call("main", "1")
    await api.relay.until_delivered("crm", 1)

    assert rotated["secret"] != created["secret"]
    assert api.relay.report("crm").signature_failures == 0  # the hook verifies with the previous one
    assert api.relay.subscriber.last_headers("crm")["webhook-signature"].count("v1,") == 2
    mine = await api.post("/v1/subscriptions/crm/rotate-secret", {"secret": OWN_SECRET})
    assert mine["secret"] == OWN_SECRET
    assert await api.problem("POST", "/v1/subscriptions/crm/rotate-secret", {"secret": OWN_SECRET}) == (422, "invalid")


async def test_a_subscription_is_disabled_and_enabled(api: ApiClient) -> None:
    """While it is disabled nothing is queued; its events are listed as missing and can be replayed."""
    await api.subscribe("crm")

    off = await api.post("/v1/subscriptions/crm/disable", {"reason": "maintenance"})
    eid = await api.publish_call("main", "1")
    refused = await api.problem("POST", "/v1/subscriptions/crm/test")
    on = await api.post("/v1/subscriptions/crm/enable")
    replayed = await api.post("/v1/subscriptions/crm/replay", {"since": "2026-01-01T00:00:00Z", "status": "missing"})
    job = await api.wait_for_job(replayed["job"])
    await api.relay.until_delivered("crm", 1)

    assert (off["state"], off["disabled_reason"]) == ("disabled", "maintenance")
    assert refused == (409, "subscription_disabled")
    assert on["state"] == "enabled"
    assert (job["state"], job["counts"]["queued"]) == ("done", 1)
    assert (await api.relay.until_state(eid, "delivered", sub="crm")).attempts == 1


async def test_a_subscription_can_be_created_disabled(api: ApiClient) -> None:
    """One that is created or changed with enabled: false gets nothing until it is enabled."""
    await api.subscribe("crm", enabled=False)

    before = await api.get("/v1/subscriptions/crm")
    after = await api.post("/v1/subscriptions/crm/enable")

    assert (before["state"], after["state"], after["options"]["enabled"]) == ("disabled", "enabled", True)
    assert [item["id"] for item in (await api.get("/v1/subscriptions?state=disabled"))["items"]] == []


async def test_a_test_event_ignores_the_filters(api: ApiClient) -> None:
    """`webhook.test` goes to this subscription alone."""
    await api.subscribe("crm", events=["call.completed"])

    sent = await api.post("/v1/subscriptions/crm/test")
    await api.relay.until_delivered("crm", 1)

    (event,) = api.relay.subscriber.events("crm")
    assert (event["id"], event["type"]) == (sent["event_id"], "webhook.test")
    assert event["data"]["subscription"]["id"] == "crm"
    assert api.relay.report("a").received == 0


async def test_one_event_is_replayed(api: ApiClient) -> None:
    """One that was delivered only with force, under the same id."""
    eid = await api.publish_call("main", "1")
    await api.relay.until_state(eid, "delivered")

    plain = await api.post("/v1/subscriptions/a/replay", {"event_id": eid})
    forced = await api.post("/v1/subscriptions/a/replay", {"event_id": eid, "force": True})
    await api.relay.subscriber.until(lambda: api.relay.report("a").received == 2)

    assert (plain["result"], forced["result"]) == ("delivered_already", "queued")
    assert api.relay.report("a").duplicates == {eid: 1}
    assert await api.problem("POST", "/v1/subscriptions/a/replay", {}) == (422, "invalid")
    missing = {"event_id": "evt_" + "a" * 26}
    assert await api.problem("POST", "/v1/subscriptions/a/replay", missing) == (404, "not_found")


async def test_a_new_subscription_can_get_earlier_events(api: ApiClient) -> None:
    """`status: any` replays what matches now, in the original order, and nothing else."""
    for number in range(3):
        await api.publish_call("main", str(number))
    await api.subscribe("crm", events=["call.completed"])

    replayed = await api.post("/v1/subscriptions/crm/replay", {"since": "2026-01-01T00:00:00Z", "status": "any"})
    job = await api.wait_for_job(replayed["job"])
    await api.relay.until_delivered("crm", 3)

    assert job["counts"]["queued"] == 3
    assert api.relay.report("crm").completed == {"0", "1", "2"}


async def test_samples_are_an_array_of_payloads(api: ApiClient) -> None:
    """Generated before there are events, real ones afterwards; the same fields, newest first, unique ids."""
    await api.subscribe("flat", payload="flat")
    await api.subscribe("mine", payload={"map": {"id": "id", "who": "data.call.external_number"}})

    made_up = await api.get("/v1/subscriptions/flat/sample")
    mapped = await api.get("/v1/subscriptions/mine/sample?limit=2")
    for number in range(4):
        await api.publish_call("main", str(number))
    real = await api.get("/v1/subscriptions/flat/sample?limit=3")
    await api.relay.until_delivered("flat", 4)

    assert [tuple(item) for item in made_up] == [FLAT_FIELDS] * 3
    assert len({item["id"] for item in made_up}) == 3
    assert [set(item) for item in mapped] == [{"id", "who"}] * 2
    assert [item["provider_call_id"] for item in real] == ["3", "2", "1"]
    received = {item["id"]: item for item in api.relay.subscriber.events("flat")}
    assert all(received[item["id"]] == item for item in real)


async def test_a_test_url_of_n8n_is_accepted_with_a_warning(api: ApiClient) -> None:
    """It works only while n8n listens, which the warning explains."""
    created = await api.post("/v1/subscriptions", {"url": "https://hooks.example.com/webhook-test/1"})
    other = await api.post("/v1/subscriptions", {"url": OUTSIDE, "sources": ["not-yet"]})

    assert "/webhook/" in created["warnings"][0]
    assert "not-yet" in other["warnings"][0]


async def test_pages_are_newest_first_and_end(api: ApiClient) -> None:
    """Paging returns each once; those of the configuration come last."""
    names = [f"s{number}" for number in range(5)]
    for name in names:
        await api.post("/v1/subscriptions", {"id": name, "url": OUTSIDE})

    seen: list[str] = []
    cursor = ""
    while True:
        page = await api.get(f"/v1/subscriptions?limit=2{cursor}")
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"

    assert sorted(seen[:5]) == names
    assert seen[5:] == ["a"]
    assert seen[0] != names[0]


async def test_other_processes_follow_within_a_second(api: ApiClient) -> None:
    """What is created here is used elsewhere at their next check."""
    runtime = api.relay.runtime
    before = await runtime.registry.declarations.version()

    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE})
    await api.post("/v1/subscriptions/crm/disable")

    assert await runtime.registry.declarations.version() == before + 1
    assert await runtime.registry.load()
    assert runtime.subscriptions["crm"].url == OUTSIDE


@pytest.mark.parametrize(
    ("health", "status"),
    [
        ({}, "ok"),
        ({"failing_since": 1}, "failing"),
        ({"failing_since": 1, "circuit_opened_at": 1}, "circuit_open"),
        ({"failing_since": 1, "circuit_opened_at": 1, "disabled": "moving"}, "disabled"),
    ],
)
async def test_a_subscription_has_one_status(api: ApiClient, health: dict[str, Any], status: str) -> None:
    """The most severe of what its health says."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE})
    if health:
        await api.relay.redis.hset(queue_keys.partition("deliver", "crm"), mapping=health)  # type: ignore[misc]

    view = await api.get("/v1/subscriptions/crm")

    assert (view["status"], view["state"] == "disabled") == (status, status == "disabled")


# --- Zapier's reverse unsubscribe ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def zapier(monkeypatch: pytest.MonkeyPatch, *, status: int = 200) -> AsyncIterator[tuple[str, list[str]]]:
    """Serve as hooks.zapier.com would; yields the hook's URL and the methods of its requests."""
    methods: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        methods.append(request.method)
        return web.Response(status=status if request.method == "POST" else 200)

    monkeypatch.setattr("relay.delivery.subscriptions.ZAPIER_HOSTS", frozenset({"127.0.0.1"}))
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hooks/standard/1", methods
    finally:
        await runner.cleanup()


async def _until(expected: list[str], methods: list[str]) -> None:
    async def read() -> list[str]:
        return methods

    await eventually(read, lambda current: current == expected)


async def test_a_zap_is_notified_once_that_its_hook_ends(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disabled and then deleted: one DELETE."""
    async with zapier(monkeypatch) as (url, methods):
        await api.post("/v1/subscriptions", {"id": "zap", "url": url})

        await api.post("/v1/subscriptions/zap/disable")
        await _until(["DELETE"], methods)
        await api.request("DELETE", "/v1/subscriptions/zap")
        await api.relay.runtime.aclose()

        assert methods == ["DELETE"]


@pytest.mark.parametrize("how", [{"path": "?unsubscribed_by=hook"}, {"headers": {"User-Agent": "Zapier"}}])
async def test_a_zap_that_unsubscribes_itself_is_not_notified(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """With the query parameter, or with Zapier's User-Agent."""
    async with zapier(monkeypatch) as (url, methods):
        await api.post("/v1/subscriptions", {"id": "zap", "url": url})

        path = f"/v1/subscriptions/zap{how.get('path', '')}"
        status, _ = await api.request("DELETE", path, headers=how.get("headers", {}))
        await api.relay.runtime.aclose()

        assert (status, methods) == (204, [])


async def test_a_zap_that_is_off_is_not_notified(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 410 the subscription is disabled, and no DELETE is sent."""
    async with zapier(monkeypatch, status=410) as (url, methods):
        await api.post("/v1/subscriptions", {"id": "zap", "url": url})
        await api.publish_call("main", "1")

        view = await eventually(lambda: api.get("/v1/subscriptions/zap"), lambda view: view["state"] == "disabled")
        await api.relay.runtime.aclose()

        assert "410" in view["disabled_reason"]
        assert methods == ["POST"]


async def test_a_hook_elsewhere_gets_no_delete(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notification is specific to Zapier."""
    async with zapier(monkeypatch) as (url, methods):
        monkeypatch.setattr("relay.delivery.subscriptions.ZAPIER_HOSTS", frozenset({"hooks.zapier.com"}))
        await api.post("/v1/subscriptions", {"id": "crm", "url": url, "secret": SECRET})

        await api.request("DELETE", "/v1/subscriptions/crm")
        await api.relay.runtime.aclose()

        assert methods == []


async def test_headers_do_not_follow_a_changed_address(api: ApiClient) -> None:
    """They may hold a credential: another host or port needs them anew, another path does not."""
    url, headers = "https://hooks.example.com/one", {"authorization": "Bearer of-the-crm"}
    await api.post("/v1/subscriptions", {"id": "crm", "url": url, "headers": headers})
    elsewhere = {"url": "https://hooks.zapier.com/one"}

    refused = await api.problem("PATCH", "/v1/subscriptions/crm", elsewhere)
    masked = await api.problem("PUT", "/v1/subscriptions/crm", {**elsewhere, "headers": {"authorization": MASK}})
    port = await api.problem("PATCH", "/v1/subscriptions/crm", {"url": "https://hooks.example.com:8443/one"})
    path, _ = await api.request("PATCH", "/v1/subscriptions/crm", {"url": "https://hooks.example.com/two"})
    anew, _ = await api.request("PATCH", "/v1/subscriptions/crm", {**elsewhere, "headers": {"x-key": "new"}})

    assert refused == masked == port == (422, "invalid")
    assert (path, anew) == (200, 200)
