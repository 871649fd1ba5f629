"""Client commands against a running relay: text for people, JSON for programs, and exit codes."""

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Direction, Outcome, Party
from relay.store import keys
from tests.fakes.subscriber import ScriptedReply
from tests.flow.api import SOURCE, TOKEN, ApiClient, open_api
from tests.flow.cli import environ_for, relay, run

JO = Party(number="+12025550123", raw="(202) 555-0123", name="Jo Sample")


async def test_a_list_is_a_table_for_people_and_one_document_for_programs(api: ApiClient) -> None:
    """No colour in a pipe; --json leaves nothing else on stdout."""
    table = await relay(api, "sources", "list")
    document = await relay(api, "sources", "list", "--json")
    shown = await relay(api, "subscriptions", "show", "a")

    assert (table.code, document.code, shown.code) == (0, 0, 0)
    assert table.out.split()[:3] == ["source", "provider", "state"]
    assert "main" in table.out
    assert "\x1b" not in table.out
    assert [each["id"] for each in document.json["items"]] == ["main"]
    assert document.err == ""
    assert "options.url" in shown.out
    assert "/hook/a" not in shown.out


async def test_a_source_is_created_updated_and_deleted(api: ApiClient, tmp_path: Path) -> None:
    """Its key comes from a file and is never shown; what cannot be undone needs --yes."""
    key = tmp_path / "key"
    key.write_text("the-key-of-the-account\n")
    options = ["--set", f"api_key=@{key}", "--set", "base_url=http://127.0.0.1:9", "--set", "contacts=false"]

    created = await relay(api, "sources", "create", "webfones", "--id", "shop", *options, "--set", "recordings=false")
    changed = await relay(api, "sources", "update", "shop", "--set", "poll_interval_s=75", "--json")
    back = await relay(api, "sources", "update", "shop", "--set", "poll_interval_s=null", "--json")
    paused = await relay(api, "sources", "pause", "shop", "--json")
    hasty = await relay(api, "sources", "delete", "shop")
    gone = await relay(api, "sources", "delete", "shop", "--yes", "--json")
    missing = await relay(api, "sources", "show", "shop")

    assert created.code == 0, created.err
    assert created.out.startswith("shop created")
    assert changed.json["options"]["poll_interval_s"] == 75
    assert back.json["options"]["poll_interval_s"] == 30
    assert "the-key-of-the-account" not in created.out + changed.out
    assert paused.json["state"] == "paused"
    assert (hasty.code, hasty.err) == (2, "this cannot be undone; confirm with --yes\n")
    assert gone.json == {"id": "shop", "deleted": True}
    assert (missing.code, missing.out, missing.err) == (1, "", "Source not found.\n")


async def test_a_subscription_is_created_tested_disabled_and_enabled(api: ApiClient) -> None:
    """The secret is shown once; a test shows what the subscriber answered, and fails unless it is acknowledged."""
    created = await relay(
        api, "subscriptions", "create", f"{api.subscriber_url}/hook/b", "--id", "b", "--direction", "outbound"
    )
    secret = created.out.split("secret: ")[1].split()[0]
    api.relay.subscriber.add_hook("b", secret)
    tested = await relay(api, "subscriptions", "test", "b")
    api.relay.subscriber.script("b", ScriptedReply(status=500))
    refused = await relay(api, "subscriptions", "test", "b")
    rotated = await relay(api, "subscriptions", "rotate-secret", "b", "--json")
    disabled = await relay(api, "subscriptions", "disable", "b", "--reason", "moving house", "--json")
    while_disabled = await relay(api, "subscriptions", "test", "b")
    enabled = await relay(api, "subscriptions", "enable", "b", "--json")

    assert created.code == 0, created.err
    assert tested.code == 0, tested.err
    assert tested.out.endswith(" delivered\n")
    assert refused.code == 1
    assert "answered 500" in refused.err
    assert rotated.json["secret"].startswith("whsec_")
    assert rotated.json["secret"] != secret
    assert disabled.json["disabled_reason"] == "moving house"
    assert (while_disabled.code, while_disabled.err) == (1, "The subscription is disabled; enable it first.\n")
    assert enabled.json["state"] == "enabled"


async def test_a_usage_error_exits_with_2_and_names_the_fix(api: ApiClient) -> None:
    """The API's own messages, field by field; secrets on the command line are rejected."""
    wrong = await relay(api, "sources", "create", "webfones", "--set", "poll_interval_s=soon", "--set", "colour=red")
    unread = await relay(api, "sources", "create", "webfones", "--set", "api_key=@/nowhere/key")
    status = await relay(api, "deliveries", "list", "--status", "great")
    secret = await relay(api, "subscriptions", "rotate-secret", "a", "--secret", "whsec_abc")
    usage = await relay(api, "sources", "show")
    path = await relay(api, "sources", "show", "..")

    assert [each.code for each in (wrong, unread, status, secret, usage, path)] == [2] * 6
    assert "poll_interval_s: " in wrong.err
    assert "colour: " in wrong.err
    assert unread.err == "--set api_key: /nowhere/key cannot be read: No such file or directory\n"
    assert "status" in status.err
    assert "whsec_abc" not in secret.err


async def test_a_viewer_can_read_but_not_change_anything(api: ApiClient) -> None:
    """A token with the role viewer gets a clear refusal; a revoked one no longer works."""
    created = await relay(api, "tokens", "create", "for the wall", "--role", "viewer", "--json")
    viewer = created.json["token"]

    looked = await relay(api, "calls", "list", "--json", token=viewer)
    changed = await relay(api, "subscriptions", "disable", "a", token=viewer)
    unknown = await relay(api, "tokens", "revoke", "for the hall")
    revoked = await relay(api, "tokens", "revoke", "for the wall")
    again = await relay(api, "tokens", "revoke", created.json["id"])
    after = await relay(api, "calls", "list", token=viewer)

    assert (looked.code, looked.json["items"]) == (0, [])
    assert changed.code == 1
    assert changed.err == "This token is read-only; use a token with the role admin.\n"
    assert (unknown.code, revoked.code, again.code) == (1, 0, 1)
    assert "token not found" in unknown.err.lower()
    assert after.code == 1
    assert "does not accept this token" in after.err


async def test_an_unusable_address_or_token_is_a_clear_message(free_port: int, tmp_path: Path) -> None:
    """No relay there, no token, an invalid address, and a server that is not a relay."""

    async def page(request: web.Request) -> web.Response:
        if "calls" in request.path:
            return web.json_response({"hello": "world"})
        return web.Response(text="<html>hello</html>", content_type="text/html")

    app = web.Application()
    app.router.add_route("*", "/{anything:.*}", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", free_port).start()
    url = f"http://127.0.0.1:{free_port}"

    other = await run("sources", "list", environ=environ_for(url, "t"))
    other_json = await run("calls", "list", environ=environ_for(url, "t"))
    await runner.cleanup()
    unreachable = await run("sources", "list", environ=environ_for(url, "t"))
    no_token = await run("sources", "list", environ=environ_for(url, None))
    local = await run("sources", "list", environ=environ_for(None, None, RELAY_DATA_DIR=str(tmp_path / "none")))
    no_url = await run("sources", "list", environ=environ_for("relay.example.com", "t"))

    assert (other.code, other_json.code) == (1, 1)
    assert "is not the API of a Call Relay" in other.err
    assert "is not the API of a Call Relay" in other_json.err
    assert unreachable.code == 1
    assert unreachable.err.startswith(f"no relay answers at {url} (connection refused); start it with `relay up`")
    assert no_token.code == 2
    assert "RELAY_TOKEN" in no_token.err
    assert local.code == 2
    assert "--config relay.yaml" in local.err
    assert no_url.code == 2
    assert "https://relay.example.com" in no_url.err


async def test_explain_shows_the_delivery_to_each_subscription(api: ApiClient) -> None:
    """By the provider's ID, ours, or a number: when it was first seen, and each subscription's reason."""
    await api.subscribe("out", direction=["outbound"])
    eid = await api.publish_call("main", "77", external=JO, caller=JO)
    await api.relay.until_state(eid, "delivered")

    by_key = await relay(api, "explain", "77")
    by_number = await relay(api, "explain", "202-555-0123", "--json")
    call_id = by_number.json["items"][0]["call_id"]
    by_id = await relay(api, "explain", call_id, "--json", "--source", "main")

    assert by_key.code == 0, by_key.err
    assert "Delivered to a." in by_key.out
    assert "by a poll" in by_key.out
    assert "filtered because direction=inbound does not match outbound" in by_key.out
    fates = {each["subscription_id"]: each["fate"] for each in by_id.json["items"][0]["subscriptions"]}
    assert fates == {"a": "delivered", "out": "filtered"}
    assert by_id.json["items"] == by_number.json["items"]


async def test_explain_of_an_unknown_call_shows_the_state_of_each_source(api: ApiClient) -> None:
    """Exit code 1, and an empty list for programs."""
    await api.relay.redis.hset(  # type: ignore[misc]
        keys.source("main"), mapping={"error": "the provider refuses the API key (401)", "error_since": 1}
    )

    nothing = await relay(api, "explain", "404404")
    document = await relay(api, "explain", "call_" + "a" * 26, "--json")

    assert nothing.code == 1
    assert "No call found for 404404." in nothing.err
    assert "the provider refuses the API key (401)" in nothing.err
    assert document.code == 1
    assert document.json["items"] == []


async def test_a_failed_delivery_is_listed_and_delivered_again(api: ApiClient) -> None:
    """The list of deliveries, a retry, and a replay of one event."""
    api.relay.subscriber.script("a", ScriptedReply(status=500))
    eid = await api.publish_call("main", "5")
    await api.relay.until_attempts(eid, 1)
    api.relay.subscriber.script("a", ScriptedReply())
    delivery = f"{eid}.a"

    waiting = await relay(api, "deliveries", "list", "--status", "waiting", "--json")
    shown = await relay(api, "deliveries", "show", delivery)
    again = await relay(api, "deliveries", "retry", delivery)
    await api.relay.end_pause("a")
    await api.relay.due_now("a", ids.call_id("main", "5"))
    await api.relay.until_state(eid, "delivered")
    replayed = await relay(api, "replay", "a", "--event", eid)
    neither = await relay(api, "replay", "a")

    assert [each["id"] for each in waiting.json["items"]] == [delivery]
    assert "answered 500" in shown.out
    assert again.out == f"{delivery} is already waiting for its next attempt\n"
    assert replayed.out == f"{eid} was already delivered; --force sends it again\n"
    assert (neither.code, neither.err) == (2, "pass either --since, such as 2h, or --event\n")


async def test_a_replay_shows_its_result(api: ApiClient) -> None:
    """The job is followed to its end, or only queued, to be looked at later."""
    eid = await api.publish_call("main", "6")
    await api.relay.until_state(eid, "delivered")

    done = await relay(api, "replay", "a", "--since", "3600d", "--status", "any", "--force", "--json")
    queued = await relay(api, "replay", "a", "--since", "1h", "--no-wait", "--json")
    shown = await relay(api, "jobs", "show", queued.json["id"], "--watch", "--json")
    over = await relay(api, "jobs", "cancel", queued.json["id"])

    assert done.code == 0, done.err
    assert (done.json["state"], done.json["counts"]["queued"]) == ("done", 1)
    assert done.err == ""
    assert shown.json["state"] == "done"
    assert (over.code, over.err) == (1, "The job has already ended.\n")


async def test_calls_and_events_are_found(api: ApiClient) -> None:
    """By their properties; a person is erased with --yes."""
    out: dict[str, Any] = {"direction": Direction.OUTBOUND, "outcome": Outcome.ANSWERED, "caller": JO, "external": JO}
    eid = await api.publish_call("main", "1", **out)
    await api.publish_call("main", "2")

    calls = await relay(api, "calls", "list", "--direction", "outbound", "--number", "2025550123")
    later = await relay(api, "calls", "list", "--since", "1s", "--until", "1s")
    events = await relay(api, "events", "list", "--limit", "1", "--json")
    event = await relay(api, "events", "show", eid, "--json")
    types = await relay(api, "events", "types")
    sample = await relay(api, "subscriptions", "sample", "a")
    erased = await relay(api, "erase", "+12025550123", "--yes", "--json")

    assert "Jo Sample" in calls.out
    assert calls.out.count("call_") == 1
    assert later.out == "No matching calls. `relay explain` says why a call is missing.\n"
    assert len(events.json["items"]) == 1
    assert events.json["next_cursor"] is not None
    assert event.json["id"] == eid
    assert "call.recording.completed" in types.out
    assert sample.json[0]["type"] == "call.completed"
    assert erased.json["calls"] == 2, "both calls have this number"


@pytest.mark.timeout(60)
async def test_a_long_list_is_read_page_by_page(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More entries than the API returns in one page."""
    async with open_api(redis, valkey_url, tmp_path, monkeypatch) as api:
        for number in range(205):
            await api.post("/v1/sources", {**SOURCE, "id": f"s-{number}", "enabled": False})

        some = await relay(api, "sources", "list", "--limit", "203", "--json")
        table = await relay(api, "sources", "list", "--limit", "2")

    assert len({each["id"] for each in some.json["items"]}) == 203
    assert some.json["next_cursor"] is not None
    assert "There are more entries; --limit shows them." in table.err
    assert TOKEN not in table.out
