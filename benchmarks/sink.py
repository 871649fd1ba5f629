"""`python -m benchmarks.sink`: a subscriber that costs next to nothing, so that it is never the bottleneck.

The first part of the path says what it does: `/ok/…` is answered with 204, `/silent/…` is read and never answered.
The first arrival of each path and webhook-id is timed by the machine's monotonic clock, which processes share.
"""

import asyncio
import signal
import sys
import time
from collections import defaultdict
from typing import Any

import orjson
import uvloop

_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


class Arrivals:
    """What has arrived, by the first part of its path."""

    def __init__(self) -> None:
        self.counts: dict[bytes, int] = defaultdict(int)
        self.first: dict[bytes, float] = {}
        self.last: dict[bytes, float] = {}
        self.first_seen: dict[bytes, dict[bytes, float]] = defaultdict(dict)

    def record(self, path: bytes, event_id: bytes) -> bytes:
        """Record a post; gives its group."""
        now = time.monotonic()
        group = path[1 : path.find(b"/", 1)]
        self.counts[group] += 1
        self.first.setdefault(group, now)
        self.last[group] = now
        self.first_seen[group].setdefault(path + b" " + event_id, now)
        return group

    def report(self) -> dict[str, Any]:
        return {
            group.decode(): {
                "count": count,
                "distinct": len(self.first_seen[group]),
                "first_s": self.first[group],
                "last_s": self.last[group],
            }
            for group, count in self.counts.items()
        }


class Hook(asyncio.Protocol):
    """One connection, with no more of HTTP/1.1 than our senders use."""

    def __init__(self, arrivals: list[Arrivals]) -> None:
        self._arrivals = arrivals
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data
        while self._data:
            head_end = self._data.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = self._data[:head_end]
            length = int(_header(head, b"content-length") or 0)
            if len(self._data) < head_end + 4 + length:
                return
            self._data = self._data[head_end + 4 + length :]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if method == b"POST":
            if self._arrivals[0].record(path, _header(head, b"webhook-id")) != b"silent":
                self._transport.write(_NO_CONTENT)  # type: ignore[attr-defined]
            return
        if path == b"/reset":
            self._arrivals[0] = Arrivals()
        report: Any = {}
        if path == b"/report":
            report = self._arrivals[0].report()
        elif path.startswith(b"/arrivals/"):
            first_seen = self._arrivals[0].first_seen[path.removeprefix(b"/arrivals/")]
            report = {key.decode(): at for key, at in first_seen.items()}
        body = orjson.dumps(report)
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # type: ignore[attr-defined]


def _header(head: bytes, name: bytes) -> bytes:
    at = head.find(b"\r\n" + name + b": ")
    if at < 0:
        at = head.lower().find(b"\r\n" + name + b": ")
        if at < 0:
            return b""
    start = at + len(name) + 4
    end = head.find(b"\r\n", start)
    return head[start:] if end < 0 else head[start:end]


async def serve() -> None:
    """Listen until a signal comes; the port is the first line of stdout."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    arrivals = [Arrivals()]
    server = await loop.create_server(lambda: Hook(arrivals), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(orjson.dumps({"port": server.sockets[0].getsockname()[1]}).decode() + "\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(serve())
