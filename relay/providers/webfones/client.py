"""One WebFones account over HTTP. Thin: what is asked and what an answer means is decided in `wire`.

Each request is paid for first, carries the key, follows no redirect, and ends in a value or a ProviderError.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final
from zoneinfo import ZoneInfo

import aiohttp

from relay.domain.call import Contact, Record
from relay.domain.clock import Clock, SystemClock
from relay.domain.json import Json
from relay.errors import OverBudget, ProviderError, UnexpectedResponse
from relay.providers.base import (
    Audio,
    CallList,
    CallStream,
    ContactChanges,
    ContactSource,
    DetailSource,
    Health,
    InvalidRow,
    NoRecordingYet,
    NoSuchCall,
    Page,
    Pay,
    Purpose,
    RecordingSource,
    Window,
)
from relay.providers.http import AUDIO, LIST, QUICK, HttpAccount, loaded
from relay.providers.parsing import audio_type, load_json, server_time
from relay.providers.webfones import wire
from relay.providers.webfones.options import WebfonesOptions

ROWS_PER_PAGE: Final = 2000
CONTACTS_PER_REQUEST: Final = 50
_ROWS_AT_ONCE: Final = 50


class Webfones:
    """A connected account; it is its own call list, recording source and contact source."""

    batch = CONTACTS_PER_REQUEST

    def __init__(
        self, options: WebfonesOptions, http: aiohttp.ClientSession, pay: Pay, *, clock: Clock | None = None
    ) -> None:
        self._options = options
        self._clock = clock or SystemClock()
        self._account = HttpAccount(
            http,
            pay,
            name=wire.NAME,
            base_url=options.base_url,
            host=options.host,
            credentials=self._key_header,
            refuse=self._refuse,
            proxy_url=options.proxy_url,
        )
        self._zone = ZoneInfo(options.timezone)
        self.calls: CallList = self
        self.recordings: RecordingSource | None = self
        self.contacts: ContactSource | None = self
        self.stream: CallStream | None = None
        self.details: DetailSource | None = None

    async def pages(self, window: Window) -> AsyncIterator[Page]:
        """List the calls since `window.since`: one request, whose rows come in pages of at most ROWS_PER_PAGE."""
        path = wire.records_path(window.since, self._zone)
        async with self._account.ask("GET", path, "the call list", window.purpose, LIST) as response:
            body = await self._account.body(response, "the call list")
            said_at = server_time(response.headers)
        rows = wire.read_call_list(await loaded(body, _load))
        size_bytes = len(body)
        del body
        for start in range(0, max(len(rows), 1), ROWS_PER_PAGE):
            parsed = await self._parse(rows[start : start + ROWS_PER_PAGE])
            yield Page(parsed, server_time=said_at, size_bytes=size_bytes if start == 0 else 0)

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncIterator[Audio | NoRecordingYet | NoSuchCall]:
        """Fetch the audio of the call `key`; it is read from the wire as its chunks are taken."""
        if not (key.isascii() and key.isdigit()):
            yield NoSuchCall()
            return
        path, what = f"/call_log/recording/{key}", "a recording"
        account = self._account
        async with account.ask("GET", path, what, purpose, AUDIO, accept="audio/*", also=(400, 404)) as response:
            if response.status != 200:
                body = await account.beginning(response)
                missing = wire.recording_missing(response.status, body)
                if missing is None:
                    raise account.refused(response, body, what)
                yield NoRecordingYet() if missing == "no recording" else NoSuchCall()
                return
            content_type = audio_type(response.headers.get("Content-Type"))
            if content_type is None:
                raise UnexpectedResponse("WebFones sent text where a recording was asked for; it was not taken over")
            chunks = account.chunks(response, await account.first_chunk(response, what), what)
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
        async with self._account.ask(method, path, what, purpose, QUICK, body=body, keyed=keyed) as response:
            content = await self._account.body(response, what)
        return await loaded(content, _load)

    def _key_header(self) -> Mapping[str, str]:
        key = self._options.credential()
        return {"Authorization": f"Bearer {key}"} if self._options.auth == "bearer" else {"x-api-key": key}

    def _refuse(self, status: int, body: bytes, headers: Mapping[str, str], *, what: str) -> ProviderError:
        return wire.refusal(status, body, headers, what=what, host=self._options.host, now=self._clock.now())

    async def _parse(self, rows: Sequence[object]) -> list[Record | InvalidRow]:
        """Read rows a few at a time: thousands of new ones take a second, and the loop has other things to do."""
        parsed: list[Record | InvalidRow] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            parsed += wire.parse_rows(some, zone=self._zone, region=self._options.region, seen_at=self._clock.now())
            await asyncio.sleep(0)
        return parsed


_load = partial(load_json, name=wire.NAME)
