"""`relay tokens`: API tokens."""

from typing import Annotated, Final

import typer

from relay.cli.client import path_of
from relay.cli.output import Column, time_at
from relay.cli.terminal import LimitOption, Terminal, command, new_app
from relay.errors import SettingsError

app = new_app()

_MAX_TOKENS: Final = 1000
COLUMNS: Final = (
    Column("token", "id"),
    Column("name", "name"),
    Column("role", "role"),
    Column("tenant", "tenant"),
    Column("created", time_at("created_at")),
)


@command(app, "list")
def list_(term: Terminal, limit: LimitOption = 50) -> None:
    """List the tokens created through the API; those in relay.yaml are not included."""
    page = term.api.newest("/v1/tokens", limit=limit)
    term.out.table(page, COLUMNS, empty="No tokens were created through the API.")


@command(app, "create")
def create(
    term: Terminal,
    name: Annotated[str, typer.Argument(help="A name to recognise it by.")],
    role: Annotated[str, typer.Option(help="admin, or viewer, which is read-only.")],
    tenant: Annotated[str | None, typer.Option(help="Restrict it to this tenant.")] = None,
) -> None:
    """Create a token; it is shown once."""
    body = {"name": name, "role": role} | ({} if tenant is None else {"tenant": tenant})
    token = term.api.post("/v1/tokens", body)
    term.out.result(token, f"{token['id']} created", f"token: {token['token']}  (not shown again)")


@command(app, "revoke")
def revoke(term: Terminal, token_id: Annotated[str, typer.Argument(metavar="ID", help="Its ID or name.")]) -> None:
    """Revoke a token immediately."""
    page = term.api.newest("/v1/tokens", limit=_MAX_TOKENS)
    ids = [token["id"] for token in page["items"] if token["name"] == token_id]
    if len(ids) > 1:
        raise SettingsError(f"{len(ids)} tokens are named {token_id}: pass the ID of one, from `relay tokens list`")
    token_id = ids[0] if ids else token_id
    term.api.request("DELETE", path_of("tokens", token_id))
    term.out.result({"id": token_id, "revoked": True}, f"{token_id} revoked")
