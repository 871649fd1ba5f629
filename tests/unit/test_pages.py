"""Cursors and pages: pure rules, and pages of lists of a real store."""

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from relay.api.paging import PageQuery, decode_cursor, encode_cursor, page_of_items, page_of_listing
from relay.api.problems import Problem
from relay.store.listings import Entry, Listing

entries = st.tuples(st.integers(min_value=-(2**53), max_value=2**53), st.text(max_size=60))


@given(entries)
def test_a_cursor_survives_its_encoding(entry: Entry) -> None:
    """Whatever the time and the id."""
    text = encode_cursor(entry)

    assert text.isascii()
    if len(text) <= 400:
        assert decode_cursor(text) == entry


@given(st.text(max_size=100) | st.binary(max_size=60).map(lambda raw: raw.hex()))
def test_an_invalid_cursor_is_a_problem(text: str) -> None:
    """A cursor that is not ours is an `invalid` problem and nothing else."""
    with contextlib.suppress(Problem):
        assert decode_cursor(text) == decode_cursor(encode_cursor(decode_cursor(text) or (0, "")))


@pytest.mark.parametrize(
    "document", ["W10", "WzEsMl0", "bnVsbA", "WyJhIiwiYiJd", "WzFlOTk5LCJhIl0", "WzEuNSwiYSJd", "=", ""]
)
def test_what_only_looks_like_a_cursor_is_refused(document: str) -> None:
    """Lists of the wrong types, too."""
    with pytest.raises(Problem) as caught:
        decode_cursor(document)

    assert caught.value.code == "invalid"
    assert "cursor" in caught.value.detail


@given(st.sets(st.tuples(st.integers(0, 5), st.text("abc", min_size=1, max_size=3)), max_size=40), st.integers(1, 7))
def test_pages_of_a_list_in_memory_are_the_list(items: set[Entry], limit: int) -> None:
    """Each entry once, in order, whatever the page size."""
    listed: list[Entry] = []
    cursor: str | None = None
    while True:
        page = page_of_items(list(items), lambda entry: entry, PageQuery(limit=limit, cursor=cursor))
        listed += page.items
        cursor = page.next_cursor
        if cursor is None:
            break

    assert listed == sorted(items, reverse=True)


async def _all_pages(listing: Listing, limit: int, scan_limit: int) -> list[str]:
    async def read(batch: Sequence[Entry]) -> list[str | None]:
        return [name if not name.startswith("x") else None for _, name in batch]

    items: list[str] = []
    cursor: str | None = None
    for _ in range(1000):
        page = await page_of_listing(listing, read, PageQuery(limit=limit, cursor=cursor), scan_limit=scan_limit)
        assert len(page.items) <= limit
        items += page.items
        cursor = page.next_cursor
        if cursor is None:
            return items
    raise AssertionError("the pages never end")


@pytest.mark.parametrize(("limit", "scan_limit"), [(1, 1), (2, 3), (7, 2000), (200, 2000)])
async def test_pages_over_several_indexes_have_every_entry_once(redis: Redis, limit: int, scan_limit: int) -> None:
    """Ties, entries in two indexes, entries that are filtered out, a missing index."""
    one = {f"a{number}": number // 10 for number in range(30)} | {"both": 1, "x1": 2}
    two = {f"b{number}": 1 for number in range(25)} | {"both": 1, "x2": 0}
    await redis.zadd("one", one)
    await redis.zadd("two", two)

    listed = await _all_pages(Listing(redis, ("one", "two", "none")), limit, scan_limit)

    expected = sorted({(at, name) for index in (one, two) for name, at in index.items()}, reverse=True)
    assert listed == [name for _, name in expected if not name.startswith("x")]


async def test_a_time_range_includes_both_ends(redis: Redis) -> None:
    """`from` and `to` are inclusive."""
    await redis.zadd("one", {str(number): number for number in range(10)})

    batches = [batch async for batch in Listing(redis, ("one",)).newest_first(newest_ms=7, oldest_ms=5, batch=2)]

    assert [name for batch in batches for _, name in batch] == ["7", "6", "5"]


async def test_a_page_costs_what_it_shows(redis: Redis) -> None:
    """A page reads a batch or two of the index, however long the index is."""
    await redis.zadd("long", {f"{number:06d}": number for number in range(50_000)})
    batch_sizes: list[int] = []

    async def read(batch: Sequence[Entry]) -> list[str]:
        batch_sizes.append(len(batch))
        return [name for _, name in batch]

    query = PageQuery(limit=50, cursor=encode_cursor((25_000, "025000")))
    page = await page_of_listing(Listing(redis, ("long",)), read, query)

    assert page.items[0] == "024999"
    assert sum(batch_sizes) <= 2 * 51
