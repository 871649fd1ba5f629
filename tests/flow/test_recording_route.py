"""Recordings over signed links: what a player, a browser, an automation and an attacker get."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError, ClientResponse, ClientSession, web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from relay.api.recordings import recording_routes, requested_range
from relay.domain.json import Json
from relay.errors import StorageError, StoreError
from relay.recordings.links import link
from relay.recordings.storage import RecordingStorage, Stored, open_storage

CALL = "call_" + "a" * 26
OTHER = "call_" + "b" * 26
KEY = b"k" * 32
NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
AUDIO = b"".join(number.to_bytes(4, "big") for number in range(300_000))
SHA256 = hashlib.sha256(AUDIO).hexdigest()


@dataclass
class RecordingServer:
    """The recording routes on loopback, with a store and a clock that tests may change."""

    base: str
    http: ClientSession
    storage: RecordingStorage
    parts: dict[str, Json]
    now: datetime = NOW
    store_error: Exception | None = None
    lookups: list[str] = field(default_factory=list)

    def url(self, call_id: str = CALL) -> str:
        return link(self.base, call_id, now=NOW, key=KEY, ttl_s=3600)[0]

    async def find(self, call_id: str) -> Json | None:
        self.lookups.append(call_id)
        if self.store_error is not None:
            raise self.store_error
        return self.parts.get(call_id)

    async def get(self, url: str | None = None, **headers: str) -> tuple[ClientResponse, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.get(URL(url or self.url(), encoded=True), headers=named) as response:
            return response, await response.read()


class FaultyStorage:
    """Storage that fails on request: at the size, at the first block or in the middle. Counts ended reads."""

    def __init__(self, storage: RecordingStorage) -> None:
        self._storage = storage
        self.fails_at: str | None = None
        self.ended = asyncio.Semaphore(0)

    async def size(self, path: str) -> int | None:
        if self.fails_at == "size":
            raise StorageError("cannot look at a recording in s3://kept: 503")
        return await self._storage.size(path)

    async def read(self, path: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        if self.fails_at == "first":
            raise StorageError("cannot read a recording in s3://kept: 503")
        try:
            async for block in self._storage.read(path, start, end):
                yield block
                if self.fails_at == "middle":
                    raise StorageError("cannot read a recording in s3://kept: 503")
        finally:
            self.ended.release()


Serve = Callable[[web.Application], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve applications on loopback; return their base URL."""
    runners: list[web.AppRunner] = []

    async def start(app: web.Application) -> str:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[RecordingStorage]:
    """A directory with one recording of 1.2 MB."""
    storage = open_storage(str(tmp_path))
    yield storage
    await storage.aclose()


@pytest.fixture
def faulty(storage: RecordingStorage) -> FaultyStorage:
    """The same directory, with faults on request."""
    return FaultyStorage(storage)


@pytest.fixture
async def server(serve: Serve, storage: RecordingStorage, faulty: FaultyStorage) -> AsyncIterator[RecordingServer]:
    """The routes, with one stored recording."""

    async def chunks() -> AsyncIterator[bytes]:
        yield AUDIO

    stored = await storage.put(CALL, chunks(), started_on=date(2026, 11, 20), expected_size_bytes=None)
    assert isinstance(stored, Stored)
    part = {"status": "available", "content_type": "audio/wav", "sha256": stored.sha256, "path": stored.path}
    async with ClientSession(auto_decompress=False) as http:
        server = RecordingServer("", http, storage, {CALL: part})
        app = web.Application()
        app.add_routes(recording_routes(faulty, server.find, [KEY], lambda: server.now, write_timeout_s=0.3))
        server.base = await serve(app)
        yield server


def problem_detail(response: ClientResponse, body: bytes) -> str:
    """Check that an error is a small problem document; return its detail."""
    assert response.content_type == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    problem = json.loads(body)
    assert problem["status"] == response.status
    assert set(problem) == {"type", "title", "status", "detail"}
    return str(problem["detail"])


async def test_a_link_plays(server: RecordingServer) -> None:
    """The whole recording, with everything that a player and a download need."""
    response, body = await server.get()

    assert response.status == 200
    assert body == AUDIO
    assert {name.lower(): value for name, value in response.headers.items() if name not in ("Date", "Server")} == {
        "accept-ranges": "bytes",
        "cache-control": "private",
        "content-disposition": f'inline; filename="call-{"a" * 26}.wav"',
        "content-length": str(len(AUDIO)),
        "content-type": "audio/wav",
        "etag": f'"{SHA256}"',
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }


async def test_head_sends_the_same_headers_and_no_body(server: RecordingServer) -> None:
    """A HEAD has every header of the GET, ignores Range, and has no body on the wire."""
    get, _ = await server.get()
    path = URL(server.url(), encoded=True).raw_path_qs

    raw = await exchange(
        server.base, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-0\r\nConnection: close\r\n\r\n"
    )

    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().lower().split("\r\n")
    assert status == "http/1.1 200 ok"
    assert {f"{name}: {value}".lower() for name, value in get.headers.items() if name != "Date"} <= set(lines)
    assert body == b""


async def test_head_of_an_invalid_link_has_no_body_either(server: RecordingServer) -> None:
    """Only the status is sent."""
    raw = await exchange(server.base, f"HEAD /recordings/{CALL} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert raw.startswith(b"HTTP/1.1 403 ")
    assert raw.endswith(b"\r\n\r\n")


async def exchange(base: str, request: str) -> bytes:
    """Send raw bytes and read to the end."""
    url = URL(base)
    assert url.host is not None
    assert url.port is not None
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(request.encode("latin-1"))
    async with asyncio.timeout(10):
        response = await reader.read()
    writer.close()
    await writer.wait_closed()
    return response


@pytest.mark.parametrize(
    ("range_header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, len(AUDIO)),
        ("bytes=100-199", 100, 200),
        (f"bytes=1048570-{2**60}", 1_048_570, len(AUDIO)),
        ("bytes=-5", len(AUDIO) - 5, len(AUDIO)),
        ("bytes=-99999999999", 0, len(AUDIO)),
        ("Bytes=1-2", 1, 3),
    ],
)
async def test_a_player_may_jump(server: RecordingServer, range_header: str, start: int, end: int) -> None:
    """A single range is answered with exactly those bytes."""
    response, body = await server.get(Range=range_header)

    assert response.status == 206
    assert body == AUDIO[start:end]
    assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(AUDIO)}"
    assert response.headers["Content-Length"] == str(end - start)
    assert response.headers["ETag"] == f'"{SHA256}"'


@pytest.mark.parametrize(
    "range_header", ["bytes=0-1,5-6", "bytes=5-4", "bytes=-", "bytes=x-1", "bytes = 1 - 2", "seconds=0-1", ""]
)
async def test_a_range_that_is_not_understood_is_ignored(server: RecordingServer, range_header: str) -> None:
    """Several ranges too: there are no multipart responses."""
    response, body = await server.get(Range=range_header)

    assert response.status == 200
    assert body == AUDIO
    assert "Content-Range" not in response.headers


@pytest.mark.parametrize("range_header", [f"bytes={len(AUDIO)}-", "bytes=99999999-999999999", "bytes=-0"])
async def test_a_range_outside_the_recording_is_answered_with_its_size(
    server: RecordingServer, range_header: str
) -> None:
    """A player learns the size from Content-Range."""
    response, body = await server.get(Range=range_header)

    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{len(AUDIO)}"
    assert problem_detail(response, body) == f"The recording has {len(AUDIO)} bytes."


@given(size=st.integers(1, 50), first=st.none() | st.integers(0, 60), last=st.none() | st.integers(0, 60))
def test_ranges_are_slices(size: int, first: int | None, last: int | None) -> None:
    """For every range and every size, what is sent is what slicing gives."""
    data = bytes(range(size))
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"

    selected = requested_range(get(header), SHA256, size)

    if selected is None:
        assert (first is None and last is None) or (first is not None and last is not None and last < first)
    elif selected:
        assert 0 <= selected.start < selected.stop <= size
        expected = data[-last:] if first is None and last else data[first : None if last is None else last + 1]
        assert data[selected.start : selected.stop] == expected
    else:
        assert last == 0 if first is None else data[first:] == b""


def get(range_header: str) -> web.BaseRequest:
    return make_mocked_request("GET", "/", headers={"Range": range_header})


@given(st.text(max_size=40) | st.from_regex(r"bytes=[0-9,\- ]*"))
def test_no_range_header_breaks_the_server(header: str) -> None:
    """Whatever is sent, the response is a part inside the recording, all of it, or 416."""
    selected = requested_range(get(header), SHA256, 10)

    assert not selected or 0 <= selected.start < selected.stop <= 10


async def test_a_cached_copy_is_confirmed_and_not_sent_again(server: RecordingServer) -> None:
    """The entity tag is the digest of the audio."""
    for tag in (f'"{SHA256}"', f'"other", W/"{SHA256}"', "*"):
        response, body = await server.get(If_None_Match=tag, Range="bytes=0-1")
        assert response.status == 304
        assert body == b""
        assert response.headers["ETag"] == f'"{SHA256}"'

    response, body = await server.get(If_None_Match='"other"')

    assert (response.status, body) == (200, AUDIO)


async def test_a_download_resumes_only_where_it_is_the_same_recording(server: RecordingServer) -> None:
    """If-Range with our tag gives the rest; anything else starts over."""
    same, rest = await server.get(Range="bytes=10-", If_Range=f'"{SHA256}"')
    changed, whole = await server.get(Range="bytes=10-", If_Range='"other"')
    dated, from_start = await server.get(Range="bytes=10-", If_Range="Fri, 20 Nov 2026 10:00:00 GMT")

    assert (same.status, rest) == (206, AUDIO[10:])
    assert (changed.status, whole) == (200, AUDIO)
    assert (dated.status, from_start) == (200, AUDIO)


async def test_an_expired_link_is_gone(server: RecordingServer) -> None:
    """The detail says what to do."""
    server.now = NOW + timedelta(hours=1)

    response, body = await server.get()

    assert response.status == 410
    assert problem_detail(response, body) == "This link has expired; request a new one."


async def test_a_modified_link_is_refused_before_anything_is_looked_up(server: RecordingServer) -> None:
    """A later expiry, another call's id, a modified, missing or doubled parameter."""
    url = URL(server.url(), encoded=True)
    expires, signature = url.query["expires"], url.query["signature"]
    for changed in (
        url.update_query(expires=str(int(expires) + 1)),
        url.with_path(f"/recordings/{OTHER}").with_query(url.query),
        url.update_query(signature=signature[::-1]),
        url.update_query(signature="é😀"),
        url.with_query(expires=expires),
        url.with_query(signature=signature),
        url.with_query(None),
        url.with_query([("expires", "99999999999"), ("expires", expires), ("signature", signature)]),
    ):
        response, body = await server.get(str(changed))
        assert response.status == 403, changed
        assert problem_detail(response, body) == "This link is incomplete or was modified."

    assert server.lookups == []


@pytest.mark.parametrize(
    "path",
    [
        "/recordings/..%2f..%2fetc%2fpasswd",
        f"/recordings/..%2F{CALL}",
        f"/recordings/{CALL}%2f..",
        f"/recordings/{CALL}%00",
        f"/recordings/{CALL}%0a",
        f"/recordings/{CALL}/",
        f"/recordings/{CALL}/x",
        f"/recordings/x/../{CALL}x",
        "/recordings/../../etc/passwd",
        "/recordings/2026/11/20/" + CALL + ".wav",
        f"/recordings/{CALL}.wav",
        f"/recordings/{CALL.upper()}",
        "/recordings/%c3%28",
        "/recordings/",
        "/recordings/..;/x",
        "/recordings/..%5c" + CALL,
    ],
)
async def test_path_tricks_find_nothing(server: RecordingServer, path: str) -> None:
    """Dots, encoded slashes, NUL and line breaks reach neither the store nor the storage."""
    query = URL(server.url(), encoded=True).raw_query_string

    raw = await exchange(server.base, f"GET {path}?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert raw.startswith(b"HTTP/1.1 404 ")
    assert server.lookups == []


async def test_a_raw_nul_is_not_a_request(server: RecordingServer) -> None:
    """Bytes that HTTP forbids are refused before any handler."""
    raw = await exchange(server.base, f"GET /recordings/{CALL}\0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert raw.split(b" ")[1] == b"400"
    assert server.lookups == []


async def test_unknown_unfinished_and_erased_recordings_look_the_same(server: RecordingServer) -> None:
    """A valid link to nothing does not reveal why there is no recording."""
    part = server.parts[CALL]
    responses = [await server.get(server.url(OTHER))]
    server.parts[CALL] = {"status": "pending", "url": None, "sha256": None}
    responses.append(await server.get())
    server.parts[CALL] = part
    await server.storage.delete(part["path"])
    responses.append(await server.get())

    assert [response.status for response, _ in responses] == [404, 404, 404]
    assert {problem_detail(*response) for response in responses} == {"Recording not found, or no longer stored."}


@pytest.mark.parametrize("content_type", ["text/html", "image/svg+xml", None, "audio/wav\r\nX-Evil: 1"])
async def test_only_audio_types_are_sent(server: RecordingServer, content_type: str | None) -> None:
    """Whatever the store contains, a browser never gets a page from here."""
    server.parts[CALL]["content_type"] = content_type

    response, _ = await server.get(Range="bytes=0-0")

    assert response.headers["Content-Type"] == "application/octet-stream"
    assert "X-Evil" not in response.headers


@pytest.mark.parametrize("fails_at", ["size", "first"])
async def test_a_storage_outage_is_answered_with_503_and_ends(
    server: RecordingServer, faulty: FaultyStorage, fails_at: str
) -> None:
    """The client gets a Retry-After, and no word about where recordings are stored."""
    faulty.fails_at = fails_at
    response, body = await server.get()
    assert response.status == 503
    assert response.headers["Retry-After"] == "30"
    assert problem_detail(response, body) == "The recording is temporarily unavailable; retry later."

    faulty.fails_at = None

    assert (await server.get())[1] == AUDIO


async def test_a_store_outage_is_answered_with_503_too(server: RecordingServer) -> None:
    """The signature is valid; the call cannot be looked up now."""
    server.store_error = StoreError("the store is gone")

    response, _ = await server.get()

    assert response.status == 503


async def test_an_outage_in_the_middle_is_not_a_whole_recording(server: RecordingServer, faulty: FaultyStorage) -> None:
    """The connection is aborted, so a player or a download knows that bytes are missing."""
    faulty.fails_at = "middle"

    with pytest.raises(ClientPayloadError):
        await server.get()


async def test_clients_that_disconnect_or_stall_do_not_affect_others(
    server: RecordingServer, faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """One disconnects in the middle, one stops reading: both reads end, without an error in the log."""

    async def long() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield bytes(1024 * 1024)

    stored = await server.storage.put(OTHER, long(), started_on=date(2026, 11, 20), expected_size_bytes=None)
    assert isinstance(stored, Stored)
    server.parts[OTHER] = {"status": "available", "sha256": stored.sha256, "path": stored.path}
    url = URL(server.url(OTHER), encoded=True)
    request = f"GET {url.raw_path_qs} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    leaving = await asyncio.open_connection(url.host, url.port, limit=1024)
    stalling = await asyncio.open_connection(url.host, url.port, limit=1024)
    for reader, writer in (leaving, stalling):
        writer.write(request)
        await reader.readexactly(100)
    leaving[1].transport.abort()
    response, body = await server.get()

    assert (response.status, body) == (200, AUDIO)
    async with asyncio.timeout(10):
        for _ in ("the ordinary one", "the one that disconnects", "the one that stalls"):
            await faulty.ended.acquire()
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    stalling[1].transport.abort()


async def test_other_methods_are_not_allowed(server: RecordingServer) -> None:
    """Nothing can be written or deleted through a link."""
    for method in ("POST", "PUT", "DELETE"):
        async with server.http.request(method, URL(server.url(), encoded=True)) as response:
            assert response.status == 405
