"""`relay subscriptions`: who hears what."""

import time
from typing import Annotated, Any, Final

import typer

from relay.cli import arguments
from relay.cli.output import Column, when
from relay.cli.terminal import Limit, Terminal, Yes, command, group
from relay.domain.json import Json
from relay.errors import RelayError, SettingsError

app = group("subscriptions", "Who hears what, and where.")

SubscriptionId = Annotated[str, typer.Argument(metavar="ID", help="id of the subscription")]
COLUMNS: Final = (
    Column("subscription", "id"),
    Column("host", "host"),
    Column("state", lambda item: "resting" if item["resting"] and item["state"] == "enabled" else item["state"]),
    Column("events", "options.events"),
    Column("from", "origin"),
    Column("tenant", "tenant"),
    Column("last heard", when("last_heard_at")),
    Column("failing since", when("failing_since")),
    Column("why off", "disabled_reason"),
)
_LOOK_EVERY_S: Final = 0.2


class NotHeard(RelayError):
    """The subscriber did not take the test."""


@command(app, "list")
async def list_(
    term: Terminal,
    state: Annotated[str | None, typer.Option(help="enabled or disabled")] = None,
    limit: Limit = 50,
) -> None:
    """List the subscriptions and how they are."""
    page = await term.api.some("/v1/subscriptions", limit=limit, state=state)
    term.out.table(page, COLUMNS, empty="There are no subscriptions: `relay subscriptions create URL`.")


@command(app, "show")
async def show(term: Terminal, subscription_id: SubscriptionId) -> None:
    """Show a subscription."""
    from relay.cli.client import path_of

    term.out.details(await term.api.get(path_of("subscriptions", subscription_id)))


@command(app, "create")
async def create(
    term: Terminal,
    hook: Annotated[str, typer.Argument(metavar="HOOK", help="where events are posted to; @file and @- read it")],
    subscription_id: Annotated[str | None, typer.Option("--id", help="an id of your own; absent: one is made")] = None,
    events: Annotated[list[str] | None, typer.Option("--events", help="event types; * is a wildcard")] = None,
    source: Annotated[list[str] | None, typer.Option("--source", help="only calls of this source")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="only inbound, outbound or internal calls")] = None,
    outcome: Annotated[list[str] | None, typer.Option(help="only calls that ended like this")] = None,
    extension: Annotated[list[str] | None, typer.Option(help="only calls of this extension")] = None,
    payload: Annotated[str | None, typer.Option(help="full or flat; a map goes into --set payload={…}")] = None,
    tenant: Annotated[str | None, typer.Option(help="whose it is")] = None,
    settings: arguments.Set = None,
    file: arguments.File = None,
) -> None:
    """Subscribe. The signing secret is made and shown once, unless one is given with --set secret=@file."""
    body = arguments.options(settings, file) | {"url": arguments.value(hook, name="HOOK")}
    named: dict[str, Any] = {
        "id": subscription_id,
        "events": events,
        "sources": source,
        "direction": direction,
        "outcome": outcome,
        "extensions": extension,
        "payload": payload,
        "tenant": tenant,
    }
    body |= {name: value for name, value in named.items() if value}
    made = await term.api.post("/v1/subscriptions", body)
    words = [f"{made['id']} is made", f"secret: {made['secret']}  (shown this once)"]
    term.out.answer(made, *words, *made["warnings"], f"`relay subscriptions test {made['id']}` sends it a test")


@command(app, "update")
async def update(
    term: Terminal, subscription_id: SubscriptionId, settings: arguments.Set = None, file: arguments.File = None
) -> None:
    """Change some options; --set name=null gives one back to its default."""
    from relay.cli.client import path_of

    body = arguments.options(settings, file)
    _, changed = await term.api.ask("PATCH", path_of("subscriptions", subscription_id), body=body)
    term.out.answer(changed, f"{subscription_id} is changed", *changed["warnings"])


@command(app, "delete")
async def delete(term: Terminal, subscription_id: SubscriptionId, yes: Yes = False) -> None:
    """Unsubscribe: nothing more is sent, what waits is dropped."""
    from relay.cli.client import path_of

    term.confirm(f"Remove {subscription_id}, and drop what waits for it?", yes=yes)
    await term.api.ask("DELETE", path_of("subscriptions", subscription_id))
    term.out.answer({"id": subscription_id, "deleted": True}, f"{subscription_id} is gone")


@command(app, "test")
async def send_test(
    term: Terminal,
    subscription_id: SubscriptionId,
    wait_s: Annotated[float, typer.Option("--wait", min=0, max=600, help="seconds to wait for what comes of it")] = 20,
) -> None:
    """Send `webhook.test` to it, whatever it subscribed to, and say what it answered."""
    from relay.cli.client import path_of

    sent = await term.api.post(path_of("subscriptions", subscription_id, "test"))
    event_id = sent["event_id"]
    if not wait_s:
        term.out.answer(sent, f"{event_id} is on its way")
        return
    delivery = await _first_attempt(term, f"{event_id}.{subscription_id}", wait_s=wait_s)
    last = delivery["log"][-1]["words"] if delivery["log"] else "it is still queued, behind what else waits for it"
    heard = delivery["status"] == "delivered"
    term.out.answer(delivery, f"{event_id} was heard" if heard else f"{event_id} was not heard: {last}")
    if not heard:
        raise NotHeard(f"{subscription_id} did not take it: {last}")


async def _first_attempt(term: Terminal, delivery_id: str, *, wait_s: float) -> Json:
    """Wait until a delivery was tried once."""
    import asyncio

    from relay.cli.client import path_of

    until_s = time.monotonic() + wait_s
    while True:
        delivery: Json = await term.api.get(path_of("deliveries", delivery_id))
        tried = delivery["attempts"] > 0 or delivery["status"] not in ("waiting", "intent")
        if tried or time.monotonic() > until_s:
            return delivery
        await asyncio.sleep(_LOOK_EVERY_S)


@command(app, "sample")
async def sample(
    term: Terminal,
    subscription_id: SubscriptionId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=20)] = 1,
) -> None:
    """Show what a hook of it carries: real events where there are some, made-up ones otherwise. Always JSON."""
    import json

    from relay.cli.client import path_of

    samples = await term.api.get(path_of("subscriptions", subscription_id, "sample"), limit=limit)
    term.out.answer(samples, json.dumps(samples, ensure_ascii=False, indent=2))


@command(app, "enable")
async def enable(term: Terminal, subscription_id: SubscriptionId) -> None:
    """Switch it on again; what waited goes on."""
    from relay.cli.client import path_of

    view = await term.api.post(path_of("subscriptions", subscription_id, "enable"))
    hint = f"`relay replay {subscription_id} --since 1d --status missing` sends what happened meanwhile"
    term.out.answer(view, f"{subscription_id} is enabled", hint)


@command(app, "disable")
async def disable(
    term: Terminal,
    subscription_id: SubscriptionId,
    reason: Annotated[str | None, typer.Option(help="why, for whoever looks")] = None,
) -> None:
    """Switch it off: what waits is kept, what happens meanwhile is listed as missing."""
    from relay.cli.client import path_of

    body = {} if reason is None else {"reason": reason}
    view = await term.api.post(path_of("subscriptions", subscription_id, "disable"), body)
    term.out.answer(view, f"{subscription_id} is disabled")


@command(app, "rotate-secret")
async def rotate_secret(
    term: Terminal,
    subscription_id: SubscriptionId,
    secret: Annotated[
        str | None, typer.Option(metavar="@FILE", help="one of your own, from a file or @- stdin")
    ] = None,
) -> None:
    """Make a fresh signing secret, shown once; for 24 hours the former one signs too."""
    from relay.cli.client import path_of

    if secret is not None and not secret.startswith("@"):
        raise SettingsError("--secret: a secret does not belong on a command line; write @file, or @- for stdin")
    body = {} if secret is None else {"secret": arguments.value(secret, name="--secret")}
    rotated = await term.api.post(path_of("subscriptions", subscription_id, "rotate-secret"), body)
    words = f"secret: {rotated['secret']}  (shown this once)"
    term.out.answer(rotated, words, f"The former one signs too until {rotated['former_valid_until']}.")
