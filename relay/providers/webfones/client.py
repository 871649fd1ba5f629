"""One WebFones account over HTTP. Thin: what is asked and what an answer means is decided in `wire`.

Each request is paid for first, carries the key, follows no redirect, and ends in a value or a ProviderError.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final
from zoneinfo import ZoneInfo

import aiohttp
from yarl import URL

from relay import __version__
from relay.clock import Clock, SystemClock
from relay.errors import OddAnswer, OverBudget, ProviderError, SettingsError, Unavailable
from relay.model import Contact, Json, Record
from relay.providers.base import (
    Audio,
    BadRow,
    CallList,
    ContactChanges,
    ContactSource,
    Health,
    NoRecordingYet,
    NoSuchCall,
    Page,
    Pay,
    Purpose,
    RecordingSource,
    Window,
)
from relay.providers.webfones import wire
from relay.providers.webfones.options import WebfonesOptions

LARGEST_BODY_BYTES: Final = 64 * 1024 * 1024
ROWS_PER_PAGE: Final = 2000
CONTACTS_PER_REQUEST: Final = 50
_ROWS_AT_ONCE: Final = 50
_LARGEST_REFUSAL_BYTES: Final = 16 * 1024
_PARSED_BESIDE_THE_LOOP_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 64 * 1024

_LIST: Final = aiohttp.ClientTimeout(total=60)
_QUICK: Final = aiohttp.ClientTimeout(total=10)
_AUDIO: Final = aiohttp.ClientTimeout(total=None, connect=10, sock_read=30)


class Webfones:
    """A connected account; it is its own call list, recording source and contact source."""

    batch = CONTACTS_PER_REQUEST

    def __init__(
        self, options: WebfonesOptions, http: aiohttp.ClientSession, pay: Pay, *, clock: Clock | None = None
    ) -> None:
        self._options = options
        self._http = http
        self._pay = pay
        self._clock = clock or SystemClock()
        self._zone = ZoneInfo(options.timezone)
        self.calls: CallList = self
        self.recordings: RecordingSource | None = self
        self.contacts: ContactSource | None = self

    async def pages(self, window: Window) -> AsyncIterator[Page]:
        """List the calls since `window.since`: one request, whose rows come in pages of at most ROWS_PER_PAGE."""
        path = wire.records_path(window.since, self._zone)
        async with self._ask("GET", path, "the call list", window.purpose, _LIST) as response:
            body = await self._body(response, "the call list")
            server_time = wire.server_time(response.headers)
        rows = wire.read_call_list(await _load(body))
        size_bytes = len(body)
        del body
        for start in range(0, max(len(rows), 1), ROWS_PER_PAGE):
            parsed = await self._parse(rows[start : start + ROWS_PER_PAGE])
            yield Page(parsed, server_time=server_time, size_bytes=size_bytes if start == 0 else 0)

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncIterator[Audio | NoRecordingYet | NoSuchCall]:
        """Fetch the audio of the call `key`; it is read from the wire as its chunks are taken."""
        if not (key.isascii() and key.isdigit()):
            yield NoSuchCall()
            return
        path, what = f"/call_log/recording/{key}", "a recording"
        async with self._ask("GET", path, what, purpose, _AUDIO, accept="audio/*", missing=True) as response:
            if response.status != 200:
                body = await self._refusal(response)
                missing = wire.recording_missing(response.status, body)
                if missing is None:
                    raise self._refused(response, body, what)
                yield NoRecordingYet() if missing == "no recording" else NoSuchCall()
                return
            content_type = wire.audio_type(response.headers.get("Content-Type"))
            if content_type is None:
                raise OddAnswer("WebFones sent text where a recording was asked for; it was not taken over")
            chunks = self._chunks(response, await self._first_chunk(response))
            size_bytes = None if "Content-Encoding" in response.headers else response.content_length
            try:
                yield Audio(chunks, content_type, size_bytes)
            finally:
                await chunks.aclose()

    async def search(self, numbers: Sequence[str]) -> Mapping[str, Sequence[Contact]]:
        """Find contacts by E.164 number. What is no such number is not asked about and has no contacts."""
        if len(numbers) > self.batch:
            raise ValueError(f"at most {self.batch} numbers in one search, not {len(numbers)}")
        found: dict[str, Sequence[Contact]] = {number: () for number in numbers}
        asked = wire.lookup_digits(numbers, self._options.region)
        if asked:
            answer = await self._json(
                "POST",
                "/contacts/contacts/search/phones",
                "the contacts",
                Purpose.CONTACTS,
                body={"phone_numbers": sorted(set(asked.values()))},
            )
            found.update(wire.read_contacts(answer, asked))
        return found

    async def changes_after(self, version: int) -> ContactChanges:
        """Ask whether any contact changed after `version`."""
        path = f"/contacts/contactsAfterVersion/{version:d}"
        return wire.read_changes(await self._json("GET", path, "the contact changes", Purpose.CONTACTS), version)

    async def health(self) -> Health:
        """Ask the gateway how it is, and whether it takes the key."""
        checks = [
            await self._check("/health", "the gateway's health", wire.health_line, keyed=False),
            await self._check("/status", "the services' status", wire.status_line, keyed=True),
        ]
        return Health(ok=all(well for well, _line in checks), lines=[line for _well, line in checks])

    async def _check(
        self, path: str, what: str, say: Callable[[object], tuple[bool, str]], *, keyed: bool
    ) -> tuple[bool, str]:
        try:
            return say(await self._json("GET", path, what, Purpose.POLL, keyed=keyed))
        except (ProviderError, OverBudget) as error:
            return False, str(error)

    async def _json(
        self, method: str, path: str, what: str, purpose: Purpose, *, body: Json | None = None, keyed: bool = True
    ) -> object:
        async with self._ask(method, path, what, purpose, _QUICK, body=body, keyed=keyed) as response:
            content = await self._body(response, what)
        return await _load(content)

    @asynccontextmanager
    async def _ask(
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
        missing: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Pay, ask, and hand out an answer of status 200; with `missing`, one of 400 or 404 too."""
        headers = {"Accept": accept, "User-Agent": f"call-relay/{__version__}"}
        if keyed:
            headers |= self._key_header()
        if accept != "application/json":
            headers["Accept-Encoding"] = "identity"
        await self._pay(purpose)
        with self._trouble(what):
            response = await self._http.request(
                method,
                URL(self._options.base_url + path, encoded=True),
                headers=headers,
                json=body,
                timeout=timeout,
                allow_redirects=False,
                proxy=self._options.proxy_url,
            )
        try:
            if response.status != 200 and not (missing and response.status in (400, 404)):
                raise self._refused(response, await self._refusal(response), what)
            yield response
        finally:
            response.close()

    def _key_header(self) -> dict[str, str]:
        try:
            key = self._options.credential()
        except SettingsError as error:
            raise Unavailable(f"WebFones was not asked: {error}") from error
        return {"Authorization": f"Bearer {key}"} if self._options.auth == "bearer" else {"x-api-key": key}

    @contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        """Name the trouble that a connection may have, without the address, which may hold numbers."""
        try:
            yield
        except TimeoutError as error:
            raise Unavailable(f"WebFones at {self._options.host} took too long to send {what}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(
                f"the connection to WebFones at {self._options.host} failed for {what} ({type(error).__name__})"
            ) from error

    async def _body(self, response: aiohttp.ClientResponse, what: str) -> bytes:
        """Read a body, counting what it unpacks to, so that no answer takes more memory than LARGEST_BODY_BYTES."""
        body = bytearray()
        with self._trouble(what):
            async for chunk in response.content.iter_chunked(_READ_BYTES):
                body += chunk
                if len(body) > LARGEST_BODY_BYTES:
                    raise OddAnswer(
                        f"WebFones sent more than {LARGEST_BODY_BYTES >> 20} MiB for {what}; nothing was taken over"
                    )
        return bytes(body)

    async def _refusal(self, response: aiohttp.ClientResponse) -> bytes:
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

    def _refused(self, response: aiohttp.ClientResponse, body: bytes, what: str) -> ProviderError:
        return wire.refusal(
            response.status, body, response.headers, what=what, host=self._options.host, now=self._clock.now()
        )

    async def _parse(self, rows: Sequence[object]) -> list[Record | BadRow]:
        """Read rows a few at a time: thousands of new ones take a second, and the loop has other things to do."""
        parsed: list[Record | BadRow] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            parsed += wire.parse_rows(some, zone=self._zone, region=self._options.region, seen_at=self._clock.now())
            await asyncio.sleep(0)
        return parsed

    async def _first_chunk(self, response: aiohttp.ClientResponse) -> bytes:
        with self._trouble("a recording"):
            first = await response.content.readany()
        if not first:
            raise OddAnswer("WebFones sent an empty recording; it was not taken over")
        return first

    async def _chunks(self, response: aiohttp.ClientResponse, first: bytes) -> AsyncGenerator[bytes, None]:
        chunk = first
        while chunk:
            yield chunk
            with self._trouble("a recording"):
                chunk = await response.content.readany()


async def _load(body: bytes) -> object:
    if len(body) > _PARSED_BESIDE_THE_LOOP_BYTES:
        return await asyncio.to_thread(wire.load_json, body)
    return wire.load_json(body)
