"""The live stream of events, as `relay tail` and `relay listen` follow it."""

import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Final

import typer

from relay.cli.client import ApiError, Query, RelayUnreachable, UnexpectedServer
from relay.cli.terminal import Terminal
from relay.domain.json import Json
from relay.sse import OversizedEvent, ServerSentEvent, SseReader

# The relay sends a comment at least every 15 s; a stream that is silent for this long is dead.
SILENCE_S: Final = 60.0
_FIRST_RETRY_MS: Final = 1_000
_LONGEST_RETRY_MS: Final = 30_000

AfterOption = Annotated[str | None, typer.Option("--after", metavar="EVENT", help="Resume after this event.")]
CountOption = Annotated[int | None, typer.Option("--count", "-n", min=1, help="Exit after this many events.")]


def events(term: Terminal, query: Query, *, after: str | None, count: int | None) -> Iterator[Json]:
    return islice(_follow(term, query, after=after), count)


def _follow(term: Terminal, query: Query, *, after: str | None) -> Iterator[Json]:
    """Yield events for ever: a stream that breaks is reopened after the last event, unless it never opened at all."""
    reader = SseReader(after)
    opened = False
    failures = 0
    while True:
        reason = "the stream ended"
        try:
            with term.api.stream(
                "/v1/events/stream", query=query, last_event_id=reader.last_id, silence_s=SILENCE_S
            ) as chunks:
                term.out.note("Reconnected." if opened else f"Listening at {term.api.target.url} …")
                opened, failures = True, 0
                reader = reader.reconnected()
                for chunk in chunks:
                    for event in reader.feed(chunk):
                        if (document := _document(term, event)) is not None:
                            yield document
        except ValueError as error:
            raise UnexpectedServer(f"the stream of {term.api.target.url} cannot be read: {error}") from None
        except RelayUnreachable as error:
            if not opened:
                raise
            reason = str(error)
        except ApiError as error:
            if not opened or error.status not in (429, 503):
                raise
            reason = str(error)
        failures += 1
        if failures == 1:
            term.out.note(f"Disconnected: {reason}. Reconnecting …")
        first_ms = _FIRST_RETRY_MS if reader.retry_ms is None else reader.retry_ms
        time.sleep(min(first_ms * 2 ** min(failures - 1, 10), _LONGEST_RETRY_MS) / 1000)


def _document(term: Terminal, event: ServerSentEvent | OversizedEvent) -> Json | None:
    """Return the event, or None for what the stream reports about itself, which becomes a note."""
    if isinstance(event, OversizedEvent):
        raise ValueError("an event is larger than 1 MiB")
    document: Json = json.loads(event.data)
    if event.name == "gap":
        missed = document.get("missed")
        many = "Some" if missed is None else f"{missed:,}"
        term.out.note(f"{many} events published meanwhile are not shown here; `relay events list` has them.")
        return None
    return document
