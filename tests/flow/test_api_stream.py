"""The event stream: heard live, resumed without a gap, and never a burden."""

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
from tests.flow.api_desk import SOURCE, Desk, open_desk
from tests.flow.harness import eventually

EVENT = {"type": "call.completed", "data": {"call": {"id": "call_x", "source_id": "main"}}, "padding": "x" * 10_000}


@dataclass
class Listener:
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
        """Read so many events; gives their ids."""
        return [(await self.next())["id"] for _ in range(count)]


@contextlib.asynccontextmanager
async def listening(
    desk: Desk, query: str = "", *, token: str | None = None, **headers: str
) -> AsyncIterator[Listener]:
    """Open a stream, and wait until it has begun."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named["Authorization"] = f"Bearer {token or desk.token}"
    async with desk.http.get(f"{desk.base}/v1/events/stream{query}", headers=named) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        assert (await answer.content.readline()).startswith(b"retry: ")
        yield Listener(answer)


async def test_events_are_heard_as_they_are_made(desk: Desk) -> None:
    """Each with its id, its type and its whole document."""
    async with listening(desk) as listener:
        eid = await desk.told("main", "1")
        heard = await listener.next()

    assert (heard["id"], heard["event"]) == (eid, "call.completed")
    assert json.loads(heard["data"]) == await desk.get(f"/v1/events/{eid}")


async def test_who_comes_back_gets_what_was_missed(desk: Desk) -> None:
    """Last-Event-ID, as a header or a parameter, goes on right after that event, and on with live ones."""
    made = [await desk.told("main", str(number)) for number in range(4)]

    async with listening(desk, Last_Event_ID=made[0]) as listener:
        missed = await listener.ids(3)
        live = await desk.told("main", "live")
        assert await listener.ids(1) == [live]
    async with listening(desk, f"?last_event_id={made[2]}") as listener:
        again = await listener.ids(2)

    assert missed == made[1:]
    assert again == [made[3], live]


async def test_events_of_the_same_millisecond_are_all_heard(desk: Desk) -> None:
    """The one that was heard last has neighbours with the very same time."""
    made = [await desk.told("main", str(number)) for number in range(4)]
    now_ms = int((await desk.relay.redis.zscore(keys.EVENTS, made[3])) or 0)
    await desk.relay.redis.zadd(keys.EVENTS, dict.fromkeys(made, now_ms))

    async with listening(desk, Last_Event_ID=made[1]) as listener:
        heard = await listener.ids(3)

    assert set(heard) == set(made) - {made[1]}


async def test_filters(desk: Desk) -> None:
    """Type and source, as for the list."""
    await desk.post("/v1/sources", {**SOURCE, "id": "new"})
    async with listening(desk, "?source=new") as by_source, listening(desk, "?type=webhook.test") as by_type:
        await desk.told("main", "1")
        mine = await desk.told("new", "1")
        sent = await desk.post("/v1/subscriptions/a/test")

        assert await by_source.ids(1) == [mine]
        assert await by_type.ids(1) == [sent["event_id"]]
    assert await desk.code("GET", "/v1/events/stream?source=nobody") == (404, "not_found")
    assert await desk.code("GET", "/v1/events/stream?last_event_id=1") == (422, "invalid")


async def test_a_tenant_hears_only_its_own(desk: Desk) -> None:
    """Nothing of the operator's, nothing of another tenant's."""
    token = await desk.token_for("viewer", "acme")
    await desk.post("/v1/sources", {**SOURCE, "id": "acme", "tenant": "acme"})
    async with listening(desk, token=token) as listener:
        await desk.told("main", "1")
        mine = await desk.told("acme", "1")

        assert await listener.ids(1) == [mine]


@pytest.mark.parametrize("last", ["evt_" + "a" * 26, "not even an id"])
async def test_a_gap_is_said(desk: Desk, last: str) -> None:
    """After an event that nobody knows any more the listener is told that something may be missing."""
    async with listening(desk, Last_Event_ID=last) as listener:
        gap = await listener.next()
        eid = await desk.told("main", "1")

        assert (gap["event"], gap["data"]) == ("gap", '{"missed":null}')
        assert "id" not in gap
        assert await listener.ids(1) == [eid]


async def test_the_backlog_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was away for too long is told how much it missed, and goes on from now."""
    monkeypatch.setattr(stream, "MAX_BACKLOG", 2)
    made = [await desk.told("main", str(number)) for number in range(4)]

    async with listening(desk, Last_Event_ID=made[0]) as listener:
        gap = await listener.next()

    assert gap["data"] == '{"missed":3}'


@pytest.fixture
async def quick(redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """A relay whose streams beat often and lose patience soon."""
    monkeypatch.setattr(app, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(app, "WRITE_TIMEOUT_S", 0.3)
    async with open_desk(redis, valkey_url, tmp_path, monkeypatch) as opened:
        yield opened


async def test_a_quiet_stream_beats(quick: Desk) -> None:
    """So that a proxy does not close it, and both sides notice when the other is gone."""
    async with listening(quick) as listener:
        async with asyncio.timeout(5):
            lines = [await listener.answer.content.readline() for _ in range(5)]

    assert b": heartbeat\n" in lines


async def test_a_revoked_token_stops_hearing(quick: Desk) -> None:
    """Its stream ends with the next beat."""
    made = await quick.post("/v1/tokens", {"name": "tail", "role": "viewer"})
    async with listening(quick, token=made["token"]) as listener:
        await quick.ask("DELETE", f"/v1/tokens/{made['id']}")

        with pytest.raises(EOFError):
            await listener.next()


async def test_a_listener_that_takes_nothing_is_let_go(quick: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the only place until its patience ends; then somebody else hears all."""
    monkeypatch.setattr(stream, "MAX_STREAMS", 1)
    redis = quick.relay.redis
    host, port = quick.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(f"GET /v1/events/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {quick.token}\r\n\r\n".encode())
    await reader.readuntil(b"retry: 2000\n\n")
    seconds, micros = await redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    ids = [f"evt_{number:026d}" for number in range(2000)]  # 20 MB, more than any socket takes
    async with redis.pipeline(transaction=False) as pipe:
        for eid in ids:
            pipe.hset(keys.event(eid), keys.BODY, pack({"id": eid, **EVENT}))
        pipe.zadd(keys.EVENTS, dict.fromkeys(ids, now_ms + 1))
        await pipe.execute()

    assert await quick.code("GET", "/v1/events/stream") == (503, "too_many_streams")
    await eventually(lambda: _status(quick), lambda status: status == 200)
    monkeypatch.setattr(stream, "MAX_STREAMS", 10)
    async with listening(quick) as listener:
        eid = await quick.told("main", "1")
        assert await listener.ids(1) == [eid]

    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def _status(desk: Desk) -> int:
    """Try to open a stream; hangs up at once."""
    headers = {"Authorization": f"Bearer {desk.token}", "Connection": "close"}
    async with desk.http.get(f"{desk.base}/v1/events/stream", headers=headers) as answer:
        return answer.status


async def test_there_are_only_so_many_streams(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is told to come later; when one leaves there is room again."""
    monkeypatch.setattr(stream, "MAX_STREAMS", 1)
    async with listening(desk):
        assert await desk.code("GET", "/v1/events/stream") == (503, "too_many_streams")
    assert await eventually(lambda: _status(desk), lambda status: status == 200)


async def test_streams_end_when_the_relay_stops(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promptly: nobody waits for a listener."""
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
        async with open_desk(redis, valkey_url, tmp_path, monkeypatch) as desk:
            listener = await stack.enter_async_context(listening(replace(desk, http=http)))
            stopping_at = loop.time()

        assert loop.time() - stopping_at < 3
        with pytest.raises(EOFError):
            await listener.next()
