"""Pages of lists, newest first. A cursor says where a page ended; it stays good while entries come and go.

A list is an index of the store (a ZSET by time). Filters that no index answers are applied to at most `SCAN_MOST`
entries in one request: the page may then be short, or empty, and still have a cursor.
"""

import base64
import binascii
import heapq
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import orjson
from pydantic import BaseModel, Field
from redis.asyncio import Redis

LIMIT_MOST: Final = 200
SCAN_MOST: Final = 2_000
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{1,400}")

T = TypeVar("T")
Entry = tuple[int, str]
"""When, ms, and which."""


class Page(BaseModel, Generic[T]):
    """A part of a list, newest first."""

    items: list[T]
    next_cursor: str | None = Field(None, description="give it as `cursor` for what follows; null at the end")


class PageQuery(BaseModel):
    """Which part of a list."""

    model_config = {"extra": "forbid", "frozen": True}

    limit: int = Field(50, ge=1, le=LIMIT_MOST, description="most entries in the answer")
    cursor: str | None = Field(None, max_length=400, description="`next_cursor` of the page before")


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """What was found, and after which entry to go on; None at the end."""

    found: Sequence[T]
    upto: Entry | None

    @property
    def next_cursor(self) -> str | None:
        """The cursor of what follows."""
        return None if self.upto is None else write_cursor(self.upto)


def write_cursor(entry: Entry) -> str:
    """Write the place after an entry."""
    return base64.urlsafe_b64encode(orjson.dumps(entry)).rstrip(b"=").decode()


def read_cursor(text: str | None) -> Entry | None:
    """Read what `write_cursor` wrote; a ValueError when it is nothing of ours."""
    if text is None:
        return None
    try:
        if not _CURSOR.fullmatch(text):
            raise ValueError
        at_ms, name = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if type(at_ms) is not int or type(name) is not str or abs(at_ms) > 2**53:
            raise ValueError
    except (ValueError, TypeError, binascii.Error):
        raise ValueError("is no cursor of this list; give next_cursor as it was answered") from None
    return at_ms, name


def after(entries: Sequence[T], place: Callable[[T], Entry], cursor: Entry | None, limit: int) -> Part[T]:
    """Cut a page out of a list that is in memory; `entries` are newest first."""
    rest = entries if cursor is None else [each for each in entries if place(each) < cursor]
    page = list(rest[:limit])
    return Part(page, place(page[-1]) if len(rest) > limit else None)


async def walk(
    redis: Redis,
    indexes: Sequence[str],
    *,
    cursor: Entry | None,
    newest_ms: int | None,
    oldest_ms: int | None,
    step: int,
) -> AsyncIterator[list[Entry]]:
    """Walk over one or more indexes as one, newest first, from behind the cursor, in batches of about `step`."""
    position = cursor
    if newest_ms is not None and (position is None or position[0] > newest_ms):
        position = (newest_ms, "\U0010ffff")
    lowest: float | str = "-inf" if oldest_ms is None else oldest_ms
    while True:
        batch = await _below(redis, indexes, position, lowest, step)
        if not batch:
            return
        yield batch
        position = batch[-1]


async def _below(
    redis: Redis, indexes: Sequence[str], position: Entry | None, lowest: float | str, step: int
) -> list[Entry]:
    """Read the `step` entries that follow a place. Those of the very same ms are told apart by name, descending."""
    highest: float | str = "+inf" if position is None else position[0]
    offsets = dict.fromkeys(indexes, 0)
    found: dict[str, list[Entry]] = {name: [] for name in indexes}
    while offsets:
        async with redis.pipeline(transaction=False) as pipe:
            for name, offset in offsets.items():
                pipe.zrevrangebyscore(name, highest, lowest, start=offset, num=step, withscores=True)
            answers = await pipe.execute()
        again: dict[str, int] = {}
        for (name, offset), rows in zip(offsets.items(), answers, strict=True):
            entries = [(int(score), member.decode()) for member, score in rows]
            found[name] += [entry for entry in entries if position is None or entry < position]
            if len(found[name]) < step and len(rows) == step:
                again[name] = offset + step  # some of them were before the place, of its very ms
        offsets = again
    merged: list[Entry] = []
    for entry in heapq.merge(*found.values(), reverse=True):
        if not merged or merged[-1] != entry:
            merged.append(entry)
        if len(merged) == step:
            break
    return merged


async def page_of(
    redis: Redis,
    indexes: Sequence[str],
    keep: Callable[[Sequence[Entry]], Awaitable[Sequence[T | None]]],
    *,
    limit: int,
    cursor: Entry | None,
    newest_ms: int | None = None,
    oldest_ms: int | None = None,
    scan_most: int | None = None,
) -> Part[T]:
    """Make a page: `keep` reads a batch of entries and gives each as it is answered, or None to leave it out."""
    found: list[T] = []
    most = SCAN_MOST if scan_most is None else scan_most
    looked_at = 0
    upto = cursor
    async for batch in walk(
        redis, indexes, cursor=cursor, newest_ms=newest_ms, oldest_ms=oldest_ms, step=min(limit + 1, 201)
    ):
        for entry, kept in zip(batch, await keep(batch), strict=True):
            if len(found) == limit or looked_at >= most:
                return Part(found, upto)
            looked_at += 1
            upto = entry
            if kept is not None:
                found.append(kept)
    return Part(found, None)
