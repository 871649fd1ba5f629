"""Pages of lists, newest first. A cursor names the last entry of a page, so it stays valid while entries come and go.

Filters that no index of the store answers are applied to at most `SCAN_LIMIT` entries in one request: the page may then
be short, or empty, and still have a cursor.
"""

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import orjson
from pydantic import BaseModel, Field

from relay.api.problems import invalid
from relay.store.listings import Entry, Listing

MAX_LIMIT: Final = 200
SCAN_LIMIT: Final = 2_000
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{1,400}")

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """A part of a list, newest first."""

    items: list[T]
    next_cursor: str | None = Field(None, description="pass it as `cursor` to get the next page; null at the end")


class PageQuery(BaseModel):
    """Which part of a list."""

    model_config = {"extra": "forbid", "frozen": True}

    limit: int = Field(50, ge=1, le=MAX_LIMIT, description="maximum number of entries")
    cursor: str | None = Field(None, max_length=400, description="`next_cursor` of the previous page")


@dataclass(frozen=True, slots=True)
class PageSlice(Generic[T]):
    """Entries of a page before they are rendered, and the cursor of the next page."""

    items: Sequence[T]
    next_cursor: str | None


def encode_cursor(entry: Entry) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(entry)).rstrip(b"=").decode()


def decode_cursor(text: str | None) -> Entry | None:
    if text is None:
        return None
    try:
        if not _CURSOR.fullmatch(text):
            raise ValueError
        at_ms, name = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if type(at_ms) is not int or type(name) is not str or abs(at_ms) > 2**53:
            raise ValueError
    except (ValueError, TypeError, binascii.Error):
        raise invalid("cursor", "is not a valid cursor of this list; pass next_cursor unchanged") from None
    return at_ms, name


def page_of_items(items: Sequence[T], entry_of: Callable[[T], Entry], query: PageQuery) -> PageSlice[T]:
    """Cut a page out of a list in memory, in any order; `entry_of` gives each item's place in the order."""
    cursor = decode_cursor(query.cursor)
    remaining = sorted(
        (item for item in items if cursor is None or entry_of(item) < cursor), key=entry_of, reverse=True
    )
    page = remaining[: query.limit]
    return PageSlice(page, encode_cursor(entry_of(page[-1])) if len(remaining) > query.limit else None)


async def page_of_listing(
    listing: Listing,
    read: Callable[[Sequence[Entry]], Awaitable[Sequence[T | None]]],
    query: PageQuery,
    *,
    newest_ms: int | None = None,
    oldest_ms: int | None = None,
    scan_limit: int | None = None,
) -> PageSlice[T]:
    """Read a page of a list of the store: `read` turns a batch of entries into items, None for those to leave out."""
    items: list[T] = []
    last = decode_cursor(query.cursor)
    scanned, limit = 0, SCAN_LIMIT if scan_limit is None else scan_limit
    # One entry more than the page has, to know whether another page follows.
    async for batch in listing.newest_first(
        after=last, newest_ms=newest_ms, oldest_ms=oldest_ms, batch=min(query.limit + 1, MAX_LIMIT + 1)
    ):
        for entry, item in zip(batch, await read(batch), strict=True):
            if len(items) == query.limit or scanned >= limit:
                return PageSlice(items, None if last is None else encode_cursor(last))
            scanned += 1
            last = entry
            if item is not None:
                items.append(item)
    return PageSlice(items, None)
