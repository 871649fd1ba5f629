"""`relay tail`: print events as they are published."""

from relay.cli.calls import party
from relay.cli.events import SourceOption, SubscriptionOption, TypesOption
from relay.cli.output import local_time
from relay.cli.stream import AfterOption, CountOption, events
from relay.cli.terminal import Terminal, command, new_app
from relay.domain.json import Json

app = new_app()


@command(app, "tail", endless=True)
def tail(
    term: Terminal,
    types: TypesOption = None,
    source: SourceOption = None,
    subscription: SubscriptionOption = None,
    after: AfterOption = None,
    count: CountOption = None,
) -> None:
    """Runs until Ctrl-C. After a disconnection it resumes where it was. With --json each line is one event."""
    query = {"type": types, "source": source, "subscription": subscription}
    for event in events(term, query, after=after, count=count):
        term.out.line(event, event_text(event))


def event_text(event: Json) -> str:
    data = event["data"]
    parts = [local_time(event["timestamp"]), event["type"]]
    if (call := data.get("call")) is not None:
        sides = f"{party('from')(call)} → {party('to')(call)}"
        duration = f"{call['duration_seconds']:g} s" if call["duration_seconds"] is not None else ""
        parts += [call["source_id"], call["direction"], call["outcome"], sides, call["contact"]["name"], duration]
    else:
        about = data.get("source") or data.get("subscription") or {}
        parts += [about.get("id"), about.get("reason") or about.get("error")]
    return "  ".join(part for part in (*parts, event["id"]) if part)
