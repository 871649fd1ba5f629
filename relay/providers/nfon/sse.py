"""Server-Sent Events out of bytes, wherever the network cuts them. Pure.

The rules are those of the WHATWG HTML standard, "Interpreting an event stream". An event that grows beyond a cap is
left out, and reading goes on after it. Ids, names and `retry` are read over: nothing is resumed by them.
"""

import codecs
from dataclasses import dataclass
from typing import Final

LARGEST_EVENT_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event: what its `data` lines hold."""

    data: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """An event of more than LARGEST_EVENT_BYTES was here; nothing of it was kept."""


class EventReader:
    """Reads one stream."""

    def __init__(self, *, largest_bytes: int = LARGEST_EVENT_BYTES) -> None:
        self._largest_bytes = largest_bytes
        self._line = bytearray()
        self._data: list[str] = []
        self._size_bytes = 0
        self._too_large = False
        self._after_cr = False
        self._begun = False

    def feed(self, chunk: bytes) -> list[Event | TooLarge]:
        """Take bytes in; gives the events that they complete. What never gets its empty line is no event."""
        events: list[Event | TooLarge] = []
        if not chunk:
            return events
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._take(line)
            event = self._end_of_line()
            if event is not None:
                events.append(event)
        self._take(rest)
        return events

    def _take(self, piece: bytes) -> None:
        self._size_bytes += len(piece)
        if self._too_large or self._size_bytes > self._largest_bytes:
            self._too_large = True
            self._data.clear()
            # Enough to know an empty line from one that is not.
            self._line[:] = (self._line + piece)[:1]
        else:
            self._line += piece

    def _end_of_line(self) -> Event | TooLarge | None:
        line = bytes(self._line)
        self._line.clear()
        if not self._begun:
            self._begun = True
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line:
            return self._dispatch()
        if not self._too_large:
            self._field(line.decode("utf-8", "replace"))
        return None

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))

    def _dispatch(self) -> Event | TooLarge | None:
        data, too_large = self._data, self._too_large
        self._data, self._too_large, self._size_bytes = [], False, 0
        if too_large:
            return TooLarge()
        return Event("\n".join(data)) if data else None
