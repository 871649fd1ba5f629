"""Authorization: tokens, roles, and tenants that are isolated from each other."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.api.routes import TABLE
from relay.domain.call import Party
from relay.store import keys
from relay.store.lanes import LaneName
from tests.fakes.subscriber import ScriptedReply
from tests.flow.api import OUTSIDE, SOURCE, TOKEN, ApiClient, open_api
from tests.flow.harness import eventually

DECLARED = {"source_id": "main", "subscription_id": "a"}
"""Ids of the configuration."""


@dataclass
class Tenants:
    """Two tenants with a source, a subscription, a call and an event each."""

    api: ApiClient
    acme: str
    acme_viewer: str
    other: str
    event: str
    call: str

    @property
    def of_acme(self) -> dict[str, str]:
        """Acme's ids, by path parameter."""
        return {
            "source_id": "acme",
            "subscription_id": "acme-crm",
            "event_id": self.event,
            "call_id": self.call,
            "delivery_id": f"{self.event}.acme-crm",
        }


@pytest.fixture
async def tenants(api: ApiClient) -> Tenants:
    """Two tenants."""
    acme, other = await api.issue_token("admin", "acme"), await api.issue_token("admin", "other")
    viewer = await api.issue_token("viewer", "acme")
    await api.post("/v1/sources", {**SOURCE, "id": "acme"}, token=acme)
    await api.post("/v1/sources", {**SOURCE, "id": "other"}, token=other)
    await api.subscribe("acme-crm", token=acme)
    await api.subscribe("other-crm", token=other)
    event = await api.publish_call("acme", "1")
    await api.publish_call("other", "1")
    await api.publish_call("main", "1")
    await api.relay.until_delivered("acme-crm", 1)
    await api.relay.until_delivered("other-crm", 1)
    await api.relay.until_delivered("a", 3)
    call = (await api.get(f"/v1/events/{event}"))["data"]["call"]["id"]
    return Tenants(api, acme, viewer, other, event, call)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        "Bearer " + "x" * 5000,
        "Bearer relay_tok_aaaaaaaaaaaaaaaa." + "x" * 43,
        "Bearer \xff\xfe",
    ],
)
async def test_every_route_requires_a_token(api: ApiClient, header: str | None) -> None:
    """401 with the scheme, for every route."""
    headers = {} if header is None else {"Authorization": header}
    for route in TABLE:
        async with api.http.request(route.method, api.base + _filled(route.path, DECLARED), headers=headers) as answer:
            problem = await answer.json(content_type=None)
        assert (answer.status, problem["code"]) == (401, "unauthorized"), route.path
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_token_is_shown_once_and_revoked_at_once(api: ApiClient) -> None:
    """Only a digest is stored; a revoked token is refused from then on; revoking again is 404."""
    made = await api.post("/v1/tokens", {"name": "n8n", "role": "viewer"})
    token = made["token"]

    listed = await api.get("/v1/tokens")
    works, _ = await api.request("GET", "/v1/sources", token=token)
    statuses = [(await api.request("DELETE", f"/v1/tokens/{made['id']}"))[0] for _ in range(2)]
    ended, _ = await api.request("GET", "/v1/sources", token=token)

    assert [item["id"] for item in listed["items"]] == [made["id"]]
    assert token not in str(listed)
    assert (works, statuses, ended) == (200, [204, 404], 401)
    stored = await api.relay.redis.hgetall(keys.declared("token"))  # type: ignore[misc]
    assert token.encode() not in b"".join(stored.values())


async def test_an_embedded_relay_has_its_own_token(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without api.tokens the one in data_dir is the operator's."""
    async with open_api(redis, valkey_url, tmp_path, monkeypatch, api={"port": 0}) as opened:
        token = (tmp_path / "api_token").read_text().strip()

        assert (await opened.request("GET", "/v1/tokens"))[0] == 401
        assert (await opened.request("GET", "/v1/tokens", token=token))[0] == 200


async def test_tokens_are_listed_in_pages(api: ApiClient) -> None:
    """Newest first."""
    for number in range(3):
        await api.post("/v1/tokens", {"name": str(number), "role": "viewer"})

    first = await api.get("/v1/tokens?limit=2")
    second = await api.get(f"/v1/tokens?limit=2&cursor={first['next_cursor']}")

    names = [item["name"] for page in (first, second) for item in page["items"]]
    assert sorted(names) == ["0", "1", "2"]
    assert second["next_cursor"] is None
    assert await api.problem("GET", "/v1/tokens?cursor=W10") == (422, "invalid")


async def test_only_the_operator_manages_tokens(tenants: Tenants) -> None:
    """A tenant's admin issues none, not even for its own tenant."""
    options = {"name": "mine", "role": "admin", "tenant": "acme"}
    for method, path, body in (
        ("GET", "/v1/tokens", None),
        ("POST", "/v1/tokens", options),
        ("DELETE", "/v1/tokens/x", None),
    ):
        assert await tenants.api.problem(method, path, body, token=tenants.acme) == (403, "forbidden")


# --- roles -----------------------------------------------------------------------------------------------------------


def _filled(path: str, names: dict[str, str]) -> str:
    for name, value in {"job_id": "backfill-x", "event_type": "call.completed", "token_id": "x", **names}.items():
        path = path.replace("{" + name + "}", value)
    for name in ("event_id", "call_id", "delivery_id"):
        path = path.replace("{" + name + "}", "none")
    return path


async def test_a_viewer_changes_nothing(tenants: Tenants) -> None:
    """Every changing route is 403, whatever the body; reading works."""
    changing = [route for route in TABLE if route.method != "GET"]
    assert all(route.scope in ("admin", "operator") for route in changing)
    viewer = await tenants.api.issue_token("viewer")
    for token in (viewer, tenants.acme_viewer):
        for route in changing:
            path = _filled(route.path, tenants.of_acme)
            assert await tenants.api.problem(route.method, path, {}, token=token) == (403, "forbidden"), path
    for path in ("/v1/sources/acme", "/v1/subscriptions/acme-crm", f"/v1/events/{tenants.event}", "/v1/event-types"):
        await tenants.api.get(path, token=tenants.acme_viewer)


# --- tenants ---------------------------------------------------------------------------------------------------------


async def test_a_tenant_lists_only_its_own(tenants: Tenants) -> None:
    """Its lists contain its own resources and nothing else; the operator's contain all."""
    expected = {
        "/v1/sources": ["acme"],
        "/v1/subscriptions": ["acme-crm"],
        "/v1/calls": [tenants.call],
        "/v1/events": [tenants.event],
        "/v1/deliveries": [f"{tenants.event}.acme-crm"],
    }
    for path, ids in expected.items():
        listed = (await tenants.api.get(path, token=tenants.acme))["items"]
        everything = (await tenants.api.get(path))["items"]
        assert [item["id"] for item in listed] == ids, path
        assert len(everything) >= 3, path
    sample = await tenants.api.get("/v1/event-types/call.completed/sample", token=tenants.acme)
    assert [item["id"] for item in sample] == [tenants.event]


async def test_another_tenant_finds_nothing_by_guessing(tenants: Tenants) -> None:
    """404, never 403, for every route with an id, exactly as for what does not exist."""
    unknown = {
        "source_id": "unknown",
        "subscription_id": "unknown",
        "event_id": "evt_" + "a" * 26,
        "call_id": "call_" + "a" * 26,
        "delivery_id": "evt_" + "a" * 26 + ".unknown",
    }
    bodies: dict[str, Any] = {
        "backfill": {"from": "2026-01-01T00:00:00Z"},
        "replay": {"event_id": tenants.event},
    }
    for route in TABLE:
        if "{" not in route.path or route.method in ("PUT", "DELETE") or route.scope == "operator":
            continue
        if "{job_id}" in route.path or "{event_type}" in route.path:
            continue
        body = None if route.method == "GET" else bodies.get(route.path.rpartition("/")[2], {})
        hidden = await tenants.api.request(
            route.method, _filled(route.path, tenants.of_acme), body, token=tenants.other
        )
        absent = await tenants.api.request(route.method, _filled(route.path, unknown), body, token=tenants.other)
        assert hidden[0] == 404, route.path
        assert hidden == absent, route.path
    for query in ("/v1/calls?source=acme", "/v1/events?source=acme", "/v1/events?subscription=acme-crm",
                  "/v1/deliveries?subscription=acme-crm", f"/v1/deliveries?event={tenants.event}"):  # fmt: skip
        assert await tenants.api.problem("GET", query, token=tenants.other) == (404, "not_found")


async def test_another_tenant_deletes_and_replaces_nothing(tenants: Tenants) -> None:
    """DELETE is 204, as for what does not exist, and does nothing; PUT only says that the id is not available."""
    api = tenants.api
    for path, options in (("/v1/sources/acme", SOURCE), ("/v1/subscriptions/acme-crm", {"url": OUTSIDE})):
        assert (await api.request("DELETE", path, token=tenants.other))[0] == 204
        status, problem = await api.request("PUT", path, options, token=tenants.other)
        assert (status, problem["code"]) == (409, "id_not_available")
        assert "acme" not in str(problem)
        created = await api.problem(
            "POST", path.rpartition("/")[0], {**options, "id": path.rpartition("/")[2]}, token=tenants.other
        )
        assert created == (409, "id_not_available")
        assert (await api.get(path))["tenant"] == "acme"
    for path in ("/v1/sources/main", "/v1/subscriptions/a"):
        assert (await api.request("DELETE", path, token=tenants.other))[0] == 204
        assert await api.problem("PUT", path, {**SOURCE, "url": OUTSIDE}, token=tenants.other) == (
            409,
            "id_not_available",
        )
        await api.get(path)


async def test_two_tenants_create_one_id_at_once(tenants: Tenants) -> None:
    """One is first, the other gets 409; nothing is overwritten."""
    api = tenants.api
    for path, options in (("/v1/sources/both", SOURCE), ("/v1/subscriptions/both", {"url": OUTSIDE})):
        asked = [api.request("PUT", path, options, token=token) for token in (tenants.acme, tenants.other) * 3]
        statuses = sorted(status for status, _ in await asyncio.gather(*asked))
        assert statuses == [200, 200, 201, 409, 409, 409], path


async def test_an_event_of_one_tenant_is_not_replayed_to_another(tenants: Tenants) -> None:
    """Not even by the operator; a subscription of the operator may get it."""
    api, options = tenants.api, {"event_id": tenants.event, "force": True}

    refused = await api.problem("POST", "/v1/subscriptions/other-crm/replay", options)
    taken = await api.post("/v1/subscriptions/a/replay", options)
    many = await api.post("/v1/subscriptions/other-crm/replay", {"since": "2026-01-01T00:00:00Z", "status": "any"})
    job = await api.wait_for_job(many["job"])

    assert refused == (409, "not_for_this_subscription")
    assert taken["result"] == "queued"
    assert job["counts"]["queued"] == 0
    assert job["counts"]["delivered"] == 1


async def test_the_id_of_a_removed_subscription_stays_reserved_for_its_tenant(tenants: Tenants) -> None:
    """Another tenant cannot use the id before every process knows of the removal."""
    api = tenants.api
    await api.request("DELETE", "/v1/subscriptions/acme-crm", token=tenants.acme)
    await api.request("DELETE", "/v1/sources/acme", token=tenants.acme)

    taken = await api.problem("PUT", "/v1/subscriptions/acme-crm", {"url": OUTSIDE}, token=tenants.other)
    taken_source = await api.problem("PUT", "/v1/sources/acme", SOURCE, token=tenants.other)
    status, _ = await api.request("PUT", "/v1/subscriptions/acme-crm", {"url": OUTSIDE}, token=tenants.acme)

    assert (taken, taken_source) == ((409, "id_not_available"), (409, "id_not_available"))
    assert status == 201


async def test_the_next_tenant_of_a_source_id_does_not_get_its_former_calls(tenants: Tenants) -> None:
    """Another tenant that uses the id later finds nothing of the former source."""
    api = tenants.api
    await api.request("DELETE", "/v1/sources/acme", token=tenants.acme)
    await api.relay.redis.delete(keys.removing("acme"))  # the reservation has expired

    status, _ = await api.request("PUT", "/v1/sources/acme", SOURCE, token=tenants.other)

    assert status == 201
    assert (await api.get("/v1/calls?source=acme", token=tenants.other))["items"] == []
    assert await api.problem("GET", f"/v1/calls/{tenants.call}", token=tenants.other) == (404, "not_found")
    assert await api.problem("GET", f"/v1/events/{tenants.event}", token=tenants.other) == (404, "not_found")


async def test_ids_removed_from_the_configuration_stay_with_the_operator(tenants: Tenants) -> None:
    """While they have calls or deliveries, a tenant cannot make them again: it would get the operator's."""
    api, runtime = tenants.api, tenants.api.relay.runtime
    without = runtime.settings.model_copy(update={"sources": {}, "subscriptions": {}})
    runtime.registry.reconfigure(without)
    await runtime.registry.load()

    source = await api.problem("PUT", "/v1/sources/main", SOURCE, token=tenants.acme)
    posted = await api.problem("POST", "/v1/sources", {**SOURCE, "id": "main"}, token=tenants.acme)
    subscription = await api.problem("PUT", "/v1/subscriptions/a", {"url": OUTSIDE}, token=tenants.acme)

    assert source == posted == subscription == (409, "id_not_available")
    status, _ = await api.request("PUT", "/v1/sources/main", SOURCE)
    assert status == 201, "the operator may use it again"
    await api.relay.redis.delete(keys.deliveries_of("a"))
    status, _ = await api.request("PUT", "/v1/subscriptions/a", {"url": OUTSIDE}, token=tenants.acme)
    assert status == 201, "nothing of the former one is left"


async def test_an_id_that_the_configuration_had_meanwhile_is_not_its_tenants_any_more(tenants: Tenants) -> None:
    """The calls of that time are the operator's: when the configuration lets the id go, the tenant's stays off."""
    api, runtime = tenants.api, tenants.api.relay.runtime
    before = runtime.settings
    taken = before.model_copy(update={"sources": {**before.sources, "acme": before.sources["main"]}})
    for settings in (taken, before):
        runtime.registry.reconfigure(settings)
        await runtime.registry.announce()
        await runtime.registry.load()

    assert await api.problem("GET", "/v1/sources/acme", token=tenants.acme) == (404, "not_found")
    assert await api.problem("GET", f"/v1/calls/{tenants.call}", token=tenants.acme) == (404, "not_found")


async def test_a_delivery_of_another_tenants_event_is_never_sent(tenants: Tenants) -> None:
    """Not even when it is in the lane: the attempt checks both tenants."""
    api = tenants.api
    document = await api.get(f"/v1/events/{tenants.event}")
    deliveries = api.relay.runtime.store.deliveries
    now_ms = api.relay.runtime.lanes[LaneName.DELIVER].store_now_ms

    await deliveries.replay(tenants.event, document["data"]["call"]["id"], ["other-crm"], at_ms=now_ms, force=True)
    api.relay.runtime.wake_ups(LaneName.DELIVER)

    await api.relay.until_state(tenants.event, "dropped", sub="other-crm")
    assert api.relay.report("other-crm").events == 1, "its own"


async def test_a_tenant_creates_only_for_itself(tenants: Tenants) -> None:
    """Its token cannot name another tenant; the operator's can name any, and not change it."""
    api = tenants.api
    options = {"url": OUTSIDE, "tenant": "other"}

    assert await api.problem("POST", "/v1/subscriptions", options, token=tenants.acme) == (422, "invalid")
    assert (await api.post("/v1/subscriptions", {**options, "id": "theirs"}))["tenant"] == "other"
    assert await api.problem("PUT", "/v1/subscriptions/theirs", {"url": OUTSIDE, "tenant": "acme"}) == (422, "invalid")
    assert (await api.post("/v1/sources", {**SOURCE, "tenant": "acme", "id": "second"}))["tenant"] == "acme"
    assert await api.problem("PUT", "/v1/sources/second", {**SOURCE, "tenant": "other"}) == (422, "invalid")
    await api.get("/v1/sources/second", token=tenants.acme)


async def test_a_tenant_erases_a_person_in_its_own_calls_only(tenants: Tenants) -> None:
    """The other tenant's call with the same number stays."""
    api, jo = tenants.api, Party(number="+12025550999")
    mine = await api.publish_call("acme", "9", external=jo, caller=jo)
    theirs = await api.publish_call("other", "9", external=jo, caller=jo)

    result = await api.post("/v1/erase", {"number": "+12025550999"}, token=tenants.acme)

    assert (result["calls"], result["events"]) == (1, 1)
    assert await api.problem("GET", f"/v1/events/{mine}") == (404, "not_found")
    await api.get(f"/v1/events/{theirs}")


async def test_jobs_belong_to_the_tenant_that_started_them(tenants: Tenants) -> None:
    """Another tenant neither reads nor cancels them; the operator does."""
    api = tenants.api
    job = (await api.post("/v1/sources/acme/backfill", {"from": "2026-01-01T00:00:00Z"}, token=tenants.acme))["id"]

    assert await api.problem("GET", f"/v1/jobs/{job}", token=tenants.other) == (404, "not_found")
    assert await api.problem("POST", f"/v1/jobs/{job}/cancel", token=tenants.other) == (404, "not_found")
    await api.get(f"/v1/jobs/{job}", token=tenants.acme)
    over = await eventually(lambda: api.get(f"/v1/jobs/{job}"), lambda view: view["state"] == "failed")
    assert "polled" in over["error"]


async def test_operational_events_of_a_tenant_stay_with_the_tenant(tenants: Tenants) -> None:
    """`subscription.disabled` goes to that tenant and the operator, not to another tenant."""
    api = tenants.api
    for name, token in (("acme-ops", tenants.acme), ("other-ops", tenants.other)):
        await api.subscribe(name, token=token, events=["subscription.*"])

    await api.relay.runtime.lifecycle.disable_unhealthy("acme-crm", "no successful delivery")
    api.relay.runtime.wake_ups(LaneName.DELIVER)
    await api.relay.until_delivered("acme-ops", 1)

    (event,) = api.relay.subscriber.events("acme-ops")
    assert event["type"] == "subscription.disabled"
    assert [row["subscription_id"] for row in (await api.get(f"/v1/deliveries?event={event['id']}"))["items"]] == [
        "acme-ops"
    ]
    await api.get(f"/v1/events/{event['id']}", token=tenants.acme)
    assert await api.problem("GET", f"/v1/events/{event['id']}", token=tenants.other) == (404, "not_found")


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:9", "127.0.0.1:6379", "10.1.2.3", "inside.example.com"])
async def test_a_tenant_without_a_grant_reaches_nothing_inside(tenants: Tenants, host: str) -> None:
    """`delivery.allowed_networks` is the operator's."""
    token = await tenants.api.issue_token("admin", "third")

    for scheme in ("http", "https"):
        options = {"url": f"{scheme}://{host}/hook"}
        refused = await tenants.api.problem("POST", "/v1/subscriptions", options, token=token)
        source = await tenants.api.problem("POST", "/v1/sources", {**SOURCE, "base_url": options["url"]}, token=token)
        assert refused == source == (422, "address_refused")


async def test_a_grant_is_for_its_ports(tenants: Tenants) -> None:
    """`delivery.tenant_networks` names networks and ports."""
    api = tenants.api
    granted = {"url": "http://127.0.0.1:9/hook"}
    other_port = {"url": "http://127.0.0.1:6379/hook"}

    status, _ = await api.request("POST", "/v1/subscriptions", granted, token=tenants.acme)

    assert status == 201
    assert await api.problem("POST", "/v1/subscriptions", other_port, token=tenants.acme) == (422, "address_refused")


async def test_a_tenant_gets_no_excerpt_of_an_answer_from_inside(tenants: Tenants) -> None:
    """The operator reads the first characters of an answer; a tenant could read the operator's network with them."""
    api = tenants.api
    for name in ("a", "acme-crm"):
        api.relay.subscriber.script(name, ScriptedReply(status=400, body=b"the-secret-of-a-service-inside", times=1))

    event = await api.publish_call("acme", "2")
    await api.relay.until_attempts(event, 1, "acme-crm")
    await api.relay.until_attempts(event, 1, "a")

    of_tenant = (await api.relay.state(event, "acme-crm")).log
    of_operator = (await api.relay.state(event, "a")).log
    assert "inside" not in str(of_tenant)
    assert of_operator[0]["excerpt"] == "the-secret-of-a-service-inside"


async def test_a_tenant_cannot_tell_an_inside_name_from_one_that_does_not_exist(tenants: Tenants) -> None:
    """The answers differ in nothing but the name."""
    details = []
    for host in ("inside.example.com", "nowhere.example.com"):
        options = {"url": f"https://{host}/hook"}
        _, problem = await tenants.api.request("POST", "/v1/subscriptions", options, token=tenants.acme)
        details.append(problem["detail"].replace(host, "it"))

    assert details[0] == details[1]


async def test_a_cursor_of_failed_deliveries_names_no_foreign_id(tenants: Tenants) -> None:
    """The list of all dead letters is the operator's; a tenant pages through its own."""
    api = tenants.api
    now_ms = int((await api.relay.redis.time())[0]) * 1000
    entries = {f"other-crm\x1fevt_{number:026}": now_ms + number for number in range(1_200)}
    await api.relay.redis.zadd(keys.DEAD, entries)

    page = await api.get("/v1/deliveries?status=exhausted&limit=1", token=tenants.acme)

    assert page == {"items": [], "next_cursor": None}
