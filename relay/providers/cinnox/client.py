"""One CINNOX tenant over HTTP. Thin: `wire` decides what is requested and what a response means.

A range is read from every list before its rows are merged. A list that fails, fails the range: a call must not be
published with half of its columns and then again as changed.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Final, NamedTuple

import aiohttp
import structlog

from relay.domain.call import InvalidRow
from relay.domain.clock import Clock
from relay.errors import RelayError
from relay.providers.base import (
    Audio,
    CallPage,
    CredentialStore,
    NoRecordingYet,
    NoSuchCall,
    ProviderHealth,
    Purpose,
    RequestBudget,
    Window,
)
from relay.providers.cinnox import wire
from relay.providers.cinnox.options import CinnoxOptions
from relay.providers.http import AUDIO, LIST, HttpProvider, parse_rows
from relay.providers.parsing import endless_list, paging_ignored

log = structlog.get_logger(__name__)

_OTHER_LIST: Final[Mapping[str, wire.ListName]] = {"call-detail": "call-log", "call-log": "call-detail"}


class _Listed(NamedTuple):
    """What one list has for a range, or a page of it."""

    rows: Sequence[object] = ()
    server_time: datetime | None = None
    size_bytes: int = 0


class _TooManyRows(Exception):
    """A range has more rows than may be read at once."""


class Cinnox(HttpProvider[CinnoxOptions]):
    """A connected tenant; it is its own call list and, where a path for it is configured, recording source."""

    _wire = wire

    def __init__(
        self,
        options: CinnoxOptions,
        http: aiohttp.ClientSession,
        budget: RequestBudget,
        store: CredentialStore | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(options, http, budget, store, clock=clock)
        self._other_list = _OTHER_LIST[options.list_from] if options.merge_other_list else None
        self.recordings = self if options.recording_path else None

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        """List the calls of the window; a range with too many rows is read in halves."""
        # The order of rows is not documented, so a range must not change while its pages are read: a poll leaves the
        # last `settle_s` to the next one. The steps of a backfill have no next one, and lie in the past anyway.
        settle_s = 0 if window.purpose is Purpose.BACKFILL else self._options.settle_s
        last = window.until - timedelta(seconds=settle_s)
        ranges = [(window.since - timedelta(seconds=1), max(last, window.since))]
        while ranges:
            first, last = ranges.pop()
            halves = wire.halves(first, last)
            try:
                max_rows = wire.MAX_ROWS if halves else wire.LONGEST_LIST
                yield await self._range(first, last, window.purpose, max_rows=max_rows)
            except _TooManyRows:
                if halves is None:
                    raise endless_list(wire.NAME, "the call list", f"{wire.LONGEST_LIST} rows") from None
                ranges += reversed(halves)

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncIterator[Audio | NoRecordingYet | NoSuchCall]:
        template, what = self._options.recording_path, "a recording"
        if template is None or not (key.isascii() and key.isprintable()) or len(key) > 256:
            yield NoSuchCall()
            return
        path = wire.recording_path(template, app_id=self._options.app_id, call_id=key)
        async with self._account.request("GET", path, what, purpose, AUDIO, accept="audio/*", also=(404,)) as response:
            if response.status == 404:
                yield NoRecordingYet()
                return
            async with self._account.read_audio(response, what, hint="Check recording_path.") as audio:
                yield audio

    async def health(self) -> ProviderHealth:
        """Request one call of the last hour, which needs the token and the App ID."""
        now = self._clock.now()
        try:
            await self._page(self._options.list_from, now - timedelta(hours=1), now, 0, 1, Purpose.POLL)
        except RelayError as error:
            return ProviderHealth(ok=False, lines=[str(error)])
        return ProviderHealth(ok=True, lines=[f"token and app_id accepted; {self._options.list_from} answers"])

    async def _range(self, first: datetime, last: datetime, purpose: Purpose, *, max_rows: int) -> CallPage:
        """Read a range from every list and merge them; raises _TooManyRows."""
        read_from, read_to = first - wire.EDGE, last + wire.EDGE
        listed = await self._read(self._options.list_from, read_from, read_to, purpose, max_rows)
        others = await self._read_other(read_from, read_to, purpose, max_rows)
        conferences = _Listed()
        if self._options.merge_conferences and any(map(wire.is_conference, (*listed.rows, *others.rows))):
            conferences = await self._read("conference-detail", read_from, read_to, purpose, wire.LONGEST_LIST)
        parse = partial(wire.parse_row, region=self._options.region, seen_at=self._clock.now())
        parsed = await parse_rows(wire.merge(listed.rows, others.rows, conferences.rows), parse)
        rows = [row for row in parsed if isinstance(row, InvalidRow) or first <= row.started_at <= last]
        return CallPage(rows, server_time=listed.server_time, size_bytes=listed.size_bytes + others.size_bytes)

    async def _read_other(self, first: datetime, last: datetime, purpose: Purpose, max_rows: int) -> _Listed:
        if self._other_list is None:
            return _Listed()
        try:
            return await self._read(self._other_list, first, last, purpose, max_rows)
        except wire.CinnoxBadParameter as error:
            # The document of call-log marks callID as required, although its examples leave it out: a server that
            # insists on it cannot list.
            log.warning("call_list_merge_failed", provider="cinnox", list=self._other_list, error=str(error))
            self._other_list = None
            return _Listed()

    async def _read(
        self, name: wire.ListName, first: datetime, last: datetime, purpose: Purpose, max_rows: int
    ) -> _Listed:
        """Read all pages of a list, until one is short; there is no total. Raises _TooManyRows."""
        limit = self._options.page_size
        rows: list[object] = []
        size_bytes = 0
        previous: Sequence[object] = ()
        while True:
            page = await self._page(name, first, last, len(rows), limit, purpose)
            if page.rows and page.rows == previous:
                raise paging_ignored(wire.NAME, name)
            previous = page.rows
            rows += page.rows
            size_bytes += page.size_bytes
            if len(page.rows) < limit:
                return _Listed(rows, page.server_time, size_bytes)
            if len(rows) >= max_rows:
                raise _TooManyRows

    async def _page(
        self, name: wire.ListName, first: datetime, last: datetime, offset: int, limit: int, purpose: Purpose
    ) -> _Listed:
        what = "the call list" if name == self._options.list_from else f"the {name} list"
        path = wire.list_path(name, self._options.app_id, first=first, last=last, offset=offset, limit=limit)
        async with self._account.request("GET", path, what, purpose, LIST) as response:
            answer = await self._account.read_json(response, what)
            # Inside the request, because a code for too many requests may come with status 200.
            rows = wire.read_list(answer.document, what=what, host=self._options.host)
        return _Listed(rows, answer.server_time, answer.size_bytes)

    def _auth_headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self._options.credential()}", "Content-Type": "application/json"}

    def _load_json(self, body: bytes) -> object:
        return wire.load_json(body)
