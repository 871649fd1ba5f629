"""How the simulators listen: one small aiohttp server each, and the rude ways to end a conversation.

A handler may wait for `Line.closing`, so that a peer who was promised silence never holds up the end of the server.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import orjson
from aiohttp import web

Answering = Callable[[web.BaseRequest, "Line"], Awaitable[web.StreamResponse]]

_SHUTDOWN_S = 0.5


@dataclass(frozen=True, slots=True)
class Line:
    """One listening server; `closing` is set when it begins to stop."""

    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, seconds: float | None) -> None:
        """Wait that long, or for ever, but not past the end of the server."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)


@contextlib.asynccontextmanager
async def listening(
    answer: Answering, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serve until the block ends; yields the base URL with the port found. A client that leaves ends its `answer`."""
    line = Line()

    async def answered(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await answer(request, line)
        except ConnectionResetError:  # the client left while something was written to it
            return web.Response()

    server = web.Server(answered, handler_cancellation=True, access_log=None)
    runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=ssl_context, backlog=1024).start()
        scheme = "https" if ssl_context else "http"
        yield f"{scheme}://{host}:{runner.addresses[0][1]}"
    finally:
        line.closing.set()
        await runner.cleanup()


def write_raw(request: web.BaseRequest, data: bytes) -> None:
    """Put bytes on the wire behind the HTTP server's back."""
    if request.transport is not None:
        request.transport.write(data)


async def hang_up(request: web.BaseRequest, *, reset: bool = False) -> web.Response:
    """Close the connection without another word; `reset` does so with a TCP RST. The result is never sent."""
    transport = request.transport
    if transport is not None:
        connection: socket.socket | None = transport.get_extra_info("socket")
        if reset and connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
        await asyncio.sleep(0)
    return web.Response()


def json_response(body: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
