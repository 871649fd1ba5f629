"""One WebFones account over HTTP. Thin: `wire` decides what is requested and what a response means."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final
from zoneinfo import ZoneInfo

import aiohttp

from relay.domain.call import Contact
from relay.domain.clock import Clock
from relay.domain.json import Json
from relay.errors import RelayError
from relay.providers.base import (
    Audio,
    CallPage,
    ContactChanges,
    CredentialStore,
    NoRecordingYet,
    NoSuchCall,
    ProviderHealth,
    Purpose,
    RequestBudget,
    Window,
)
from relay.providers.http import AUDIO, LIST, QUICK, HttpProvider, parse_rows
from relay.providers.webfones import wire
from relay.providers.webfones.options import WebfonesOptions

ROWS_PER_PAGE: Final = 2000
# The document names no limit for a contact search.
CONTACTS_PER_REQUEST: Final = 50


class Webfones(HttpProvider[WebfonesOptions]):
    """A connected account; it is its own call list, recording source and contact source."""

    _wire = wire
    batch = CONTACTS_PER_REQUEST

    def __init__(
        self,
        options: WebfonesOptions,
        http: aiohttp.ClientSession,
        budget: RequestBudget,
        store: CredentialStore | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(options, http, budget, store, clock=clock)
        self._zone = ZoneInfo(options.timezone)
        self.recordings = self
        self.contacts = self

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        """List the calls since `window.since`: WebFones has no paging, so one response is cut into pages here."""
        path = wire.records_path(window.since, self._zone)
        async with self._account.request("GET", path, wire.CALL_LIST, window.purpose, LIST) as response:
            listed = await self._account.read_json(response, wire.CALL_LIST)
        rows = wire.read_call_list(listed.document)
        size_bytes = listed.size_bytes
        for start in range(0, max(len(rows), 1), ROWS_PER_PAGE):
            parse = partial(wire.parse_row, zone=self._zone, region=self._options.region, seen_at=self._clock.now())
            page = await parse_rows(rows[start : start + ROWS_PER_PAGE], parse)
            yield CallPage(page, server_time=listed.server_time, size_bytes=size_bytes if start == 0 else 0)

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncIterator[Audio | NoRecordingYet | NoSuchCall]:
        if not (key.isascii() and key.isdigit()):
            yield NoSuchCall()
            return
        path, what = f"/call_log/recording/{key}", "a recording"
        account = self._account
        async with account.request("GET", path, what, purpose, AUDIO, accept="audio/*", also=(400, 404)) as response:
            if response.status == 200:
                async with account.read_audio(response, what) as audio:
                    yield audio
                return
            error = await account.error_response(response, what)
            missing = wire.missing_recording(error)
            if missing is None:
                raise wire.error_of(error)
            yield missing

    async def search(self, numbers: Sequence[str]) -> Mapping[str, Sequence[Contact]]:
        """Find contacts by E.164 number; anything else is not requested and has no contacts."""
        if len(numbers) > self.batch:
            raise ValueError(f"at most {self.batch} numbers in one search, not {len(numbers)}")
        contacts: dict[str, Sequence[Contact]] = {number: () for number in numbers}
        digits_of = wire.lookup_digits(numbers, self._options.region)
        if digits_of:
            document = await self._json(
                "POST",
                "/contacts/contacts/search/phones",
                wire.CONTACT_SEARCH,
                Purpose.CONTACTS,
                json={"phone_numbers": sorted(set(digits_of.values()))},
            )
            contacts.update(wire.read_contacts(document, digits_of))
        return contacts

    async def changes_after(self, version: int) -> ContactChanges:
        path = f"/contacts/contactsAfterVersion/{version:d}"
        return wire.read_changes(await self._json("GET", path, wire.CONTACT_CHANGES, Purpose.CONTACTS), version)

    async def health(self) -> ProviderHealth:
        """Check whether the gateway runs, and whether it accepts the key."""
        checks = [
            await self._check("/health", "the gateway's health", wire.health_line, authenticated=False),
            await self._check("/status", "the services' status", wire.status_line, authenticated=True),
        ]
        return ProviderHealth(ok=all(ok for ok, _ in checks), lines=[line for _, line in checks])

    async def _check(
        self, path: str, what: str, describe: Callable[[object], tuple[bool, str]], *, authenticated: bool
    ) -> tuple[bool, str]:
        try:
            return describe(await self._json("GET", path, what, Purpose.POLL, authenticated=authenticated))
        except RelayError as error:
            return False, str(error)

    async def _json(
        self,
        method: str,
        path: str,
        what: str,
        purpose: Purpose,
        *,
        json: Json | None = None,
        authenticated: bool = True,
    ) -> object:
        async with self._account.request(
            method, path, what, purpose, QUICK, json=json, authenticated=authenticated
        ) as response:
            return (await self._account.read_json(response, what)).document

    def _auth_headers(self) -> Mapping[str, str]:
        key = self._options.credential()
        return {"Authorization": f"Bearer {key}"} if self._options.auth == "bearer" else {"x-api-key": key}
