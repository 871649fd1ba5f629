"""`relay explain`: why did this call not arrive."""

from typing import Annotated, Final

import typer

from relay.cli.output import Column
from relay.cli.terminal import Terminal
from relay.domain.json import Json
from relay.errors import RelayError

_SHOWN: Final = 12


class NothingKnown(RelayError):
    """Nothing is known of what was asked for."""


async def explain(
    term: Terminal,
    about: Annotated[str, typer.Argument(help="id of the call, the provider's own id of it, or a number")],
    source: Annotated[str | None, typer.Option(help="only of this source")] = None,
) -> None:
    """Say why a call did or did not arrive: when it was seen, contact, audio, and what became of it for each
    subscription."""
    found = await term.api.get("/v1/explain", about=about, source=source)
    if term.out.as_json:
        term.out.answer(found)
    else:
        for number, item in enumerate(found["items"]):
            if number:
                term.out.answer(None, "")
            _tell(term, item)
    if found["items"]:
        return
    lines = [f"No call like {about} is known."]
    lines += [f"  {each['source_id']}: {each['words']}" for each in found["sources"]]
    if not found["sources"]:
        lines.append("  There are no sources: nobody is asked for calls.")
    raise NothingKnown("\n".join(lines))


def _tell(term: Terminal, item: Json) -> None:
    out = term.out
    lines = [
        f"{item['call_id']}  ({item['provider_call_id']} of {item['source_id']})",
        f"  {item['summary']}",
        f"  seen       {item['seen']}",
    ]
    if item["verdict"] != "not_a_call":
        lines += [f"  contact    {item['contact']}", f"  recording  {item['recording']}"]
    out.answer(None, *lines)
    if not item["subscriptions"]:
        return
    columns = (
        Column("  subscription", lambda fate: f"  {fate['subscription_id']}"),
        Column("event", "event_type"),
        Column("", "fate"),
        Column("why", "why"),
    )
    interesting = sorted(item["subscriptions"], key=lambda fate: fate["fate"] in ("filtered", "delivered"))
    out.table({"items": interesting[:_SHOWN]}, columns, empty="")
    hidden = len(interesting) - _SHOWN + item["left_out"] if len(interesting) > _SHOWN else item["left_out"]
    if hidden:
        out.note(f"  and {hidden} more; --json shows them")
