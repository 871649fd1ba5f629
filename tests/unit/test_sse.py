"""Server-Sent Events are parsed as the WHATWG standard says, whatever the network does to the bytes."""

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.sse import OversizedEvent, ServerSentEvent, SseReader

STREAM = (
    b'\xef\xbb\xbf: hello\r\nid: 0\r\ndata: {"a":1}\r\n\r\n'
    b"event: x\rdata: two\rdata:lines\r\r"
    b"retry: 10\n\ndata\ndata:  spaced \n\n:comment\n\nno colon\ndata: \xc3\xa9\n\n"
    b"id: 7\nevent: gap\ndata: {}\n\nid: 8\ndata: never ended"
)
EVENTS = [
    ServerSentEvent('{"a":1}'),
    ServerSentEvent("two\nlines", "x"),
    ServerSentEvent("\n spaced "),
    ServerSentEvent("é"),
    ServerSentEvent("{}", "gap"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=60))
def test_a_stream_parses_the_same_wherever_it_is_split(cuts: list[int]) -> None:
    """Between CR and LF, inside a character, or into empty chunks; the last id is that of the last whole event."""
    reader = SseReader()
    offsets = [0, *sorted(cuts), len(STREAM)]

    events = [event for a, b in pairwise(offsets) for event in reader.feed(STREAM[a:b])]

    assert events == EVENTS
    assert (reader.last_id, reader.retry_ms) == ("7", 10)


def test_a_reconnected_reader_keeps_the_last_id_and_the_retry_delay() -> None:
    reader = SseReader("6")
    reader.feed(b"retry: 250\nid: 7\ndata: x\n\n")

    reconnected = reader.reconnected()

    assert (reconnected.last_id, reconnected.retry_ms) == ("7", 250)


@pytest.mark.parametrize("chunk_bytes", [1, 3, 1000])
@pytest.mark.parametrize("oversized", [b"data: " + b"x" * 200, b"data: y\n" * 40, b": " + b"z" * 200])
def test_an_oversized_event_is_skipped_and_the_next_one_is_parsed(chunk_bytes: int, oversized: bytes) -> None:
    reader = SseReader(max_event_bytes=100)
    stream = b"data: before\n\n" + oversized + b"\n\ndata: after\n\n"

    events = [
        event for at in range(0, len(stream), chunk_bytes) for event in reader.feed(stream[at : at + chunk_bytes])
    ]

    assert events == [ServerSentEvent("before"), OversizedEvent(), ServerSentEvent("after")]


def test_an_endless_line_takes_no_memory() -> None:
    reader = SseReader(max_event_bytes=1000)
    chunk = b"x" * 1000
    tracemalloc.start()

    for _ in range(1000):
        assert reader.feed(chunk) == []

    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 50_000
