"""Ways to end a connection that no HTTP server has."""

import asyncio
import socket
import struct

from aiohttp import web


class CutShort(Exception):
    """The server ends the connection before it has sent everything."""


def write_raw(request: web.BaseRequest, data: bytes) -> None:
    """Put bytes on the wire behind the HTTP server's back."""
    if request.transport is not None:
        request.transport.write(data)


async def hang_up(request: web.BaseRequest, *, reset: bool = False) -> web.Response:
    """Close the connection without another byte; `reset` does so with a TCP RST. The result is never sent."""
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
