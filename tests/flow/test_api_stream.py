"""The event stream: live, resumed without a gap, and bounded."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis

from relay.api import app, stream
from relay.store import keys
from relay.store.documents import pack
from tests.flow.api import SOURCE, ApiClient, open_api
from tests.flow.harness import eventually

EVENT = {"type": "call.completed", "data": {"call": {"id": "call_x", "source_id": "main"}}, "padding": "x" * 10_000}


@dataclass
class StreamClient:
    """Reads one stream."""

    answer: aiohttp.ClientResponse
    comments: int = field(default=0)

    async def next(self) -> dict[str, str]:
        """Read the next event; EOFError when the stream has ended."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(10):
            while True:
                line = (await self.answer.content.readline()).decode()
                if not line:
                    raise EOFError
                line = line.rstrip("\n")
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    return fields
                else:
                    fields.clear()

    async def ids(self, count: int) -> list[str]:
        """Read a number of events; returns their ids."""
        return [(await self.next())["id"] for _ in range(count)]


@contextlib.asynccontextmanager
async def open_stream(
    api: ApiClient, query: str = "", *, token: str | None = None, **headers: str
) -> AsyncIterator[StreamClient]:
    """Open a stream, and wait until it has started."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named["Authorization"] = f"Bearer {token or api.token}"
    async with api.http.get(f"{api.base}/v1/events/stream{query}", headers=named) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        assert (await answer.content.readline()).startswith(b"retry: ")
        yield StreamClient(answer)


async def test_events_are_streamed_as_they_are_created(api: ApiClient) -> None:
    """Each with its id, its type and its whole document."""
    async with open_stream(api) as listener:
        eid = await api.publish_call("main", "1")
        received = await listener.next()

    assert (received["id"], received["event"]) == (eid, "call.completed")
    assert json.loads(received["data"]) == await api.get(f"/v1/events/{eid}")


async def test_a_client_that_reconnects_gets_what_it_missed(api: ApiClient) -> None:
    """Last-Event-ID, as a header or a parameter, resumes after that event and continues live."""
    event_ids = [await api.publish_call("main", str(number)) for number in range(4)]

    async with open_stream(api, Last_Event_ID=event_ids[0]) as listener:
        missed = await listener.ids(3)
        live = await api.publish_call("main", "live")
        assert await listener.ids(1) == [live]
    async with open_stream(api, f"?last_event_id={event_ids[2]}") as listener:
        again = await listener.ids(2)

    assert missed == event_ids[1:]
    assert again == [event_ids[3], live]


async def test_events_of_the_same_millisecond_are_all_streamed(api: ApiClient) -> None:
    """Other events have the same time as the one that was received last."""
    event_ids = [await api.publish_call("main", str(number)) for number in range(4)]
    now_ms = int((await api.relay.redis.zscore(keys.EVENTS, event_ids[3])) or 0)
    await api.relay.redis.zadd(keys.EVENTS, dict.fromkeys(event_ids, now_ms))

    async with open_stream(api, Last_Event_ID=event_ids[1]) as listener:
        received = await listener.ids(3)

    assert set(received) == set(event_ids) - {event_ids[1]}


async def test_filters(api: ApiClient) -> None:
    """Type and source, as for the list."""
    await api.post("/v1/sources", {**SOURCE, "id": "new"})
    async with open_stream(api, "?source=new") as by_source, open_stream(api, "?type=webhook.test") as by_type:
        await api.publish_call("main", "1")
        mine = await api.publish_call("new", "1")
        sent = await api.post("/v1/subscriptions/a/test")

        assert await by_source.ids(1) == [mine]
        assert await by_type.ids(1) == [sent["event_id"]]
    assert await api.problem("GET", "/v1/events/stream?source=unknown") == (404, "not_found")
    assert await api.problem("GET", "/v1/events/stream?last_event_id=1") == (422, "invalid")


async def test_a_tenant_gets_only_its_own_events(api: ApiClient) -> None:
    """Nothing of the operator's, nothing of another tenant's."""
    token = await api.issue_token("viewer", "acme")
    await api.post("/v1/sources", {**SOURCE, "id": "acme", "tenant": "acme"})
    async with open_stream(api, token=token) as listener:
        await api.publish_call("main", "1")
        mine = await api.publish_call("acme", "1")

        assert await listener.ids(1) == [mine]


@pytest.mark.parametrize("last", ["evt_" + "a" * 26, "not even an id"])
async def test_a_gap_is_reported(api: ApiClient, last: str) -> None:
    """After an event that has expired, the client learns that others may be missing."""
    async with open_stream(api, Last_Event_ID=last) as listener:
        gap = await listener.next()
        eid = await api.publish_call("main", "1")

        assert (gap["event"], gap["data"]) == ("gap", '{"missed":null}')
        assert "id" not in gap
        assert await listener.ids(1) == [eid]


async def test_the_backlog_is_bounded(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that was away for too long learns how many events it missed, and continues live."""
    monkeypatch.setattr(stream, "MAX_BACKLOG", 2)
    event_ids = [await api.publish_call("main", str(number)) for number in range(4)]

    async with open_stream(api, Last_Event_ID=event_ids[0]) as listener:
        gap = await listener.next()

    assert gap["data"] == '{"missed":3}'


@pytest.fixture
async def quick(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ApiClient]:
    """A relay whose streams have short heartbeats and write timeouts."""
    monkeypatch.setattr(app, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(app, "WRITE_TIMEOUT_S", 0.3)
    async with open_api(redis, valkey_url, tmp_path, monkeypatch) as opened:
        yield opened


async def test_a_quiet_stream_has_heartbeats(quick: ApiClient) -> None:
    """So that a proxy does not close it, and both sides notice a lost connection."""
    async with open_stream(quick) as listener:
        async with asyncio.timeout(5):
            lines = [await listener.answer.content.readline() for _ in range(5)]

    assert b": heartbeat\n" in lines


async def test_revoking_a_token_ends_its_streams(quick: ApiClient) -> None:
    """At the next heartbeat."""
    issued = await quick.post("/v1/tokens", {"name": "tail", "role": "viewer"})
    async with open_stream(quick, token=issued["token"]) as listener:
        await quick.request("DELETE", f"/v1/tokens/{issued['id']}")

        with pytest.raises(EOFError):
            await listener.next()


async def test_a_client_that_reads_nothing_is_disconnected(quick: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the only stream until the write timeout; then another client gets every event."""
    monkeypatch.setattr(stream, "MAX_STREAMS", 1)
    redis = quick.relay.redis
    host, port = quick.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(f"GET /v1/events/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {quick.token}\r\n\r\n".encode())
    await reader.readuntil(b"retry: 2000\n\n")
    seconds, micros = await redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    ids = [f"evt_{number:026d}" for number in range(2000)]  # 20 MB, more than any socket buffers
    async with redis.pipeline(transaction=False) as pipe:
        for eid in ids:
            pipe.hset(keys.event(eid), keys.BODY, pack({"id": eid, **EVENT}))
        pipe.zadd(keys.EVENTS, dict.fromkeys(ids, now_ms + 1))
        await pipe.execute()

    assert await quick.problem("GET", "/v1/events/stream") == (503, "too_many_streams")
    await eventually(lambda: _status(quick), lambda status: status == 200)
    monkeypatch.setattr(stream, "MAX_STREAMS", 10)
    async with open_stream(quick) as listener:
        eid = await quick.publish_call("main", "1")
        assert await listener.ids(1) == [eid]

    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def _status(api: ApiClient) -> int:
    """Try to open a stream, and close it at once."""
    headers = {"Authorization": f"Bearer {api.token}", "Connection": "close"}
    async with api.http.get(f"{api.base}/v1/events/stream", headers=headers) as answer:
        return answer.status


async def test_the_number_of_streams_is_limited(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused; when one ends there is room again."""
    monkeypatch.setattr(stream, "MAX_STREAMS", 1)
    async with open_stream(api):
        assert await api.problem("GET", "/v1/events/stream") == (503, "too_many_streams")
    assert await eventually(lambda: _status(api), lambda status: status == 200)


async def test_streams_end_when_the_relay_stops(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promptly: the shutdown does not wait for clients."""
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
        async with open_api(redis, valkey_url, tmp_path, monkeypatch) as api:
            listener = await stack.enter_async_context(open_stream(replace(api, http=http)))
            stopping_at = loop.time()

        assert loop.time() - stopping_at < 3
        with pytest.raises(EOFError):
            await listener.next()


async def test_one_viewer_or_tenant_does_not_take_all_streams(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are limits per token, per tenant and for all tenants; the others are the operator's."""
    monkeypatch.setattr(stream, "MAX_STREAMS_PER_TOKEN", 2)
    monkeypatch.setattr(stream, "MAX_STREAMS_PER_TENANT", 3)
    monkeypatch.setattr(stream, "MAX_STREAMS_OF_TENANTS", 4)
    first, second = await api.issue_token("viewer", "acme"), await api.issue_token("viewer", "acme")
    other, third = await api.issue_token("viewer", "other"), await api.issue_token("viewer", "third")

    async with contextlib.AsyncExitStack() as streams:
        for token in (first, first, second):
            await streams.enter_async_context(open_stream(api, token=token))
        of_token = await api.problem("GET", "/v1/events/stream", token=first)
        of_tenant = await api.problem("GET", "/v1/events/stream", token=second)
        await streams.enter_async_context(open_stream(api, token=other))
        of_tenants = await api.problem("GET", "/v1/events/stream", token=third)
        for _ in range(3):
            await streams.enter_async_context(open_stream(api))

    assert of_token == of_tenant == of_tenants == (503, "too_many_streams")


async def test_streams_of_a_revoked_token_end_within_a_second(api: ApiClient) -> None:
    token = await api.issue_token("viewer", "acme")
    [issued] = [each for each in (await api.get("/v1/tokens"))["items"] if each["name"] == "viewer of acme"]

    async with open_stream(api, token=token) as listener:
        await api.request("DELETE", f"/v1/tokens/{issued['id']}")
        async with asyncio.timeout(1):
            with contextlib.suppress(aiohttp.ClientError):
                assert await listener.answer.content.read() == b"\n"
