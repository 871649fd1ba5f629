"""`relay deliveries`: events on their way to subscriptions."""

from typing import Annotated, Final

import typer

from relay.cli.output import Column, when
from relay.cli.terminal import Limit, Terminal, command, group

app = group("deliveries", "Events on their way to subscriptions.")

DeliveryId = Annotated[str, typer.Argument(metavar="ID", help="event and subscription, with a dot between")]
COLUMNS: Final = (
    Column("delivery", "id"),
    Column("status", "status"),
    Column("attempts", "attempts"),
    Column("queued", when("queued_at")),
    Column("last attempt", when("last_attempt_at")),
    Column("next attempt", when("next_attempt_at")),
)
WORDS: Final = {
    "queued": "is on its way again",
    "waiting_already": "is on its way already",
    "delivered_already": "was delivered already; --force sends it again",
}


@command(app, "list")
async def list_(
    term: Terminal,
    subscription: Annotated[str | None, typer.Option(help="only to this subscription")] = None,
    event: Annotated[str | None, typer.Option(help="only of this event")] = None,
    status: Annotated[
        list[str] | None, typer.Option(help="waiting, delivered, exhausted, missing, unknown, expired, …")
    ] = None,
    limit: Limit = 50,
) -> None:
    """List deliveries."""
    page = await term.api.some("/v1/deliveries", limit=limit, subscription=subscription, event=event, status=status)
    term.out.table(page, COLUMNS, empty="There are no deliveries like that.")


@command(app, "show")
async def show(term: Terminal, delivery_id: DeliveryId) -> None:
    """Show a delivery with its attempts."""
    from relay.cli.client import path_of

    delivery = await term.api.get(path_of("deliveries", delivery_id))
    term.out.details(delivery)


@command(app, "retry")
async def retry(
    term: Terminal,
    delivery_id: DeliveryId,
    force: Annotated[bool, typer.Option("--force", help="also when it was delivered")] = False,
) -> None:
    """Try again now, in its old place of the call's order; its schedule begins anew."""
    from relay.cli.client import path_of

    result = await term.api.post(path_of("deliveries", delivery_id, "retry"), {"force": force})
    term.out.answer(result, f"{delivery_id} {WORDS[result['result']]}")
