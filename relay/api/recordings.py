"""Serves a kept recording to whoever holds a signed link, in constant memory.

Nothing is looked up before the signature is right, so a stranger learns nothing, not even which calls exist.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Protocol, assert_never

import structlog
from aiohttp import web

from relay.domain.json import Json
from relay.errors import StorageError, StoreError
from relay.recordings.fetch import audio_type
from relay.recordings.links import BadSignature, Expired, Valid, verify
from relay.recordings.storage import CALL_ID

WRITE_TIMEOUT_S = 300
RETRY_AFTER_S = 30

_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,40})\s*-\s*([0-9]{0,40})\s*", re.ASCII | re.IGNORECASE)

log = structlog.get_logger(__name__)


class AudioStore(Protocol):
    """Where the audio is."""

    async def size(self, path: str) -> int | None: ...

    def read(self, path: str, start: int, end: int) -> AsyncGenerator[bytes, None]: ...


FindRecording = Callable[[str], Awaitable[Json | None]]
"""Answers the recording part of a call (with `path`), None when the call is unknown or erased."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Send everything."""


@dataclass(frozen=True, slots=True)
class Part:
    """Send bytes `start` to `end`, exclusive."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """The range lies outside of the recording."""


def parse_range(header: str | None, size_bytes: int) -> Whole | Part | Unsatisfiable:
    """Read a `Range` header (RFC 9110, 14.2). What is not understood, and several ranges at once, mean everything."""
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or found.groups() == ("", ""):
        return Whole()
    first, last = found.groups()
    if not first:
        wanted = min(int(last), size_bytes)
        return Part(size_bytes - wanted, size_bytes) if wanted else Unsatisfiable()
    if last and int(last) < int(first):
        return Whole()
    if int(first) >= size_bytes:
        return Unsatisfiable()
    return Part(int(first), min(int(last) + 1, size_bytes) if last else size_bytes)


def recording_routes(
    storage: AudioStore,
    find_recording: FindRecording,
    keys: Sequence[bytes],
    clock: Callable[[], datetime],
    *,
    write_timeout_s: float = WRITE_TIMEOUT_S,
) -> list[web.RouteDef]:
    """Build the routes of `/recordings/{call_id}`, GET and HEAD. A listener that takes nothing for
    `write_timeout_s` is let go.
    """

    async def serve(request: web.Request) -> web.StreamResponse:
        call_id = request.match_info["call_id"]
        if not CALL_ID.fullmatch(call_id):
            return _problem(HTTPStatus.NOT_FOUND, "There is no recording at this address.")
        query = request.query
        match verify(call_id, query.get("expires", ""), query.get("signature", ""), keys=keys, now=clock()):
            case BadSignature():
                return _problem(HTTPStatus.FORBIDDEN, "This link is incomplete or was changed.")
            case Expired():
                return _problem(HTTPStatus.GONE, "This link has expired; ask for a new one.")
            case Valid():
                pass
            case other:
                assert_never(other)
        try:
            part = await find_recording(call_id)
            path = part.get("path") if part else None
            size_bytes = await storage.size(path) if path else None
        except (StorageError, StoreError) as error:
            return _unavailable(call_id, error)
        if part is None or path is None or size_bytes is None:
            return _problem(HTTPStatus.NOT_FOUND, "This recording is not kept, or not any more.")
        return await _answer(request, storage, _Recording(call_id, part, path, size_bytes), write_timeout_s)

    async def nothing(_: web.Request) -> web.StreamResponse:
        return _problem(HTTPStatus.NOT_FOUND, "There is no recording at this address.")

    return [web.get("/recordings/{call_id}", serve), web.get("/recordings/{rest:.*}", nothing)]


@dataclass(frozen=True, slots=True)
class _Recording:
    call_id: str
    part: Json
    path: str
    size_bytes: int

    @property
    def etag(self) -> str:
        return f'"{self.part["sha256"]}"'

    @property
    def headers(self) -> dict[str, str]:
        name = f"call-{self.call_id.removeprefix('call_')}{PurePosixPath(self.path).suffix}"
        return {
            "Accept-Ranges": "bytes",
            "Cache-Control": "private",
            "Content-Disposition": f'inline; filename="{name}"',
            "Content-Type": audio_type(self.part.get("content_type") or "") or "application/octet-stream",
            "ETag": self.etag,
            "X-Content-Type-Options": "nosniff",
        }


async def _answer(
    request: web.Request, storage: AudioStore, recording: _Recording, write_timeout_s: float
) -> web.StreamResponse:
    headers, size_bytes = recording.headers, recording.size_bytes
    if _matches(request.headers.getall("If-None-Match", []), recording.etag):
        kept = {name: headers[name] for name in ("Cache-Control", "ETag")}
        return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=kept)
    wanted = request.headers.get("Range") if request.method == "GET" else None
    if request.headers.get("If-Range", recording.etag) != recording.etag:
        wanted = None
    match parse_range(wanted, size_bytes):
        case Unsatisfiable():
            answer = _problem(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"The recording has {size_bytes} bytes.")
            answer.headers["Content-Range"] = f"bytes */{size_bytes}"
            return answer
        case Part(start, end):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size_bytes}"
            response = web.StreamResponse(status=HTTPStatus.PARTIAL_CONTENT, headers=headers)
        case Whole():
            start, end = 0, size_bytes
            response = web.StreamResponse(headers=headers)
        case other:
            assert_never(other)
    response.content_length = end - start
    if request.method == "HEAD":
        await response.prepare(request)
        return response
    async with aclosing(storage.read(recording.path, start, end)) as blocks:
        return await _send(request, response, blocks, recording.call_id, write_timeout_s)


async def _send(
    request: web.Request,
    response: web.StreamResponse,
    blocks: AsyncGenerator[bytes, None],
    call_id: str,
    write_timeout_s: float,
) -> web.StreamResponse:
    """Send block by block. The first is read before the status goes out, so that an outage can still be said."""
    try:
        block = await anext(blocks, None)
    except StorageError as error:
        return _unavailable(call_id, error)
    try:
        await response.prepare(request)
        while block is not None:
            async with asyncio.timeout(write_timeout_s):
                await response.write(block)
            block = await anext(blocks, None)
        await response.write_eof()
    except StorageError as error:
        log.warning("recording_broke_off", call=call_id, error=str(error))
        _hang_up(request)
    except TimeoutError:
        log.info("recording_listener_stalled", call=call_id)
        _hang_up(request)
    except ConnectionError:
        log.debug("recording_listener_left", call=call_id)
    return response


def _hang_up(request: web.Request) -> None:
    """Cut the connection: the length was announced, so the listener sees that something is missing."""
    if request.transport is not None:
        request.transport.abort()


def _matches(headers: Sequence[str], etag: str) -> bool:
    """Compare `If-None-Match` weakly, as RFC 9110, 13.1.2 wants it."""
    tags = [tag.strip().removeprefix("W/") for header in headers for tag in header.split(",")]
    return "*" in tags or etag in tags


def _unavailable(call_id: str, error: Exception) -> web.Response:
    log.warning("recording_unavailable", call=call_id, error=str(error))
    answer = _problem(HTTPStatus.SERVICE_UNAVAILABLE, "The recording cannot be read just now; try again soon.")
    answer.headers["Retry-After"] = str(RETRY_AFTER_S)
    return answer


def _problem(status: HTTPStatus, detail: str) -> web.Response:
    """Say what is wrong in a sentence (RFC 9457)."""
    body = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(status=status, text=json.dumps(body), content_type="application/problem+json", headers=headers)
