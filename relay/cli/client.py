"""Asking a relay over HTTP: which one, with which token, and what its refusals mean in a sentence."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

import relay
from relay.domain.json import Json
from relay.domain.retry_after import parse_retry_after
from relay.domain.url import check_base_url
from relay.errors import RelayError, SettingsError

PAGE: Final = 200
_TIMEOUT: Final = aiohttp.ClientTimeout(total=90, sock_connect=10)
_EXCERPT_CHARS: Final = 200
_LONGEST_RETRY_AFTER_S: Final = 3600.0
_ASKED_WRONGLY: Final = frozenset({"invalid", "not_json", "too_large", "address_refused"})

Query = Mapping[str, str | int | bool | Sequence[str] | None]


class Unanswered(RelayError):
    """No relay could be reached at the address."""


class NotARelay(RelayError):
    """What answers at the address is something else."""


class Refused(RelayError):
    """The relay said no: `code` is for programs, the text for people."""

    def __init__(self, sentence: str, *, status: int, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def asked_wrongly(self) -> bool:
        """Whether what was asked can never be right, so that the exit code is 2."""
        return self.code in _ASKED_WRONGLY


@dataclass(frozen=True, slots=True)
class Target:
    """The relay that is talked to."""

    url: str
    token: str = field(repr=False)


def find_target(url: str | None, token: str | None, config: Path | None, environ: Mapping[str, str]) -> Target:
    """Find the relay: the given address, else that of the configuration, with the token that the relay made itself.

    That token goes to nobody but the relay of the configuration. Raises SettingsError.
    """
    if url is not None:
        if token is None:
            raise SettingsError("there is no token for this address: set RELAY_TOKEN, or give --token")
        return Target(checked_url(url), checked_token(token))
    from relay.settings import load

    settings = load(config, environ)
    host, port = settings.api.host, settings.api.port
    if port == 0:
        raise SettingsError("api.port is 0, so the relay takes a free one: give its address with --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    if token is None and settings.api.tokens:
        token = settings.api.tokens[0].get_secret_value()
    if token is None:
        token = _own_token(settings.data_dir)
    return Target(f"http://{f'[{host}]' if ':' in host else host}:{port}", checked_token(token))


def _own_token(data_dir: Path) -> str:
    from relay.secrets import TOKEN_FILE

    path = data_dir / TOKEN_FILE
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise SettingsError(
            f"there is no token: {path} does not exist. Name the relay's own configuration with --config relay.yaml, "
            "or the relay and a token with RELAY_URL and RELAY_TOKEN"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not plain text"
        raise SettingsError(f"the token in {path} cannot be read: {why}; set RELAY_TOKEN") from None


def checked_url(text: str) -> str:
    """Check the address of a relay; a path before /v1 is kept."""
    try:
        return check_base_url(text, example="https://relay.example.com").removesuffix("/v1")
    except ValueError as error:
        raise SettingsError(f"the address of the relay (RELAY_URL, --url) {error}") from None


def checked_token(text: str) -> str:
    """Check that a token can be sent at all."""
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError("a token is one word of plain characters (RELAY_TOKEN, --token)")
    return token


def path_of(*parts: str) -> str:
    """Write a path below /v1 of parts that people typed."""
    if any(part in ("", ".", "..") for part in parts):
        raise SettingsError("an id is empty, or is no id")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Client:
    """Asks one relay."""

    def __init__(self, http: aiohttp.ClientSession, target: Target) -> None:
        self._http = http
        self.target = target

    async def get(self, path: str, **query: str | int | bool | Sequence[str] | None) -> Any:
        """Read something."""
        return (await self.ask("GET", path, query=query))[1]

    async def post(self, path: str, body: Any = None) -> Any:
        """Have something made or done."""
        return (await self.ask("POST", path, body={} if body is None else body))[1]

    async def ask(self, method: str, path: str, *, body: Any = None, query: Query | None = None) -> tuple[int, Any]:
        """Ask once; gives the status and the answer. Raises Unanswered, NotARelay or Refused."""
        async with self._request(method, path, body=body, query=query, timeout=_TIMEOUT) as response:
            raw = await response.read()
            if response.status >= 300:
                raise self._refusal(response, raw)
            if not raw:
                return response.status, None
            try:
                return response.status, orjson.loads(raw)
            except ValueError:
                raise self._not_a_relay(response.status) from None

    async def some(self, path: str, *, limit: int, **query: str | int | bool | Sequence[str] | None) -> Json:
        """Read the newest entries of a list, over as many pages as it takes: `{items, next_cursor}`."""
        items: list[Any] = []
        cursor: str | None = None
        while True:
            status, page = await self.ask(
                "GET", path, query={**query, "limit": min(limit - len(items), PAGE), "cursor": cursor}
            )
            if not isinstance(page, dict) or not isinstance(page.get("items"), list):
                raise self._not_a_relay(status)
            items += page["items"]
            cursor = page.get("next_cursor")
            if cursor is None or len(items) >= limit:
                return {"items": items[:limit], "next_cursor": cursor}

    @asynccontextmanager
    async def stream(
        self, path: str, *, query: Query, last_event_id: str | None, silence_s: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a stream; gives its bytes as they come. A silence of `silence_s` ends it with Unanswered."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence_s)
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        async with self._request("GET", path, query=query, timeout=timeout, headers=headers) as response:
            if response.status >= 300:
                raise self._refusal(response, await response.read())
            if response.content_type != "text/event-stream":
                raise self._not_a_relay(response.status)
            yield response.content.iter_any()

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,
        body: Any = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        given = {"Authorization": f"Bearer {self.target.token}", **(headers or {})}
        data = None
        if body is not None:
            data = orjson.dumps(body)
            given["Content-Type"] = "application/json"
        url = URL(self.target.url + path, encoded=True).update_query(_texts(query or {}))
        try:
            async with self._http.request(
                method, url, data=data, headers=given, timeout=timeout, allow_redirects=False
            ) as response:
                yield response
        except TimeoutError:
            raise Unanswered(f"the relay at {self.target.url} took too long to answer") from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise Unanswered(
                f"the certificate of {self.target.url} is not trusted: {error.certificate_error}"
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise Unanswered(
                f"no relay answers at {self.target.url} ({why_unreachable(error)}); start it with `relay up`, "
                "or name another one with RELAY_URL"
            ) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unanswered(
                f"the relay at {self.target.url} broke the connection ({type(error).__name__}); is it a relay, "
                "and is it https where it should be?"
            ) from None

    def _refusal(self, response: aiohttp.ClientResponse, raw: bytes) -> RelayError:
        try:
            problem = orjson.loads(raw)
            code, detail = str(problem["code"]), str(problem["detail"])
        except (ValueError, TypeError, KeyError):
            return self._not_a_relay(response.status)
        lines = [detail]
        errors = problem.get("errors") or []
        if len(errors) > 1:
            lines = [f"{each['field']}: {each['message']}" if each["field"] else each["message"] for each in errors]
        sentence = "\n".join(lines)
        if code == "unauthorized":
            sentence = f"the relay at {self.target.url} does not know this token; set RELAY_TOKEN, or give --token"
        header = response.headers.get("Retry-After")
        retry_after_s = parse_retry_after(header, datetime.now(UTC), longest_s=_LONGEST_RETRY_AFTER_S)
        return Refused(sentence, status=response.status, code=code, retry_after_s=retry_after_s)

    def _not_a_relay(self, status: int) -> NotARelay:
        return NotARelay(
            f"what answers at {self.target.url} ({status}) is not the API of a Call Relay; check the address, "
            "and that its version is not older than this command"
        )


def why_unreachable(error: aiohttp.ClientConnectorError) -> str:
    """Say why nobody could be reached: `connection refused`."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "there is no such host"
    number = error.os_error.errno
    return os.strerror(number).lower() if number else "no connection"


def _texts(query: Query) -> list[tuple[str, str]]:
    """Write a query; what is None or empty is left out, several values are repeated."""
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
                pairs += [(name, each) for each in value]
    return pairs


@asynccontextmanager
async def open_client(target: Target) -> AsyncIterator[Client]:
    """Open a client; it follows no redirects and keeps no cookies."""
    connector = aiohttp.TCPConnector(limit=64)
    headers = {"User-Agent": f"call-relay/{relay.__version__} (command line)"}
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    ) as http:
        yield Client(http, target)
