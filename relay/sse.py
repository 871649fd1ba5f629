"""Parses Server-Sent Events from byte chunks, however the network splits them. Pure.

Follows the WHATWG HTML standard, section "Interpreting an event stream". An event larger than a limit is skipped, and
parsing continues behind it.
"""

import codecs
from dataclasses import dataclass
from typing import Final

MAX_EVENT_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event; `name` is "message" when the stream gives none."""

    data: str
    name: str = "message"


@dataclass(frozen=True, slots=True)
class OversizedEvent:
    """Takes the place of an event that exceeded the size limit and was dropped."""


class SseReader:
    """Parses one stream. `last_id` is what to resume after, `retry_ms` the reconnect delay the server asks for."""

    def __init__(self, last_id: str | None = None, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.last_id = last_id
        self.retry_ms: int | None = None
        self._max_event_bytes = max_event_bytes
        self._id = last_id
        self._name = ""
        self._data: list[str] = []
        self._line = bytearray()
        self._size_bytes = 0
        self._oversized = False
        self._after_cr = False
        self._at_start = True

    def feed(self, chunk: bytes) -> list[ServerSentEvent | OversizedEvent]:
        """Return the events that `chunk` completes; one without its final empty line is dropped (WHATWG)."""
        events: list[ServerSentEvent | OversizedEvent] = []
        if not chunk:
            return events
        # A CR ends a line by itself, so the LF of a CRLF split between two chunks must not end another one.
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._buffer(line)
            if (event := self._end_line()) is not None:
                events.append(event)
        self._buffer(rest)
        return events

    def reconnected(self) -> "SseReader":
        """Return a reader for the stream that resumes this one."""
        reader = SseReader(self.last_id, max_event_bytes=self._max_event_bytes)
        reader.retry_ms = self.retry_ms
        return reader

    def _buffer(self, piece: bytes) -> None:
        self._size_bytes += len(piece)
        if self._oversized or self._size_bytes > self._max_event_bytes:
            self._oversized = True
            self._data.clear()
            # One byte is enough to tell the empty line that ends the event from any other.
            self._line[:] = (self._line + piece)[:1]
        else:
            self._line += piece

    def _end_line(self) -> ServerSentEvent | OversizedEvent | None:
        line = bytes(self._line)
        self._line.clear()
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line:
            return self._dispatch()
        if not self._oversized:
            self._set_field(line.decode("utf-8", "replace"))
        return None

    def _set_field(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "data":
                self._data.append(value)
            case "event":
                self._name = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value[:9])
            case _:
                pass  # comments and unknown fields are ignored

    def _dispatch(self) -> ServerSentEvent | OversizedEvent | None:
        data, name, oversized = self._data, self._name, self._oversized
        self._data, self._name, self._oversized, self._size_bytes = [], "", False, 0
        # Only a dispatched event moves the id, so a stream cut inside an event resumes before it.
        self.last_id = self._id or None
        if oversized:
            return OversizedEvent()
        return ServerSentEvent("\n".join(data), name or "message") if data else None
