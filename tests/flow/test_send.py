"""Whatever a subscriber does with an attempt, one outcome comes of it: in time, in message, with bounded memory."""

import asyncio
import base64
import contextlib
import errno
import gzip
import ipaddress
import socket
import ssl
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import relay
from relay.delivery.guard import Guard
from relay.delivery.outcomes import (
    AddressRefused,
    AttemptOutcome,
    Delivered,
    Gone,
    Interrupted,
    Rejected,
    Throttled,
    TimedOut,
    Unreachable,
)
from relay.delivery.send import Sender

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Peer:
    """A raw server: what it was sent, and over how many connections."""

    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    received: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0

    def url(self, path: str = "/hook", *, scheme: str = "http", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return head + await reader.readexactly(length)


@asynccontextmanager
async def peer(behave: Behaviour, *, tls: ssl.SSLContext | None = None, read: bool = True) -> AsyncIterator[Peer]:
    """Serve on loopback; `behave` runs after each request, or with `read=False` once at the start of a connection."""
    here = Peer()
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        here.connections += 1
        try:
            if not read:
                await behave(reader, writer)
            while read and not writer.is_closing():
                here.requests.append(await read_request(reader))
                here.received.set()
                await behave(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            running.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls, backlog=1024)
    here.port = server.sockets[0].getsockname()[1]
    try:
        yield here
    finally:
        server.close()
        waiting = list(running)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def answers(*pieces: bytes, close: bool = False) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if close:
            writer.close()

    return behave


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    async with Sender(Guard(LOOPBACK), now=lambda: NOW) as opened:
        yield opened


async def post(sender: Sender, url: str, *, timeout_s: float = 5.0, **options: Any) -> AttemptOutcome:
    return await sender.send(url, b'{"id":"evt_1"}', {"webhook-id": "evt_1"}, timeout_s=timeout_s, **options)


# --- answers


async def test_a_2xx_is_delivered_and_the_request_is_what_was_signed(sender: Sender) -> None:
    async with peer(answers(OK)) as subscriber:
        outcome = await post(sender, subscriber.url("/a%2Fb?sig=%2B"))

    assert isinstance(outcome, Delivered)
    assert (outcome.status, outcome.excerpt, outcome.message) == (200, "ok", "answered 200")
    assert 0 <= outcome.duration_ms < 5000
    head, _, body = subscriber.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /a%2Fb?sig=%2B HTTP/1.1"
    sent = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
    assert sent == {
        "host": f"127.0.0.1:{subscriber.port}",
        "user-agent": f"call-relay/{relay.__version__}",
        "content-type": "application/json",
        "accept-encoding": "identity",
        "accept": "*/*",
        "webhook-id": "evt_1",
        "content-length": "14",
    }
    assert body == b'{"id":"evt_1"}'


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", Delivered, "answered 204"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", Delivered, "answered 202"),
        (b"HTTP/1.0 200 OK\r\n\r\nno length", Delivered, "answered 200"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", Rejected, "answered 400"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Rejected, "answered 404"),
        (b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n", Gone, "answered 410 Gone"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", Rejected, "answered 500"),
        (
            b"HTTP/1.1 429 No\r\nRetry-After: 30\r\nContent-Length: 0\r\n\r\n",
            Throttled,
            "answered 429 with Retry-After: 30 s",
        ),
        (
            b"HTTP/1.1 503 No\r\nRetry-After: Tue, 01 Jul 2025 12:01:00 GMT\r\nContent-Length: 0\r\n\r\n",
            Throttled,
            "answered 503 with Retry-After: 60 s",
        ),
        (b"HTTP/1.1 429 No\r\nRetry-After: -5\r\nContent-Length: 0\r\n\r\n", Throttled, "answered 429"),
    ],
)
async def test_an_answer_is_sorted_by_its_status(sender: Sender, answer: bytes, kind: type, message: str) -> None:
    async with peer(answers(answer, close=True)) as subscriber:
        outcome = await post(sender, subscriber.url())

    assert type(outcome) is kind
    assert outcome.message == message


async def test_a_redirect_to_an_internal_address_is_not_followed(sender: Sender) -> None:
    """A subscriber that answers 307 to another address gets no second request, nor does that address."""
    async with peer(answers(OK)) as internal:
        location = internal.url("/latest/meta-data").encode()
        moved = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
        async with peer(answers(moved)) as subscriber:
            outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Rejected)
    assert outcome.message == "answered 307, a redirect; redirects are not followed"
    assert len(subscriber.requests) == 1
    assert internal.connections == 0


async def test_cookies_are_not_kept(sender: Sender) -> None:
    cookie = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n\r\n"
    async with peer(answers(cookie)) as subscriber:
        await post(sender, subscriber.url(host="127.0.0.1"))
        await post(sender, subscriber.url(host="127.0.0.1"))

    assert len(subscriber.requests) == 2
    assert b"cookie" not in subscriber.requests[1].lower()


async def test_credentials_of_the_url_are_sent_as_a_header(sender: Sender) -> None:
    async with peer(answers(OK)) as subscriber:
        await post(sender, f"http://ann:s%40cret@127.0.0.1:{subscriber.port}/hook")

    basic = base64.b64encode(b"ann:s@cret")
    assert b"Authorization: Basic " + basic in subscriber.requests[0]
    assert b"s%40cret" not in subscriber.requests[0]


# --- connections


async def test_deliveries_share_a_connection_and_a_new_one_is_opened_on_request(sender: Sender) -> None:
    async with peer(answers(OK)) as subscriber:
        reused = [await post(sender, subscriber.url()) for _ in range(5)]
        assert subscriber.connections == 1
        fresh = [await post(sender, subscriber.url(), reuse=False) for _ in range(2)]

    assert all(isinstance(outcome, Delivered) for outcome in reused + fresh)
    assert subscriber.connections == 3
    assert b"Connection: close" in subscriber.requests[-1]


async def test_an_idle_connection_that_was_closed_costs_no_attempt(sender: Sender) -> None:
    async with peer(answers(OK, close=True)) as subscriber:
        first = await post(sender, subscriber.url())
        connector = sender._sessions[True, True].connector
        assert connector is not None
        for ((protocol, _),) in connector._conns.values():
            if (noticed := protocol.closed) is not None:
                await noticed
        second = await post(sender, subscriber.url())

    assert isinstance(first, Delivered)
    assert isinstance(second, Delivered)
    assert len(subscriber.requests) == 2


async def test_a_connection_lost_before_anything_was_written_is_replaced_at_once(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's close arrives between taking the kept connection and writing to it."""
    async with peer(answers(OK)) as subscriber:
        await post(sender, subscriber.url())
        session = sender._sessions[True, True]
        assert session.connector is not None
        take = session.connector.connect

        async def take_and_lose(*arguments: Any, **options: Any) -> Any:
            connection = await take(*arguments, **options)
            assert connection.protocol is not None
            assert connection.protocol.transport is not None
            connection.protocol.transport.abort()
            return connection

        monkeypatch.setattr(session.connector, "connect", take_and_lose)
        outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Delivered)
    assert len(subscriber.requests) == 2
    assert subscriber.connections == 2


async def test_a_reused_connection_that_ends_after_the_request_is_interrupted_and_not_retried(
    sender: Sender,
) -> None:
    """The subscriber may have received it: only the schedule tries again."""
    first = True

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        if first:
            first = False
            writer.write(OK)
        else:
            writer.close()

    async with peer(once) as subscriber:
        await post(sender, subscriber.url())
        outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Interrupted)
    assert not outcome.never_sent
    assert len(subscriber.requests) == 2


# --- misbehaviour


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (answers(close=True), "closed the connection without an answer"),
        (reset, "reset the connection without an answer"),
        (answers(b"HTTP/1.1 200 OK\r\nContent-Le", close=True), "in the middle of its answer's headers"),
        (answers(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", close=True), "is not HTTP"),
        (answers(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", close=True), "is not HTTP"),
        (answers(b"\x15\x03\x03\x00\x02\x02\x46" * 4, close=True), "is not HTTP"),
        (answers(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", close=True), "headers that are too large"),
        (
            answers(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n", close=True),
            "answer",
        ),
    ],
    ids=["close", "reset", "half-headers", "ssh", "bad-length", "tls-alert", "long-header", "many-headers"],
)
async def test_a_connection_that_gives_no_http_answer_is_interrupted_and_may_have_been_received(
    sender: Sender, behave: Behaviour, reason: str
) -> None:
    async with peer(behave) as subscriber:
        outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Interrupted), outcome
    assert reason in outcome.message
    assert not outcome.never_sent
    assert len(subscriber.requests) == 1


async def test_a_subscriber_that_hangs_is_timed_out(sender: Sender) -> None:
    async with peer(hang) as subscriber:
        outcome = await post(sender, subscriber.url(), timeout_s=0.2)

    assert isinstance(outcome, TimedOut)
    assert outcome.message == "did not answer within 0.2 s"
    assert not outcome.never_sent
    assert 190 <= outcome.duration_ms < 2000


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.02)


async def test_headers_that_drip_are_timed_out(sender: Sender) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await drip(writer, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100)

    async with peer(behave) as subscriber:
        outcome = await post(sender, subscriber.url(), timeout_s=0.3)

    assert isinstance(outcome, TimedOut)
    assert outcome.duration_ms < 2000


@pytest.mark.parametrize(("status", "kind"), [(b"200 OK", Delivered), (b"500 Oh", Rejected)])
async def test_a_body_that_drips_ends_with_the_time_and_its_status_stands(
    sender: Sender, status: bytes, kind: type
) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 5000\r\n\r\n")
        await drip(writer, b"x" * 5000)

    async with peer(behave) as subscriber:
        outcome = await post(sender, subscriber.url(), timeout_s=0.3)
        again = await post(sender, subscriber.url(), timeout_s=0.3)

    assert type(outcome) is kind
    assert isinstance(outcome, Delivered | Rejected)
    assert set(outcome.excerpt) == {"x"}
    assert outcome.duration_ms < 2000
    assert type(again) is kind
    assert subscriber.connections == 2


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked", b"X-None: 1"])
async def test_an_endless_body_is_read_for_16_kib_and_dropped(sender: Sender, framing: bytes) -> None:
    done = asyncio.Event()
    written_bytes = 0

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written_bytes
        try:
            writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
            piece = b"x" * 65_536
            if framing.endswith(b"chunked"):
                piece = b"10000\r\n" + piece + b"\r\n"
            while True:
                writer.write(piece)
                await writer.drain()
                written_bytes += len(piece)
        finally:
            done.set()

    async with peer(behave) as subscriber:
        outcome = await post(sender, subscriber.url())
        await asyncio.wait_for(done.wait(), 10)

    assert isinstance(outcome, Delivered)
    assert len(outcome.excerpt) == 300
    assert written_bytes < 50_000_000  # what the kernel's buffers took, far from a gigabyte


def compressed(body: bytes, encoding: bytes) -> bytes:
    return b"HTTP/1.1 400 No\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s" % (encoding, len(body), body)


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


BOMB = gzip.compress(b"\0" * 20_000_000) * 20


@pytest.mark.parametrize(
    ("body", "encoding", "excerpt"),
    [
        (gzip.compress(b"wrong field: name"), b"gzip", "wrong field: name"),
        (zlib.compress(b"wrong field: name"), b"deflate", "wrong field: name"),
        (raw_deflate(b"wrong field: name"), b"deflate", "wrong field: name"),
        (b"plain", b"identity", "plain"),
        (b"not gzip", b"gzip", "(8 bytes that are not gzip)"),
        (b"whatever", b"br", "(8 bytes, compressed as br)"),
        (gzip.compress(b"x" * 1_000_000), b"gzip", "x" * 299 + "…"),
        (BOMB, b"gzip", ""),
        (b"x" * 41, b"gzip, gzip", "(41 bytes, compressed as gzip, gzip)"),
    ],
    ids=["gzip", "zlib", "deflate", "identity", "broken", "br", "megabyte", "bomb", "twice"],
)
async def test_a_compressed_body_is_unpacked_to_a_bounded_excerpt(
    sender: Sender, body: bytes, encoding: bytes, excerpt: str
) -> None:
    async with peer(answers(compressed(body, encoding))) as subscriber:
        outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Rejected)
    assert outcome.excerpt == excerpt


async def test_a_reset_in_the_body_of_a_2xx_is_delivered(sender: Sender) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
        await writer.drain()
        await asyncio.sleep(0.05)
        await reset(reader, writer)

    async with peer(behave) as subscriber:
        outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Delivered)


async def test_an_answer_before_the_request_was_read_is_taken(sender: Sender) -> None:
    async with peer(
        answers(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n", close=True), read=False
    ) as subscriber:
        outcome = await sender.send(subscriber.url(), b"x" * 20_000, {}, timeout_s=5)

    assert isinstance(outcome, Rejected | Interrupted)
    assert not outcome.never_sent


async def test_a_closed_port_is_unreachable(sender: Sender) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        outcome = await post(sender, f"http://127.0.0.1:{held.getsockname()[1]}/")

    assert isinstance(outcome, Unreachable)
    assert (outcome.stage, outcome.message) == ("connect", "the connection was refused")
    assert outcome.never_sent


async def test_a_host_that_does_not_accept_is_unreachable_and_nothing_was_sent(sender: Sender) -> None:
    """Its queue of connections is full: the kernel answers nothing."""
    with contextlib.ExitStack() as held:
        full = held.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        outcome = await post(sender, f"http://127.0.0.1:{full.getsockname()[1]}/", connect_timeout_s=0.2)

    assert isinstance(outcome, Unreachable), outcome
    assert outcome.message == "did not accept a connection within 0.2 s"
    assert outcome.never_sent


class Stumbling(Guard):
    """A guard that fails to create sockets after the first few."""

    def __init__(self, error: OSError, *, after: int = 0) -> None:
        super().__init__(LOOPBACK)
        self.error = error
        self.left = after

    def socket_factory(self, *, plain: bool = False) -> Callable[[Any], socket.socket]:
        make = super().socket_factory(plain=plain)

        def stumble(addr_info: Any) -> socket.socket:
            if self.left == 0:
                raise self.error
            self.left -= 1
            return make(addr_info)

        return stumble


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EHOSTUNREACH, "there is no route to the subscriber"),
        (errno.ENETUNREACH, "there is no route to the subscriber"),
        (errno.ETIMEDOUT, "the connection timed out"),
        (errno.ECONNRESET, "the connection was reset before anything was sent"),
        (errno.EPROTO, "no connection could be made: EPROTO"),
        (None, "no connection could be made"),
    ],
)
async def test_a_connection_that_cannot_be_made_has_a_message(code: int | None, message: str) -> None:
    error = OSError("unexpected") if code is None else OSError(code, "unexpected")
    async with Sender(Stumbling(error)) as sender:
        outcome = await post(sender, "http://127.0.0.1:9/")

    assert isinstance(outcome, Unreachable)
    assert (outcome.stage, outcome.message) == ("connect", message)
    assert outcome.never_sent


async def test_a_header_with_a_line_break_is_not_sent(sender: Sender) -> None:
    async with peer(answers(OK)) as subscriber:
        outcome = await sender.send(subscriber.url(), b"{}", {"x-note": "a\r\nx-evil: 1"}, timeout_s=5)

    assert isinstance(outcome, Unreachable)
    assert outcome.message == "the request cannot be written as HTTP: a header has a forbidden character"
    assert subscriber.requests == []


async def test_cancelling_an_attempt_closes_its_connection(sender: Sender) -> None:
    for behave in (hang, answers(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")):
        async with peer(behave) as subscriber:
            attempt = asyncio.create_task(post(sender, subscriber.url(), timeout_s=30))
            await subscriber.received.wait()
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt


# --- the guard


async def zone(host: str) -> Sequence[str]:
    return {"inside.example.org": ["127.0.0.1"], "mixed.example.org": ["127.0.0.1", "93.184.216.34"]}[host]


async def no_name(host: str) -> Sequence[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://127.0.0.1:{port}/", 'to allow it: delivery.allowed_networks: ["127.0.0.1/32"]'),
        ("https://2130706433:{port}/", 'to allow it: delivery.allowed_networks: ["127.0.0.1/32"]'),
        ("https://[::ffff:127.0.0.1]:{port}/", 'to allow it: delivery.allowed_networks: ["127.0.0.1/32"]'),
        ("https://inside.example.org:{port}/", "inside.example.org is at 127.0.0.1, the relay's own host"),
        ("https://mixed.example.org:{port}/", "mixed.example.org is at 127.0.0.1, the relay's own host"),
        ("http://inside.example.org:{port}/", "plain http is only for addresses inside delivery.allowed_networks"),
        ("ftp://inside.example.org:{port}/", "the scheme must be https or http, not ftp"),
    ],
)
async def test_a_forbidden_address_is_refused_and_nothing_is_dialled(url: str, message: str) -> None:
    async with peer(hang, read=False) as internal, Sender(Guard((), zone)) as sender:
        outcome = await post(sender, url.format(port=internal.port))

    assert isinstance(outcome, AddressRefused)
    assert message in outcome.message
    assert outcome.never_sent
    assert internal.connections == 0


async def test_a_name_that_becomes_internal_is_refused_on_its_next_connection() -> None:
    """DNS rebinding: the name is allowed at first, and at an internal address for the second connection."""
    asked: list[str] = []

    async def rebinding(host: str) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.5"]

    async with peer(answers(OK)) as subscriber, Sender(Guard(LOOPBACK, rebinding, cache_s=0)) as sender:
        first = await post(sender, subscriber.url(host="hooks.example.org"))
        reused = await post(sender, subscriber.url(host="hooks.example.org"))
        second = await post(sender, subscriber.url(host="hooks.example.org"), reuse=False)

    assert isinstance(first, Delivered)
    assert isinstance(reused, Delivered)
    assert isinstance(second, AddressRefused)
    assert '["10.0.0.5/32"]' in second.message
    assert len(asked) == 2


async def test_every_dialled_address_passes_the_socket_factory() -> None:
    """Even if the reading of URLs let a literal through, no socket would be made for it."""
    guard = Guard(LOOPBACK)
    async with peer(answers(OK)) as subscriber, Sender(guard) as sender:
        await post(sender, subscriber.url())
        guard.allowed_networks = ()
        outcome = await post(sender, subscriber.url(), reuse=False)

    assert isinstance(outcome, AddressRefused)
    assert '["127.0.0.1/32"]' in outcome.message
    assert subscriber.connections == 1


async def test_proxies_of_the_environment_are_not_used(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer(answers(OK)) as proxy, peer(answers(OK)) as subscriber:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        outcome = await post(sender, subscriber.url())

    assert isinstance(outcome, Delivered)
    assert proxy.connections == 0


async def test_a_name_without_an_address_is_unreachable() -> None:
    async with Sender(Guard((), no_name)) as sender:
        outcome = await post(sender, "https://hooks.example.org/secret-path")

    assert isinstance(outcome, Unreachable)
    assert (outcome.stage, outcome.message) == ("dns", "the name hooks.example.org has no address")
    assert outcome.never_sent


# --- TLS


@dataclass(frozen=True)
class Authority:
    """A certificate authority of the test's own."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def server(self, host: str, *, valid_from: datetime, valid_until: datetime, signed: bool = True) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        issuer = self.key.public_key() if signed else key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.certificate.subject if signed else name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(valid_from)
            .not_valid_after(valid_until)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
            .sign(self.key if signed else key, hashes.SHA256())
        )
        pem = self.folder / f"{certificate.serial_number}.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(
            cadata=self.certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
        )


TODAY = datetime.now(UTC)
DAY = timedelta(days=1)


_MAY_SIGN = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of a test")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(TODAY - 900 * DAY)
        .not_valid_after(TODAY + 900 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_MAY_SIGN, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(tmp_path_factory.mktemp("tls"), key, certificate)


async def test_tls_with_a_trusted_certificate_is_delivered_and_kept(authority: Authority) -> None:
    tls = authority.server("127.0.0.1", valid_from=TODAY - DAY, valid_until=TODAY + DAY)
    async with (
        peer(answers(OK), tls=tls) as subscriber,
        Sender(Guard(LOOPBACK), ssl_context=authority.client()) as sender,
    ):
        outcomes = [await post(sender, subscriber.url(scheme="https")) for _ in range(2)]

    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered]
    assert subscriber.connections == 1


@pytest.mark.parametrize("case", ["expired", "future", "other-name", "self-signed", "unknown"])
async def test_a_certificate_that_is_not_accepted_has_a_message(authority: Authority, case: str) -> None:
    ended, begins = TODAY - 30 * DAY, TODAY + 30 * DAY
    tls, message = {
        "expired": (
            authority.server("127.0.0.1", valid_from=TODAY - 60 * DAY, valid_until=ended),
            f"the subscriber's certificate expired on {ended:%Y-%m-%d}",
        ),
        "future": (
            authority.server("127.0.0.1", valid_from=begins, valid_until=TODAY + 60 * DAY),
            f"the subscriber's certificate is not valid before {begins:%Y-%m-%d}",
        ),
        "other-name": (
            authority.server("other.example.org", valid_from=TODAY - DAY, valid_until=TODAY + DAY),
            "the subscriber's certificate is not for 127.0.0.1",
        ),
        "self-signed": (
            authority.server("127.0.0.1", valid_from=TODAY - DAY, valid_until=TODAY + DAY, signed=False),
            "the subscriber's certificate is self-signed, or its root is not a trusted one",
        ),
        "unknown": (
            authority.server("127.0.0.1", valid_from=TODAY - DAY, valid_until=TODAY + DAY),
            "the subscriber's certificate comes from an unknown authority, or an intermediate one is not sent",
        ),
    }[case]
    trusting = None if case == "unknown" else authority.client()
    async with peer(answers(OK), tls=tls) as subscriber, Sender(Guard(LOOPBACK), ssl_context=trusting) as sender:
        outcome = await post(sender, subscriber.url(scheme="https"))
        again = await post(sender, subscriber.url(scheme="https"))

    assert isinstance(outcome, Unreachable)
    assert (outcome.stage, outcome.message) == ("tls", message)
    assert outcome.never_sent
    assert again.message == message
    assert subscriber.requests == []


async def test_an_expired_certificate_is_reported_without_its_date_when_it_cannot_be_fetched(
    authority: Authority,
) -> None:
    tls = authority.server("127.0.0.1", valid_from=TODAY - 60 * DAY, valid_until=TODAY - 30 * DAY)
    guard = Stumbling(OSError(errno.EMFILE, "unexpected"), after=1)
    async with peer(answers(OK), tls=tls) as subscriber, Sender(guard, ssl_context=authority.client()) as sender:
        outcome = await post(sender, subscriber.url(scheme="https"))

    assert outcome.message == "the subscriber's certificate has expired"


async def test_a_port_that_does_not_speak_tls_has_a_message(sender: Sender) -> None:
    async with peer(answers(b"HTTP/1.1 400 Bad Request\r\n\r\n", close=True), read=False) as subscriber:
        outcome = await post(sender, subscriber.url(scheme="https"))

    assert isinstance(outcome, Unreachable)
    assert (outcome.stage, outcome.message) == ("tls", "the subscriber does not speak TLS on this port")


async def test_a_tls_handshake_that_hangs_has_sent_nothing(sender: Sender) -> None:
    async with peer(hang, read=False) as subscriber:
        outcome = await post(sender, subscriber.url(scheme="https"), connect_timeout_s=0.2)

    assert isinstance(outcome, Unreachable)
    assert outcome.message == "did not accept a connection within 0.2 s"


async def test_many_attempts_at_once_all_have_an_outcome(sender: Sender) -> None:
    async with peer(answers(OK)) as subscriber:
        outcomes = await asyncio.gather(*(post(sender, subscriber.url(), timeout_s=30) for _ in range(300)))

    assert {type(outcome) for outcome in outcomes} == {Delivered}
    assert len(subscriber.requests) == 300
