"""`relay deliveries`: events on their way to subscriptions."""

from typing import Annotated, Final

import typer

from relay.cli.client import path_of
from relay.cli.output import Column, time_at
from relay.cli.terminal import LimitOption, Terminal, command, new_app

app = new_app()

DeliveryId = Annotated[str, typer.Argument(metavar="ID", help="EVENT.SUBSCRIPTION: the two IDs joined by a dot.")]
COLUMNS: Final = (
    Column("delivery", "id"),
    Column("status", "status"),
    Column("attempts", "attempts"),
    Column("queued", time_at("queued_at")),
    Column("last attempt", time_at("last_attempt_at")),
    Column("next attempt", time_at("next_attempt_at")),
)
# What the API did with a delivery that was to be sent again.
RESULTS: Final = {
    "queued": "is queued again",
    "waiting_already": "is already waiting for its next attempt",
    "delivered_already": "was already delivered; --force sends it again",
}


@command(app, "list")
def list_(
    term: Terminal,
    subscription: Annotated[str | None, typer.Option(help="Only to this subscription.")] = None,
    event: Annotated[str | None, typer.Option(help="Only of this event.")] = None,
    status: Annotated[
        list[str] | None, typer.Option(help="waiting, delivered, exhausted, missing, unknown, expired, …")
    ] = None,
    limit: LimitOption = 50,
) -> None:
    """List deliveries, newest first."""
    page = term.api.newest("/v1/deliveries", limit=limit, subscription=subscription, event=event, status=status)
    term.out.table(page, COLUMNS, empty="No matching deliveries.")


@command(app, "show")
def show(term: Terminal, delivery_id: DeliveryId) -> None:
    """Show a delivery and its attempts."""
    term.out.details(term.api.get(path_of("deliveries", delivery_id)))


@command(app, "retry")
def retry(
    term: Terminal,
    delivery_id: DeliveryId,
    force: Annotated[bool, typer.Option("--force", help="Even if it was delivered.")] = False,
) -> None:
    """Deliver again, in its place in the order of its call; the retry schedule restarts."""
    result = term.api.post(path_of("deliveries", delivery_id, "retry"), {"force": force})
    term.out.result(result, f"{delivery_id} {RESULTS[result['result']]}")
