"""Server-sent events out of bytes, wherever the network cuts them: pure, with ids, so that a stream can be resumed.

The rules are those of the WHATWG HTML standard, "Interpreting an event stream".
"""

import codecs
from dataclasses import dataclass
from typing import Final

LARGEST_EVENT_CHARS: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event."""

    name: str
    data: str


class EventReader:
    """Reads a stream; `last_id` is where to go on, `retry_ms` what the server asks for between two tries."""

    def __init__(self, last_id: str | None = None) -> None:
        self.last_id = last_id
        self.retry_ms: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._id = last_id
        self._name = ""
        self._data: list[str] = []
        self._size = 0
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Take bytes in; gives the events that they complete."""
        text = self._decoder.decode(chunk)
        if text and self._after_cr:
            text = text.removeprefix("\n")
        if text:
            self._after_cr = text.endswith("\r")
        *lines, self._rest = (self._rest + text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
        if len(self._rest) > LARGEST_EVENT_CHARS:
            raise ValueError("a line of the stream is larger than 1 MiB")
        events: list[Event] = []
        for line in lines:
            event = self._take(line)
            if event is not None:
                events.append(event)
        return events

    def _take(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._size += len(value)
                if self._size > LARGEST_EVENT_CHARS:
                    raise ValueError("an event of the stream is larger than 1 MiB")
                self._data.append(value)
            case "event":
                self._name = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value[:9])
            case _:
                pass
        return None

    def _dispatch(self) -> Event | None:
        name, data = self._name, self._data
        self._name, self._data, self._size = "", [], 0
        self.last_id = self._id or None
        return Event(name or "message", "\n".join(data)) if data else None

    def again(self) -> "EventReader":
        """Make a reader for the stream that is opened after this one broke off."""
        reader = EventReader(self.last_id)
        reader.retry_ms = self.retry_ms
        return reader
