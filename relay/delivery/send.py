"""Make one attempt: one POST, one outcome, whatever the peer does.

Redirects are not followed, cookies are not stored, proxies of the environment are not used. At most 16 KiB of an answer
are read; a longer one costs its connection. A compressed answer is decompressed to at most the same size.

Connections are reused, for less than the 5 seconds after which common servers drop idle ones. A reused connection may
still turn out to be closed. If nothing of the request was written yet, the attempt continues on a new connection. If it
was written, the subscriber may have received it: that is `Interrupted`, and the first retry comes 5 seconds later. An
at-most-once delivery passes `reuse=False`, so that it never meets a stale connection.
"""

import asyncio
import errno
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesPayload
from cryptography import x509

import relay
from relay import descriptors
from relay.delivery.guard import ForbiddenAddress, Guard, NoAddress, hidden_reason
from relay.delivery.outcomes import (
    AddressRefused,
    AttemptOutcome,
    Interrupted,
    Postponed,
    TimedOut,
    Unreachable,
    answered,
    excerpt,
)
from relay.delivery.retry import MAX_RETRY_AFTER_S
from relay.domain.retry_after import parse_retry_after
from relay.domain.url import ParsedUrl

# Standard Webhooks recommends 15 to 30 s.
TIMEOUT_S: Final = 15.0
CONNECT_TIMEOUT_S: Final = 5.0
MAX_ANSWER_BYTES: Final = 16 * 1024
KEEPALIVE_S: Final = 4.0
USER_AGENT: Final = f"call-relay/{relay.__version__}"

_MAX_TARGETS: Final = 10_000
_CERTIFICATE_FETCH_S: Final = 2.0
# An expired certificate stays expired: each retry would open a second connection only to name its date again.
_CERTIFICATE_CACHE_S: Final = 600.0
# OpenSSL verification errors: X509_V_ERR_… in openssl/x509_vfy.h
_X509_NOT_YET_VALID: Final = 9
_X509_EXPIRED: Final = 10
_X509_SELF_SIGNED: Final = (18, 19)
_X509_UNKNOWN_ISSUER: Final = (2, 20, 21)
_X509_OTHER_NAME: Final = (62, 64)


class Sender:
    """Sends signed requests. Open it once per process, as a context manager; `send` may run many times at once.

    `limit` bounds the connections of each kind (https or http, reused or not). Callers have no more attempts in flight
    than that, so no attempt waits for a connection. Without `show_inside`, outcomes reveal no answer of an address that
    is not public, nor which names have one: a tenant must not look into the operator's network.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        limit: int = 1000,
        show_inside: bool = True,
        keepalive_s: float = KEEPALIVE_S,
        ssl_context: ssl.SSLContext | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._guard = guard
        self._limit = limit
        self._show_inside = show_inside
        self._keepalive_s = keepalive_s
        self._ssl_context = ssl_context
        self._now = now
        self._sessions: dict[tuple[bool, bool], aiohttp.ClientSession] = {}
        self._targets: dict[str, ParsedUrl] = {}
        self._expiries: dict[tuple[str, int], tuple[float, str]] = {}

    @property
    def guard(self) -> Guard:
        return self._guard

    async def __aenter__(self) -> Self:
        context = self._ssl_context or ssl.create_default_context()
        self._sessions = {
            (plain, reuse): self._open(context, plain=plain, reuse=reuse)
            for plain in (False, True)
            for reuse in (False, True)
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self._sessions.values():
            await session.close()
        await self._guard.close()

    def _open(self, context: ssl.SSLContext, *, plain: bool, reuse: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=self._limit,
            ssl=context,
            resolver=self._guard.resolver(plain=plain),
            use_dns_cache=False,  # the guard has its own, and checks what is in it again
            socket_factory=self._guard.socket_factory(plain=plain),
            **({"keepalive_timeout": self._keepalive_s} if reuse else {"force_close": True}),
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                hdrs.USER_AGENT: USER_AGENT,
                hdrs.CONTENT_TYPE: "application/json",
                hdrs.ACCEPT_ENCODING: "identity",
            },
            auto_decompress=False,  # a few kB can unpack to gigabytes; see _decompress
            read_bufsize=MAX_ANSWER_BYTES,
            trust_env=False,
        )

    async def send(
        self,
        target_url: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        reuse: bool = True,
    ) -> AttemptOutcome:
        """POST `body` and return the outcome; raises nothing but CancelledError."""
        started_s = time.monotonic()
        target = self._targets.get(target_url)
        if target is None:
            try:
                target = self._vet(target_url)
            except ValueError as error:
                return AddressRefused(reason=str(error), duration_ms=_ms_since(started_s))
        if target.authorization is not None:
            headers = {hdrs.AUTHORIZATION: target.authorization, **headers}
        timeout = _timeout(timeout_s, connect_timeout_s)
        request = _Body(body)
        try:
            try:
                response = await self._sessions[target.plain, reuse].post(
                    target.url, data=request, headers=headers, timeout=timeout, allow_redirects=False
                )
            except aiohttp.ClientConnectionError as error:
                if not reuse or request.started or not _was_open(error):
                    raise
                # The idle connection was closed under us before anything was written: no attempt is lost to that.
                request = _Body(body)
                response = await self._sessions[target.plain, False].post(
                    target.url, data=request, headers=headers, timeout=timeout, allow_redirects=False
                )
        except Exception as error:  # whatever a peer causes is an outcome
            return await self._failure(error, target, request, timeout, started_s)
        return await self._answer(response, target, started_s)

    async def unsubscribe(self, target_url: str, *, timeout_s: float = TIMEOUT_S) -> AttemptOutcome:
        """Send DELETE to a hook, once, without a body; raises nothing but CancelledError."""
        started_s = time.monotonic()
        timeout = _timeout(timeout_s, CONNECT_TIMEOUT_S)
        try:
            target = self._vet(target_url)
        except ValueError as error:
            return AddressRefused(reason=str(error), duration_ms=_ms_since(started_s))
        headers = {} if target.authorization is None else {hdrs.AUTHORIZATION: target.authorization}
        try:
            response = await self._sessions[target.plain, False].delete(
                target.url,
                headers=headers,
                skip_auto_headers=(hdrs.CONTENT_TYPE,),
                timeout=timeout,
                allow_redirects=False,
            )
        except Exception as error:  # as for `send`
            return await self._failure(error, target, _Body(b""), timeout, started_s)
        return await self._answer(response, target, started_s)

    def _vet(self, url: str) -> ParsedUrl:
        target = self._guard.vet_url(url)
        if len(self._targets) >= _MAX_TARGETS:
            self._targets.clear()
        self._targets[url] = target
        return target

    async def _answer(self, response: aiohttp.ClientResponse, target: ParsedUrl, started_s: float) -> AttemptOutcome:
        content = response.content
        body = b""
        if not content.at_eof():
            try:
                body = await _read(content)
            finally:
                if not content.at_eof():
                    response.close()  # more was to come: the connection cannot be reused
        status = response.status
        retry_after_s: float | None = None
        if status in (429, 503):
            header = response.headers.get(hdrs.RETRY_AFTER)
            retry_after_s = parse_retry_after(header, self._now(), longest_s=MAX_RETRY_AFTER_S)
        if body and hdrs.CONTENT_ENCODING in response.headers:
            body = _decompress(body, response.headers[hdrs.CONTENT_ENCODING])
        if body and not self._show_inside and await self._is_inside(target):
            body = b""
        return answered(status, duration_ms=_ms_since(started_s), excerpt=excerpt(body), retry_after_s=retry_after_s)

    async def _is_inside(self, target: ParsedUrl) -> bool:
        try:
            return await self._guard.is_inside(target)
        except NoAddress:
            return True

    async def _failure(
        self, error: Exception, target: ParsedUrl, request: "_Body", timeout: aiohttp.ClientTimeout, started_s: float
    ) -> AttemptOutcome:
        duration_ms = _ms_since(started_s)
        if not request.started and descriptors.exhausted(error):
            return Postponed(duration_ms=duration_ms)
        match error:
            case aiohttp.ClientConnectorError(os_error=ForbiddenAddress() | NoAddress()) if not self._show_inside:
                return Unreachable(stage="dns", reason=hidden_reason(target.host), duration_ms=duration_ms)
            case aiohttp.ClientConnectorError(os_error=ForbiddenAddress() as forbidden):
                return AddressRefused(reason=str(forbidden), duration_ms=duration_ms)
            case aiohttp.ClientConnectorDNSError(os_error=cause):
                return Unreachable(stage="dns", reason=str(cause), duration_ms=duration_ms)
            case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
                reason = await self._certificate_reason(target, cause)
                return Unreachable(stage="tls", reason=reason, duration_ms=duration_ms)
            case aiohttp.ClientConnectorSSLError(os_error=cause):
                return Unreachable(stage="tls", reason=_tls_reason(cause), duration_ms=duration_ms)
            case aiohttp.ClientConnectorError(os_error=cause):
                return Unreachable(stage="connect", reason=_connect_reason(cause), duration_ms=duration_ms)
            case TimeoutError() if request.started:
                return TimedOut(timeout_s=timeout.total or TIMEOUT_S, duration_ms=duration_ms)
            case TimeoutError():
                waited_s = min(timeout.sock_connect or CONNECT_TIMEOUT_S, timeout.total or TIMEOUT_S)
                reason = f"did not accept a connection within {waited_s:g} s"
                return Unreachable(stage="connect", reason=reason, duration_ms=duration_ms)
        reason = _interruption_reason(error)
        if request.started:
            return Interrupted(reason=reason, duration_ms=duration_ms)
        return Unreachable(stage="send", reason=reason, duration_ms=duration_ms)

    async def _certificate_reason(self, target: ParsedUrl, error: Exception) -> str:
        code = getattr(error, "verify_code", None)
        if code in (_X509_EXPIRED, _X509_NOT_YET_VALID):
            key = (target.host, code)
            until_s, reason = self._expiries.get(key, (0.0, ""))
            if until_s < time.monotonic():
                reason = _validity_reason(code, await self._fetch_certificate(target))
                if len(self._expiries) >= _MAX_TARGETS:
                    self._expiries.clear()
                self._expiries[key] = (time.monotonic() + _CERTIFICATE_CACHE_S, reason)
            return reason
        if code in _X509_SELF_SIGNED:
            return "the subscriber's certificate is self-signed, or its root is not a trusted one"
        if code in _X509_UNKNOWN_ISSUER:
            return "the subscriber's certificate comes from an unknown authority, or an intermediate one is not sent"
        if code in _X509_OTHER_NAME:
            return f"the subscriber's certificate is not for {target.host}"
        detail = getattr(error, "verify_message", "") or "no reason given"
        return f"the subscriber's certificate is not accepted: {detail}"

    async def _fetch_certificate(self, target: ParsedUrl) -> x509.Certificate | None:
        """Fetch the certificate that was not accepted, to name its dates; nothing is sent over this connection."""
        loop = asyncio.get_running_loop()
        host, port = target.url.raw_host or "", target.url.port or 443
        try:
            async with asyncio.timeout(_CERTIFICATE_FETCH_S):
                ip = target.address or (await self._guard.addresses(host, port))[0]
                family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
                address = (str(ip), port)
                sock = self._guard.socket_factory()((family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address))
                try:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, address)
                    transport, _ = await loop.create_connection(
                        asyncio.Protocol, sock=sock, ssl=_unverified(), server_hostname=host
                    )
                except BaseException:
                    sock.close()
                    raise
                der = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
                transport.abort()
            return x509.load_der_x509_certificate(der) if der else None
        except (OSError, ValueError):
            return None


class _Body(BytesPayload):
    """A request body that knows whether the peer can have received any of the request.

    aiohttp writes headers and body as one piece, so nothing has left before the body is written.
    """

    started = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        transport = writer.transport
        self.started = transport is not None and not transport.is_closing()
        await writer.write(self._value)


async def _read(content: aiohttp.StreamReader) -> bytes:
    """Read at most 16 KiB. Of a body that breaks off or takes too long, return what came: the status counts."""
    pieces: list[bytes] = []
    left_bytes = MAX_ANSWER_BYTES
    try:
        while left_bytes > 0 and (piece := await content.read(left_bytes)):
            pieces.append(piece)
            left_bytes -= len(piece)
    except (aiohttp.ClientError, OSError):
        pass
    return b"".join(pieces)


def _decompress(packed: bytes, encoding: str) -> bytes:
    encoding = encoding.strip().lower()
    if encoding == "identity":
        return packed
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return f"({len(packed)} bytes, compressed as {encoding[:20]})".encode()
    # With a zlib or gzip header, else raw: servers send both as "deflate".
    for window_bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
        try:
            return zlib.decompressobj(window_bits).decompress(packed, MAX_ANSWER_BYTES)
        except zlib.error:
            continue
    return f"({len(packed)} bytes that are not {encoding})".encode()


@lru_cache(maxsize=256)
def _timeout(timeout_s: float, connect_timeout_s: float) -> aiohttp.ClientTimeout:
    # A high threshold keeps the limits exact: aiohttp rounds longer ones up to whole seconds.
    return aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s, ceil_threshold=86_400)


@lru_cache(maxsize=1)
def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _ms_since(started_s: float) -> int:
    return round((time.monotonic() - started_s) * 1000)


def _was_open(error: aiohttp.ClientConnectionError) -> bool:
    """Whether an error is that of an open connection, rather than of opening one."""
    return not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError)


def _validity_reason(code: int, certificate: x509.Certificate | None) -> str:
    expired = code == _X509_EXPIRED
    if certificate is None:
        return "the subscriber's certificate " + ("has expired" if expired else "is not valid yet")
    if expired:
        return f"the subscriber's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    return f"the subscriber's certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d}"


def _tls_reason(error: OSError) -> str:
    reason = str(getattr(error, "reason", "") or "").lower().replace("_", " ")
    if reason in ("wrong version number", "record layer failure", "http request", "packet length too long"):
        return "the subscriber does not speak TLS on this port"
    return f"the TLS handshake failed: {reason or type(error).__name__}"


def _connect_reason(error: OSError) -> str:
    match error.errno:
        case errno.ECONNREFUSED:
            return "the connection was refused"
        case errno.ECONNRESET | errno.EPIPE:
            return "the connection was reset before anything was sent"
        case errno.EHOSTUNREACH | errno.ENETUNREACH:
            return "there is no route to the subscriber"
        case errno.ETIMEDOUT:
            return "the connection timed out"
        case None:
            return "no connection could be made"
        case code:
            return f"no connection could be made: {errno.errorcode.get(code, code)}"


def _interruption_reason(error: Exception) -> str:
    match error:
        case aiohttp.ServerDisconnectedError(message=str()):
            return "the subscriber closed the connection without an answer"
        case aiohttp.ServerDisconnectedError():
            return "the subscriber closed the connection in the middle of its answer's headers"
        case aiohttp.ClientResponseError(message=str() as message) if "more than" in message.lower():
            return "the subscriber's answer has headers that are too large"
        case aiohttp.ClientResponseError():
            return "the subscriber's answer is not HTTP"
        case OSError():
            return "the subscriber reset the connection without an answer"
        case ValueError():
            return "the request cannot be written as HTTP: a header has a forbidden character"
    return f"the attempt failed: {type(error).__name__}"
