"""`GET /v1/explain`: what became of a call or a row, without revealing anything of another tenant."""

from datetime import UTC, datetime
from typing import Any

import pytest

from relay.domain import ids
from relay.domain.call import InvalidRow, Party, Record
from relay.store import keys
from relay.store.calls import Row
from tests.fakes.subscriber import ScriptedReply
from tests.flow.api import SOURCE, ApiClient


async def explained(api: ApiClient, about: str, **options: Any) -> Any:
    (item,) = (await api.get(f"/v1/explain?about={about}", **options))["items"]
    return item


async def ingest(api: ApiClient, key: str, *, seed: bool = False, finished: bool = True) -> None:
    record = Record(
        key=key, started_at=datetime.now(UTC), local_date=datetime.now(UTC).date().isoformat(), finished=finished
    )
    row = Row(record, record.content_hash(), seed)
    await api.relay.runtime.store.calls.ingest("main", [row], token=b"", mapping=1, via="poll")


@pytest.mark.parametrize(
    ("finished", "words"),
    [(True, "`relay backfill main` publishes one"), (False, "its event is published when it ends")],
)
async def test_a_row_older_than_the_first_poll_is_explained(api: ApiClient, finished: bool, words: str) -> None:
    """With the command that publishes it."""
    await ingest(api, "old", seed=True, finished=finished)

    item = await explained(api, "old")

    assert item["verdict"] == "not_a_call"
    assert words in item["summary"]


async def test_a_quarantined_row_has_its_reason(api: ApiClient) -> None:
    """With the reason of its quarantine."""
    await api.relay.runtime.store.sources.quarantine("main", [InvalidRow("it starts in the year 9999", "bad", "{}")])

    item = await explained(api, "bad")

    assert item["verdict"] == "not_a_call"
    assert "it starts in the year 9999" in item["summary"]


async def test_a_call_that_has_not_ended_is_not_published_yet(api: ApiClient) -> None:
    """Ingested, and waiting for its end."""
    await ingest(api, "long", finished=False)

    item = await explained(api, "long")

    assert (item["verdict"], item["observed_via"], item["found_within_s"]) == ("not_told_yet", "poll", 7200)
    assert item["summary"] == "The call has not ended; its event is published when it ends."
    assert item["seen"].endswith("by a poll that looks 2 hours back")


async def test_a_failing_delivery_has_the_last_response(api: ApiClient) -> None:
    """The delivery, its attempts and the next one; a subscription that was created later is distinguished."""
    api.relay.subscriber.script("a", ScriptedReply(status=500))
    eid = await api.publish_call("main", "1")
    await api.relay.until_attempts(eid, 1)
    await api.subscribe("later")

    item = await explained(api, ids.call_id("main", "1"))

    assert (item["verdict"], item["summary"]) == ("waiting", "Delivery to a is pending.")
    first, later = item["subscriptions"]
    assert (first["fate"], first["delivery_id"], first["attempts"]) == ("waiting", f"{eid}.a", 1)
    assert "last attempt: answered 500" in first["why"]
    assert first["next_attempt_at"] is not None
    assert (later["fate"], later["delivery_id"]) == ("not_queued", None)
    assert later["why"].startswith("the subscription was created later")


async def test_a_number_finds_its_calls_and_nothing_else(api: ApiClient) -> None:
    """In any spelling; for an unknown number the state of the sources is shown."""
    await api.publish_call("main", "1", external=Party(number="+12025550123"), caller=Party(number="+12025550123"))

    assert (await explained(api, "(202)%20555-0123"))["provider_call_id"] == "1"
    nothing = await api.get("/v1/explain?about=2025550199")
    assert nothing["items"] == []
    assert [(item["source_id"], item["words"]) for item in nothing["sources"]] == [("main", "not polled yet")]
    assert await api.problem("GET", "/v1/explain") == (422, "invalid")
    assert await api.problem("GET", "/v1/explain?about=1&source=unknown") == (404, "not_found")


async def test_a_call_whose_events_have_expired_was_published(api: ApiClient) -> None:
    """Calls are kept longer than events: missing events do not mean missing deliveries."""
    eid = await api.publish_call("main", "1")
    await api.relay.redis.delete(keys.event(eid))

    item = await explained(api, ids.call_id("main", "1"))

    assert item["verdict"] == "forgotten"
    assert "retention.events_days" in item["summary"]


async def test_a_tenant_learns_nothing_of_others(api: ApiClient) -> None:
    """Neither calls, nor sources, nor subscriptions, whatever it requests."""
    acme = await api.issue_token("viewer", "acme")
    await api.post("/v1/sources", {**SOURCE, "id": "acme-office", "tenant": "acme", "enabled": False})
    party = Party(number="+12025550123")
    await api.publish_call("main", "1", external=party, caller=party)
    await api.publish_call("acme-office", "2", external=party, caller=party)

    for about in ("1", ids.call_id("main", "1")):
        response = await api.get(f"/v1/explain?about={about}", token=acme)
        assert response["items"] == []
        assert [item["source_id"] for item in response["sources"]] == ["acme-office"]
    own = await explained(api, "2025550123", token=acme)

    assert (own["provider_call_id"], own["subscriptions"]) == ("2", [])
    assert own["verdict"] == "nobody"
