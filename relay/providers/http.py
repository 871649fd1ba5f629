"""One account at a provider over HTTP: a request is counted first, and ends in a response or a ProviderError.

A 429 closes the budget here, where nothing above can swallow it. Redirects are not followed, because the credential
would go along. Bodies are read up to a limit that counts decompressed bytes. Messages name the host and what was
requested, never the path, which may contain phone numbers.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, Protocol, TypeVar

import aiohttp
from yarl import URL

from relay import __version__
from relay.domain.clock import Clock, SystemClock
from relay.domain.json import Json
from relay.errors import ProviderError, RateLimited, Unavailable, UnexpectedResponse
from relay.providers.base import Audio, CallList, CredentialStore, HttpSourceOptions, Provider, Purpose, RequestBudget
from relay.providers.parsing import ErrorResponse, audio_type, load_json, server_time

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
LIST: Final = aiohttp.ClientTimeout(total=60)
QUICK: Final = aiohttp.ClientTimeout(total=10)
# Without a total: recordings/fetch.py ends a transfer that is too slow or too long.
AUDIO: Final = aiohttp.ClientTimeout(total=None, connect=10, sock_read=30)

_MAX_ERROR_BODY_BYTES: Final = 16 * 1024
_CHUNK_BYTES: Final = 64 * 1024
_LOAD_IN_THREAD_BYTES: Final = 1024 * 1024
_ROWS_PER_TURN: Final = 50

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound=HttpSourceOptions)


@dataclass(frozen=True, slots=True)
class JsonResponse:
    """A parsed body, and what its response tells beside it."""

    document: Any
    server_time: datetime | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HttpAccount:
    """How to reach one account. `name` and `host` are what messages call it.

    `auth_headers` identifies the account and is called for each request, since key files change; it may raise
    SettingsError. `load` parses a JSON body. `error_of` is the provider's mapping of wrong statuses.
    """

    http: aiohttp.ClientSession
    budget: RequestBudget
    clock: Clock
    name: str
    base_url: str
    host: str
    auth_headers: Callable[[], Mapping[str, str]]
    load: Callable[[bytes], object]
    error_of: Callable[[ErrorResponse], ProviderError]
    proxy_url: str | None = None
    max_body_bytes: int | None = None

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        what: str,
        purpose: Purpose,
        timeout: aiohttp.ClientTimeout,
        *,
        json: Json | None = None,
        form: Mapping[str, str] | None = None,
        accept: str = "application/json",
        authenticated: bool = True,
        also: Collection[int] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and yield a response of status 200, or one of `also`. `path` is percent-encoded already."""
        headers = {"Accept": accept, "User-Agent": f"call-relay/{__version__}"}
        if authenticated:
            headers |= self.auth_headers()
        if accept.startswith("audio/"):
            # Compressed audio would come without a length to check it against.
            headers["Accept-Encoding"] = "identity"
        await self.budget.spend(purpose)
        try:
            with self.unavailable_on_failure(what):
                response = await self.http.request(
                    method,
                    URL(self.base_url + path, encoded=True),
                    headers=headers,
                    json=json,
                    data=form,
                    timeout=timeout,
                    allow_redirects=False,
                    proxy=self.proxy_url,
                )
            try:
                if response.status != 200 and response.status not in also:
                    raise self.error_of(await self.error_response(response, what))
                yield response
            finally:
                response.close()
        except RateLimited as refusal:
            await self.budget.close(refusal, purpose)
            raise

    async def read_json(self, response: aiohttp.ClientResponse, what: str) -> JsonResponse:
        """Read and parse a body; raises UnexpectedResponse when it is too large or not JSON."""
        limit_bytes = self.max_body_bytes or MAX_BODY_BYTES
        body = bytearray()
        with self.unavailable_on_failure(what):
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                body += chunk
                if len(body) > limit_bytes:
                    raise UnexpectedResponse(
                        f"{self.name} sent more than {_size_text(limit_bytes)} for {what}. Nothing of it was ingested."
                    )
        # A large body takes long enough to parse to hold up everything else on the event loop.
        load_in_thread = len(body) > _LOAD_IN_THREAD_BYTES
        document = await asyncio.to_thread(self.load, bytes(body)) if load_in_thread else self.load(bytes(body))
        return JsonResponse(document, server_time(response.headers), len(body))

    @asynccontextmanager
    async def read_audio(self, response: aiohttp.ClientResponse, what: str, *, hint: str = "") -> AsyncIterator[Audio]:
        """Yield a recording whose chunks are read from the connection as they are taken."""
        content_type = audio_type(response.headers.get("Content-Type"))
        if content_type is None:
            raise UnexpectedResponse(f"{self.name} sent text instead of {what}. {hint}".rstrip())
        with self.unavailable_on_failure(what):
            first = await response.content.readany()
        if not first:
            raise UnexpectedResponse(f"{self.name} sent an empty body for {what}. It was not stored.")
        size_bytes = None if "Content-Encoding" in response.headers else response.content_length
        async with aclosing(self._chunks(response, first, what)) as chunks:
            yield Audio(chunks, content_type, size_bytes)

    async def error_response(self, response: aiohttp.ClientResponse, what: str) -> ErrorResponse:
        """Read what a wrong status comes with; the status suffices where the body does not arrive."""
        body = bytearray()
        try:
            async for chunk in response.content.iter_chunked(_MAX_ERROR_BODY_BYTES):
                body += chunk
                if len(body) >= _MAX_ERROR_BODY_BYTES:
                    break
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass
        return ErrorResponse(response.status, response.headers, bytes(body), what, self.host, self.clock.now())

    @contextmanager
    def unavailable_on_failure(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise Unavailable(f"{self.name} at {self.host} took too long to send {what}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(
                f"the connection to {self.name} at {self.host} failed for {what} ({type(error).__name__})"
            ) from error

    async def _chunks(self, response: aiohttp.ClientResponse, first: bytes, what: str) -> AsyncGenerator[bytes, None]:
        chunk = first
        while chunk:
            yield chunk
            with self.unavailable_on_failure(what):
                chunk = await response.content.readany()


class Wire(Protocol):
    """What every provider's `wire` module has: the name that messages use, and the mapping of wrong statuses."""

    @property
    def NAME(self) -> str: ...

    def error_of(self, response: ErrorResponse, /) -> ProviderError: ...


class HttpProvider(Provider, CallList, Generic[OptionsT]):
    """One connected account over HTTP, which is its own call list."""

    _wire: Wire

    def __init__(
        self,
        options: OptionsT,
        http: aiohttp.ClientSession,
        budget: RequestBudget,
        store: CredentialStore | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._options = options
        self._clock = clock or SystemClock()
        self._account = HttpAccount(
            http,
            budget,
            self._clock,
            name=self._wire.NAME,
            base_url=options.base_url,
            host=options.host,
            auth_headers=self._auth_headers,
            load=self._load_json,
            error_of=self._wire.error_of,
            proxy_url=options.proxy_url,
        )
        self.calls = self

    def _auth_headers(self) -> Mapping[str, str]:
        return {}

    def _load_json(self, body: bytes) -> object:
        return load_json(body, name=self._wire.NAME)


async def parse_rows(rows: Sequence[object], parse: Callable[[object], T]) -> list[T]:
    """Parse rows in slices: thousands of new ones take a second, in which other tasks want to run."""
    parsed: list[T] = []
    for start in range(0, len(rows), _ROWS_PER_TURN):
        parsed += map(parse, rows[start : start + _ROWS_PER_TURN])
        await asyncio.sleep(0)
    return parsed


def _size_text(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"
