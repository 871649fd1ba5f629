"""One account at a provider over HTTP: each request is paid for first, and ends in an answer or a ProviderError.

No redirect is followed, since the credential would go along. A body is read under a cap, counting what it unpacks to.
Messages name the host and what was asked for, never the address, which may hold numbers.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import aiohttp
from yarl import URL

from relay import __version__
from relay.domain.json import Json
from relay.errors import ProviderError, SettingsError, Unavailable, UnexpectedResponse
from relay.providers.base import Pay, Purpose

LARGEST_BODY_BYTES: Final = 64 * 1024 * 1024
LIST: Final = aiohttp.ClientTimeout(total=60)
QUICK: Final = aiohttp.ClientTimeout(total=10)
AUDIO: Final = aiohttp.ClientTimeout(total=None, connect=10, sock_read=30)

_BESIDE_THE_LOOP_BYTES: Final = 1024 * 1024
_LARGEST_REFUSAL_BYTES: Final = 16 * 1024
_READ_BYTES: Final = 64 * 1024


class Refuse(Protocol):
    """Names the error that an unwanted answer is; each provider has its own in `wire`."""

    def __call__(self, status: int, body: bytes, headers: Mapping[str, str], *, what: str) -> ProviderError: ...


@dataclass(frozen=True, slots=True)
class HttpAccount:
    """How one account is asked. `name` is the provider's name in messages, `host` what they show of `base_url`.

    `credentials` makes the headers that say who asks, for each request anew; it may raise SettingsError.
    """

    http: aiohttp.ClientSession
    pay: Pay
    name: str
    base_url: str
    host: str
    credentials: Callable[[], Mapping[str, str]]
    refuse: Refuse
    proxy_url: str | None = None

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        what: str,
        purpose: Purpose,
        timeout: aiohttp.ClientTimeout,
        *,
        body: Json | None = None,
        accept: str = "application/json",
        keyed: bool = True,
        also: Collection[int] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Pay, ask, and hand out an answer of status 200, or one of `also`. `path` is percent-encoded already."""
        headers = {"Accept": accept, "User-Agent": f"call-relay/{__version__}"}
        if keyed:
            headers |= self._credentials()
        if accept.startswith("audio/"):
            headers["Accept-Encoding"] = "identity"
        await self.pay(purpose)
        with self.trouble(what):
            response = await self.http.request(
                method,
                URL(self.base_url + path, encoded=True),
                headers=headers,
                json=body,
                timeout=timeout,
                allow_redirects=False,
                proxy=self.proxy_url,
            )
        try:
            if response.status != 200 and response.status not in also:
                raise self.refused(response, await self.beginning(response), what)
            yield response
        finally:
            response.close()

    def refused(self, response: aiohttp.ClientResponse, body: bytes, what: str) -> ProviderError:
        """Name the error that an unwanted answer is."""
        return self.refuse(response.status, body, response.headers, what=what)

    @contextmanager
    def trouble(self, what: str) -> Iterator[None]:
        """Name the trouble that a connection may have."""
        try:
            yield
        except TimeoutError as error:
            raise Unavailable(f"{self.name} at {self.host} took too long to send {what}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(
                f"the connection to {self.name} at {self.host} failed for {what} ({type(error).__name__})"
            ) from error

    async def body(self, response: aiohttp.ClientResponse, what: str) -> bytes:
        """Read a body, counting what it unpacks to, so that no answer takes more memory than LARGEST_BODY_BYTES."""
        body = bytearray()
        with self.trouble(what):
            async for chunk in response.content.iter_chunked(_READ_BYTES):
                body += chunk
                if len(body) > LARGEST_BODY_BYTES:
                    raise UnexpectedResponse(
                        f"{self.name} sent more than {LARGEST_BODY_BYTES >> 20} MiB for {what}; nothing was taken over"
                    )
        return bytes(body)

    async def beginning(self, response: aiohttp.ClientResponse) -> bytes:
        """Read the beginning of an unwanted answer; its status says enough where the rest does not come."""
        body = bytearray()
        try:
            async for chunk in response.content.iter_chunked(_LARGEST_REFUSAL_BYTES):
                body += chunk
                if len(body) >= _LARGEST_REFUSAL_BYTES:
                    break
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass
        return bytes(body)

    async def first_chunk(self, response: aiohttp.ClientResponse, what: str) -> bytes:
        """Read the first bytes of audio; none at all is an odd answer."""
        with self.trouble(what):
            first = await response.content.readany()
        if not first:
            raise UnexpectedResponse(f"{self.name} sent an empty answer for {what}; it was not taken over")
        return first

    async def chunks(self, response: aiohttp.ClientResponse, first: bytes, what: str) -> AsyncGenerator[bytes, None]:
        """Hand out `first` and then what follows, as it comes."""
        chunk = first
        while chunk:
            yield chunk
            with self.trouble(what):
                chunk = await response.content.readany()

    def _credentials(self) -> Mapping[str, str]:
        try:
            return self.credentials()
        except SettingsError as error:
            raise Unavailable(f"{self.name} was not asked: {error}") from error


async def loaded(body: bytes, load: Callable[[bytes], object]) -> object:
    """Parse a body; a large one beside the loop, which has other things to do."""
    if len(body) > _BESIDE_THE_LOOP_BYTES:
        return await asyncio.to_thread(load, body)
    return load(body)
