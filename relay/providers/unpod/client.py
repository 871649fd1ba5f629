"""One Unpod organisation over HTTP. Thin: `wire` decides what is requested and what a response means."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from relay.errors import RelayError
from relay.providers.base import CallPage, ProviderHealth, Purpose, Window
from relay.providers.http import LIST, HttpProvider, JsonResponse, parse_rows
from relay.providers.parsing import endless_list
from relay.providers.unpod import wire
from relay.providers.unpod.options import UnpodOptions


@dataclass(frozen=True, slots=True)
class _ListResponse:
    listed: wire.UnpodCallList
    response: JsonResponse


class Unpod(HttpProvider[UnpodOptions]):
    """A connected organisation; it only has a call list."""

    _wire = wire

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        """List the calls of the days around the window, newest first, until they are older than it."""
        paging = wire.UnpodPaging(since=window.since, page_size=self._options.page_size)
        path: str | None = self._path(window, page=1)
        followed: set[str] = set()
        assigned: dict[str, dict[str, str]] = {}
        while path is not None:
            followed.add(path)
            answer = await self._list(path, window.purpose, page=paging.pages + 1)
            if answer is None:
                break
            page = await self._page(answer, assigned)
            paging.add(answer.listed, page.rows)
            yield page
            path = self._next_path(paging, answer.listed, window, followed)
        if paging.ended_early and not paging.past_the_window:
            raise wire.incomplete(paging)
        # Calls that begin meanwhile push rows to later pages, where they are seen twice, and land on the first page
        # themselves. So it is read again when the count moved.
        if paging.count_moved and (answer := await self._list(self._path(window, page=1), window.purpose, page=1)):
            yield await self._page(answer, assigned)

    async def health(self) -> ProviderHealth:
        """Request one call of today, which needs the token and the handle."""
        now = self._clock.now()
        window = Window(now - timedelta(hours=1), now)
        try:
            await self._list(self._path(window, page=1, page_size=1), Purpose.POLL, page=1)
        except RelayError as error:
            return ProviderHealth(ok=False, lines=[str(error)])
        return ProviderHealth(ok=True, lines=["token and org_handle accepted; the call list answers"])

    def _next_path(
        self, paging: wire.UnpodPaging, listed: wire.UnpodCallList, window: Window, followed: set[str]
    ) -> str | None:
        if paging.past_the_window:
            return None
        link = wire.next_path(listed.next, base_url=self._options.base_url, seen=followed)
        if link is None and paging.complete:
            return None
        if paging.pages >= wire.MAX_PAGES:
            raise endless_list(wire.NAME, wire.CALL_LIST, f"{paging.pages} pages")
        return link or self._path(window, page=paging.pages + 1)

    async def _list(self, path: str, purpose: Purpose, *, page: int) -> _ListResponse | None:
        """Request a page; None when the list ended before it."""
        account = self._account
        async with account.request("GET", path, wire.CALL_LIST, purpose, LIST, also=(400, 404)) as response:
            if response.status != 200:
                if wire.past_the_end(response.status, page):
                    return None
                raise wire.error_of(await account.error_response(response, wire.CALL_LIST))
            answer = await account.read_json(response, wire.CALL_LIST)
        return _ListResponse(wire.read_list(answer.document), answer)

    async def _page(self, answer: _ListResponse, assigned: dict[str, dict[str, str]]) -> CallPage:
        parse = partial(
            wire.parse_row,
            org=self._options.org_handle,
            region=self._options.region,
            natural=self._options.record_key == "natural",
            seen_at=self._clock.now(),
        )
        natural = self._options.record_key == "natural"
        rows = wire.number_calls(await parse_rows(answer.listed.data, parse), assigned, natural=natural)
        return CallPage(rows, server_time=answer.response.server_time, size_bytes=answer.response.size_bytes)

    def _path(self, window: Window, *, page: int, page_size: int | None = None) -> str:
        return wire.list_path(
            window,
            page=page,
            page_size=page_size or self._options.page_size,
            margin_days=self._options.date_margin_days,
            form=self._options.date_format,
        )

    def _auth_headers(self) -> Mapping[str, str]:
        return {"Org-Handle": self._options.org_handle, "Authorization": f"Token {self._options.credential()}"}
