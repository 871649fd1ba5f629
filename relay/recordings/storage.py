"""Where recordings are kept: a directory or an object store, whole or not at all, in constant memory.

An object has its final name only once every byte is there and the length is right. Object names are made here from a
date and a call id of the known shape, and nothing else is ever opened, so no path from outside reaches the storage.

Only the synchronous half of obstore is used: its asynchronous half can abort the interpreter at exit. It runs in
threads of this module's own, because a stalled object store must not take the event loop's shared threads (and with
them name resolution) away from everybody else. Uploads have threads apart from everything else, because an upload
keeps its thread for as long as the provider sends.
"""

import asyncio
import hashlib
import os
import queue
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store, from_url

from relay.errors import SettingsError, StorageError, StorageFull

BLOCK_BYTES = 1024 * 1024
PART_BYTES = 5 * 1024 * 1024
PARTS_AT_ONCE = 2
BLOCKS_WAITING = 2
MAX_RECORDING_BYTES = 4 * 1024**3
MAX_SMALL_BYTES = 64 * 1024
ROOM_LEFT_BYTES = 256 * 1024 * 1024
"""What recordings leave free on their disk, or a twentieth of it where that is less: an embedded store may share it,
and calls matter more than their audio."""

CALL_ID = re.compile(r"call_[a-z2-7]{26}", re.ASCII)

_PATH = re.compile(r"(\d{4})/(\d{2})/(\d{2})/call_[a-z2-7]{26}\.[a-z0-9]{2,4}", re.ASCII)
_UNFINISHED = re.compile(r"call_[a-z2-7]{26}\.[a-z0-9]{2,4}#\d+", re.ASCII)
_SMALL_NAME = re.compile(r"[a-z0-9_-]+(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NO_ROOM = re.compile(r"\(os error (?:27|28|69|122)\)")  # EFBIG, ENOSPC, and EDQUOT on macOS and Linux
_SUFFIXES = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/vnd.wave": "wav",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
    "audio/ogg": "ogg",
    "audio/opus": "opus",
    "audio/mp4": "m4a",
    "audio/x-m4a": "m4a",
    "audio/aac": "aac",
    "audio/flac": "flac",
    "audio/webm": "webm",
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """The audio is kept under `path`, whole; `sha256` is of exactly these bytes, in hex."""

    size_bytes: int
    sha256: str
    path: str


@dataclass(frozen=True, slots=True)
class Refused:
    """What came was not what was announced; nothing was kept."""

    reason: str


class _End(Enum):
    COMMIT = "commit"
    ABANDON = "abandon"


class _AbandonedError(Exception):
    """Raised inside the upload's thread, so that obstore drops what it has and cleans up behind itself."""


class _Feed:
    """A bounded hand-over of blocks from the event loop to the upload's thread.

    The thread only ever waits for `_blocks`; the loop's side always ends with one of `_End`, whatever happens to it,
    so the thread always ends too.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._blocks: queue.SimpleQueue[bytes | _End] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(BLOCKS_WAITING)
        self._hash = hashlib.sha256()
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        while True:
            block = self._blocks.get()
            if block is _End.COMMIT:
                return
            if block is _End.ABANDON:
                raise _AbandonedError
            self._hash.update(block)
            yield block
            self._loop.call_soon_threadsafe(self._room.release)

    async def give(self, block: bytes) -> None:
        """Wait for room and hand a block over; when the upload has ended, nobody reads any more and all is dropped."""
        await self._room.acquire()
        if self._ended:
            self._room.release()
        else:
            self._blocks.put(block)

    def end(self, how: _End) -> None:
        self._blocks.put(how)

    def upload_ended(self, upload: "asyncio.Future[None]") -> None:
        """Let every `give` through from now on; a failure counts as seen."""
        self._ended = True
        self._room.release()
        if not upload.cancelled():
            upload.exception()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class RecordingStorage:
    """Recordings by date and call id, and small notes of the relay itself, in one directory or bucket.

    Everything raises `StorageError` when the storage does not do as asked, `StorageFull` when it has no room.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        place: str,
        directory: Path | None = None,
        max_recording_bytes: int = MAX_RECORDING_BYTES,
    ) -> None:
        self._store = store
        self._place = place
        self._directory = directory
        self._max_recording_bytes = max_recording_bytes
        self._uploads = ThreadPoolExecutor(16, thread_name_prefix="recording-upload")
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="recording-storage")

    async def aclose(self) -> None:
        """Wait for what is under way, then let the threads go."""
        await asyncio.to_thread(self._uploads.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def put(
        self,
        call_id: str,
        chunks: AsyncIterator[bytes],
        *,
        started_on: date,
        content_type: str = "audio/wav",
        expected_size_bytes: int | None,
    ) -> Stored | Refused:
        """Keep the audio that `chunks` brings, or nothing.

        What `chunks` raises comes out as it is, after the upload was abandoned. A second put of the same call and
        date replaces the first in one step.
        """
        path = object_path(call_id, started_on, content_type)
        feed = _Feed()
        upload = asyncio.get_running_loop().run_in_executor(self._uploads, self._upload, path, feed, content_type)
        upload.add_done_callback(feed.upload_ended)
        try:
            size_bytes = await self._forward(chunks, feed, upload, expected_size_bytes)
        except BaseException as gone:
            feed.end(_End.ABANDON)
            if isinstance(gone, Exception):
                await asyncio.wait({upload})
            raise
        reason = _objection(size_bytes, expected_size_bytes, self._max_recording_bytes)
        feed.end(_End.ABANDON if reason else _End.COMMIT)
        try:
            await asyncio.shield(upload)
        except _AbandonedError:
            return Refused(reason or "the upload was abandoned")
        except (BaseError, OSError, ValueError) as error:
            raise self._trouble("keep a recording", error) from error
        return Stored(size_bytes, feed.sha256, path)

    async def size(self, path: str) -> int | None:
        """Tell the size of a recording in bytes, None when it is not there."""
        try:
            meta = await self._run("look at a recording", partial(obstore.head, self._store, _checked(path)))
        except FileNotFoundError:
            return None
        return meta["size"]

    async def read(self, path: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield bytes `start` to `end` (exclusive) in blocks; a recording that ends sooner is a StorageError.

        Each block is a request of its own: a listener may pause for as long as it likes and holds nothing.
        """
        name = _checked(path)
        for at in range(start, end, BLOCK_BYTES):
            until = min(at + BLOCK_BYTES, end)
            try:
                block = await self._run("read a recording", partial(self._read_block, name, at, until))
            except FileNotFoundError as error:
                raise StorageError(f"a recording has vanished from {self._place} while it was read") from error
            if len(block) != until - at:
                raise StorageError(f"a recording in {self._place} is shorter than it was")
            yield block

    async def delete(self, path: str) -> None:
        """Delete a recording; one that is not there is fine."""
        name = _checked(path)
        try:
            await self._run("delete a recording", partial(obstore.delete, self._store, name))
        except FileNotFoundError:
            return

    async def presign(self, path: str, ttl_s: float) -> str | None:
        """Have the object store sign a link, for 7 days at most; None when it cannot, as a directory."""
        store, name = self._store, _checked(path)
        if not isinstance(store, S3Store | GCSStore | AzureStore):
            return None
        sign = partial(obstore.sign, store, "GET", name, timedelta(seconds=ttl_s))
        return await self._run("sign a link", sign)

    async def put_small(self, name: str, data: bytes) -> None:
        """Write a small note under a name with a folder (`sources/main.json`), in one step."""
        if len(data) > MAX_SMALL_BYTES:
            raise ValueError(f"a note may have {MAX_SMALL_BYTES} bytes, this one has {len(data)}")
        await self._run("write a note", partial(self._put_small, _checked_small(name), data))

    async def get_small(self, name: str) -> bytes | None:
        """Read a small note, None when there is none."""
        try:
            return await self._run("read a note", partial(self._get_small, _checked_small(name)))
        except FileNotFoundError:
            return None

    async def delete_small(self, name: str) -> None:
        """Delete a note; one that is not there is fine."""
        try:
            await self._run("delete a note", partial(obstore.delete, self._store, _checked_small(name)))
        except FileNotFoundError:
            return

    async def trim(self, before: datetime, *, abandoned_before: datetime | None = None) -> int:
        """Delete the recordings that were stored before `before`; answer how many.

        A directory also loses what a killed upload left behind, when it is older than `abandoned_before`.
        """
        deleted = await self._run("trim", partial(self._trim, before))
        await self._run("trim", partial(self._tidy, before, abandoned_before or before))
        return deleted

    async def _forward(
        self,
        chunks: AsyncIterator[bytes],
        feed: _Feed,
        upload: "asyncio.Future[None]",
        expected_size_bytes: int | None,
    ) -> int:
        """Hand over blocks until the source ends, says too much, or nobody takes them any more; answer the size."""
        limit = min(self._max_recording_bytes, expected_size_bytes or self._max_recording_bytes)
        waiting = bytearray()
        size_bytes = 0
        async for chunk in chunks:
            size_bytes += len(chunk)
            waiting += chunk
            if size_bytes > limit or upload.done():
                return size_bytes
            while len(waiting) >= BLOCK_BYTES:
                await feed.give(bytes(waiting[:BLOCK_BYTES]))
                del waiting[:BLOCK_BYTES]
        if waiting:
            await feed.give(bytes(waiting))
        return size_bytes

    def _with_room_left(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass blocks on while there is room; asked here, in the upload's thread, for a disk may stall too."""
        self._leave_room()
        for block in blocks:
            self._leave_room()
            yield block

    def _leave_room(self) -> None:
        if self._directory is None:
            return
        disk = shutil.disk_usage(self._directory)
        if disk.free < min(ROOM_LEFT_BYTES, disk.total // 20):
            raise StorageFull(
                f"cannot keep a recording: the disk of {self._place} has only {disk.free // 1_000_000} MB left"
            )

    def _upload(self, path: str, feed: _Feed, content_type: str) -> None:
        attributes = None if isinstance(self._store, LocalStore) else {"Content-Type": content_type}
        obstore.put(
            self._store,
            path,
            self._with_room_left(feed),
            attributes=attributes,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )
        if self._directory:
            _sync(self._directory / path)

    def _read_block(self, path: str, start: int, end: int) -> bytes:
        return bytes(obstore.get_range(self._store, path, start=start, end=end))

    def _put_small(self, name: str, data: bytes) -> None:
        obstore.put(self._store, name, data, use_multipart=False)
        if self._directory:
            _sync(self._directory / name)

    def _get_small(self, name: str) -> bytes:
        found = obstore.get(self._store, name)
        if found.meta["size"] > MAX_SMALL_BYTES:
            raise StorageError(f"{name} in {self._place} is too large to be a note of the relay")
        return bytes(found.bytes())

    def _trim(self, before: datetime) -> int:
        deleted = 0
        for day in self._days(before):
            for batch in obstore.list(self._store, day, chunk_size=1000):
                old = [
                    meta["path"] for meta in batch if _PATH.fullmatch(meta["path"]) and meta["last_modified"] < before
                ]
                self._delete_all(old)
                deleted += len(old)
        return deleted

    def _delete_all(self, paths: list[str]) -> None:
        """Delete in bulk; when another process was faster with one of them, one by one."""
        if not paths:
            return
        try:
            obstore.delete(self._store, paths)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    obstore.delete(self._store, path)

    def _days(self, before: datetime) -> Iterator[str]:
        """Yield the day folders that can hold something stored before `before`; later days are not even listed."""
        last = (before.astimezone(UTC) + timedelta(days=2)).strftime("%Y/%m/%d")
        for year in self._folders(None, r"\d{4}"):
            for month in self._folders(year, r"\d{4}/\d{2}"):
                for day in self._folders(month, r"\d{4}/\d{2}/\d{2}"):
                    if day <= last:
                        yield day

    def _folders(self, under: str | None, shape: str) -> list[str]:
        found = obstore.list_with_delimiter(self._store, under)["common_prefixes"]
        return sorted(folder for folder in found if re.fullmatch(shape, folder, re.ASCII))

    def _tidy(self, before: datetime, abandoned_before: datetime) -> None:
        if self._directory is None:
            return
        cutoff = before.astimezone(UTC).strftime("%Y/%m/%d")
        for day in list(self._days(before)):
            folder = self._directory / day
            with suppress(FileNotFoundError):  # another process tidies too
                for entry in folder.iterdir():
                    if _UNFINISHED.fullmatch(entry.name) and entry.stat().st_mtime < abandoned_before.timestamp():
                        entry.unlink()
            if day < cutoff:
                with suppress(OSError):  # not empty, or gone
                    folder.rmdir()

    async def _run(self, doing: str, act: Callable[[], T]) -> T:
        """Run `act` in one of our threads; FileNotFoundError passes, other failures become StorageError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, act)
        except FileNotFoundError:
            raise
        except (BaseError, OSError, ValueError) as error:
            raise self._trouble(doing, error) from error

    def _trouble(self, doing: str, error: Exception) -> StorageError:
        text = _first_line(error)
        if _NO_ROOM.search(text):
            return StorageFull(f"cannot {doing}: no room left in {self._place}")
        return StorageError(f"cannot {doing} in {self._place}: {text}")


def open_storage(storage_url: str) -> RecordingStorage:
    """Open a directory (made when it is missing, readable by its owner only) or an `s3://`, `gs://`, `az://` address.

    Object stores take their credentials, region and endpoint from the environment, each by its vendor's usual names.
    Nothing is asked over the network yet. Raises SettingsError when the address cannot be used.
    """
    if storage_url.startswith(("s3://", "gs://", "az://")):
        if "@" in storage_url:
            raise SettingsError("storage_url: credentials belong in the environment, not in the address")
        return RecordingStorage(_open_bucket(storage_url), place=storage_url.split("?")[0])
    if not storage_url or _URL.match(storage_url):
        scheme = storage_url.split("://")[0]
        raise SettingsError(f"storage_url: {scheme!r} cannot keep recordings; use a path, s3://, gs:// or az://")
    directory = Path(storage_url).expanduser().absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return RecordingStorage(LocalStore(directory, mkdir=True), place=str(directory), directory=directory)
    except (BaseError, OSError) as error:
        raise SettingsError(f"storage_url: {directory} cannot be used: {_first_line(error)}") from error


def _open_bucket(storage_url: str) -> ObjectStore:
    try:
        return from_url(
            storage_url,
            client_options={
                "allow_http": _http_allowed(storage_url.split(":")[0]),
                "connect_timeout": "5 seconds",
                "timeout": "120 seconds",
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)},
        )
    except (BaseError, OSError, ValueError) as error:
        raise SettingsError(f"storage_url: {storage_url.split('?')[0]} cannot be used: {_first_line(error)}") from error


def _http_allowed(scheme: str) -> bool:
    """Read `AWS_ALLOW_HTTP` and its likes: obstore forgets them as soon as it is given any other client option."""
    vendor = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[scheme]
    return os.environ.get(f"{vendor}_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")


def object_path(call_id: str, started_on: date, content_type: str) -> str:
    """Name a recording: `2026/11/20/call_….wav`. Raises ValueError when the call id has another shape."""
    if not CALL_ID.fullmatch(call_id):
        raise ValueError("a recording is kept under a call id and nothing else")
    return f"{started_on:%Y/%m/%d}/{call_id}.{_SUFFIXES.get(content_type, 'bin')}"


def object_paths(call_id: str, started_on: date) -> list[str]:
    """Name every place where the recording of a call may be."""
    return sorted({object_path(call_id, started_on, content_type) for content_type in (*_SUFFIXES, "")})


def _objection(size_bytes: int, expected_size_bytes: int | None, max_bytes: int) -> str | None:
    """Say why this many bytes are not a recording, or None when they are."""
    if size_bytes == 0:
        return "the recording has no bytes"
    if size_bytes > max_bytes:
        return f"the recording has more than {max_bytes} bytes"
    if expected_size_bytes is not None and size_bytes > expected_size_bytes:
        return f"the recording has more than the {expected_size_bytes} bytes that were announced"
    if expected_size_bytes is not None and size_bytes < expected_size_bytes:
        return f"the recording ended after {size_bytes} of {expected_size_bytes} bytes"
    return None


def _checked(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError("this is no path of a recording")
    return path


def _checked_small(name: str) -> str:
    if not _SMALL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a note; use folder/name")
    return name


def _sync(file: Path) -> None:
    """Put a file and its name on the disk, so that what we say is kept survives a power cut."""
    for place in (file, file.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(error: Exception) -> str:
    """Cut an error to one line without query strings, which may carry a signature."""
    text = str(error).strip().splitlines()
    return re.sub(r"\?\S+", "?…", text[0])[:300] if text else type(error).__name__
