"""Stores recordings in a directory or an object store: whole or not at all, in constant memory.

An object gets its final name only when every byte has arrived and the length is right. Object names are built here,
from a date and a call id, and nothing else is ever opened, so no path from outside reaches the storage.
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
BLOCKS_BUFFERED = 2
# obstore's defaults buffer 12 parts of 5 MiB for each upload; two keep a slow provider's upload within 10 MiB, and
# 5 MiB is the smallest part that S3 accepts.
PART_BYTES = 5 * 1024 * 1024
PARTS_IN_FLIGHT = 2
# Most uploads at a time: more than recordings are fetched at once, because an upload waits for its provider in a
# thread.
UPLOADS = 128
MAX_RECORDING_BYTES = 4 * 1024**3
MAX_SMALL_BYTES = 64 * 1024
# Disk space that recordings leave free, or 5 % of the disk where that is less: an embedded store may share the disk,
# and calls matter more than their audio.
MIN_FREE_BYTES = 256 * 1024 * 1024

CALL_ID = re.compile(r"call_[a-z2-7]{26}", re.ASCII)

_PATH = re.compile(r"(\d{4})/(\d{2})/(\d{2})/call_[a-z2-7]{26}\.[a-z0-9]{2,4}", re.ASCII)
_UNFINISHED = re.compile(r"call_[a-z2-7]{26}\.[a-z0-9]{2,4}#\d+", re.ASCII)
_SMALL_NAME = re.compile(r"[a-z0-9_-]+(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# obstore reports a full disk as a generic error: EFBIG, ENOSPC, and EDQUOT on macOS and Linux are only in its text.
_DISK_FULL = re.compile(r"\(os error (?:27|28|69|122)\)")
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
    """The audio is stored under `path`, whole; `sha256` is the hex digest of exactly these bytes."""

    size_bytes: int
    sha256: str
    path: str


@dataclass(frozen=True, slots=True)
class Discarded:
    """The bytes are not the announced recording; nothing was stored."""

    reason: str


class _End(Enum):
    COMMIT = "commit"
    ABORT = "abort"


class _UploadAborted(Exception):
    """Raised inside the upload's thread, so that obstore aborts the upload and removes its parts."""


class _BlockQueue:
    """A bounded queue of blocks from the event loop to the upload's thread.

    The thread waits for nothing but `_blocks`, and the event loop's side always puts an `_End`, whatever happens to
    it, so the thread always ends.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._blocks: queue.SimpleQueue[bytes | _End] = queue.SimpleQueue()
        self._slots = asyncio.Semaphore(BLOCKS_BUFFERED)
        self._hash = hashlib.sha256()
        self._upload_ended = False

    def __iter__(self) -> Iterator[bytes]:
        while True:
            block = self._blocks.get()
            if block is _End.COMMIT:
                return
            if block is _End.ABORT:
                raise _UploadAborted
            self._hash.update(block)
            yield block
            self._loop.call_soon_threadsafe(self._slots.release)

    async def put(self, block: bytes) -> None:
        """Wait for a free slot and queue a block; drop it when the upload has ended."""
        await self._slots.acquire()
        if self._upload_ended:
            self._slots.release()
        else:
            self._blocks.put(block)

    def end(self, how: _End) -> None:
        self._blocks.put(how)

    def on_upload_ended(self, upload: "asyncio.Future[None]") -> None:
        """Unblock every `put`: an upload that failed early reads no more blocks."""
        self._upload_ended = True
        self._slots.release()
        if not upload.cancelled():
            upload.exception()  # mark it as retrieved, or asyncio logs it

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class RecordingStorage:
    """Recordings by date and call id, and small objects of the relay itself, in one directory or bucket.

    Every method raises `StorageError` when the storage fails, `StorageFull` when it has no space left.
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
        # Only obstore's synchronous API is used, in threads: its asynchronous one can abort the interpreter at exit.
        # Not in the event loop's default threads: a stalled object store would block name resolution with them.
        # And uploads apart from the rest: an upload occupies its thread for as long as the provider sends.
        self._uploads = ThreadPoolExecutor(UPLOADS, thread_name_prefix="recording-upload")
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="recording-storage")

    async def aclose(self) -> None:
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
    ) -> Stored | Discarded:
        """Store the audio that `chunks` yields, or nothing.

        An exception of `chunks` is raised unchanged, after the upload was aborted. A second put of the same call and
        date replaces the first atomically.
        """
        path = object_path(call_id, started_on, content_type)
        blocks = _BlockQueue()
        upload = asyncio.get_running_loop().run_in_executor(self._uploads, self._upload, path, blocks, content_type)
        upload.add_done_callback(blocks.on_upload_ended)
        try:
            size_bytes = await self._forward(chunks, blocks, upload, expected_size_bytes)
        except BaseException as error:
            blocks.end(_End.ABORT)
            if isinstance(error, Exception):  # a cancelled task does not wait for the storage
                await asyncio.wait({upload})
            raise
        reason = _size_error(size_bytes, expected_size_bytes, self._max_recording_bytes)
        blocks.end(_End.ABORT if reason else _End.COMMIT)
        try:
            await asyncio.shield(upload)
        except _UploadAborted:
            return Discarded(reason or "the upload was aborted")
        except (BaseError, OSError, ValueError) as error:
            raise self._storage_error("store a recording", error) from error
        return Stored(size_bytes, blocks.sha256, path)

    async def size(self, path: str) -> int | None:
        """Read the size of a recording in bytes, None when it does not exist."""
        try:
            meta = await self._run("read a recording's size", partial(obstore.head, self._store, _checked(path)))
        except FileNotFoundError:
            return None
        return meta["size"]

    async def read(self, path: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield bytes `start` to `end` (exclusive) in blocks. Raises StorageError for a recording that ends sooner."""
        name = _checked(path)
        # One request for each block: a client may pause for as long as it likes without holding a connection.
        for at in range(start, end, BLOCK_BYTES):
            until = min(at + BLOCK_BYTES, end)
            try:
                block = await self._run("read a recording", partial(self._read_block, name, at, until))
            except FileNotFoundError as error:
                raise StorageError(f"a recording was deleted from {self._place} while it was read") from error
            if len(block) != until - at:
                raise StorageError(f"a recording in {self._place} is shorter than it was")
            yield block

    async def delete(self, path: str) -> None:
        await self._delete("delete a recording", _checked(path))

    async def presign(self, path: str, ttl_s: float) -> str | None:
        """Have the object store sign a link, for at most 7 days; None when it cannot, like a directory."""
        store, name = self._store, _checked(path)
        if not isinstance(store, S3Store | GCSStore | AzureStore):
            return None
        sign = partial(obstore.sign, store, "GET", name, timedelta(seconds=ttl_s))
        return await self._run("sign a link", sign)

    async def put_small(self, name: str, data: bytes) -> None:
        """Write a small object under a name with a folder (`markers/main.json`), atomically."""
        if len(data) > MAX_SMALL_BYTES:
            raise ValueError(f"{name} has {len(data)} bytes; a small object has at most {MAX_SMALL_BYTES}")
        await self._run(f"write {name}", partial(self._put_small, _checked_small(name), data))

    async def get_small(self, name: str) -> bytes | None:
        try:
            return await self._run(f"read {name}", partial(self._get_small, _checked_small(name)))
        except FileNotFoundError:
            return None

    async def delete_small(self, name: str) -> None:
        await self._delete(f"delete {name}", _checked_small(name))

    async def trim(self, before: datetime) -> int:
        """Delete the recordings stored before `before`, and files that a killed upload left; return the number."""
        deleted = await self._run("trim recordings", partial(self._trim, before))
        await self._run("trim recordings", partial(self._remove_leftovers, before))
        return deleted

    async def _forward(
        self,
        chunks: AsyncIterator[bytes],
        blocks: _BlockQueue,
        upload: "asyncio.Future[None]",
        expected_size_bytes: int | None,
    ) -> int:
        """Queue blocks until the chunks end, exceed the limit, or the upload has ended; return the size."""
        limit = min(self._max_recording_bytes, expected_size_bytes or self._max_recording_bytes)
        buffer = bytearray()
        size_bytes = 0
        async for chunk in chunks:
            size_bytes += len(chunk)
            buffer += chunk
            if size_bytes > limit or upload.done():
                return size_bytes
            while len(buffer) >= BLOCK_BYTES:
                await blocks.put(bytes(buffer[:BLOCK_BYTES]))
                del buffer[:BLOCK_BYTES]
        if buffer:
            await blocks.put(bytes(buffer))
        return size_bytes

    def _while_space_left(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        self._require_space()
        for block in blocks:
            self._require_space()
            yield block

    def _require_space(self) -> None:
        if self._directory is None:
            return
        disk = shutil.disk_usage(self._directory)
        if disk.free < min(MIN_FREE_BYTES, disk.total // 20):
            raise StorageFull(
                f"cannot store a recording: the disk of {self._place} has only {disk.free // 1_000_000} MB left"
            )

    def _upload(self, path: str, blocks: _BlockQueue, content_type: str) -> None:
        # LocalStore refuses attributes, and keeps the unfinished file beside its final name as `<name>#<number>`.
        attributes = None if isinstance(self._store, LocalStore) else {"Content-Type": content_type}
        obstore.put(
            self._store,
            path,
            self._while_space_left(blocks),
            attributes=attributes,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_IN_FLIGHT,
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
        result = obstore.get(self._store, name)
        if result.meta["size"] > MAX_SMALL_BYTES:
            raise StorageError(f"{name} in {self._place} has more than {MAX_SMALL_BYTES} bytes")
        return bytes(result.bytes())

    def _trim(self, before: datetime) -> int:
        deleted = 0
        for day in self._days(before):
            for batch in obstore.list(self._store, day, chunk_size=1000):
                expired = [
                    meta["path"] for meta in batch if _PATH.fullmatch(meta["path"]) and meta["last_modified"] < before
                ]
                self._delete_all(expired)
                deleted += len(expired)
        return deleted

    def _delete_all(self, paths: list[str]) -> None:
        if not paths:
            return
        try:
            obstore.delete(self._store, paths)
        except FileNotFoundError:
            # Another process deleted one of them first; a bulk delete stops there, so delete the rest one by one.
            for path in paths:
                with suppress(FileNotFoundError):
                    obstore.delete(self._store, path)

    def _days(self, before: datetime) -> Iterator[str]:
        """Yield the day folders that can hold something stored before `before`; later days are not listed."""
        last = (before.astimezone(UTC) + timedelta(days=2)).strftime("%Y/%m/%d")
        for year in self._folders(None, r"\d{4}"):
            for month in self._folders(year, r"\d{4}/\d{2}"):
                for day in self._folders(month, r"\d{4}/\d{2}/\d{2}"):
                    if day <= last:
                        yield day

    def _folders(self, under: str | None, shape: str) -> list[str]:
        folders = obstore.list_with_delimiter(self._store, under)["common_prefixes"]
        return sorted(folder for folder in folders if re.fullmatch(shape, folder, re.ASCII))

    def _remove_leftovers(self, before: datetime) -> None:
        """Remove unfinished files of killed uploads and empty day folders; an object store has neither."""
        if self._directory is None:
            return
        cutoff = before.astimezone(UTC).strftime("%Y/%m/%d")
        for day in list(self._days(before)):
            folder = self._directory / day
            with suppress(FileNotFoundError):  # another process trims too
                for entry in folder.iterdir():
                    if _UNFINISHED.fullmatch(entry.name) and entry.stat().st_mtime < before.timestamp():
                        entry.unlink()
            if day < cutoff:
                with suppress(OSError):  # not empty, or removed already
                    folder.rmdir()

    async def _delete(self, action: str, name: str) -> None:
        with suppress(FileNotFoundError):
            await self._run(action, partial(obstore.delete, self._store, name))

    async def _run(self, action: str, operation: Callable[[], T]) -> T:
        """Run `operation` in a thread; FileNotFoundError passes, other failures become StorageError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, operation)
        except FileNotFoundError:
            raise
        except (BaseError, OSError, ValueError) as error:
            raise self._storage_error(action, error) from error

    def _storage_error(self, action: str, error: Exception) -> StorageError:
        text = _first_line(error)
        if _DISK_FULL.search(text):
            return StorageFull(f"cannot {action}: no space left in {self._place}")
        return StorageError(f"cannot {action} in {self._place}: {text}")


def open_storage(storage_url: str) -> RecordingStorage:
    """Open a directory (created when missing, readable by its owner only) or an `s3://`, `gs://`, `az://` URL.

    Object stores take their credentials, region and endpoint from the environment, under each vendor's usual names.
    Sends nothing over the network yet. Raises SettingsError for a URL that cannot be used.
    """
    if storage_url.startswith(("s3://", "gs://", "az://")):
        if "@" in storage_url:
            raise SettingsError("storage_url: credentials belong in the environment, not in the URL")
        return RecordingStorage(_open_bucket(storage_url), place=storage_url.split("?")[0])
    if not storage_url or _URL.match(storage_url):
        scheme = storage_url.split("://")[0]
        raise SettingsError(f"storage_url: {scheme!r} is not supported; use a path, s3://, gs:// or az://")
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
    # obstore ignores AWS_ALLOW_HTTP and its likes as soon as any other client option is passed.
    vendor = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[scheme]
    return os.environ.get(f"{vendor}_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")


def object_path(call_id: str, started_on: date, content_type: str) -> str:
    """Build the path of a recording: `2026/11/20/call_….wav`. Raises ValueError for an invalid call id."""
    if not CALL_ID.fullmatch(call_id):
        raise ValueError("not a valid call id")
    return f"{started_on:%Y/%m/%d}/{call_id}.{_SUFFIXES.get(content_type, 'bin')}"


def object_paths(call_id: str, started_on: date) -> list[str]:
    return sorted({object_path(call_id, started_on, content_type) for content_type in (*_SUFFIXES, "")})


def _size_error(size_bytes: int, expected_size_bytes: int | None, max_bytes: int) -> str | None:
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
        raise ValueError("not a valid recording path")
    return path


def _checked_small(name: str) -> str:
    if not _SMALL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid object name; use folder/name")
    return name


def _sync(file: Path) -> None:
    # The folder too: until its entry is on disk, a power cut can lose the name of a file whose bytes were written.
    for path in (file, file.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(error: Exception) -> str:
    # Without query strings: object stores put signatures there.
    text = str(error).strip().splitlines()
    return re.sub(r"\?\S+", "?…", text[0])[:300] if text else type(error).__name__
