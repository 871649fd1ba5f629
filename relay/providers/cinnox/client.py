"""One CINNOX tenant over HTTP. Thin: what is asked and what an answer means is decided in `wire`.

A range is read from every list before its rows are merged; a list that fails, fails the range, so that a call is never
told with half of its columns and told again as changed.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

import aiohttp
import structlog

from relay.domain.call import Record
from relay.domain.clock import Clock, SystemClock
from relay.errors import OverBudget, ProviderError, UnexpectedResponse
from relay.providers.base import (
    Audio,
    CallList,
    CallStream,
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
from relay.providers.cinnox import wire
from relay.providers.cinnox.options import CinnoxOptions
from relay.providers.http import AUDIO, LIST, HttpAccount, loaded
from relay.providers.parsing import audio_type, server_time

log = structlog.get_logger(__name__)

_ROWS_AT_ONCE: Final = 50
_OTHER: Final[Mapping[str, wire.ListName]] = {"call-detail": "call-log", "call-log": "call-detail"}


@dataclass(slots=True)
class _Range:
    """What one list gave for a range; `rows` None when there were more than a range may have."""

    rows: list[object] | None = field(default_factory=list)
    server_time: datetime | None = None
    size_bytes: int = 0


class Cinnox:
    """A connected tenant; it is its own call list and, where a path for it is configured, recording source."""

    def __init__(
        self, options: CinnoxOptions, http: aiohttp.ClientSession, pay: Pay, *, clock: Clock | None = None
    ) -> None:
        self._options = options
        self._clock = clock or SystemClock()
        self._account = HttpAccount(
            http,
            pay,
            name=wire.NAME,
            base_url=options.base_url,
            host=options.host,
            credentials=self._headers,
            refuse=self._refuse,
            proxy_url=options.proxy_url,
        )
        self._other: wire.ListName | None = _OTHER[options.list_from] if options.merge_other_list else None
        self.calls: CallList = self
        self.recordings: RecordingSource | None = self if options.recording_path else None
        self.contacts: ContactSource | None = None
        self.stream: CallStream | None = None
        self.details: DetailSource | None = None

    async def pages(self, window: Window) -> AsyncIterator[Page]:
        """List the calls of the window; a range with too many is read in halves.

        A poll leaves out the last `settle_s`, which the next one brings. The steps of a backfill have no next one.
        """
        settle_s = 0 if window.purpose is Purpose.BACKFILL else self._options.settle_s
        last = window.until - timedelta(seconds=settle_s)
        ranges = [(window.since - timedelta(seconds=1), max(last, window.since))]
        while ranges:
            first, last = ranges.pop()
            halves = wire.halves(first, last)
            page = await self._range(first, last, window.purpose, may_refuse=halves is not None)
            if page is not None:
                yield page
            elif halves is not None:
                ranges += reversed(halves)

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncIterator[Audio | NoRecordingYet | NoSuchCall]:
        """Fetch the audio of the call with the callID `key`; it is read from the wire as its chunks are taken."""
        template, what = self._options.recording_path, "a recording"
        if template is None or not (key.isascii() and key.isprintable()) or len(key) > 256:
            yield NoSuchCall()
            return
        path = wire.recording_path(template, app_id=self._options.app_id, call_id=key)
        account = self._account
        async with account.ask("GET", path, what, purpose, AUDIO, accept="audio/*", also=(404,)) as response:
            if response.status != 200:
                yield NoRecordingYet()
                return
            content_type = audio_type(response.headers.get("Content-Type"))
            if content_type is None:
                raise UnexpectedResponse(
                    "CINNOX sent text where a recording was asked for; check recording_path: only audio is taken over"
                )
            chunks = account.chunks(response, await account.first_chunk(response, what), what)
            size_bytes = None if "Content-Encoding" in response.headers else response.content_length
            try:
                yield Audio(chunks, content_type, size_bytes)
            finally:
                await chunks.aclose()

    async def health(self) -> Health:
        """Ask for one call of the last hour: whether the token and the App ID are taken."""
        now = self._clock.now()
        try:
            await self._ask(self._options.list_from, now - timedelta(hours=1), now, 0, 1, Purpose.POLL)
        except (ProviderError, OverBudget) as error:
            return Health(ok=False, lines=[str(error)])
        return Health(ok=True, lines=[f"token and app_id accepted; {self._options.list_from} answers"])

    async def _range(self, first: datetime, last: datetime, purpose: Purpose, *, may_refuse: bool) -> Page | None:
        """Read a range from every list; None when it has too many rows and may be refused for that."""
        most = wire.MOST_ROWS if may_refuse else wire.LONGEST_LIST
        begin, end = first, last
        first, last = first - wire.EDGE, last + wire.EDGE
        listed = await self._read(self._options.list_from, first, last, purpose, most)
        others = await self._read_other(first, last, purpose, most) if listed.rows is not None else _Range()
        if listed.rows is None or others.rows is None:
            if may_refuse:
                return None
            raise UnexpectedResponse(f"CINNOX's call list has no end after {most} rows; nothing of it was taken over")
        conferences: Sequence[object] = ()
        if self._options.merge_conferences and any(map(wire.is_conference, (*listed.rows, *others.rows))):
            conferences = (await self._read("conference-detail", first, last, purpose, wire.LONGEST_LIST)).rows or ()
        rows = wire.merge(listed.rows, others.rows, conferences)
        size_bytes = listed.size_bytes + others.size_bytes
        parsed = [
            row for row in await self._parse(rows) if isinstance(row, InvalidRow) or begin <= row.started_at <= end
        ]
        return Page(parsed, server_time=listed.server_time, size_bytes=size_bytes)

    async def _read_other(self, first: datetime, last: datetime, purpose: Purpose, most: int) -> _Range:
        """Read the list that fills in. Its document demands a callID in one place: then it cannot be read as a list."""
        if self._other is None:
            return _Range()
        try:
            return await self._read(self._other, first, last, purpose, most)
        except wire.BadParameter as error:
            log.warning("list_not_merged", provider="cinnox", list=self._other, why=str(error))
            self._other = None
            return _Range()

    async def _read(self, name: wire.ListName, first: datetime, last: datetime, purpose: Purpose, most: int) -> _Range:
        """Read all pages of a list for a range that does not move, until one is short."""
        read = _Range()
        limit = self._options.page_size
        found: list[object] = []
        rows: list[object] = []
        while True:
            answer = await self._ask(name, first, last, len(found), limit, purpose)
            if answer.rows and answer.rows == rows:
                raise UnexpectedResponse(
                    f"CINNOX sends the same page of {name} whatever the offset; nothing was taken over"
                )
            rows = answer.rows or []
            read.size_bytes += answer.size_bytes
            read.server_time = answer.server_time
            found += rows
            if len(rows) < limit:
                read.rows = found
                return read
            if len(found) >= most:
                read.rows = None
                return read

    async def _ask(
        self, name: wire.ListName, first: datetime, last: datetime, offset: int, limit: int, purpose: Purpose
    ) -> _Range:
        what = "the call list" if name == self._options.list_from else f"the {name} list"
        path = wire.list_path(name, self._options.app_id, first=first, last=last, offset=offset, limit=limit)
        async with self._account.ask("GET", path, what, purpose, LIST) as response:
            body = await self._account.body(response, what)
            said_at = server_time(response.headers)
        rows = wire.read_list(await loaded(body, wire.load_json), what=what, host=self._options.host)
        return _Range(rows, said_at, len(body))

    async def _parse(self, rows: Sequence[object]) -> list[Record | InvalidRow]:
        """Read rows a few at a time: thousands of new ones take a second, and the loop has other things to do."""
        parsed: list[Record | InvalidRow] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            parsed += wire.parse_rows(some, region=self._options.region, seen_at=self._clock.now())
            await asyncio.sleep(0)
        return parsed

    def _headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self._options.credential()}", "Content-Type": "application/json"}

    def _refuse(self, status: int, body: bytes, headers: Mapping[str, str], *, what: str) -> ProviderError:
        return wire.refusal(status, body, headers, what=what, host=self._options.host, now=self._clock.now())
