"""API tokens: issued, listed and revoked by the operator."""

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller, IssuedToken, Role
from relay.api.context import ApiContext
from relay.api.fields import Id
from relay.api.paging import Page, PageQuery, page_of_items
from relay.api.problems import not_found
from relay.store.listings import Entry


class CreateToken(BaseModel):
    """A new token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100, description="a label for people")
    role: Role = Field(description="admin may change things, viewer may only read")
    tenant: Id | None = Field(None, description="restricts the token to the resources of this tenant")


class TokenView(BaseModel):
    """A token, without its secret."""

    id: str
    name: str
    role: Role
    tenant: str | None
    created_at: AwareDatetime


class TokenWithSecret(TokenView):
    """A new token, with its secret."""

    token: str = Field(description="send it as Authorization: Bearer; shown only once")


async def create_token(context: ApiContext, caller: Caller, body: CreateToken) -> TokenWithSecret:
    """Issue a token. Only a digest of it is stored."""
    issued, token = await context.authenticator.issue(body.name, body.role, body.tenant)
    return TokenWithSecret(**dict(_view(issued)), token=token)


async def list_tokens(context: ApiContext, caller: Caller, query: PageQuery) -> Page[TokenView]:
    """List the issued tokens, without those of the configuration."""

    def entry_of(token: IssuedToken) -> Entry:
        return round(token.created_at.timestamp() * 1000), token.id

    page = page_of_items(await context.authenticator.issued(), entry_of, query)
    return Page(items=[_view(token) for token in page.items], next_cursor=page.next_cursor)


async def revoke_token(context: ApiContext, caller: Caller, token_id: str) -> None:
    """Revoke a token at once."""
    if not await context.authenticator.revoke(token_id):
        raise not_found("Token")


def _view(issued: IssuedToken) -> TokenView:
    return TokenView(
        id=issued.id, name=issued.name, role=issued.role, tenant=issued.tenant, created_at=issued.created_at
    )
