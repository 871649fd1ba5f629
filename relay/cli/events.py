"""`relay events`, and `relay tail`: what was told, and what is told just now."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import typer

from relay.cli.calls import party
from relay.cli.output import Column, time_text, when
from relay.cli.terminal import Limit, Since, Terminal, Until, command, group, moment
from relay.domain.json import Json
from relay.sse import OversizedEvent, ServerSentEvent, SseReader

SILENCE_S: Final = 60.0
"""The relay says something at least every 15 s; a stream that is silent for so long is dead."""
_FIRST_WAIT_MS: Final = 1_000
_LONGEST_WAIT_MS: Final = 30_000

app = group("events", "What is told of calls.")

EventId = Annotated[str, typer.Argument(metavar="ID", help="id of the event")]
Types = Annotated[list[str] | None, typer.Option("--type", "-t", help="only these types; * is a wildcard")]
OfSource = Annotated[str | None, typer.Option("--source", help="only of this source")]
OfSubscription = Annotated[str | None, typer.Option("--subscription", help="only what this subscription is told")]
After = Annotated[str | None, typer.Option("--after", metavar="EVENT", help="go on after this event")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="end after so many events; absent: Ctrl-C")]


def of_call(value: str) -> Any:
    """Make a column of what an event says of its call."""

    def read(item: Json) -> Any:
        call = item["data"].get("call")
        return None if call is None else Column("", value).text(call)

    return read


COLUMNS: Final = (
    Column("event", "id"),
    Column("at", when("timestamp")),
    Column("type", "type"),
    Column("source", of_call("source_id")),
    Column("direction", of_call("direction")),
    Column("outcome", of_call("outcome")),
    Column("call", of_call("id")),
)


@command(app, "list")
async def list_(
    term: Terminal,
    type_: Types = None,
    source: OfSource = None,
    call: Annotated[str | None, typer.Option(help="only of this call")] = None,
    subscription: OfSubscription = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 50,
) -> None:
    """List events."""
    page = await term.api.some(
        "/v1/events",
        limit=limit,
        type=type_,
        source=source,
        call=call,
        subscription=subscription,
        **{"from": moment(since, name="--since"), "to": moment(until, name="--until")},
    )
    term.out.table(page, COLUMNS, empty="There are no events like that.")


@command(app, "show")
async def show(term: Terminal, event_id: EventId) -> None:
    """Show an event."""
    from relay.cli.client import path_of

    term.out.details(await term.api.get(path_of("events", event_id)))


@command(app, "types")
async def types(term: Terminal) -> None:
    """List the types that there are; --json has the schema and a sample of each."""
    found = await term.api.get("/v1/event-types")
    if term.out.as_json:
        term.out.answer(found)
    else:
        columns = (Column("type", "type"), Column("when", "description"))
        term.out.table({"items": found}, columns, empty="")


async def tail(
    term: Terminal,
    type_: Types = None,
    source: OfSource = None,
    subscription: OfSubscription = None,
    after: After = None,
    count: Count = None,
) -> None:
    """Show events as they are made, until Ctrl-C; what was missed while away is fetched. --json is a line an event."""
    query = {"type": type_, "source": source, "subscription": subscription}
    async for document in follow(term, query, after=after):
        term.out.line(document, sentence(document))
        if count is not None:
            count -= 1
            if count == 0:
                return


async def follow(term: Terminal, query: Any, *, after: str | None) -> AsyncIterator[Json]:
    """Follow the stream of events for ever: where it breaks off it is opened again, behind the last event.

    What cannot be reached at first, or is refused, is raised.
    """
    import asyncio

    from relay.cli.client import NotARelay, Refused, Unanswered

    reader = SseReader(after)
    opened = False
    failures = 0
    while True:
        why = "the stream ended"
        try:
            async with term.api.stream(
                "/v1/events/stream", query=query, last_event_id=reader.last_id, silence_s=SILENCE_S
            ) as chunks:
                if not opened:
                    term.out.note(f"Listening at {term.api.target.url} …")
                elif failures:
                    term.out.note("Listening again.")
                opened, failures = True, 0
                reader = reader.reconnected()
                async for chunk in chunks:
                    for event in reader.feed(chunk):
                        if (document := _read(term, event)) is not None:
                            yield document
        except ValueError as error:
            raise NotARelay(f"the stream of {term.api.target.url} cannot be read: {error}") from None
        except Unanswered as error:
            if not opened:
                raise
            why = str(error)
        except Refused as refused:
            if not opened or refused.status not in (429, 503):
                raise
            why = str(refused)
        failures += 1
        if failures == 1:
            term.out.note(f"No longer listening: {why}. Trying again …")
        first_ms = _FIRST_WAIT_MS if reader.retry_ms is None else reader.retry_ms
        await asyncio.sleep(min(first_ms * 2 ** min(failures - 1, 10), _LONGEST_WAIT_MS) / 1000)


def _read(term: Terminal, event: ServerSentEvent | OversizedEvent) -> Json | None:
    """Read one event of the stream; what the stream says about itself is only noted."""
    if isinstance(event, OversizedEvent):
        raise ValueError("an event is larger than 1 MiB")
    document: Json = json.loads(event.data)
    if event.name == "gap":
        missed = document.get("missed")
        many = "some" if missed is None else f"{missed:,}"
        term.out.note(f"{many} events were made meanwhile and are not shown here; `relay events list` has them.")
        return None
    return document


def sentence(event: Json) -> str:
    """Say what an event tells, in a line."""
    at, type_, data = time_text(event["timestamp"]), event["type"], event["data"]
    call = data.get("call")
    if call is not None:
        talk = f"{call['duration_seconds']:g} s" if call["duration_seconds"] is not None else ""
        name = call["contact"]["name"] or ""
        sides = f"{party('from')(call)} → {party('to')(call)}"
        words = [at, type_, call["source_id"], call["direction"], call["outcome"], sides, name, talk, event["id"]]
    else:
        about = data.get("source") or data.get("subscription") or {}
        words = [at, type_, about.get("id", ""), about.get("reason") or about.get("error") or "", event["id"]]
    return "  ".join(word for word in words if word)
