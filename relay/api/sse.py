"""Writes Server-Sent Events (WHATWG HTML standard, section "Server-sent events")."""

import asyncio
from typing import Final

from aiohttp import web

_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would buffer the stream
    "X-Content-Type-Options": "nosniff",
}


class SseResponse:
    """A stream of events to one client. Writes raise TimeoutError when the client reads nothing for too long."""

    def __init__(self, request: web.Request, *, write_timeout_s: float) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS)
        self._write_timeout_s = write_timeout_s
        self.written_at = 0.0

    async def start(self, *, retry_ms: int) -> None:
        """Send the headers, and the delay after which the client reconnects."""
        await self.response.prepare(self._request)
        await self._write(b"retry: %d\n\n" % retry_ms)

    async def send(self, data: bytes, *, event: str, event_id: str | None = None) -> None:
        """Send an event; `data` is one line."""
        identity = b"" if event_id is None else b"id: %s\n" % event_id.encode()
        await self._write(b"%sevent: %s\ndata: %s\n\n" % (identity, event.encode(), data))

    async def send_comment(self, text: str) -> None:
        """Send a comment, which clients ignore: it keeps the connection open and detects a lost one."""
        await self._write(b": %s\n\n" % text.encode())

    @property
    def disconnected(self) -> bool:
        """Whether the client has closed the connection: a quiet stream would notice only at its next write."""
        return self._request.transport is None or self._request.transport.is_closing()

    def abort(self) -> None:
        """Close the connection without waiting for the client to read."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _write(self, data: bytes) -> None:
        async with asyncio.timeout(self._write_timeout_s):
            await self.response.write(data)
        self.written_at = asyncio.get_running_loop().time()
