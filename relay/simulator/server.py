"""How the fakes listen: one small aiohttp server each, on loopback by default."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import orjson
from aiohttp import web

Handler = Callable[[web.BaseRequest, "Listener"], Awaitable[web.StreamResponse]]

# Handlers end by themselves when the listener closes; this is for one that does not.
_SHUTDOWN_S = 0.5


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening server. A handler that waits does so here, so that it never delays the server's end."""

    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, seconds: float | None) -> None:
        """Wait that long (None: for ever), but not past the end of the server."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)


@contextlib.asynccontextmanager
async def listen(
    handler: Handler, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serve until the block ends; yields the base URL. A client that disconnects cancels its handler."""
    listener = Listener()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request, listener)
        except ConnectionResetError:  # the client disconnected while the response was being written
            return web.Response()

    server = web.Server(handle, handler_cancellation=True, access_log=None)
    runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=ssl_context, backlog=1024).start()
        scheme = "https" if ssl_context else "http"
        yield f"{scheme}://{host}:{runner.addresses[0][1]}"
    finally:
        listener.closing.set()
        await runner.cleanup()


def json_response(body: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
