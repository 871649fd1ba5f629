"""Authenticates callers: by tokens of the configuration, and by tokens issued at run time.

Of an issued token, `relay_<id>.<secret>`, only a digest is stored: the id finds it, and digests are compared in
constant time.
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

_ISSUED: Final = re.compile(TOKEN_PREFIX + r"(tok_[a-z2-7]{16})\.([A-Za-z0-9_-]{43})")
# Longer than any token; it bounds what an unauthenticated request makes us hash.
_MAX_TOKEN_CHARS: Final = 1024


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. Without a `tenant` it is the operator, who may access everything. `token` is the id of
    an issued token, None for one of the configuration."""

    role: Role
    tenant: str | None = None
    token: str | None = None

    def can_access(self, tenant: str | None) -> bool:
        return self.tenant is None or self.tenant == tenant


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token that was issued at run time, without its secret."""

    id: str
    name: str
    role: Role
    tenant: str | None
    created_at: datetime


class Authenticator:
    """Verifies tokens, and issues, lists and revokes them."""

    def __init__(self, declarations: Declarations, configured: Sequence[str]) -> None:
        self._declarations = declarations
        self._configured = [_digest(token) for token in configured]

    async def authenticate(self, authorization: str | None) -> Caller | None:
        """Verify an `Authorization` header; None when it has no valid token."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN_CHARS:
            return None
        digest = _digest(token)
        is_configured = False
        for configured in self._configured:  # all of them, so that the time does not tell which one matched
            is_configured |= hmac.compare_digest(configured, digest)
        if is_configured:
            return Caller("admin")
        match = _ISSUED.fullmatch(token)
        declaration = await self._declarations.get("token", match.group(1)) if match else None
        if declaration is None or not hmac.compare_digest(str(declaration.document["digest"]).encode(), digest):
            return None
        return Caller(declaration.document["role"], declaration.tenant, declaration.id)

    async def issue(self, name: str, role: Role, tenant: str | None) -> tuple[IssuedToken, str]:
        """Issue a token; return it with its secret text, which is not stored."""
        token_id = "tok_" + base64.b32encode(secrets.token_bytes(10)).decode().lower()
        token = f"{TOKEN_PREFIX}{token_id}.{secrets.token_urlsafe(32)}"
        document = {"name": name, "role": role, "digest": _digest(token).decode()}
        declaration = await self._declarations.put("token", token_id, document, tenant=tenant)
        return _issued(declaration), token

    async def issued(self) -> list[IssuedToken]:
        """List the issued tokens, newest first."""
        return [_issued(declaration) for declaration in reversed((await self._declarations.all("token")).values())]

    async def revoke(self, token_id: str) -> bool:
        return await self._declarations.remove("token", token_id)


def _digest(token: str) -> bytes:
    # Header bytes that are not UTF-8 arrive as surrogates.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest().encode()


def _issued(declaration: Declaration) -> IssuedToken:
    document = declaration.document
    created_at = from_ms(declaration.created_ms)
    return IssuedToken(declaration.id, document["name"], document["role"], declaration.tenant, created_at)
