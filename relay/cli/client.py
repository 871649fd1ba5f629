"""An HTTP client for the API, on the standard library: importing aiohttp alone takes longer than most commands run."""

import json
import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import gaierror
from typing import Any, Final
from urllib.parse import quote, urlencode

import relay
from relay.cli.target import ApiTarget
from relay.domain.json import Json
from relay.domain.retry_after import parse_retry_after
from relay.domain.url import ParsedUrl, parse_url
from relay.errors import RelayError, SettingsError

# The most that the API returns at once.
PAGE: Final = 200
CONNECT_S: Final = 10.0
# Longer than the slowest operations: a check of a source takes up to 30 s, an erasure in place some seconds.
_ANSWER_S: Final = 90.0
_CHUNK_BYTES: Final = 65_536
_LONGEST_RETRY_AFTER_S: Final = 86_400.0
_USAGE_ERRORS: Final = frozenset({"invalid", "not_json", "too_large", "address_refused"})

Query = Mapping[str, str | int | bool | Sequence[str] | None]


class RelayUnreachable(RelayError):
    """No relay answered at the address."""


class UnexpectedServer(RelayError):
    """What answers at the address is not the API of a relay."""


class ApiError(RelayError):
    """The API answered with a problem: `code` is for programs, the text for people."""

    def __init__(self, detail: str, *, status: int, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def is_usage_error(self) -> bool:
        """Whether the same request can never succeed, so that the exit code is 2."""
        return self.code in _USAGE_ERRORS


def path_of(*parts: str) -> str:
    """Return the path below /v1 of ids that people typed, each exactly one segment."""
    if any(part in ("", ".", "..") for part in parts):
        raise SettingsError("an id is empty or not valid")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def connect(url: ParsedUrl, *, timeout_s: float) -> HTTPConnection:
    """Open a connection to the host of `url`, never through a proxy. Raises OSError."""
    kind = HTTPConnection if url.plain else HTTPSConnection
    connection = kind(url.url.host or "", url.url.port, timeout=timeout_s)
    connection.connect()
    return connection


def why_unreachable(error: OSError) -> str:
    if isinstance(error, gaierror):
        return "no such host"
    if isinstance(error, TimeoutError):
        return "timed out"
    return os.strerror(error.errno).lower() if error.errno else "no connection"


class Client:
    """Sends one request at a time to one relay, over one connection; follows no redirects."""

    def __init__(self, target: ApiTarget) -> None:
        self.target = target
        self._url = parse_url(target.url)
        self._connection: HTTPConnection | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, path: str, **query: str | int | bool | Sequence[str] | None) -> Any:
        return self.request("GET", path, query=query)[1]

    def post(self, path: str, body: Any = None) -> Any:
        return self.request("POST", path, body={} if body is None else body)[1]

    def request(self, method: str, path: str, *, body: Any = None, query: Query | None = None) -> tuple[int, Any]:
        """Return the status and the parsed body. Raises RelayUnreachable, UnexpectedServer or ApiError."""
        response = self._send(method, path, body=body, query=query, timeout_s=_ANSWER_S)
        with self._transport_errors():
            raw = response.read()
        if response.status >= 300:
            raise self._error(response, raw)
        if response.status == 204:
            return response.status, None
        try:
            return response.status, json.loads(raw)
        except ValueError:
            raise self._unexpected(response.status) from None

    def newest(self, path: str, *, limit: int, **query: str | int | bool | Sequence[str] | None) -> Json:
        """Return the newest entries of a list, over as many pages as `limit` takes: `{items, next_cursor}`."""
        items: list[Any] = []
        cursor: str | None = None
        while True:
            page_query = {**query, "limit": min(limit - len(items), PAGE), "cursor": cursor}
            status, page = self.request("GET", path, query=page_query)
            if not isinstance(page, dict) or not isinstance(page.get("items"), list):
                raise self._unexpected(status)
            items += page["items"]
            cursor = page.get("next_cursor")
            if cursor is None or len(items) >= limit:
                return {"items": items[:limit], "next_cursor": cursor}

    @contextmanager
    def stream(
        self, path: str, *, query: Query, last_event_id: str | None, silence_s: float
    ) -> Iterator[Iterator[bytes]]:
        """Open a stream and yield its bytes as they arrive; `silence_s` without any raises RelayUnreachable."""
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        response = self._send("GET", path, query=query, headers=headers, timeout_s=silence_s)
        try:
            if response.status >= 300:
                with self._transport_errors():
                    raw = response.read()
                raise self._error(response, raw)
            if response.headers.get_content_type() != "text/event-stream":
                raise self._unexpected(response.status)
            yield self._chunks(response)
        finally:
            self.close()

    def _chunks(self, response: HTTPResponse) -> Iterator[bytes]:
        while True:
            with self._transport_errors():
                chunk = response.read1(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    def _send(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        body: Any = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> HTTPResponse:
        all_headers = {
            "Authorization": f"Bearer {self.target.token}",
            "User-Agent": f"call-relay/{relay.__version__} (command line)",
            **(headers or {}),
        }
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            all_headers["Content-Type"] = "application/json"
        pairs = _query_pairs(query or {})
        target = self._url.url.raw_path.rstrip("/") + path + (f"?{urlencode(pairs)}" if pairs else "")
        connection = self._connection
        if connection is None or connection.sock is None:  # http.client drops the socket after Connection: close
            connection = self._connect()
        connection.sock.settimeout(timeout_s)
        with self._transport_errors():
            connection.request(method, target, body=data, headers=all_headers)
            return connection.getresponse()

    def _connect(self) -> HTTPConnection:
        url = self.target.url
        try:
            self._connection = connect(self._url, timeout_s=CONNECT_S)
        except ssl.SSLCertVerificationError as error:
            raise RelayUnreachable(f"the certificate of {url} is not trusted: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise RelayUnreachable(f"no TLS at {url} ({error.reason}); is it an http:// address?") from None
        except OSError as error:
            raise RelayUnreachable(
                f"no relay answers at {url} ({why_unreachable(error)}); start it with `relay up`, "
                "or set RELAY_URL to another address"
            ) from None
        return self._connection

    @contextmanager
    def _transport_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.close()  # half an exchange is on it: the next request needs a fresh one
            if isinstance(error, TimeoutError):
                raise RelayUnreachable(f"the relay at {self.target.url} took too long to answer") from None
            if isinstance(error, HTTPException | OSError):
                raise RelayUnreachable(
                    f"the relay at {self.target.url} closed the connection ({type(error).__name__}); "
                    "check the address, and http:// or https://"
                ) from None
            raise

    def _error(self, response: HTTPResponse, raw: bytes) -> RelayError:
        try:
            problem = json.loads(raw)
            code, detail = str(problem["code"]), str(problem["detail"])
        except (ValueError, TypeError, KeyError):
            return self._unexpected(response.status)
        errors = problem.get("errors") or []
        if len(errors) > 1:
            detail = "\n".join(f"{e['field']}: {e['message']}" if e["field"] else e["message"] for e in errors)
        if code == "unauthorized":
            detail = f"the relay at {self.target.url} does not accept this token; set RELAY_TOKEN or pass --token"
        retry_after = response.headers.get("Retry-After")
        retry_after_s = parse_retry_after(retry_after, datetime.now(UTC), longest_s=_LONGEST_RETRY_AFTER_S)
        return ApiError(detail, status=response.status, code=code, retry_after_s=retry_after_s)

    def _unexpected(self, status: int) -> UnexpectedServer:
        return UnexpectedServer(
            f"what answers at {self.target.url} ({status}) is not the API of a Call Relay; check the address, "
            "and that its version is not older than this command"
        )


def _query_pairs(query: Query) -> list[tuple[str, str]]:
    """Return the pairs of a query string; None and empty lists are left out, several values repeat the name."""
    pairs: list[tuple[str, str]] = []
    for name, value in query.items():
        match value:
            case None:
                continue
            case bool():
                pairs.append((name, "true" if value else "false"))
            case str() | int():
                pairs.append((name, str(value)))
            case _:
                pairs += [(name, item) for item in value]
    return pairs
