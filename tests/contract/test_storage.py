"""Every kind of storage keeps recordings whole or not at all: a directory, memory, and an object store."""

import asyncio
import hashlib
import os
import re
import resource
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import ClientSession, web
from obstore.store import MemoryStore

from relay.errors import SettingsError, StorageError, StorageFull, Unavailable
from relay.recordings.storage import BLOCK_BYTES, Discarded, RecordingStorage, Stored, open_storage

CALL = "call_" + "a" * 26
OTHER = "call_" + "b" * 26
DAY = date(2026, 11, 20)
PATH = f"2026/11/20/{CALL}.wav"
MIB = 1024 * 1024
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass
class Bucket:
    """The part of S3 that the relay uses, on loopback; `down` makes it answer 503."""

    objects: dict[str, bytes] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    down: bool = False

    async def handle(self, request: web.Request) -> web.Response:
        body, query = await request.read(), request.query
        key = request.path.removeprefix("/kept/")
        if self.down:
            return web.Response(status=503)
        match request.method:
            case "POST" if "uploads" in query:
                upload = f"u{len(self.types)}"
                self.uploads[upload] = {}
                self.types[key] = request.headers.get("Content-Type", "")
                return _xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>")
            case "POST" if "uploadId" in query:
                parts = self.uploads.pop(query["uploadId"])
                self.objects[key] = b"".join(parts[number] for number in sorted(parts))
                return _xml('<CompleteMultipartUploadResult><ETag>"e"</ETag>')
            case "POST":
                names = re.findall(r"<Key>(.*?)</Key>", body.decode())
                for name in names:
                    self.objects.pop(name, None)
                deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
                return _xml(f"<DeleteResult>{deleted}")
            case "PUT" if "uploadId" in query:
                if query["uploadId"] in self.uploads:
                    self.uploads[query["uploadId"]][int(query["partNumber"])] = body
                return web.Response(headers={"ETag": '"p"'})
            case "PUT":
                self.objects[key] = body
                return web.Response(headers={"ETag": '"e"'})
            case "DELETE":
                self.uploads.pop(query["uploadId"], None)
                return web.Response(status=204)
            case _ if "list-type" in query:
                return self._list(request)
            case _ if key in self.objects:
                return self._send(request, self.objects[key])
        return web.Response(status=404)

    def _list(self, request: web.Request) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter")
        names = [name for name in self.objects if name.startswith(prefix)]
        folders: set[str] = set()
        if delimiter:
            folders = {prefix + rest.split("/")[0] + "/" for name in names if "/" in (rest := name[len(prefix) :])}
            names = [name for name in names if "/" not in name[len(prefix) :]]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        rows = "".join(
            f"<Contents><Key>{name}</Key><LastModified>{now}</LastModified><ETag>e</ETag>"
            f"<Size>{len(self.objects[name])}</Size></Contents>"
            for name in names
        )
        rows += "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        return _xml(f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}")

    def _send(self, request: web.Request, data: bytes) -> web.Response:
        headers = {"ETag": '"e"', "Last-Modified": "Fri, 20 Nov 2026 10:00:00 GMT"}
        if "Range" not in request.headers:
            return web.Response(body=data, headers=headers)
        wanted = request.http_range
        part = data[wanted]
        start = wanted.start or 0
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return web.Response(status=206, body=part, headers=headers)


def _xml(inner: str) -> web.Response:
    """Close the element that `inner` opens."""
    root = inner[1 : inner.index(">")]
    return web.Response(text=f'<?xml version="1.0"?>{inner}</{root}>', content_type="application/xml")


@pytest.fixture
async def bucket(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bucket]:
    """A loopback object store that the environment points to."""
    bucket = Bucket()
    app = web.Application(client_max_size=64 * MIB)
    app.router.add_route("*", "/{key:.*}", bucket.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
        "AWS_REGION": "eu-test-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield bucket
    await runner.cleanup()


@pytest.fixture
async def s3(bucket: Bucket) -> AsyncIterator[RecordingStorage]:
    """Recordings in an object store, below a prefix."""
    storage = open_storage("s3://kept/calls")
    yield storage
    await storage.aclose()


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[RecordingStorage]:
    """Recordings in a directory."""
    storage = open_storage(str(tmp_path / "recordings"))
    yield storage
    await storage.aclose()


@pytest.fixture
async def memory() -> AsyncIterator[RecordingStorage]:
    """Recordings in memory."""
    storage = RecordingStorage(MemoryStore(), place="memory", max_recording_bytes=20 * MIB)
    yield storage
    await storage.aclose()


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest) -> RecordingStorage:
    """Each implementation in turn."""
    storage = request.getfixturevalue(request.param)
    assert isinstance(storage, RecordingStorage)
    return storage


def audio(size_bytes: int) -> bytes:
    """Bytes that differ at every position."""
    return b"".join(number.to_bytes(4, "big") for number in range(size_bytes // 4 + 1))[:size_bytes]


async def sent(data: bytes, chunk_bytes: int = 100_000, *, error: Exception | None = None) -> AsyncIterator[bytes]:
    """Send in chunks, as a provider does; then fail, if there is an error."""
    for at in range(0, len(data), chunk_bytes):
        yield data[at : at + chunk_bytes]
    if error is not None:
        raise error


def files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


async def kept(storage: RecordingStorage, start: int, end: int, path: str = PATH) -> bytes:
    return b"".join([block async for block in storage.read(path, start, end)])


async def put(storage: RecordingStorage, data: bytes, call_id: str = CALL, day: date = DAY) -> Stored | Discarded:
    return await storage.put(call_id, sent(data), started_on=day, expected_size_bytes=len(data))


@pytest.mark.parametrize("size_bytes", [1, BLOCK_BYTES, 12 * MIB + 7])
async def test_what_is_put_is_what_is_read(storage: RecordingStorage, size_bytes: int) -> None:
    """One byte or several upload parts: the same bytes, size and digest."""
    data = audio(size_bytes)

    stored = await put(storage, data)

    assert stored == Stored(size_bytes, hashlib.sha256(data).hexdigest(), PATH)
    assert await storage.size(PATH) == size_bytes
    assert await kept(storage, 0, size_bytes) == data


@pytest.mark.parametrize(("start", "end"), [(0, 1), (MIB - 1, MIB + 1), (5, 3 * MIB), (3 * MIB, 3 * MIB + 3), (7, 7)])
async def test_any_part_can_be_read(storage: RecordingStorage, start: int, end: int) -> None:
    """A player that jumps gets the bytes that it asked for, across block borders too."""
    data = audio(3 * MIB + 3)
    await put(storage, data)

    assert await kept(storage, start, end) == data[start:end]


async def test_an_unknown_length_is_accepted(storage: RecordingStorage) -> None:
    """A provider need not send a Content-Length."""
    data = audio(2 * MIB)

    stored = await storage.put(CALL, sent(data), started_on=DAY, expected_size_bytes=None)

    assert isinstance(stored, Stored)
    assert await kept(storage, 0, len(data)) == data


@pytest.mark.parametrize("size_bytes", [10, 7 * MIB])
@pytest.mark.parametrize("expected", [-1, +1])
async def test_a_wrong_length_leaves_nothing(storage: RecordingStorage, size_bytes: int, expected: int) -> None:
    """Truncated or overlong audio never gets a name, and an earlier recording of the call stays."""
    refused = await storage.put(
        OTHER, sent(audio(size_bytes)), started_on=DAY, expected_size_bytes=size_bytes + expected
    )

    assert isinstance(refused, Discarded)
    assert await storage.size(PATH.replace(CALL, OTHER)) is None


async def test_an_empty_body_is_not_a_recording(storage: RecordingStorage) -> None:
    """An empty response is discarded whatever length was announced."""
    for expected in (0, None):
        refused = await storage.put(CALL, sent(b""), started_on=DAY, expected_size_bytes=expected)
        assert refused == Discarded("the recording has no bytes")

    assert await storage.size(PATH) is None


@pytest.mark.parametrize("size_bytes", [10, 7 * MIB])
async def test_a_source_that_breaks_off_leaves_nothing_and_has_a_reason(
    storage: RecordingStorage, size_bytes: int
) -> None:
    """The provider's error comes out as it was."""
    broken = sent(audio(size_bytes), error=Unavailable("connection lost"))

    with pytest.raises(Unavailable, match="connection lost"):
        await storage.put(CALL, broken, started_on=DAY, expected_size_bytes=size_bytes + 5)
    assert await storage.size(PATH) is None


async def test_a_failed_second_put_keeps_the_first(storage: RecordingStorage) -> None:
    """A retry that fails leaves what is there; one that succeeds replaces it."""
    await put(storage, audio(100))
    await storage.put(CALL, sent(b"short"), started_on=DAY, expected_size_bytes=50)
    assert await kept(storage, 0, 100) == audio(100)

    await put(storage, b"second")

    assert await storage.size(PATH) == 6


async def test_a_source_that_stalls_can_be_cancelled(storage: RecordingStorage) -> None:
    """Cancelling returns at once, leaves nothing behind, and frees the upload's thread."""
    stalled = asyncio.Event()

    async def drip() -> AsyncIterator[bytes]:
        yield audio(6 * MIB)
        stalled.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(storage.put(CALL, drip(), started_on=DAY, expected_size_bytes=9 * MIB))
    await stalled.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting

    assert await storage.size(PATH) is None
    await storage.aclose()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recording-")]


async def test_stalled_uploads_do_not_delay_readers(storage: RecordingStorage) -> None:
    """Twenty providers that stop in the middle delay no reader."""
    await put(storage, audio(1000), OTHER)
    stalled = asyncio.Semaphore(0)

    async def drip() -> AsyncIterator[bytes]:
        yield audio(1000)
        stalled.release()
        await asyncio.Event().wait()

    tasks = [
        asyncio.create_task(storage.put(CALL, drip(), started_on=DAY, expected_size_bytes=2000)) for _ in range(20)
    ]
    for _ in tasks:
        await stalled.acquire()

    assert await kept(storage, 0, 1000, PATH.replace(CALL, OTHER)) == audio(1000)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_the_source_is_slowed_down_to_the_speed_of_the_storage(memory: RecordingStorage) -> None:
    """A provider that sends for ever is stopped at the limit, and not read any further."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += MIB
            yield bytes(MIB)

    refused = await memory.put(CALL, endless(), started_on=DAY, expected_size_bytes=None)

    assert refused == Discarded(f"the recording has more than {20 * MIB} bytes")
    assert taken == 21 * MIB


async def test_deleting_twice_is_allowed(storage: RecordingStorage) -> None:
    """Erasing may run twice without harm."""
    await put(storage, b"audio")

    await storage.delete(PATH)
    await storage.delete(PATH)

    assert await storage.size(PATH) is None
    with pytest.raises(StorageError):
        await kept(storage, 0, 5)


async def test_reading_past_the_end_is_an_error(storage: RecordingStorage) -> None:
    """A recording that has become shorter is never served as whole."""
    await put(storage, b"audio")

    with pytest.raises(StorageError, match="shorter"):
        await kept(storage, 0, 6)


@pytest.mark.parametrize(
    "call_id", ["", "call_", CALL + "a", CALL + "\n", CALL.upper(), "../" + CALL, "call_" + "1" * 26, CALL[:-1] + "/"]
)
async def test_only_a_call_id_becomes_a_name(storage: RecordingStorage, call_id: str) -> None:
    """No path can be built out of a call id."""
    with pytest.raises(ValueError, match="not a valid call id"):
        await storage.put(call_id, sent(b"x"), started_on=DAY, expected_size_bytes=1)


@pytest.mark.parametrize("path", ["", "../x", f"/{PATH}", f"{PATH}\0", f"../{PATH}", "sources/main.json", f"{PATH}#1"])
async def test_only_a_recording_can_be_opened(storage: RecordingStorage, path: str) -> None:
    """Whatever the store contains, nothing but a recording is read, signed or deleted."""
    with pytest.raises(ValueError, match="not a valid recording path"):
        await storage.size(path)
    with pytest.raises(ValueError, match="not a valid recording path"):
        await kept(storage, 0, 1, path)
    with pytest.raises(ValueError, match="not a valid recording path"):
        await storage.delete(path)
    with pytest.raises(ValueError, match="not a valid recording path"):
        await storage.presign(path, 60)


async def test_small_objects_are_written_read_and_replaced(storage: RecordingStorage) -> None:
    """The marker of a source lives beside the recordings."""
    assert await storage.get_small("sources/main.json") is None

    await storage.put_small("sources/main.json", b"one")
    await storage.put_small("sources/main.json", b"two")

    assert await storage.get_small("sources/main.json") == b"two"


@pytest.mark.parametrize("name", ["main.json", "../main.json", "sources/../x", "sources/", "/sources/x", "sources/.x"])
async def test_a_small_object_has_a_plain_name(storage: RecordingStorage, name: str) -> None:
    """Source ids come from a configuration file; none of them leaves its folder."""
    with pytest.raises(ValueError, match="not a valid object name"):
        await storage.put_small(name, b"x")


async def test_a_small_object_has_a_maximum_size(storage: RecordingStorage) -> None:
    """A larger one is refused before it is written."""
    with pytest.raises(ValueError, match="65537"):
        await storage.put_small("sources/main.json", bytes(65_537))
    assert await storage.get_small("sources/main.json") is None


async def test_trimming_deletes_what_was_stored_too_long_ago_and_only_that(storage: RecordingStorage) -> None:
    """Retention counts from when a recording was stored; small objects are never trimmed."""
    now = datetime.now(UTC)
    yesterday = (now - timedelta(days=1)).date()
    await put(storage, b"audio", CALL, yesterday)
    await put(storage, b"audio", OTHER, yesterday)
    await storage.put_small("sources/main.json", b"marker")
    assert await storage.trim(now - timedelta(hours=1)) == 0
    assert await storage.trim(LONG_AGO) == 0
    assert await storage.size(f"{yesterday:%Y/%m/%d}/{CALL}.wav") == 5

    assert await storage.trim(now + timedelta(days=2)) == 2
    assert await storage.trim(now + timedelta(days=2)) == 0

    assert await storage.size(f"{yesterday:%Y/%m/%d}/{CALL}.wav") is None
    assert await storage.get_small("sources/main.json") == b"marker"


async def test_a_directory_and_memory_sign_no_links(local: RecordingStorage, memory: RecordingStorage) -> None:
    """The relay then serves the audio itself."""
    assert await local.presign(PATH, 60) is None
    assert await memory.presign(PATH, 60) is None


async def test_an_object_store_signs_links(s3: RecordingStorage, bucket: Bucket) -> None:
    """A presigned link names the object and its end, works without credentials, and holds no secret."""
    await put(s3, b"audio")

    url = await s3.presign(PATH, 7 * 86_400)

    assert url is not None
    assert urlsplit(url).path == f"/kept/calls/{PATH}"
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["604800"]
    assert "not-a-real-secret" not in url
    async with ClientSession() as http, http.get(url) as answer:
        assert await answer.read() == b"audio"


async def test_an_object_keeps_its_content_type(s3: RecordingStorage, bucket: Bucket) -> None:
    """A presigned link plays in a browser."""
    data = audio(6 * MIB)

    await s3.put(CALL, sent(data), started_on=DAY, content_type="audio/mpeg", expected_size_bytes=len(data))

    assert bucket.types == {f"calls/2026/11/20/{CALL}.mp3": "audio/mpeg"}


async def test_an_aborted_upload_leaves_no_parts_in_the_bucket(s3: RecordingStorage, bucket: Bucket) -> None:
    """Unfinished parts cost money and are invisible in listings."""
    refused = await s3.put(CALL, sent(audio(12 * MIB)), started_on=DAY, expected_size_bytes=13 * MIB)

    assert isinstance(refused, Discarded)
    assert bucket.uploads == {}
    assert bucket.objects == {}


async def test_a_bucket_that_is_down_is_a_storage_error(s3: RecordingStorage, bucket: Bucket) -> None:
    """Every error names in one line the action and the place, and the storage recovers with the bucket."""
    await put(s3, b"audio")
    bucket.down = True

    with pytest.raises(StorageError, match=r"cannot read a recording's size in s3://kept/calls: [^\n]*$"):
        await s3.size(PATH)
    with pytest.raises(StorageError, match=r"cannot store a recording in s3://kept/calls: [^\n]*$"):
        await put(s3, b"again")

    bucket.down = False
    assert await kept(s3, 0, 5) == b"audio"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let no file of this process grow beyond 7 MiB: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7 * MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
async def test_a_full_disk_is_reported_and_leaves_nothing(local: RecordingStorage, tmp_path: Path) -> None:
    """The upload stops early, its partial file is removed, and small recordings still work."""
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        async for chunk in sent(bytes(40 * MIB)):
            taken += len(chunk)
            yield chunk

    with pytest.raises(StorageFull, match="no space left"):
        await local.put(CALL, counted(), started_on=DAY, expected_size_bytes=40 * MIB)

    assert taken < 30 * MIB
    assert files_below(tmp_path) == []
    assert isinstance(await put(local, b"small"), Stored)


@pytest.mark.parametrize(("free_mb", "kept"), [(300, True), (200, False), (0, False)])
async def test_recordings_leave_disk_space_for_the_store(
    local: RecordingStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_mb: int, kept: bool
) -> None:
    """An embedded store may share the disk and cannot run without space; audio can wait."""
    usage = SimpleNamespace(total=10**11, free=free_mb * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    if kept:
        assert isinstance(await put(local, b"small"), Stored)
        return
    with pytest.raises(StorageFull, match=f"only {free_mb} MB left"):
        await put(local, b"small")
    assert files_below(tmp_path) == []


@pytest.mark.usefixtures("small_disk")
async def test_a_full_disk_is_noticed_within_one_large_chunk(local: RecordingStorage) -> None:
    """A source that sends everything at once does not wait for an upload that has ended."""
    async with asyncio.timeout(20):
        with pytest.raises(StorageFull):
            await local.put(CALL, sent(bytes(40 * MIB), 40 * MIB), started_on=DAY, expected_size_bytes=40 * MIB)


async def test_a_cancelled_upload_leaves_no_file(local: RecordingStorage, tmp_path: Path) -> None:
    """Not under the final name, and not beside it."""
    begun = asyncio.Event()

    async def drip() -> AsyncIterator[bytes]:
        yield audio(12 * MIB)
        begun.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(local.put(CALL, drip(), started_on=DAY, expected_size_bytes=None))
    await begun.wait()
    putting.cancel()
    await asyncio.wait({putting})
    await local.aclose()

    assert putting.cancelled()
    assert files_below(tmp_path) == []


async def test_trimming_removes_what_a_killed_upload_left(local: RecordingStorage, tmp_path: Path) -> None:
    """Unfinished files of dead processes are removed, running uploads and foreign files stay, empty days go."""
    day = tmp_path / "recordings/2026/11/20"
    empty = tmp_path / "recordings/2026/11/19"
    empty.mkdir(parents=True)
    await put(local, b"audio")
    dead, running, foreign = day / f"{CALL}.wav#1", day / f"{CALL}.wav#2", day / "notes.txt"
    for file in (dead, running, foreign):
        file.write_bytes(b"half")
    for file in (dead, foreign):
        os.utime(file, (LONG_AGO.timestamp(), LONG_AGO.timestamp()))

    before = datetime(2026, 11, 21, tzinfo=UTC)
    os.utime(running, (before.timestamp() + 60, before.timestamp() + 60))
    os.utime(day / f"{CALL}.wav", (before.timestamp() + 60, before.timestamp() + 60))
    await local.trim(before)

    assert sorted(file.name for file in day.iterdir()) == sorted([f"{CALL}.wav", running.name, foreign.name])
    assert not empty.exists()


async def test_a_new_directory_is_private(local: RecordingStorage, tmp_path: Path) -> None:
    """Other users of the machine cannot read recordings."""
    assert (tmp_path / "recordings").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("storage_url", "sentence"),
    [
        ("", "'' is not supported"),
        ("ftp://host/path", "'ftp' is not supported; use a path, s3://, gs:// or az://"),
        ("file:///srv/recordings", "use a path"),
        ("s3://", "s3:// cannot be used"),
        ("s3://id:secret@bucket", "credentials belong in the environment"),
        ("/dev/null/recordings", "/dev/null/recordings cannot be used"),
    ],
)
def test_an_invalid_storage_url_stops_the_start(storage_url: str, sentence: str) -> None:
    """The message names the setting and what is wrong, and never repeats a credential."""
    with pytest.raises(SettingsError, match=r"^storage_url: ") as caught:
        open_storage(storage_url)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_relative_path_is_resolved_when_the_relay_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later change of directory changes nothing."""
    monkeypatch.chdir(tmp_path)
    storage = open_storage("./relay-data/recordings")
    monkeypatch.chdir("/")

    await put(storage, b"audio")
    await storage.aclose()

    assert (tmp_path / "relay-data/recordings" / PATH).read_bytes() == b"audio"
