"""Calls, events, deliveries and erasure over HTTP."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import TypeAdapter

from relay.api import calls as calls_module
from relay.domain.call import Direction, Outcome, Party
from relay.domain.time import iso
from relay.errors import StorageError
from relay.events import payload
from relay.events.payload import FLAT_FIELDS
from relay.events.types import EVENT_TYPES
from relay.providers.base import Audio, Purpose
from relay.providers.source import Source
from relay.queue.claim import Claim
from relay.recordings.storage import Stored, object_paths
from relay.store import keys
from relay.store.lanes import LaneName
from tests.fakes.subscriber import ScriptedReply
from tests.flow.api import SOURCE, ApiClient
from tests.flow.harness import eventually
from workers.record import RecordWorker

JO = Party(number="+12025550123", raw="(202) 555-0123", name="Jo Sample")
KIM = Party(number="+12025550177", raw="2025550177", name="Kim Other")
OUTBOUND: dict[str, Any] = {
    "caller": KIM, "external": KIM, "direction": Direction.OUTBOUND, "outcome": Outcome.ANSWERED
}  # fmt: skip


async def test_a_call_is_read_with_its_events_and_deliveries(api: ApiClient) -> None:
    """Its content, its events, and the subscriptions that got them."""
    eid = await api.publish_call("main", "1", caller=JO, external=JO, outcome=Outcome.BUSY)
    await api.relay.until_state(eid, "delivered")
    (listed,) = (await api.get("/v1/calls"))["items"]

    read = await api.get(f"/v1/calls/{listed['id']}")

    assert (read["source_id"], read["provider"], read["provider_call_id"]) == ("main", "webfones", "1")
    assert (read["outcome"], read["from"]["number"], read["revision"]) == ("busy", "+12025550123", 1)
    (event,) = read["events"]
    assert (event["id"], event["type"]) == (eid, "call.completed")
    assert [(item["subscription_id"], item["status"]) for item in event["deliveries"]] == [("a", "delivered")]
    assert await api.problem("GET", "/v1/calls/call_" + "a" * 26) == (404, "not_found")
    assert await api.problem("GET", "/v1/calls/nonsense") == (404, "not_found")


async def test_calls_can_be_filtered(api: ApiClient) -> None:
    """Source, direction, outcome, number in any spelling, and time; several values at once."""
    await api.post("/v1/sources", {**SOURCE, "id": "new"})
    first = await api.ingest_call("main", "1", caller=JO, external=JO)
    second = await api.ingest_call("new", "2", **OUTBOUND)

    async def listed(query: str) -> list[str]:
        return [item["id"] for item in (await api.get(f"/v1/calls?{query}"))["items"]]

    assert await listed("") == [second, first]
    assert await listed("source=new") == [second]
    assert await listed("direction=inbound") == [first]
    assert await listed("direction=inbound,outbound") == [second, first]
    assert await listed("outcome=answered&outcome=busy") == [second]
    assert await listed("number=%2B12025550123") == [first]
    assert await listed("number=202-555-0177") == [second]
    assert await listed("to=2026-01-01T00:00:00Z") == []
    assert await listed("from=2020-01-01T00:00:00Z") == [second, first]
    assert await api.problem("GET", "/v1/calls?outcome=great") == (422, "invalid")
    assert await api.problem("GET", "/v1/calls?colour=red") == (422, "invalid")
    assert await api.problem("GET", "/v1/calls?limit=201") == (422, "invalid")
    assert await api.problem("GET", "/v1/calls?limit=1&limit=2") == (422, "invalid")
    assert await api.problem("GET", "/v1/calls?from=yesterday") == (422, "invalid")
    assert await api.problem("GET", "/v1/calls?source=unknown") == (404, "not_found")


async def test_paging_through_calls_returns_each_once(api: ApiClient) -> None:
    """Calls of the same millisecond are neither lost nor repeated, and new calls do not shift the pages."""
    made = {await api.ingest_call("main", str(number)) for number in range(7)}
    same_ms = dict.fromkeys(made, 1_790_000_000_000)
    await api.relay.redis.zadd(keys.CALLS, same_ms)

    seen: list[str] = []
    cursor = ""
    while True:
        page = await api.get(f"/v1/calls?limit=3{cursor}")
        seen += [item["id"] for item in page["items"]]
        if len(seen) == 3:
            await api.ingest_call("main", "late")
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"

    assert sorted(seen) == sorted(made)


async def test_a_recording_link_is_issued(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new link that works; 404 without a recording, 409 when links are not configured."""
    call_id = await api.ingest_call("main", "1")
    assert await api.problem("GET", f"/v1/calls/{call_id}/recording") == (404, "not_found")
    part = await _add_recording(api, call_id)

    assert await api.problem("GET", f"/v1/calls/{call_id}/recording") == (409, "no_recording_links")
    monkeypatch.setattr(api.relay.runtime.links, "public_url", api.base)
    link = await api.get(f"/v1/calls/{call_id}/recording")
    async with api.http.get(link["url"]) as answer:
        audio = await answer.read()

    assert (answer.status, audio) == (200, b"RIFF-audio")
    assert link["sha256"] == part["sha256"]


async def _add_recording(api: ApiClient, call_id: str) -> dict[str, Any]:
    """Store audio for a call and its recording part, as the record lane does."""
    runtime = api.relay.runtime
    path = await _store_audio(api, call_id)
    part: dict[str, Any] = {"status": "available", "path": path, "sha256": "0" * 64, "size_bytes": 10}
    part |= {"content_type": "audio/wav", "url": None, "expires_at": None, "duration_seconds": None}
    call = await runtime.store.calls.get(call_id)
    while (
        await runtime.store.events.publish_call(call, {"recording": part}, ()) is None
    ):  # its event is being published
        call = await runtime.store.calls.get(call_id)
    return part


async def _store_audio(api: ApiClient, call_id: str) -> str:
    runtime = api.relay.runtime
    call = await runtime.store.calls.get(call_id)
    assert call is not None

    async def chunks() -> AsyncIterator[bytes]:
        yield b"RIFF-audio"

    started_on = datetime.fromtimestamp(call.started_ms / 1000, UTC).date()
    stored = await runtime.storage.put(call_id, chunks(), started_on=started_on, expected_size_bytes=None)
    assert isinstance(stored, Stored)
    return stored.path


# --- events ----------------------------------------------------------------------------------------------------------


async def test_events_are_listed_and_read(api: ApiClient) -> None:
    """In their full form, newest first, by type, source, call and subscription."""
    first = await api.publish_call("main", "1")
    second = await api.publish_call("main", "2")
    sent = await api.post("/v1/subscriptions/a/test")

    async def listed(query: str) -> list[str]:
        return [item["id"] for item in (await api.get(f"/v1/events?{query}"))["items"]]

    assert await listed("") == [sent["event_id"], second, first]
    assert await listed("type=call.*") == [second, first]
    assert await listed("type=webhook.test,call.updated") == [sent["event_id"]]
    assert await listed("source=main") == [second, first]
    call_id = (await api.get(f"/v1/events/{first}"))["data"]["call"]["id"]
    assert await listed(f"call={call_id}") == [first]
    assert set(await listed("subscription=a")) == {sent["event_id"], second, first}
    assert await listed("to=2026-01-01T00:00:00Z") == []
    assert await api.problem("GET", "/v1/events/evt_" + "a" * 26) == (404, "not_found")
    assert await api.problem("GET", "/v1/events?call=1") == (422, "invalid")
    assert await api.problem("GET", "/v1/events?subscription=unknown") == (404, "not_found")


async def test_a_page_may_be_short_and_have_a_cursor(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter without an index scans a limited number of entries in one request."""
    await api.publish_call("main", "1", outcome=Outcome.BUSY)
    for number in range(2, 8):
        await api.ingest_call("main", str(number))
    monkeypatch.setattr("relay.api.paging.SCAN_LIMIT", 3)

    first = await api.get("/v1/calls?outcome=busy&limit=2")
    second = await api.get(f"/v1/calls?outcome=busy&limit=2&cursor={first['next_cursor']}")
    third = await api.get(f"/v1/calls?outcome=busy&limit=2&cursor={second['next_cursor']}")

    assert [first["items"], second["items"]] == [[], []]
    assert [item["provider_call_id"] for item in third["items"]] == ["1"]
    assert third["next_cursor"] is None


async def test_every_type_has_a_schema_and_a_valid_sample(api: ApiClient) -> None:
    """Generated samples and real events match the published schema."""
    types = await api.get("/v1/event-types")
    eid = await api.publish_call("main", "1", caller=JO, external=JO)
    sent = await api.post("/v1/subscriptions/a/test")

    assert [item["type"] for item in types] == list(EVENT_TYPES)
    for item in types:
        TypeAdapter(payload.model_of(item["type"])).validate_python(item["sample"])
        assert item["schema"]["properties"]["type"] == {"const": item["type"], "type": "string"}
    for real in (eid, sent["event_id"]):
        document = await api.get(f"/v1/events/{real}")
        TypeAdapter(payload.model_of(document["type"])).validate_python(document)


async def test_samples_of_a_type_are_an_array(api: ApiClient) -> None:
    """Generated until there are real events, in both forms, each with its own id."""
    made_up = await api.get("/v1/event-types/call.updated/sample?payload=flat")
    eid = await api.publish_call("main", "1")
    real = await api.get("/v1/event-types/call.completed/sample")

    assert [tuple(item) for item in made_up] == [FLAT_FIELDS] * 3
    assert len({item["id"] for item in made_up}) == 3
    assert [item["id"] for item in real] == [eid]
    assert await api.problem("GET", "/v1/event-types/call.finished/sample") == (404, "not_found")
    assert await api.problem("GET", "/v1/event-types/call.updated/sample?limit=0") == (422, "invalid")


# --- erasure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_job", [False, True])
async def test_a_person_is_erased(api: ApiClient, monkeypatch: pytest.MonkeyPatch, by_job: bool) -> None:
    """Number, name, audio and payloads are gone everywhere, pending deliveries expire, and other calls stay."""
    if by_job:
        monkeypatch.setattr(calls_module, "MAX_INLINE_KEYS", 0)
    redis = api.relay.redis
    api.relay.subscriber.script("a", ScriptedReply(status=500))
    waiting = await api.publish_call("main", "1", caller=JO, external=JO, raw={"caller": "1-202-555-0123"})
    as_text = await api.publish_call("main", "2", caller=Party(raw="sip:12025550123@pbx.example.com"), external=None)
    other = await api.publish_call("main", "3", caller=KIM, external=KIM)
    await api.relay.until_attempts(waiting, 1)
    call_id = (await api.get(f"/v1/events/{waiting}"))["data"]["call"]["id"]
    part = await _add_recording(api, call_id)
    await redis.set(keys.contact("main", 0, "+12025550123"), b"Jo Sample")

    result = await api.post("/v1/erase", {"number": "+12025550123"})
    if by_job:
        over = await api.wait_for_job(result["job"]["id"])
        assert over["state"] == "done"
        result = over["counts"]

    counts = {name: result[name] for name in ("calls", "events", "recordings", "contacts")}
    assert counts == {"calls": 2, "events": 2, "recordings": 1, "contacts": 1}
    assert await api.relay.runtime.storage.size(part["path"]) is None
    assert not await redis.exists(keys.contact("main", 0, "+12025550123"))
    for eid in (waiting, as_text):
        assert await api.problem("GET", f"/v1/events/{eid}") == (404, "not_found")
        assert (await api.get(f"/v1/deliveries/{eid}.a"))["status"] == "expired"
        assert (await api.get(f"/v1/deliveries/{eid}.a"))["log"] == []
    assert await api.problem("GET", f"/v1/calls/{call_id}") == (404, "not_found")
    assert (await api.get(f"/v1/events/{other}"))["id"] == other
    assert await _traces(api, b"2025550123", b"Jo Sample") == []


async def _traces(api: ApiClient, *needles: bytes) -> list[bytes]:
    """List the keys whose values hold any of the texts, packed or not."""
    from relay.store.documents import unpack_bytes

    def plain(value: bytes) -> bytes:
        return unpack_bytes(value) if value[:1] == b"\x01" else value

    found: list[bytes] = []
    redis = api.relay.redis
    async for name in redis.scan_iter("*"):
        kind = await redis.type(name)
        values: list[bytes] = []
        if kind == b"string":
            values = [await redis.get(name)]
        elif kind == b"hash":
            values = [item for pair in (await redis.hgetall(name)).items() for item in pair]  # type: ignore[misc]
        elif kind == b"zset":
            values = await redis.zrange(name, 0, -1)
        elif kind == b"set":
            values = list(await redis.smembers(name))  # type: ignore[misc]
        assert kind in (b"string", b"hash", b"zset", b"set")
        if any(needle in plain(value) for value in values for needle in needles):
            found.append(name)
    return found


async def test_an_erased_call_is_not_ingested_again(api: ApiClient) -> None:
    """The next poll returns the same row: nothing is published for it."""
    await api.publish_call("main", "1", caller=JO, external=JO)
    await api.post("/v1/erase", {"number": "+12025550123"})

    call_id = await api.ingest_call("main", "1", caller=JO, external=JO)

    assert await api.relay.runtime.store.calls.get(call_id) is None
    assert (await api.get("/v1/calls"))["items"] == []


async def test_erasure_can_be_repeated_after_a_storage_error(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """503, the call is still there, and a second request erases it."""
    call_id = await api.ingest_call("main", "1", caller=JO, external=JO)
    await _add_recording(api, call_id)

    async def broken(_: str) -> None:
        raise StorageError("the bucket is unavailable")

    with monkeypatch.context() as trouble:
        trouble.setattr(api.relay.runtime.storage, "delete", broken)
        refused = await api.problem("POST", "/v1/erase", {"number": "+12025550123"})
    again = await api.post("/v1/erase", {"number": "+12025550123"})

    assert refused == (503, "storage_unavailable")
    assert (again["calls"], again["recordings"]) == (1, 1)


async def test_only_a_number_can_be_erased(api: ApiClient) -> None:
    """Anything else is refused, and the value is not repeated."""
    status, problem = await api.request("POST", "/v1/erase", {"number": "Jo Sample"})

    assert (status, problem["code"]) == (422, "invalid")
    assert "Jo" not in str(problem)


# --- deliveries ------------------------------------------------------------------------------------------------------


async def test_deliveries_are_listed_and_read(api: ApiClient) -> None:
    """By subscription, by status and by event; a failed one with its attempts."""
    await api.subscribe("crm")
    api.relay.subscriber.script("crm", ScriptedReply(status=500, body="out of order"))
    eid = await api.publish_call("main", "1")
    await api.relay.until_attempts(eid, 1, sub="crm")
    await api.relay.until_state(eid, "delivered")

    async def listed(query: str) -> list[str]:
        return sorted(item["id"] for item in (await api.get(f"/v1/deliveries?{query}"))["items"])

    read = await api.get(f"/v1/deliveries/{eid}.crm")
    assert await listed("") == [f"{eid}.a", f"{eid}.crm"]
    assert await listed("subscription=crm") == [f"{eid}.crm"]
    assert await listed("status=delivered") == [f"{eid}.a"]
    assert await listed("status=waiting,exhausted&subscription=crm") == [f"{eid}.crm"]
    assert await listed(f"event={eid}&subscription=a") == [f"{eid}.a"]
    assert await listed("status=exhausted") == []
    assert (read["status"], read["attempts"]) == ("waiting", 1)
    assert read["next_attempt_at"] > read["last_attempt_at"]
    (attempt,) = read["log"]
    assert (attempt["status"], attempt["excerpt"]) == (500, "out of order")
    assert await api.problem("GET", f"/v1/deliveries/{eid}.unknown") == (404, "not_found")
    assert await api.problem("GET", "/v1/deliveries?status=lost") == (422, "invalid")


async def test_a_failed_delivery_is_listed_and_can_be_retried(api: ApiClient) -> None:
    """It is among the dead letters; a retry restarts its schedule."""
    api.relay.subscriber.script("a", ScriptedReply(status=500, times=1))
    eid = await api.publish_call("main", "1")
    await api.relay.until_attempts(eid, 1)
    call_id = (await api.get(f"/v1/events/{eid}"))["data"]["call"]["id"]
    redis = api.relay.redis
    await redis.hset(keys.event(eid), "a", b'{"s":"exhausted","n":10,"t":1}')  # type: ignore[misc]
    await redis.zadd(keys.DEAD, {f"a\x1f{eid}": 1})
    await redis.zrem(keys.pending("a", call_id), eid)
    await api.relay.runtime.lanes[LaneName.DELIVER].drop("a", call_id)

    listed = await api.get("/v1/deliveries?status=exhausted")
    retried = await api.post(f"/v1/deliveries/{eid}.a/retry")
    await api.relay.until_state(eid, "delivered")

    assert [item["id"] for item in listed["items"]] == [f"{eid}.a"]
    assert retried["result"] == "queued"
    assert await api.problem("POST", f"/v1/deliveries/{eid}.a/retry") == (409, "already_delivered")
    assert (await api.post(f"/v1/deliveries/{eid}.a/retry", {"force": True}))["result"] == "queued"
    await redis.hdel(keys.event(eid), keys.BODY)  # type: ignore[misc]  # as erasing does
    assert await api.problem("POST", f"/v1/deliveries/{eid}.a/retry") == (410, "event_gone")
    assert await api.problem("POST", "/v1/deliveries/nonsense/retry") == (404, "not_found")


async def test_times_out_of_range_are_refused(api: ApiClient) -> None:
    """A year that no call has is a 422, not a crash."""
    for when in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", iso(datetime.now(UTC) + timedelta(days=90_000))):
        assert await api.problem("GET", "/v1/events", params={"from": when}) == (422, "invalid")
    found = await eventually(lambda: api.get("/v1/events"), lambda page: page["items"] == [])
    assert found["next_cursor"] is None


async def test_audio_that_its_call_does_not_reference_yet_is_erased_too(api: ApiClient) -> None:
    """It was stored a moment before the recording part was written."""
    eid = await api.publish_call("main", "1", caller=JO, external=JO)
    call_id = (await api.get(f"/v1/events/{eid}"))["data"]["call"]["id"]
    path = await _store_audio(api, call_id)

    result = await api.post("/v1/erase", {"number": "+12025550123"})

    assert result["recordings"] == 1
    assert await api.relay.runtime.storage.size(path) is None


async def test_audio_that_arrives_after_the_erasure_is_deleted(api: ApiClient) -> None:
    """The call was erased while its audio was being transferred."""
    eid = await api.publish_call("main", "1", caller=JO, external=JO, outcome=Outcome.ANSWERED)
    call_id = (await api.get(f"/v1/events/{eid}"))["data"]["call"]["id"]
    runtime = api.relay.runtime
    stored = await api.relay.redis.hgetall(keys.call(call_id))  # type: ignore[misc]
    source = _SlowSource(api, runtime.sources["main"])
    record = RecordWorker(
        runtime.lanes[LaneName.RECORD],
        lambda: {"main": source},  # type: ignore[dict-item]  # what a fetch needs of a source
        runtime.storage,
        runtime.store.sources,
        wake_enrich=lambda: None,
        find_call=runtime.store.calls.get,
    )
    flat = [item for pair in stored.items() for item in pair]

    await record.work([Claim("main", call_id, b"1", payload=[flat])], lambda *_: None)

    assert source.erased["calls"] == 1
    started_on = datetime(2026, 11, 20, tzinfo=UTC).date()
    assert [await runtime.storage.size(path) for path in object_paths(call_id, started_on)] == [None] * len(
        object_paths(call_id, started_on)
    )


class _SlowSource:
    """A source whose audio takes so long that the person is erased meanwhile."""

    def __init__(self, api: ApiClient, like: Source) -> None:
        self.id = like.id
        self.rules = replace(like.rules, recordings=True)
        self.provider = self
        self.recordings = self
        self.erased: dict[str, int] = {}
        self._api = api

    @contextlib.asynccontextmanager
    async def recording(self, key: str, *, purpose: Purpose = Purpose.RECORDING) -> AsyncIterator[Audio]:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"RIFF"
            self.erased = await self._api.post("/v1/erase", {"number": "+12025550123"})
            yield b"-audio"

        yield Audio(chunks(), "audio/wav", None)
