"""Who asks: tokens of the configuration, and tokens made at run time, of which only a digest is kept.

A made token is `relay_<id>.<secret>`: the id finds its digest, the secret is compared in constant time.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from relay.domain.time import from_ms
from relay.secrets import TOKEN_PREFIX
from relay.store.declarations import Declaration, Declarations

Role = Literal["admin", "viewer"]

TOKEN_ID: Final = r"^tok_[a-z2-7]{16}$"  # noqa: S105 - a pattern
_MADE: Final = re.compile(TOKEN_PREFIX + r"(tok_[a-z2-7]{16})\.([A-Za-z0-9_-]{43})")
_LONGEST: Final = 1024


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Without a `tenant` it is the operator, who sees everything; `token` is None for a configured one."""

    role: Role
    tenant: str | None = None
    token: str | None = None

    def sees(self, tenant: str | None) -> bool:
        """Whether what belongs to a tenant (None: the operator) is this caller's business."""
        return self.tenant is None or self.tenant == tenant


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token that was made at run time, as it can be listed."""

    id: str
    name: str
    role: Role
    tenant: str | None
    created_at: datetime


class Tokens:
    """Knows every token that may use the API."""

    def __init__(self, declarations: Declarations, configured: Sequence[str]) -> None:
        self._declarations = declarations
        self._configured = [_digest(token) for token in configured]

    async def caller(self, authorization: str | None) -> Caller | None:
        """Judge an `Authorization` header; None when nobody known asks."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or len(token) > _LONGEST:
            return None
        digest = _digest(token)
        known = False
        for each in self._configured:
            known |= hmac.compare_digest(each, digest)
        if known:
            return Caller("admin")
        parts = _MADE.fullmatch(token)
        made = await self._declarations.get("token", parts.group(1)) if parts else None
        if made is None or not hmac.compare_digest(str(made.document["digest"]).encode(), digest):
            return None
        return Caller(made.document["role"], made.tenant, made.id)

    async def make(self, name: str, role: Role, tenant: str | None) -> tuple[IssuedToken, str]:
        """Make one; the token itself is told here and never again."""
        token_id = "tok_" + base64.b32encode(secrets.token_bytes(10)).decode().lower()
        token = f"{TOKEN_PREFIX}{token_id}.{secrets.token_urlsafe(32)}"
        document = {"name": name, "role": role, "digest": _digest(token).decode()}
        made = await self._declarations.put("token", token_id, document, tenant=tenant)
        return _listed(made), token

    async def all(self) -> list[IssuedToken]:
        """List them, newest first."""
        return [_listed(each) for each in reversed((await self._declarations.all("token")).values())]

    async def revoke(self, token_id: str) -> bool:
        """End one at once; False when there was none."""
        return await self._declarations.remove("token", token_id)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest().encode()


def _listed(made: Declaration) -> IssuedToken:
    document = made.document
    created_at = from_ms(made.created_ms)
    return IssuedToken(made.id, document["name"], document["role"], made.tenant, created_at)
