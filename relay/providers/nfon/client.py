"""One NFON account over HTTP. Thin: `wire` decides what is requested and what a response means.

Each request carries a token that is renewed in time; one that NFON rejects all the same is renewed once. NFON's DELETE
endpoints are never used.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Final

import aiohttp
import structlog

from relay.domain.call import InvalidRow, Record
from relay.domain.clock import Clock
from relay.errors import RelayError, Unauthorized, UnexpectedResponse
from relay.providers.base import (
    CallPage,
    CallStream,
    CredentialStore,
    ProviderHealth,
    Purpose,
    RequestBudget,
    Window,
)
from relay.providers.http import LIST, QUICK, HttpAccount, HttpProvider, JsonResponse, parse_rows
from relay.providers.nfon import wire
from relay.providers.nfon.options import NfonOptions
from relay.providers.nfon.tokens import AccessToken, NfonTokens
from relay.providers.parsing import load_json, paging_ignored
from relay.sse import OversizedEvent, ServerSentEvent, SseReader

log = structlog.get_logger(__name__)

_CONCURRENT_DETAILS: Final = 5
DETAILS_TIMEOUT_S: Final = 5.0
DETAILS_PAUSE_S: Final = 30.0
# Each step is twice as far as the one before, so these reach back over more rows than any list has.
_MAX_STEPS_BACK: Final = 16
_STREAM: Final = aiohttp.ClientTimeout(total=None, connect=10)


class Nfon(HttpProvider[NfonOptions]):
    """A connected account; it is its own call list, stream and source of details."""

    _wire = wire

    def __init__(
        self,
        options: NfonOptions,
        http: aiohttp.ClientSession,
        budget: RequestBudget,
        store: CredentialStore | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(options, http, budget, clock=clock)
        self._tokens = NfonTokens(options, self._account, store)
        self._scope = wire.Scope(options.customer, options.extension)
        self._unit: wire.Unit = "milliseconds" if options.time_unit == "milliseconds" else "seconds"
        self._unit_is_settled = options.time_unit != "auto"
        self._largest_page = 0
        self._newest = wire.NewestRevisions()
        self._no_details_until = 0.0
        self.stream: CallStream | None = self if options.stream else None
        self.details = self

    # -- the call list

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        """List the calls since `window.since`, oldest first, one request per page.

        Each page begins with the last row of the one before. Where it does not, rows were deleted meanwhile, and the
        offset steps back until it meets a known row. NFON may return fewer rows than requested, so the end is a page
        shorter than others have been, or one without anything new.
        """
        rows, page = await self._first(window)
        beginning = wire.row_identity(rows[0]) if rows else ""
        known_ids: set[str] = set()
        offset, overlaps, steps_back = 0, False, 0
        while True:
            ids = [wire.row_identity(row) for row in rows]
            if overlaps and offset and (not ids or ids[0] not in known_ids) and steps_back < _MAX_STEPS_BACK:
                offset = max(0, offset - 2**steps_back)
                steps_back += 1
                rows, page = await self._list(window, offset)
                continue
            new_rows = [row for row, id_ in zip(rows, ids, strict=True) if id_ not in known_ids]
            started_over = offset > 0 and bool(ids) and ids[0] == beginning
            if started_over and len(rows) >= self._options.page_size:
                raise paging_ignored(wire.NAME, wire.CALL_LIST)
            known_ids.update(ids)
            self._largest_page = max(self._largest_page, len(rows))
            newest = [self._newest.of(row) for row in new_rows]
            yield replace(page, rows=await parse_rows(newest, partial(wire.parse_row, region=self._options.region)))
            if len(rows) < self._largest_page or (not new_rows and (started_over or len(rows) <= 1)):
                return
            overlaps = len(rows) > 1
            offset, steps_back = offset + (len(rows) - 1 if overlaps else len(rows)), 0
            rows, page = await self._list(window, offset)

    async def _first(self, window: Window) -> tuple[list[object], CallPage]:
        """Request the first page, and check that NFON understood its lower bound.

        The document calls `from` a number and names no unit. Seconds that are read as milliseconds are a moment in
        1970, so too much comes, which shows. The reverse would return nothing, a silent loss; so milliseconds are only
        used once they find a call that is known to exist.
        """
        rows, page = await self._list(window, 0)
        if self._options.time_unit != "auto":
            return rows, page
        too_early = wire.before(rows, window.since)
        if self._unit == "seconds" and too_early is not None and not self._unit_is_settled:
            probe = wire.list_path(self._scope, too_early, "milliseconds", limit=1)
            self._unit_is_settled = True
            if await self._rows(probe, window.purpose):
                self._unit = "milliseconds"
                log.info("nfon_time_unit_detected", host=self._options.host, unit=self._unit)
                return await self._list(window, 0)
        elif self._unit == "milliseconds" and not rows:
            newest = await self._rows(wire.newest_path(self._scope), window.purpose)
            started_at = wire.created_at(newest[0]) if newest else None
            if started_at is not None and started_at >= window.since:
                self._unit, self._unit_is_settled = "seconds", False
                log.warning("nfon_time_unit_changed", host=self._options.host, unit=self._unit)
                return await self._list(window, 0)
        return rows, page

    async def _list(self, window: Window, offset: int) -> tuple[list[object], CallPage]:
        path = wire.list_path(self._scope, window.since, self._unit, limit=self._options.page_size, offset=offset)
        answer = await self._json(path, wire.CALL_LIST, window.purpose, LIST)
        page = CallPage((), server_time=answer.server_time, size_bytes=answer.size_bytes)
        return wire.read_call_list(answer.document), page

    async def _rows(self, path: str, purpose: Purpose) -> list[object]:
        return wire.read_call_list((await self._json(path, wire.CALL_LIST, purpose, QUICK)).document)

    async def _json(self, path: str, what: str, purpose: Purpose, timeout: aiohttp.ClientTimeout) -> JsonResponse:
        async with self._request(path, what, purpose, timeout) as response:
            return await self._account.read_json(response, what)

    # -- the stream

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[AsyncIterator[Sequence[Record | InvalidRow]]]:
        """Connect to the event stream; see CallStream."""
        path, what = wire.stream_path(self._scope), "the event stream"
        async with AsyncExitStack() as stack:
            with self._account.unavailable_on_failure(what):
                async with asyncio.timeout(self._options.stream_idle_s):
                    response = await stack.enter_async_context(
                        self._request(path, what, Purpose.POLL, _STREAM, accept="text/event-stream")
                    )
            if response.content_type != "text/event-stream":
                raise UnexpectedResponse(
                    f"NFON at {self._options.host} answered with {response.content_type} instead of an event stream. "
                    "Set stream: false if it has none."
                )
            yield await stack.enter_async_context(aclosing(self._events(response, await self._tokens.current())))

    async def _events(
        self, response: aiohttp.ClientResponse, token: AccessToken
    ) -> AsyncGenerator[Sequence[Record | InvalidRow], None]:
        reader = SseReader()
        while True:
            wait_s = self._options.stream_idle_s
            if token.renew_at is not None:
                wait_s = min(wait_s, token.renew_at - self._clock.now().timestamp())
            try:
                async with asyncio.timeout(max(wait_s, 0)):
                    with self._account.unavailable_on_failure("the event stream"):
                        chunk = await response.content.readany()
            except TimeoutError:
                return  # idle for too long, or the token is about to expire
            if not chunk:
                return
            rows = [self._row(event) for event in reader.feed(chunk)]
            if rows:
                yield rows

    def _row(self, event: ServerSentEvent | OversizedEvent) -> Record | InvalidRow:
        if isinstance(event, OversizedEvent):
            return InvalidRow("a stream event is larger than 1 MiB")
        try:
            row = load_json(event.data.encode("utf-8", "replace"), name=wire.NAME)
        except UnexpectedResponse:
            return InvalidRow("a stream event is not JSON")
        return wire.parse_row(self._newest.of(row), region=self._options.region)

    # -- details

    async def complete(self, records: Sequence[Record]) -> Sequence[Record]:
        """Fetch the transcripts of the records that have one, a few at a time; see DetailSource."""
        transcribed = [record for record in records if wire.has_transcript(record)]
        if not transcribed:
            return records
        now_s = time.monotonic()
        deadline_s = now_s + DETAILS_TIMEOUT_S if now_s >= self._no_details_until else now_s
        slots = asyncio.Semaphore(_CONCURRENT_DETAILS)

        async def complete_one(record: Record) -> Record:
            async with slots:
                return await self._with_transcript(record, deadline_s)

        completed = await asyncio.gather(*map(complete_one, transcribed))
        by_key = {record.key: record for record in completed}
        return [by_key[record.key] if wire.has_transcript(record) else record for record in records]

    async def _with_transcript(self, record: Record, deadline_s: float) -> Record:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            return wire.without_transcript(record)
        path, what = wire.details_path(record.key), "a transcript"
        try:
            async with (
                asyncio.timeout(remaining_s),
                self._request(path, what, Purpose.RECORDING, QUICK, also=(404,)) as response,
            ):
                if response.status == 404:
                    return wire.with_transcript(record, None)
                return wire.with_transcript(record, (await self._account.read_json(response, what)).document)
        except (RelayError, TimeoutError) as error:
            if isinstance(error, Unauthorized) and error.status == 403:
                log.warning("transcript_forbidden", host=self._options.host, error=str(error))
                return wire.with_transcript(record, None)
            log.info("transcript_postponed", host=self._options.host, error=str(error) or "timeout")
            # Calls wait for their details, so after a failure none are requested for a while.
            self._no_details_until = time.monotonic() + DETAILS_PAUSE_S
            return wire.without_transcript(record)

    # -- requests

    async def health(self) -> ProviderHealth:
        """Request the newest call: NFON has no endpoint for its health."""
        try:
            rows = await self._rows(wire.newest_path(self._scope), Purpose.POLL)
        except RelayError as error:
            return ProviderHealth(ok=False, lines=[str(error)])
        return ProviderHealth(ok=True, lines=[f"token accepted; {'calls can be read' if rows else 'no calls so far'}"])

    @asynccontextmanager
    async def _request(
        self,
        path: str,
        what: str,
        purpose: Purpose,
        timeout: aiohttp.ClientTimeout,
        *,
        accept: str = "application/json",
        also: tuple[int, ...] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a GET with a token; one that NFON rejects is renewed once, where that yields another."""
        token = await self._tokens.current()
        account = self._authenticated(token)
        async with account.request("GET", path, what, purpose, timeout, accept=accept, also=(*also, 401)) as response:
            if response.status != 401:
                yield response
                return
            rejection = await account.error_response(response, what)
        renewed = await self._tokens.current(rejected=token.text)
        if renewed.text == token.text:
            raise wire.error_of(rejection)
        account = self._authenticated(renewed)
        async with account.request("GET", path, what, purpose, timeout, accept=accept, also=also) as response:
            yield response

    def _authenticated(self, token: AccessToken) -> HttpAccount:
        def auth_headers() -> Mapping[str, str]:
            return {"Authorization": f"Bearer {token.text}"}

        return replace(self._account, auth_headers=auth_headers)
