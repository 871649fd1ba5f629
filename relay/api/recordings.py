"""Serves stored recordings over signed links, in constant memory.

Nothing is looked up before the signature is verified, so a link that is not ours does not reveal which calls exist.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Final, Protocol, assert_never

import structlog
from aiohttp import hdrs, web

from relay.api.problems import problem_response
from relay.domain.json import Json
from relay.errors import StorageError, StoreError
from relay.recordings.fetch import audio_type
from relay.recordings.links import BadSignature, Expired, Valid, verify
from relay.recordings.storage import CALL_ID
from relay.store.connection import STORE_ERRORS

WRITE_TIMEOUT_S: Final = 300
RETRY_AFTER_S: Final = 30
_EMPTY_SUFFIX: Final = re.compile(r"bytes=-0+", re.IGNORECASE)

log = structlog.get_logger(__name__)


class AudioReader(Protocol):
    """Reads stored audio."""

    async def size(self, path: str) -> int | None: ...

    def read(self, path: str, start: int, end: int) -> AsyncGenerator[bytes, None]: ...


# Reads the recording part of a call (with `path`); None when the call is unknown or erased.
FindRecording = Callable[[str], Awaitable[Json | None]]


def recording_routes(
    storage: AudioReader,
    find_recording: FindRecording,
    keys: Sequence[bytes],
    clock: Callable[[], datetime],
    *,
    write_timeout_s: float = WRITE_TIMEOUT_S,
) -> list[web.RouteDef]:
    """Build the routes of `/recordings/{call_id}`, GET and HEAD.

    The connection of a client that reads nothing for `write_timeout_s` is closed.
    """

    async def serve(request: web.Request) -> web.StreamResponse:
        call_id = request.match_info["call_id"]
        if not CALL_ID.fullmatch(call_id):
            return await not_found(request)
        query = request.query
        match verify(call_id, query.get("expires", ""), query.get("signature", ""), keys=keys, now=clock()):
            case BadSignature():
                return problem_response(HTTPStatus.FORBIDDEN, "This link is incomplete or was modified.")
            case Expired():
                return problem_response(HTTPStatus.GONE, "This link has expired; request a new one.")
            case Valid():
                pass
            case other:
                assert_never(other)
        try:
            part = await find_recording(call_id)
            path = part.get("path") if part else None
            size_bytes = await storage.size(path) if path else None
        except (StorageError, StoreError, *STORE_ERRORS) as error:
            return _unavailable(call_id, error)
        if part is None or path is None or size_bytes is None:
            return problem_response(HTTPStatus.NOT_FOUND, "Recording not found, or no longer stored.")
        return await _respond(request, storage, _Recording(call_id, part, path, size_bytes), write_timeout_s)

    async def not_found(_: web.Request) -> web.StreamResponse:
        return problem_response(HTTPStatus.NOT_FOUND, "Recording not found.")

    return [web.get("/recordings/{call_id}", serve), web.get("/recordings/{rest:.*}", not_found)]


@dataclass(frozen=True, slots=True)
class _Recording:
    call_id: str
    part: Json
    path: str
    size_bytes: int

    @property
    def etag(self) -> str:
        return str(self.part["sha256"])

    @property
    def headers(self) -> dict[str, str]:
        name = f"call-{self.call_id.removeprefix('call_')}{PurePosixPath(self.path).suffix}"
        return {
            "Accept-Ranges": "bytes",
            "Cache-Control": "private",
            "Content-Disposition": f'inline; filename="{name}"',
            "Content-Security-Policy": "default-src 'none'; sandbox",  # whatever the bytes are, they run no script
            "Content-Type": audio_type(self.part.get("content_type") or "") or "application/octet-stream",
            "X-Content-Type-Options": "nosniff",
        }


def requested_range(request: web.BaseRequest, etag: str, size_bytes: int) -> range | None:
    """Resolve `Range` and `If-Range` to the bytes to send, None for all of them (RFC 9110, 13.1.5 and 14.2).

    An empty range cannot be satisfied. A header that is not understood, and several ranges at once, are ignored.
    """
    header = request.headers.get(hdrs.RANGE)
    if header is None or request.method != hdrs.METH_GET:
        return None
    # aiohttp's `if_range` parses dates only. We send no Last-Modified, so only our entity tag can match.
    if request.headers.get(hdrs.IF_RANGE, f'"{etag}"') != f'"{etag}"':
        return None
    # aiohttp's `http_range` takes "the last 0 bytes" for everything.
    if _EMPTY_SUFFIX.fullmatch(header):
        return range(0)
    try:
        return range(size_bytes)[request.http_range]
    except ValueError:
        return None


async def _respond(
    request: web.Request, storage: AudioReader, recording: _Recording, write_timeout_s: float
) -> web.StreamResponse:
    response: web.StreamResponse
    if any(tag.value in ("*", recording.etag) for tag in request.if_none_match or ()):
        response = web.Response(status=HTTPStatus.NOT_MODIFIED, headers={"Cache-Control": "private"})
        response.etag = recording.etag
        return response
    size_bytes = recording.size_bytes
    selected = requested_range(request, recording.etag, size_bytes)
    if selected is None:
        selected = range(size_bytes)
        response = web.StreamResponse(headers=recording.headers)
    elif not selected:
        headers = {"Content-Range": f"bytes */{size_bytes}"}
        detail = f"The recording has {size_bytes} bytes."
        return problem_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, detail, headers=headers)
    else:
        response = web.StreamResponse(status=HTTPStatus.PARTIAL_CONTENT, headers=recording.headers)
        response.headers["Content-Range"] = f"bytes {selected.start}-{selected.stop - 1}/{size_bytes}"
    response.etag = recording.etag
    response.content_length = len(selected)
    if request.method == hdrs.METH_HEAD:
        await response.prepare(request)
        return response
    async with aclosing(storage.read(recording.path, selected.start, selected.stop)) as blocks:
        return await _send(request, response, blocks, recording.call_id, write_timeout_s)


async def _send(
    request: web.Request,
    response: web.StreamResponse,
    blocks: AsyncGenerator[bytes, None],
    call_id: str,
    write_timeout_s: float,
) -> web.StreamResponse:
    try:
        # Before the status is sent, so that an unavailable storage can still be answered with 503.
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
        log.warning("recording_interrupted", call=call_id, error=str(error))
        _abort(request)
    except TimeoutError:
        log.info("recording_client_stalled", call=call_id)
        _abort(request)
    except ConnectionError:
        log.debug("recording_client_disconnected", call=call_id)
    return response


def _abort(request: web.Request) -> None:
    # The Content-Length was sent, so a client that loses the connection knows that the audio is incomplete.
    if request.transport is not None:
        request.transport.abort()


def _unavailable(call_id: str, error: Exception) -> web.Response:
    log.warning("recording_read_failed", call=call_id, error=str(error))
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return problem_response(
        HTTPStatus.SERVICE_UNAVAILABLE, "The recording is temporarily unavailable; retry later.", headers=headers
    )
