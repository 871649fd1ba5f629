"""`relay tokens`: who may use the API."""

from typing import Annotated, Final

import typer

from relay.cli.output import Column, when
from relay.cli.terminal import Limit, Terminal, command, group
from relay.errors import SettingsError

app = group("tokens", "Who may use the API.")

_MOST: Final = 1000
COLUMNS: Final = (
    Column("token", "id"),
    Column("name", "name"),
    Column("role", "role"),
    Column("tenant", "tenant"),
    Column("made", when("created_at")),
)


@command(app, "list")
async def list_(term: Terminal, limit: Limit = 50) -> None:
    """List the tokens that were made here; those of the configuration are not among them."""
    page = await term.api.some("/v1/tokens", limit=limit)
    term.out.table(page, COLUMNS, empty="No tokens were made here.")


@command(app, "create")
async def create(
    term: Terminal,
    name: Annotated[str, typer.Argument(help="for people, to know it by")],
    role: Annotated[str, typer.Option(help="admin may change things, viewer may look")],
    tenant: Annotated[str | None, typer.Option(help="sees and makes only what is this tenant's")] = None,
) -> None:
    """Make a token; it is shown once."""
    body = {"name": name, "role": role} | ({} if tenant is None else {"tenant": tenant})
    made = await term.api.post("/v1/tokens", body)
    term.out.answer(made, f"{made['id']} is made", f"token: {made['token']}  (shown this once)")


@command(app, "revoke")
async def revoke(term: Terminal, token_id: Annotated[str, typer.Argument(metavar="ID", help="or its name")]) -> None:
    """End a token at once."""
    from relay.cli.client import path_of

    page = await term.api.some("/v1/tokens", limit=_MOST)
    named = [each["id"] for each in page["items"] if each["name"] == token_id]
    if len(named) > 1:
        raise SettingsError(f"{len(named)} tokens are called {token_id}: give the id of one, from relay tokens list")
    token_id = named[0] if named else token_id
    await term.api.ask("DELETE", path_of("tokens", token_id))
    term.out.answer({"id": token_id, "revoked": True}, f"{token_id} ends now")
