"""Limits on the connections of a port: how many there are, and how long one may hold its place without a request.

aiohttp.web accepts any number of connections, and waits for the end of a request's headers for as long as it keeps
idle connections (RFC 9112, section 9.5, leaves both to the server). When all places are taken, the connection that has
waited longest for its headers makes room for the next: a client that sends its request at once is served during a
flood of clients that do not.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from ipaddress import IPv6Address, ip_address
from typing import Any, Final, cast

import structlog
from aiohttp import hdrs, web

from relay.tasks import cancel

log = structlog.get_logger(__name__)

_CHECK_EVERY_S: Final = 1.0
_LOG_EVERY_S: Final = 60.0
_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one port. `header_timeout_s` runs from the connection, or the first byte of a further request, to the
    end of its headers; `write_timeout_s` is how long a client may read nothing of what it is sent."""

    total: int
    per_address: int
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0  # longer than what reverse proxies use, so that they close first
    write_timeout_s: float = 30.0


class _State(Enum):
    HEADERS = auto()
    REQUEST = auto()
    IDLE = auto()


class Connections:
    """The open connections of one port."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._open: dict[_Connection, None] = {}  # ordered by age
        self._by_address: dict[str, dict[_Connection, None]] = {}
        self._refused = 0
        self._logged_at = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: "_Connection") -> bool:
        """Give a new connection a place; False when neither a free one nor a waiting connection is left."""
        neighbours = self._by_address.setdefault(connection.address, {})
        if len(neighbours) >= self._limits.per_address and not self._make_room(neighbours):
            return False
        if len(self._open) >= self._limits.total and not self._make_room(self._open):
            return False
        self._open[connection] = None
        # Making room may have removed the address's last connection, and its entry.
        self._by_address.setdefault(connection.address, neighbours)[connection] = None
        return True

    def remove(self, connection: "_Connection") -> None:
        if self._open.pop(connection, self) is self:
            return  # it has made room already
        neighbours = self._by_address[connection.address]
        del neighbours[connection]
        if not neighbours:
            del self._by_address[connection.address]

    def _make_room(self, connections: "dict[_Connection, None]") -> bool:
        for state in (_State.HEADERS, _State.IDLE):
            for connection in connections:
                if connection.state is state:
                    self._close(connection)
                    return True
        self._count_refused()
        return False

    def _close(self, connection: "_Connection") -> None:
        self.remove(connection)
        connection.abort()
        self._count_refused()

    def _count_refused(self) -> None:
        self._refused += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._logged_at >= _LOG_EVERY_S:
            log.warning("connections_refused", count=self._refused, open=len(self._open), limit=self._limits.total)
            self._refused, self._logged_at = 0, now_s

    async def close_overdue(self) -> None:
        """Close for ever the connections that exceed a time limit."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            now_s = loop.time()
            for connection in [each for each in self._open if each.overdue(self._limits, now_s)]:
                self.remove(connection)
                connection.abort()


class _Connection(web.RequestHandler):
    """One connection, which knows since when it waits for what."""

    __slots__ = ("_admitted", "_connections", "_unsent_bytes", "_unsent_since_s", "address", "since_s", "state")

    def __init__(self, server: web.Server, connections: Connections, **options: Any) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, **options)
        self._connections = connections
        self._admitted = False
        self._unsent_bytes, self._unsent_since_s = 0, 0.0
        self.address = ""
        self.state = _State.HEADERS
        self.since_s = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.address = _client_of(transport)
        self._admitted = self._connections.admit(self)
        if self._admitted:
            super().connection_made(transport)
        else:
            cast(asyncio.Transport, transport).abort()

    def data_received(self, data: bytes) -> None:
        if not self._admitted:
            return
        if self.state is _State.IDLE:
            self.enter(_State.HEADERS)
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._admitted:
            self._connections.remove(self)
            super().connection_lost(exc)

    def enter(self, state: _State) -> None:
        self.state, self.since_s = state, asyncio.get_running_loop().time()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def overdue(self, limits: ConnectionLimits, now_s: float) -> bool:
        """Whether it exceeds a time limit."""
        waited_s = now_s - self.since_s
        match self.state:
            case _State.HEADERS if waited_s > limits.header_timeout_s:
                return True
            case _State.IDLE if waited_s > limits.idle_timeout_s:
                return True
        unsent_bytes = 0 if self.transport is None else self.transport.get_write_buffer_size()
        if unsent_bytes == 0 or unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since_s = unsent_bytes, now_s
        return now_s - self._unsent_since_s > limits.write_timeout_s


@web.middleware
async def _track_request(request: web.Request, handler: Any) -> web.StreamResponse:
    connection = request.protocol
    if not isinstance(connection, _Connection):
        return cast(web.StreamResponse, await handler(request))
    connection.enter(_State.REQUEST)
    try:
        return cast(web.StreamResponse, await handler(request))
    finally:
        connection.enter(_State.IDLE)


async def _omit_server(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop(hdrs.SERVER, None)  # it would name the versions of Python and aiohttp


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int, limits: ConnectionLimits) -> AsyncIterator[int]:
    """Serve an application within limits; yields the port. Raises OSError when it cannot listen there."""
    app.middlewares.insert(0, _track_request)
    app.on_response_prepare.append(_omit_server)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
    await runner.setup()
    connections = Connections(limits)
    try:
        http_server = runner.server
        assert http_server is not None  # noqa: S101 - it was set up
        server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(http_server, connections, access_log=None),
            host,
            port,
            backlog=_BACKLOG,
        )
        closing = asyncio.create_task(connections.close_overdue(), name="connections")
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            await cancel(closing)
            server.close()
    finally:
        await runner.cleanup()


def _client_of(transport: asyncio.BaseTransport) -> str:
    """Name the client that a connection counts for: an IPv4 address, or an IPv6 /64, which one client has whole."""
    peer = transport.get_extra_info("peername")
    with contextlib.suppress(ValueError, TypeError, IndexError):
        address = ip_address(str(peer[0]).partition("%")[0])
        if isinstance(address, IPv6Address):
            return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
        return str(address)
    return ""
