"""One Unpod organisation over HTTP. Thin: what is asked and what an answer means is decided in `wire`."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import aiohttp

from relay.domain.call import Record
from relay.domain.clock import Clock, SystemClock
from relay.errors import OverBudget, ProviderError, UnexpectedResponse
from relay.providers.base import (
    CallList,
    CallStream,
    ContactSource,
    DetailSource,
    Health,
    InvalidRow,
    Page,
    Pay,
    Purpose,
    RecordingSource,
    Window,
)
from relay.providers.http import LIST, HttpAccount, loaded
from relay.providers.parsing import load_json, server_time
from relay.providers.unpod import wire
from relay.providers.unpod.options import UnpodOptions

_ROWS_AT_ONCE: Final = 50
_WHAT: Final = "the call list"


@dataclass(frozen=True, slots=True)
class _Answer:
    listed: wire.ListAnswer
    server_time: datetime | None
    size_bytes: int


class Unpod:
    """A connected organisation; it is its own call list and has nothing else."""

    def __init__(
        self, options: UnpodOptions, http: aiohttp.ClientSession, pay: Pay, *, clock: Clock | None = None
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
        self.calls: CallList = self
        self.recordings: RecordingSource | None = None
        self.contacts: ContactSource | None = None
        self.stream: CallStream | None = None
        self.details: DetailSource | None = None

    async def pages(self, window: Window) -> AsyncIterator[Page]:
        """List the calls of the days around the window, newest first, until they are older than it.

        Calls that begin while pages are read push rows to later pages, where they are seen twice. Where the count
        moved, the first page is read once more.
        """
        progress = wire.Progress(since=window.since, page_size=self._options.page_size)
        path: str | None = self._path(window, page=1)
        followed: set[str] = set()
        while path is not None:
            followed.add(path)
            answer = await self._ask(path, progress, window.purpose)
            if answer is None:
                break
            page = await self._page(answer)
            progress.add(answer.listed, page.rows)
            yield page
            path = self._after(progress, answer.listed, window, followed)
        if progress.ended_early() and not progress.past_the_window:
            raise UnexpectedResponse(
                f"Unpod announced {progress.count} calls and ended its list after {progress.rows}; "
                "it will be asked again"
            )
        if progress.count_moved:
            again = await self._ask(self._path(window, page=1), wire.Progress(window.since, 1), window.purpose)
            if again is not None:
                yield await self._page(again)

    async def health(self) -> Health:
        """Ask for one call of today: whether the token and the handle are taken."""
        now = self._clock.now()
        window = Window(now - timedelta(hours=1), now)
        try:
            await self._ask(self._path(window, page=1, page_size=1), wire.Progress(window.since, 1), Purpose.POLL)
        except (ProviderError, OverBudget) as error:
            return Health(ok=False, lines=[str(error)])
        return Health(ok=True, lines=["token and org_handle accepted; the call list answers"])

    def _after(
        self, progress: wire.Progress, listed: wire.ListAnswer, window: Window, followed: set[str]
    ) -> str | None:
        """Say which page is next; None when there is none to ask for."""
        if progress.past_the_window:
            return None
        link = wire.next_path(listed.next, base_url=self._options.base_url, seen=followed)
        if link is None and progress.complete:
            return None
        if progress.pages >= wire.MOST_PAGES:
            raise UnexpectedResponse(
                f"Unpod's call list has no end after {progress.pages} pages; nothing more of it was read"
            )
        return link or self._path(window, page=progress.pages + 1)

    async def _ask(self, path: str, progress: wire.Progress, purpose: Purpose) -> _Answer | None:
        """Ask for a page; None when the list has ended before it."""
        account = self._account
        async with account.ask("GET", path, _WHAT, purpose, LIST, also=(400, 404)) as response:
            if response.status != 200:
                body = await account.beginning(response)
                if wire.past_the_end(response.status, progress.pages + 1):
                    return None
                raise account.refused(response, body, _WHAT)
            body = await account.body(response, _WHAT)
            said_at = server_time(response.headers)
        listed = wire.read_list(await loaded(body, _load))
        return _Answer(listed, said_at, len(body))

    async def _page(self, answer: _Answer) -> Page:
        """Read rows a few at a time: thousands of new ones take a second, and the loop has other things to do."""
        rows: Sequence[object] = answer.listed.data
        parsed: list[Record | InvalidRow] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            parsed += wire.parse_rows(
                rows[start : start + _ROWS_AT_ONCE],
                org=self._options.org_handle,
                region=self._options.region,
                natural=self._options.record_key == "natural",
                seen_at=self._clock.now(),
            )
            await asyncio.sleep(0)
        return Page(parsed, server_time=answer.server_time, size_bytes=answer.size_bytes)

    def _path(self, window: Window, *, page: int, page_size: int | None = None) -> str:
        return wire.list_path(
            window,
            page=page,
            page_size=page_size or self._options.page_size,
            margin_days=self._options.date_margin_days,
            form=self._options.date_format,
        )

    def _headers(self) -> Mapping[str, str]:
        return {"Org-Handle": self._options.org_handle, "Authorization": f"Token {self._options.credential()}"}

    def _refuse(self, status: int, body: bytes, headers: Mapping[str, str], *, what: str) -> ProviderError:
        return wire.refusal(status, body, headers, what=what, host=self._options.host, now=self._clock.now())


_load = partial(load_json, name=wire.NAME)
