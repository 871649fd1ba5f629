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
from tests.flow.api_desk import OUTSIDE, SOURCE, TOKEN, Desk, open_desk
from tests.flow.harness import eventually

DECLARED = {"source_id": "main", "subscription_id": "a"}
"""Ids of the configuration."""


@dataclass
class Tenants:
    """Two tenants with a source, a subscription, a call and an event each."""

    desk: Desk
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
async def houses(desk: Desk) -> Tenants:
    """Two tenants."""
    acme, other = await desk.token_for("admin", "acme"), await desk.token_for("admin", "other")
    viewer = await desk.token_for("viewer", "acme")
    await desk.post("/v1/sources", {**SOURCE, "id": "acme"}, token=acme)
    await desk.post("/v1/sources", {**SOURCE, "id": "other"}, token=other)
    await desk.subscribe("acme-crm", token=acme)
    await desk.subscribe("other-crm", token=other)
    event = await desk.told("acme", "1")
    await desk.told("other", "1")
    await desk.told("main", "1")
    await desk.relay.until_delivered("acme-crm", 1)
    await desk.relay.until_delivered("other-crm", 1)
    await desk.relay.until_delivered("a", 3)
    call = (await desk.get(f"/v1/events/{event}"))["data"]["call"]["id"]
    return Tenants(desk, acme, viewer, other, event, call)


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
async def test_every_route_requires_a_token(desk: Desk, header: str | None) -> None:
    """401 with the scheme, for every route."""
    headers = {} if header is None else {"Authorization": header}
    for route in TABLE:
        async with desk.http.request(
            route.method, desk.base + _filled(route.path, DECLARED), headers=headers
        ) as answer:
            problem = await answer.json(content_type=None)
        assert (answer.status, problem["code"]) == (401, "unauthorized"), route.path
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_token_is_shown_once_and_revoked_at_once(desk: Desk) -> None:
    """Only a digest is stored; a revoked token is refused from then on; revoking again is 404."""
    made = await desk.post("/v1/tokens", {"name": "n8n", "role": "viewer"})
    token = made["token"]

    listed = await desk.get("/v1/tokens")
    works, _ = await desk.ask("GET", "/v1/sources", token=token)
    statuses = [(await desk.ask("DELETE", f"/v1/tokens/{made['id']}"))[0] for _ in range(2)]
    ended, _ = await desk.ask("GET", "/v1/sources", token=token)

    assert [item["id"] for item in listed["items"]] == [made["id"]]
    assert token not in str(listed)
    assert (works, statuses, ended) == (200, [204, 404], 401)
    stored = await desk.relay.redis.hgetall(keys.declared("token"))  # type: ignore[misc]
    assert token.encode() not in b"".join(stored.values())


async def test_an_embedded_relay_has_its_own_token(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without api.tokens the one in data_dir is the operator's."""
    async with open_desk(redis, valkey_url, tmp_path, monkeypatch, api={"port": 0}) as opened:
        token = (tmp_path / "api_token").read_text().strip()

        assert (await opened.ask("GET", "/v1/tokens"))[0] == 401
        assert (await opened.ask("GET", "/v1/tokens", token=token))[0] == 200


async def test_tokens_are_listed_in_pages(desk: Desk) -> None:
    """Newest first."""
    for number in range(3):
        await desk.post("/v1/tokens", {"name": str(number), "role": "viewer"})

    first = await desk.get("/v1/tokens?limit=2")
    second = await desk.get(f"/v1/tokens?limit=2&cursor={first['next_cursor']}")

    names = [item["name"] for page in (first, second) for item in page["items"]]
    assert sorted(names) == ["0", "1", "2"]
    assert second["next_cursor"] is None
    assert await desk.code("GET", "/v1/tokens?cursor=W10") == (422, "invalid")


async def test_only_the_operator_manages_tokens(houses: Tenants) -> None:
    """A tenant's admin issues none, not even for its own tenant."""
    options = {"name": "mine", "role": "admin", "tenant": "acme"}
    for method, path, body in (
        ("GET", "/v1/tokens", None),
        ("POST", "/v1/tokens", options),
        ("DELETE", "/v1/tokens/x", None),
    ):
        assert await houses.desk.code(method, path, body, token=houses.acme) == (403, "forbidden")


# --- roles -----------------------------------------------------------------------------------------------------------


def _filled(path: str, names: dict[str, str]) -> str:
    for name, value in {"job_id": "backfill-x", "event_type": "call.completed", "token_id": "x", **names}.items():
        path = path.replace("{" + name + "}", value)
    for name in ("event_id", "call_id", "delivery_id"):
        path = path.replace("{" + name + "}", "none")
    return path


async def test_a_viewer_changes_nothing(houses: Tenants) -> None:
    """Every changing route is 403, whatever the body; reading works."""
    changing = [route for route in TABLE if route.method != "GET"]
    assert all(route.scope in ("admin", "operator") for route in changing)
    viewer = await houses.desk.token_for("viewer")
    for token in (viewer, houses.acme_viewer):
        for route in changing:
            path = _filled(route.path, houses.of_acme)
            assert await houses.desk.code(route.method, path, {}, token=token) == (403, "forbidden"), path
    for path in ("/v1/sources/acme", "/v1/subscriptions/acme-crm", f"/v1/events/{houses.event}", "/v1/event-types"):
        await houses.desk.get(path, token=houses.acme_viewer)


# --- tenants ---------------------------------------------------------------------------------------------------------


async def test_a_tenant_lists_only_its_own(houses: Tenants) -> None:
    """Its lists contain its own resources and nothing else; the operator's contain all."""
    expected = {
        "/v1/sources": ["acme"],
        "/v1/subscriptions": ["acme-crm"],
        "/v1/calls": [houses.call],
        "/v1/events": [houses.event],
        "/v1/deliveries": [f"{houses.event}.acme-crm"],
    }
    for path, ids in expected.items():
        listed = (await houses.desk.get(path, token=houses.acme))["items"]
        everything = (await houses.desk.get(path))["items"]
        assert [item["id"] for item in listed] == ids, path
        assert len(everything) >= 3, path
    sample = await houses.desk.get("/v1/event-types/call.completed/sample", token=houses.acme)
    assert [item["id"] for item in sample] == [houses.event]


async def test_another_tenant_finds_nothing_by_guessing(houses: Tenants) -> None:
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
        "replay": {"event_id": houses.event},
    }
    for route in TABLE:
        if "{" not in route.path or route.method in ("PUT", "DELETE") or route.scope == "operator":
            continue
        if "{job_id}" in route.path or "{event_type}" in route.path:
            continue
        body = None if route.method == "GET" else bodies.get(route.path.rpartition("/")[2], {})
        hidden = await houses.desk.ask(route.method, _filled(route.path, houses.of_acme), body, token=houses.other)
        absent = await houses.desk.ask(route.method, _filled(route.path, unknown), body, token=houses.other)
        assert hidden[0] == 404, route.path
        assert hidden == absent, route.path
    for query in ("/v1/calls?source=acme", "/v1/events?source=acme", "/v1/events?subscription=acme-crm",
                  "/v1/deliveries?subscription=acme-crm", f"/v1/deliveries?event={houses.event}"):  # fmt: skip
        assert await houses.desk.code("GET", query, token=houses.other) == (404, "not_found")


async def test_another_tenant_deletes_and_replaces_nothing(houses: Tenants) -> None:
    """DELETE is 204, as for what does not exist, and does nothing; PUT only says that the id is not available."""
    desk = houses.desk
    for path, options in (("/v1/sources/acme", SOURCE), ("/v1/subscriptions/acme-crm", {"url": OUTSIDE})):
        assert (await desk.ask("DELETE", path, token=houses.other))[0] == 204
        status, problem = await desk.ask("PUT", path, options, token=houses.other)
        assert (status, problem["code"]) == (409, "id_not_available")
        assert "acme" not in str(problem)
        created = await desk.code(
            "POST", path.rpartition("/")[0], {**options, "id": path.rpartition("/")[2]}, token=houses.other
        )
        assert created == (409, "id_not_available")
        assert (await desk.get(path))["tenant"] == "acme"
    for path in ("/v1/sources/main", "/v1/subscriptions/a"):
        assert (await desk.ask("DELETE", path, token=houses.other))[0] == 204
        assert await desk.code("PUT", path, {**SOURCE, "url": OUTSIDE}, token=houses.other) == (409, "id_not_available")
        await desk.get(path)


async def test_two_tenants_create_one_id_at_once(houses: Tenants) -> None:
    """One is first, the other gets 409; nothing is overwritten."""
    desk = houses.desk
    for path, options in (("/v1/sources/both", SOURCE), ("/v1/subscriptions/both", {"url": OUTSIDE})):
        asked = [desk.ask("PUT", path, options, token=token) for token in (houses.acme, houses.other) * 3]
        statuses = sorted(status for status, _ in await asyncio.gather(*asked))
        assert statuses == [200, 200, 201, 409, 409, 409], path


async def test_an_event_of_one_tenant_is_not_replayed_to_another(houses: Tenants) -> None:
    """Not even by the operator; a subscription of the operator may get it."""
    desk, options = houses.desk, {"event_id": houses.event, "force": True}

    refused = await desk.code("POST", "/v1/subscriptions/other-crm/replay", options)
    taken = await desk.post("/v1/subscriptions/a/replay", options)
    many = await desk.post("/v1/subscriptions/other-crm/replay", {"since": "2026-01-01T00:00:00Z", "status": "any"})
    job = await desk.until_over(many["job"])

    assert refused == (409, "not_for_this_subscription")
    assert taken["result"] == "queued"
    assert job["counts"]["queued"] == 0
    assert job["counts"]["delivered"] == 1


async def test_the_id_of_a_removed_subscription_stays_reserved_for_its_tenant(houses: Tenants) -> None:
    """Another tenant cannot use the id before every process knows of the removal."""
    desk = houses.desk
    await desk.ask("DELETE", "/v1/subscriptions/acme-crm", token=houses.acme)
    await desk.ask("DELETE", "/v1/sources/acme", token=houses.acme)

    taken = await desk.code("PUT", "/v1/subscriptions/acme-crm", {"url": OUTSIDE}, token=houses.other)
    taken_source = await desk.code("PUT", "/v1/sources/acme", SOURCE, token=houses.other)
    status, _ = await desk.ask("PUT", "/v1/subscriptions/acme-crm", {"url": OUTSIDE}, token=houses.acme)

    assert (taken, taken_source) == ((409, "id_not_available"), (409, "id_not_available"))
    assert status == 201


async def test_the_next_tenant_of_a_source_id_does_not_get_its_former_calls(houses: Tenants) -> None:
    """Another tenant that uses the id later finds nothing of the former source."""
    desk = houses.desk
    await desk.ask("DELETE", "/v1/sources/acme", token=houses.acme)
    await desk.relay.redis.delete(keys.forgotten("acme"))  # the reservation has expired

    status, _ = await desk.ask("PUT", "/v1/sources/acme", SOURCE, token=houses.other)

    assert status == 201
    assert (await desk.get("/v1/calls?source=acme", token=houses.other))["items"] == []
    assert await desk.code("GET", f"/v1/calls/{houses.call}", token=houses.other) == (404, "not_found")
    assert await desk.code("GET", f"/v1/events/{houses.event}", token=houses.other) == (404, "not_found")


async def test_a_tenant_creates_only_for_itself(houses: Tenants) -> None:
    """Its token cannot name another tenant; the operator's can name any, and not change it."""
    desk = houses.desk
    options = {"url": OUTSIDE, "tenant": "other"}

    assert await desk.code("POST", "/v1/subscriptions", options, token=houses.acme) == (422, "invalid")
    assert (await desk.post("/v1/subscriptions", {**options, "id": "theirs"}))["tenant"] == "other"
    assert await desk.code("PUT", "/v1/subscriptions/theirs", {"url": OUTSIDE, "tenant": "acme"}) == (422, "invalid")
    assert (await desk.post("/v1/sources", {**SOURCE, "tenant": "acme", "id": "second"}))["tenant"] == "acme"
    assert await desk.code("PUT", "/v1/sources/second", {**SOURCE, "tenant": "other"}) == (422, "invalid")
    await desk.get("/v1/sources/second", token=houses.acme)


async def test_a_tenant_erases_a_person_in_its_own_calls_only(houses: Tenants) -> None:
    """The other tenant's call with the same number stays."""
    desk, jo = houses.desk, Party(number="+12025550999")
    mine = await desk.told("acme", "9", external=jo, caller=jo)
    theirs = await desk.told("other", "9", external=jo, caller=jo)

    result = await desk.post("/v1/erase", {"number": "+12025550999"}, token=houses.acme)

    assert (result["calls"], result["events"]) == (1, 1)
    assert await desk.code("GET", f"/v1/events/{mine}") == (404, "not_found")
    await desk.get(f"/v1/events/{theirs}")


async def test_jobs_belong_to_the_tenant_that_started_them(houses: Tenants) -> None:
    """Another tenant neither reads nor cancels them; the operator does."""
    desk = houses.desk
    job = (await desk.post("/v1/sources/acme/backfill", {"from": "2026-01-01T00:00:00Z"}, token=houses.acme))["id"]

    assert await desk.code("GET", f"/v1/jobs/{job}", token=houses.other) == (404, "not_found")
    assert await desk.code("POST", f"/v1/jobs/{job}/cancel", token=houses.other) == (404, "not_found")
    await desk.get(f"/v1/jobs/{job}", token=houses.acme)
    over = await eventually(lambda: desk.get(f"/v1/jobs/{job}"), lambda view: view["state"] == "failed")
    assert "polled" in over["error"]


async def test_operational_events_of_a_tenant_stay_with_the_tenant(houses: Tenants) -> None:
    """`subscription.disabled` goes to that tenant and the operator, not to another tenant."""
    desk = houses.desk
    for name, token in (("acme-ops", houses.acme), ("other-ops", houses.other)):
        await desk.subscribe(name, token=token, events=["subscription.*"])

    await desk.relay.runtime.lifecycle.disable_unhealthy("acme-crm", "no successful delivery")
    desk.relay.runtime.wake_ups(LaneName.DELIVER)
    await desk.relay.until_delivered("acme-ops", 1)

    (event,) = desk.relay.subscriber.events("acme-ops")
    assert event["type"] == "subscription.disabled"
    assert [row["subscription_id"] for row in (await desk.get(f"/v1/deliveries?event={event['id']}"))["items"]] == [
        "acme-ops"
    ]
    await desk.get(f"/v1/events/{event['id']}", token=houses.acme)
    assert await desk.code("GET", f"/v1/events/{event['id']}", token=houses.other) == (404, "not_found")
