"""`relay explain`: why a call was or was not delivered."""

from typing import Annotated, Final

import typer

from relay.cli.output import Column, Output
from relay.cli.terminal import Terminal, command, new_app
from relay.domain.json import Json
from relay.errors import RelayError

_SUBSCRIPTIONS_SHOWN: Final = 12
COLUMNS: Final = (
    Column("  subscription", lambda fate: f"  {fate['subscription_id']}"),
    Column("event", "event_type"),
    Column("status", "fate"),
    Column("why", "why"),
)

app = new_app()


class CallNotFound(RelayError):
    """The relay has no such call; the text says how each source is doing."""


@command(app, "explain")
def explain(
    term: Terminal,
    about: Annotated[str, typer.Argument(help="ID of the call, the provider's own ID of it, or a phone number.")],
    source: Annotated[str | None, typer.Option(help="Only of this source.")] = None,
) -> None:
    """Shows when the call was first seen, its contact and recording, and the delivery to each subscription."""
    explanation = term.api.get("/v1/explain", about=about, source=source)
    if term.out.as_json:
        term.out.result(explanation)
    else:
        for number, item in enumerate(explanation["items"]):
            if number:
                term.out.result(None, "")
            _write(term.out, item)
    if explanation["items"]:
        return
    lines = [f"No call found for {about}."]
    lines += [f"  {source['source_id']}: {source['words']}" for source in explanation["sources"]]
    if not explanation["sources"]:
        lines.append("  No sources are configured, so no provider is polled.")
    raise CallNotFound("\n".join(lines))


def _write(out: Output, item: Json) -> None:
    lines = [
        f"{item['call_id']}  ({item['provider_call_id']} of {item['source_id']})",
        f"  {item['summary']}",
        f"  seen       {item['seen']}",
    ]
    if item["verdict"] != "not_a_call":
        lines += [f"  contact    {item['contact']}", f"  recording  {item['recording']}"]
    out.result(None, *lines)
    if not item["subscriptions"]:
        return
    # Failures first: of hundreds of subscriptions only a few are shown.
    subscriptions = sorted(item["subscriptions"], key=lambda fate: fate["fate"] in ("filtered", "delivered"))
    out.table({"items": subscriptions[:_SUBSCRIPTIONS_SHOWN]}, COLUMNS, empty="")
    hidden = max(len(subscriptions) - _SUBSCRIPTIONS_SHOWN, 0) + item["left_out"]
    if hidden:
        out.note(f"  and {hidden} more; --json shows them")
