"""Listening over a signed link: what a player, a browser, an automation and an attacker get."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError, ClientResponse, ClientSession, web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from relay.api.recordings import Part, Unsatisfiable, Whole, parse_range, recording_routes
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
class Desk:
    """The API's recordings on loopback, with a ledger and a clock that tests may change."""

    base: str
    http: ClientSession
    storage: RecordingStorage
    parts: dict[str, Json]
    now: datetime = NOW
    ledger_error: Exception | None = None
    asked: list[str] = field(default_factory=list)

    def url(self, call_id: str = CALL) -> str:
        return link(self.base, call_id, now=NOW, key=KEY, ttl_s=3600)[0]

    async def find(self, call_id: str) -> Json | None:
        self.asked.append(call_id)
        if self.ledger_error is not None:
            raise self.ledger_error
        return self.parts.get(call_id)

    async def get(self, url: str | None = None, **headers: str) -> tuple[ClientResponse, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.get(URL(url or self.url(), encoded=True), headers=named) as answer:
            return answer, await answer.read()


class Wrapped:
    """Storage that fails when told to, at the size, at the first block or in the middle, and notes who is done."""

    def __init__(self, storage: RecordingStorage) -> None:
        self._storage = storage
        self.fails_at: str | None = None
        self.let_go = asyncio.Semaphore(0)

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
            self.let_go.release()


Serve = Callable[[web.Application], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve applications on loopback; answer where."""
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
def wrapped(storage: RecordingStorage) -> Wrapped:
    """The same directory, with trouble on demand."""
    return Wrapped(storage)


@pytest.fixture
async def desk(serve: Serve, storage: RecordingStorage, wrapped: Wrapped) -> AsyncIterator[Desk]:
    """The route, with one recording kept."""

    async def chunks() -> AsyncIterator[bytes]:
        yield AUDIO

    stored = await storage.put(CALL, chunks(), started_on=date(2026, 11, 20), expected_size_bytes=None)
    assert isinstance(stored, Stored)
    part = {"status": "available", "content_type": "audio/wav", "sha256": stored.sha256, "path": stored.path}
    async with ClientSession(auto_decompress=False) as http:
        desk = Desk("", http, storage, {CALL: part})
        app = web.Application()
        app.add_routes(recording_routes(wrapped, desk.find, [KEY], lambda: desk.now, write_timeout_s=0.3))
        desk.base = await serve(app)
        yield desk


def said(answer: ClientResponse, body: bytes) -> str:
    """Check that an error is a small problem document; return its sentence."""
    assert answer.content_type == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    problem = json.loads(body)
    assert problem["status"] == answer.status
    assert set(problem) == {"type", "title", "status", "detail"}
    return str(problem["detail"])


async def test_a_link_plays(desk: Desk) -> None:
    """The whole recording, with everything that a player and a download need."""
    answer, body = await desk.get()

    assert answer.status == 200
    assert body == AUDIO
    assert {name.lower(): value for name, value in answer.headers.items() if name not in ("Date", "Server")} == {
        "accept-ranges": "bytes",
        "cache-control": "private",
        "content-disposition": f'inline; filename="call-{"a" * 26}.wav"',
        "content-length": str(len(AUDIO)),
        "content-type": "audio/wav",
        "etag": f'"{SHA256}"',
        "x-content-type-options": "nosniff",
    }


async def test_head_tells_the_same_and_sends_nothing(desk: Desk) -> None:
    """A HEAD has every header of the GET, ignores Range, and has no body on the wire."""
    get, _ = await desk.get()
    path = URL(desk.url(), encoded=True).raw_path_qs

    raw = await exchange(desk.base, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-0\r\nConnection: close\r\n\r\n")

    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().lower().split("\r\n")
    assert status == "http/1.1 200 ok"
    assert {f"{name}: {value}".lower() for name, value in get.headers.items() if name != "Date"} <= set(lines)
    assert body == b""


async def test_head_of_a_wrong_link_has_no_body_either(desk: Desk) -> None:
    """The status says it."""
    raw = await exchange(desk.base, f"HEAD /recordings/{CALL} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert raw.startswith(b"HTTP/1.1 403 ")
    assert raw.endswith(b"\r\n\r\n")


async def exchange(base: str, request: str) -> bytes:
    """Send bytes as they are and read to the end."""
    url = URL(base)
    assert url.host is not None
    assert url.port is not None
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(request.encode("latin-1"))
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    ("range_header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, len(AUDIO)),
        ("bytes=100-199", 100, 200),
        (f"bytes=1048570-{2**60}", 1_048_570, len(AUDIO)),
        ("bytes=-5", len(AUDIO) - 5, len(AUDIO)),
        ("bytes=-99999999999", 0, len(AUDIO)),
        ("Bytes = 1 - 2", 1, 3),
    ],
)
async def test_a_player_may_jump(desk: Desk, range_header: str, start: int, end: int) -> None:
    """A single range is answered with exactly those bytes."""
    answer, body = await desk.get(Range=range_header)

    assert answer.status == 206
    assert body == AUDIO[start:end]
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(AUDIO)}"
    assert answer.headers["Content-Length"] == str(end - start)
    assert answer.headers["ETag"] == f'"{SHA256}"'


@pytest.mark.parametrize("range_header", ["bytes=0-1,5-6", "bytes=5-4", "bytes=-", "bytes=x-1", "seconds=0-1", ""])
async def test_a_range_that_is_not_understood_means_everything(desk: Desk, range_header: str) -> None:
    """Several ranges too: no multipart answers."""
    answer, body = await desk.get(Range=range_header)

    assert answer.status == 200
    assert body == AUDIO
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize("range_header", [f"bytes={len(AUDIO)}-", "bytes=99999999-999999999", "bytes=-0"])
async def test_a_range_outside_is_said_with_the_size(desk: Desk, range_header: str) -> None:
    """A player learns how long the recording is."""
    answer, body = await desk.get(Range=range_header)

    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(AUDIO)}"
    assert said(answer, body) == f"The recording has {len(AUDIO)} bytes."


@given(size=st.integers(1, 50), first=st.none() | st.integers(0, 60), last=st.none() | st.integers(0, 60))
def test_ranges_are_slices(size: int, first: int | None, last: int | None) -> None:
    """For every range and every size, what is sent is what slicing gives."""
    data = bytes(range(size))
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"

    wanted = parse_range(header, size)

    match wanted:
        case Part(start, end):
            assert 0 <= start < end <= size
            expected = data[-last:] if first is None and last else data[first : None if last is None else last + 1]
            assert data[start:end] == expected
        case Unsatisfiable():
            assert last == 0 if first is None else data[first:] == b""
        case Whole():
            assert (first is None and last is None) or (first is not None and last is not None and last < first)


@given(st.text(max_size=40) | st.from_regex(r"bytes=[0-9,\- ]*"))
def test_no_range_header_upsets_the_server(header: str) -> None:
    """Whatever is sent, the answer is a part inside the recording, everything, or a refusal."""
    wanted = parse_range(header, 10)

    assert isinstance(wanted, Whole | Unsatisfiable) or 0 <= wanted.start < wanted.end <= 10


async def test_a_cached_copy_is_confirmed_and_not_sent_again(desk: Desk) -> None:
    """The entity tag is the digest of the audio."""
    for tag in (f'"{SHA256}"', f'"other", W/"{SHA256}"', "*"):
        answer, body = await desk.get(If_None_Match=tag, Range="bytes=0-1")
        assert answer.status == 304
        assert body == b""
        assert answer.headers["ETag"] == f'"{SHA256}"'

    answer, body = await desk.get(If_None_Match='"other"')

    assert (answer.status, body) == (200, AUDIO)


async def test_a_download_resumes_only_where_it_is_the_same_recording(desk: Desk) -> None:
    """If-Range with our tag gives the rest; anything else starts over."""
    same, rest = await desk.get(Range="bytes=10-", If_Range=f'"{SHA256}"')
    changed, whole = await desk.get(Range="bytes=10-", If_Range='"other"')
    dated, from_start = await desk.get(Range="bytes=10-", If_Range="Fri, 20 Nov 2026 10:00:00 GMT")

    assert (same.status, rest) == (206, AUDIO[10:])
    assert (changed.status, whole) == (200, AUDIO)
    assert (dated.status, from_start) == (200, AUDIO)


async def test_an_expired_link_is_gone(desk: Desk) -> None:
    """The sentence says what to do."""
    desk.now = NOW + timedelta(hours=1)

    answer, body = await desk.get()

    assert answer.status == 410
    assert said(answer, body) == "This link has expired; ask for a new one."


async def test_a_changed_link_is_refused_before_anything_is_looked_up(desk: Desk) -> None:
    """A stretched expiry, another call's id, a changed, missing or doubled signature."""
    url = URL(desk.url(), encoded=True)
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
        answer, body = await desk.get(str(changed))
        assert answer.status == 403, changed
        assert said(answer, body) == "This link is incomplete or was changed."

    assert desk.asked == []


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
async def test_path_tricks_find_nothing(desk: Desk, path: str) -> None:
    """Dots, encoded slashes, NUL and line breaks reach neither the ledger nor the storage."""
    query = URL(desk.url(), encoded=True).raw_query_string

    raw = await exchange(desk.base, f"GET {path}?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert raw.startswith(b"HTTP/1.1 404 ")
    assert desk.asked == []


async def test_a_raw_nul_is_no_request(desk: Desk) -> None:
    """Bytes that HTTP forbids are refused before any handler."""
    raw = await exchange(desk.base, f"GET /recordings/{CALL}\0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert raw.split(b" ")[1] == b"400"
    assert desk.asked == []


async def test_unknown_unfinished_and_erased_recordings_look_the_same(desk: Desk) -> None:
    """A good link to nothing says that nothing is kept, not why."""
    kept = desk.parts[CALL]
    answers = [await desk.get(desk.url(OTHER))]
    desk.parts[CALL] = {"status": "pending", "url": None, "sha256": None}
    answers.append(await desk.get())
    desk.parts[CALL] = kept
    await desk.storage.delete(kept["path"])
    answers.append(await desk.get())

    assert [answer.status for answer, _ in answers] == [404, 404, 404]
    assert {said(*answer) for answer in answers} == {"This recording is not kept, or not any more."}


@pytest.mark.parametrize("content_type", ["text/html", "image/svg+xml", None, "audio/wav\r\nX-Evil: 1"])
async def test_only_audio_types_are_sent(desk: Desk, content_type: str | None) -> None:
    """Whatever the ledger holds, a browser never gets a page from here."""
    desk.parts[CALL]["content_type"] = content_type

    answer, _ = await desk.get(Range="bytes=0-0")

    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert "X-Evil" not in answer.headers


@pytest.mark.parametrize("fails_at", ["size", "first"])
async def test_a_storage_outage_is_said_and_passes(desk: Desk, wrapped: Wrapped, fails_at: str) -> None:
    """The listener is asked to come back, and hears nothing about where recordings are kept."""
    wrapped.fails_at = fails_at
    answer, body = await desk.get()
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "30"
    assert said(answer, body) == "The recording cannot be read just now; try again soon."

    wrapped.fails_at = None

    assert (await desk.get())[1] == AUDIO


async def test_a_ledger_outage_is_said_too(desk: Desk) -> None:
    """The signature was right; what it opens cannot be looked up just now."""
    desk.ledger_error = StoreError("the store is gone")

    answer, _ = await desk.get()

    assert answer.status == 503


async def test_an_outage_in_the_middle_is_no_whole_recording(desk: Desk, wrapped: Wrapped) -> None:
    """The connection is cut, so a player or a download knows that something is missing."""
    wrapped.fails_at = "middle"

    with pytest.raises(ClientPayloadError):
        await desk.get()


async def test_listeners_that_leave_or_stall_disturb_nobody(
    desk: Desk, wrapped: Wrapped, caplog: pytest.LogCaptureFixture
) -> None:
    """One hangs up in the middle, one stops reading for good: both are let go, without an error in the log."""

    async def long() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield bytes(1024 * 1024)

    stored = await desk.storage.put(OTHER, long(), started_on=date(2026, 11, 20), expected_size_bytes=None)
    assert isinstance(stored, Stored)
    desk.parts[OTHER] = {"status": "available", "sha256": stored.sha256, "path": stored.path}
    url = URL(desk.url(OTHER), encoded=True)
    request = f"GET {url.raw_path_qs} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    leaving = await asyncio.open_connection(url.host, url.port, limit=1024)
    stalling = await asyncio.open_connection(url.host, url.port, limit=1024)
    for reader, writer in (leaving, stalling):
        writer.write(request)
        await reader.readexactly(100)
    leaving[1].transport.abort()
    answer, body = await desk.get()

    assert (answer.status, body) == (200, AUDIO)
    async with asyncio.timeout(10):
        for _ in ("the ordinary one", "the one that left", "the one that stalls"):
            await wrapped.let_go.acquire()
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    stalling[1].transport.abort()


async def test_other_methods_are_not_allowed(desk: Desk) -> None:
    """Nothing can be written or deleted through a link."""
    for method in ("POST", "PUT", "DELETE"):
        async with desk.http.request(method, URL(desk.url(), encoded=True)) as answer:
            assert answer.status == 405
