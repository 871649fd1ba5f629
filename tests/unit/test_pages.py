"""Cursors and pages: pure rules, and the walk over indexes of a real store."""

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from relay.api.paging import Entry, after, page_of, read_cursor, walk, write_cursor

entries = st.tuples(st.integers(min_value=-(2**53), max_value=2**53), st.text(max_size=60))


@given(entries)
def test_a_cursor_comes_back_as_it_was(entry: Entry) -> None:
    """Whatever the time and the name."""
    text = write_cursor(entry)

    assert text.isascii()
    if len(text) <= 400:
        assert read_cursor(text) == entry


@given(st.text(max_size=100) | st.binary(max_size=60).map(lambda raw: raw.hex()))
def test_nonsense_is_refused_in_a_sentence(text: str) -> None:
    """A cursor that is not ours is a ValueError and nothing else."""
    with contextlib.suppress(ValueError):
        assert read_cursor(text) == read_cursor(write_cursor(read_cursor(text) or (0, "")))


@pytest.mark.parametrize(
    "document", ["W10", "WzEsMl0", "bnVsbA", "WyJhIiwiYiJd", "WzFlOTk5LCJhIl0", "WzEuNSwiYSJd", "=", ""]
)
def test_what_only_looks_like_a_cursor_is_refused(document: str) -> None:
    """Lists of the wrong things, too."""
    with pytest.raises(ValueError, match="cursor"):
        read_cursor(document)


@given(st.sets(st.tuples(st.integers(0, 5), st.text("abc", min_size=1, max_size=3)), max_size=40), st.integers(1, 7))
def test_pages_of_a_list_in_memory_are_the_list(found: set[Entry], limit: int) -> None:
    """Each entry once, in order, however long a page is."""
    listed = sorted(found, reverse=True)
    seen: list[Entry] = []
    cursor: Entry | None = None
    while True:
        part = after(listed, lambda entry: entry, cursor, limit)
        seen += part.found
        if part.upto is None:
            break
        cursor = part.upto

    assert seen == listed


async def _all_pages(redis: Redis, indexes: Sequence[str], limit: int, scan_most: int) -> list[str]:
    async def keep(batch: Sequence[Entry]) -> list[str | None]:
        return [name if not name.startswith("x") else None for _, name in batch]

    seen: list[str] = []
    cursor: Entry | None = None
    for _ in range(1000):
        part = await page_of(redis, indexes, keep, limit=limit, cursor=cursor, scan_most=scan_most)
        assert len(part.found) <= limit
        seen += part.found
        if part.upto is None:
            return seen
        cursor = read_cursor(part.next_cursor)
    raise AssertionError("the pages never end")


@pytest.mark.parametrize(("limit", "scan_most"), [(1, 1), (2, 3), (7, 2000), (200, 2000)])
async def test_pages_over_several_indexes_are_all_entries_once(redis: Redis, limit: int, scan_most: int) -> None:
    """Ties, entries that are in two indexes, entries that are left out, an index that is not there."""
    one = {f"a{number}": number // 10 for number in range(30)} | {"both": 1, "x1": 2}
    two = {f"b{number}": 1 for number in range(25)} | {"both": 1, "x2": 0}
    await redis.zadd("one", one)
    await redis.zadd("two", two)

    seen = await _all_pages(redis, ["one", "two", "none"], limit, scan_most)

    expected = sorted({(at, name) for index in (one, two) for name, at in index.items()}, reverse=True)
    assert seen == [name for _, name in expected if not name.startswith("x")]


async def test_a_range_of_time_is_heeded(redis: Redis) -> None:
    """Both ends belong to it."""
    await redis.zadd("one", {str(number): number for number in range(10)})

    found = [batch async for batch in walk(redis, ["one"], cursor=None, newest_ms=7, oldest_ms=5, step=2)]

    assert [name for batch in found for _, name in batch] == ["7", "6", "5"]


async def test_a_page_costs_what_it_shows(redis: Redis) -> None:
    """A page reads a batch or two of the index, however long the index is."""
    await redis.zadd("long", {f"{number:06d}": number for number in range(50_000)})
    reads: list[int] = []

    async def keep(batch: Sequence[Entry]) -> list[str]:
        reads.append(len(batch))
        return [name for _, name in batch]

    part = await page_of(redis, ["long"], keep, limit=50, cursor=(25_000, "025000"))

    assert part.found[0] == "024999"
    assert sum(reads) <= 2 * 51
