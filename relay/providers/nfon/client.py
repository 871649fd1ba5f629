"""One NFON account over HTTP. Thin: what is asked and what an answer means is decided in `wire`.

Each request carries a token that is renewed in time; one that NFON refuses all the same is renewed once. Nothing here
ever asks NFON to delete anything.
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

from relay.domain.call import Record
from relay.domain.clock import Clock, SystemClock
from relay.errors import OverBudget, ProviderError, Unauthorized, UnexpectedResponse
from relay.providers.base import (
    CallList,
    CallStream,
    ContactSource,
    CredentialStore,
    DetailSource,
    Health,
    InvalidRow,
    Page,
    Pay,
    Purpose,
    RecordingSource,
    Window,
)
from relay.providers.http import LIST, QUICK, HttpAccount, loaded
from relay.providers.nfon import wire
from relay.providers.nfon.options import NfonOptions
from relay.providers.nfon.tokens import AccessToken, Tokens
from relay.providers.parsing import load_json, server_time
from relay.sse import OversizedEvent, ServerSentEvent, SseReader

log = structlog.get_logger(__name__)

_ROWS_AT_ONCE: Final = 50
_DETAILS_AT_ONCE: Final = 5
_DETAILS_S: Final = 5.0
_DETAILS_REST_S: Final = 30.0
_MOST_STEPS_BACK: Final = 16
_STREAM: Final = aiohttp.ClientTimeout(total=None, connect=10)


class Nfon:
    """A connected account; it is its own call list, stream and source of details."""

    def __init__(
        self,
        options: NfonOptions,
        http: aiohttp.ClientSession,
        pay: Pay,
        safe: CredentialStore | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._options = options
        self._clock = clock or SystemClock()
        self._tokens = Tokens(options, http, safe, clock=self._clock)
        self._account = HttpAccount(
            http,
            pay,
            name=wire.NAME,
            base_url=options.base_url,
            host=options.host,
            credentials=dict,
            refuse=self._refuse,
            proxy_url=options.proxy_url,
        )
        self._scope = wire.Scope(options.customer, options.extension)
        self._unit: wire.Unit = "milliseconds" if options.time_unit == "milliseconds" else "seconds"
        self._unit_is_settled = options.time_unit != "auto"
        self._largest_page = 0
        self._newest = wire.Newest()
        self._no_details_until = 0.0
        self.calls: CallList = self
        self.recordings: RecordingSource | None = None
        self.contacts: ContactSource | None = None
        self.stream: CallStream | None = self if options.stream else None
        self.details: DetailSource | None = self

    # Listing

    async def pages(self, window: Window) -> AsyncIterator[Page]:
        """List the calls since `window.since`, oldest first, a page a request.

        Each page begins with the last row of the one before: where it does not, rows went away meanwhile, and the
        offset steps back until a known row is met. A page may be short because NFON gives fewer rows than were asked
        for, so the end is a page shorter than others have been, or one that brings nothing.
        """
        rows, page = await self._first(window)
        beginning = wire.row_identity(rows[0]) if rows else ""
        known: set[str] = set()
        offset, overlaps, steps_back = 0, False, 0
        while True:
            names = [wire.row_identity(row) for row in rows]
            if overlaps and offset and (not names or names[0] not in known) and steps_back < _MOST_STEPS_BACK:
                offset = max(0, offset - 2**steps_back)
                steps_back += 1
                rows, page = await self._list(window, offset)
                continue
            fresh = [row for row, name in zip(rows, names, strict=True) if name not in known]
            again = offset > 0 and bool(names) and names[0] == beginning
            if again and len(rows) >= self._options.page_size:
                raise UnexpectedResponse(
                    "NFON sends the same page whatever the offset; the calls behind it cannot be read"
                )
            known.update(names)
            self._largest_page = max(self._largest_page, len(rows))
            yield replace(page, rows=await self._parse(fresh))
            if len(rows) < self._largest_page or (not fresh and (again or len(rows) <= 1)):
                return
            overlaps = len(rows) > 1
            offset, steps_back = offset + (len(rows) - 1 if overlaps else len(rows)), 0
            rows, page = await self._list(window, offset)

    async def _first(self, window: Window) -> tuple[list[object], Page]:
        """Ask for the first page, and see whether NFON understood since when."""
        rows, page = await self._list(window, 0)
        if self._options.time_unit != "auto":
            return rows, page
        too_early = wire.before(rows, window.since)
        if self._unit == "seconds" and too_early is not None and not self._unit_is_settled:
            # Seconds read as milliseconds are a moment in 1970: everything comes. The reverse would be silence, so
            # the other unit is only believed when it finds a call that is known to be there.
            probe = wire.list_path(self._scope, too_early, "milliseconds", limit=1)
            self._unit_is_settled = True
            if await self._rows(probe, window.purpose):
                self._unit = "milliseconds"
                log.info("nfon_reads_milliseconds", host=self._options.host)
                return await self._list(window, 0)
        elif self._unit == "milliseconds" and not rows:
            newest = await self._rows(wire.newest_path(self._scope), window.purpose)
            started_at = wire.created_at(newest[0]) if newest else None
            if started_at is not None and started_at >= window.since:
                self._unit, self._unit_is_settled = "seconds", False
                log.warning("nfon_reads_seconds_again", host=self._options.host)
                return await self._list(window, 0)
        return rows, page

    async def _list(self, window: Window, offset: int) -> tuple[list[object], Page]:
        path = wire.list_path(self._scope, window.since, self._unit, limit=self._options.page_size, offset=offset)
        async with self._ask(path, "the call list", window.purpose, LIST) as response:
            body = await self._account.body(response, "the call list")
            said_at = server_time(response.headers)
        rows = wire.read_call_list(await loaded(body, _load))
        return rows, Page((), server_time=said_at, size_bytes=len(body))

    async def _rows(self, path: str, purpose: Purpose) -> list[object]:
        async with self._ask(path, "the call list", purpose, QUICK) as response:
            body = await self._account.body(response, "the call list")
        return wire.read_call_list(await loaded(body, _load))

    async def _parse(self, rows: Sequence[object]) -> list[Record | InvalidRow]:
        """Read rows a few at a time: thousands of new ones take a second, and the loop has other things to do."""
        parsed: list[Record | InvalidRow] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = [self._newest.of(row) for row in rows[start : start + _ROWS_AT_ONCE]]
            parsed += wire.parse_rows(some, region=self._options.region)
            await asyncio.sleep(0)
        return parsed

    # Listening

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[AsyncIterator[Sequence[Record | InvalidRow]]]:
        """Connect to the event stream; see CallStream."""
        async with AsyncExitStack() as stack:
            with self._account.trouble("the event stream"):
                async with asyncio.timeout(self._options.stream_idle_s):
                    response = await stack.enter_async_context(
                        self._ask(
                            wire.stream_path(self._scope),
                            "the event stream",
                            Purpose.POLL,
                            _STREAM,
                            accept="text/event-stream",
                        )
                    )
            if response.content_type != "text/event-stream":
                raise UnexpectedResponse(
                    f"NFON at {self._options.host} answers with {response.content_type} where an event stream was "
                    "asked for; set stream: false when it has none"
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
                    with self._account.trouble("the event stream"):
                        chunk = await response.content.readany()
            except TimeoutError:
                return  # silent for too long, or the token ends
            if not chunk:
                return
            rows = [self._row(event) for event in reader.feed(chunk)]
            if rows:
                yield rows

    def _row(self, event: ServerSentEvent | OversizedEvent) -> Record | InvalidRow:
        if isinstance(event, OversizedEvent):
            return InvalidRow("an event of the stream is larger than 1 MiB")
        try:
            row = load_json(event.data.encode("utf-8", "replace"), name=wire.NAME)
        except UnexpectedResponse:
            return InvalidRow("an event of the stream is not JSON")
        return wire.parse_row(self._newest.of(row), region=self._options.region)

    # Details

    async def complete(self, records: Sequence[Record]) -> Sequence[Record]:
        """Fetch the transcripts of the records that have one, a few at a time; see DetailSource.

        After trouble nothing is asked for a while: an extra never holds up the calls for long.
        """
        wanted = [record for record in records if wire.has_more(record)]
        if not wanted:
            return records
        now_s = time.monotonic()
        deadline = now_s + _DETAILS_S if now_s >= self._no_details_until else now_s
        room = asyncio.Semaphore(_DETAILS_AT_ONCE)

        async def one(record: Record) -> Record:
            async with room:
                return await self._completed(record, deadline)

        found = await asyncio.gather(*(one(record) for record in wanted))
        by_key = dict(zip((record.key for record in wanted), found, strict=True))
        return [by_key[record.key] if wire.has_more(record) else record for record in records]

    async def _completed(self, record: Record, deadline: float) -> Record:
        if time.monotonic() >= deadline:
            return wire.not_yet(record)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                path = wire.details_path(record.key)
                async with self._ask(path, "a transcript", Purpose.RECORDING, QUICK, also=(404,)) as response:
                    if response.status == 404:
                        return wire.completed(record, None)
                    body = await self._account.body(response, "a transcript")
                return wire.completed(record, await loaded(body, _load))
        except (ProviderError, OverBudget, TimeoutError) as error:
            if isinstance(error, Unauthorized) and error.status == 403:
                log.warning("transcript_refused", host=self._options.host, error=str(error))
                return wire.completed(record, None)
            log.info("transcript_not_now", host=self._options.host, error=str(error) or "took too long")
            # Other calls wait while this does not answer: let them, once in a while.
            self._no_details_until = time.monotonic() + _DETAILS_REST_S
            return wire.not_yet(record)

    # Asking

    async def health(self) -> Health:
        """Ask for the newest call: the document has no other question about health."""
        try:
            rows = await self._rows(wire.newest_path(self._scope), Purpose.POLL)
        except (ProviderError, OverBudget) as error:
            return Health(ok=False, lines=[str(error)])
        return Health(ok=True, lines=[f"token accepted; {'calls can be read' if rows else 'no calls so far'}"])

    @asynccontextmanager
    async def _ask(
        self,
        path: str,
        what: str,
        purpose: Purpose,
        timeout: aiohttp.ClientTimeout,
        *,
        accept: str = "application/json",
        also: tuple[int, ...] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask with a token; one that is refused is renewed once, where that gives another."""
        token = await self._tokens.current()
        asking = self._asking(path, what, purpose, timeout, token, accept=accept, also=(*also, 401))
        async with asking as response:
            if response.status != 401:
                yield response
                return
            refusal = self._account.refused(response, b"", what)
        again = await self._tokens.current(refused=token.text)
        if again.text == token.text:
            raise refusal
        async with self._asking(path, what, purpose, timeout, again, accept=accept, also=also) as response:
            yield response

    @asynccontextmanager
    async def _asking(
        self,
        path: str,
        what: str,
        purpose: Purpose,
        timeout: aiohttp.ClientTimeout,
        token: AccessToken,
        *,
        accept: str,
        also: tuple[int, ...],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        account = replace(self._account, credentials=lambda: {"Authorization": f"Bearer {token.text}"})
        async with account.ask("GET", path, what, purpose, timeout, accept=accept, also=also) as response:
            yield response

    def _refuse(self, status: int, body: bytes, headers: Mapping[str, str], *, what: str) -> ProviderError:
        return wire.refusal(status, headers, what=what, host=self._options.host, now=self._clock.now())


_load = partial(load_json, name=wire.NAME)
