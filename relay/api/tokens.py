"""Tokens over HTTP: made, listed and revoked by the operator."""

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller, IssuedToken, Role
from relay.api.context import Api, Id
from relay.api.paging import Page, PageQuery, after, read_cursor
from relay.api.problems import invalid, not_found


class CreateToken(BaseModel):
    """A token to be made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100, description="for people, to know it by")
    role: Role = Field(description="admin may change things, viewer may look")
    tenant: Id | None = Field(None, description="sees and makes only what is this tenant's")


class TokenView(BaseModel):
    """A token, without the token."""

    id: str
    name: str
    role: Literal["admin", "viewer"]
    tenant: str | None
    created_at: AwareDatetime


class TokenWithSecret(TokenView):
    """A token that was just made."""

    token: str = Field(description="send it as Authorization: Bearer; shown this once")


async def create_token(api: Api, caller: Caller, body: CreateToken) -> TokenWithSecret:
    """Make a token; only a digest of it is kept."""
    made, token = await api.tokens.make(body.name, body.role, body.tenant)
    return TokenWithSecret(**dict(_show(made)), token=token)


async def list_tokens(api: Api, caller: Caller, query: PageQuery) -> Page[TokenView]:
    """List the tokens that were made here; those of the configuration are not among them."""

    def place(each: IssuedToken) -> tuple[int, str]:
        return round(each.created_at.timestamp() * 1000), each.id

    try:
        part = after(await api.tokens.all(), place, read_cursor(query.cursor), query.limit)
    except ValueError as error:
        raise invalid("cursor", str(error)) from None
    return Page(items=[_show(each) for each in part.found], next_cursor=part.next_cursor)


async def revoke_token(api: Api, caller: Caller, token_id: str) -> None:
    """End a token at once, everywhere."""
    if not await api.tokens.revoke(token_id):
        raise not_found("token")


def _show(made: IssuedToken) -> TokenView:
    return TokenView(id=made.id, name=made.name, role=made.role, tenant=made.tenant, created_at=made.created_at)
