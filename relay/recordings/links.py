"""Signed links to recordings: pure. Whoever holds one may listen until it expires; nobody can make or stretch one.

The signature covers the call id and the expiry and nothing else, so a proxy may put any prefix before the path.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

DEFAULT_TTL_S = 7 * 86_400

_EXPIRES = re.compile(r"[1-9][0-9]{0,10}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Valid:
    """The link is ours and may still be used."""

    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Expired:
    """The link is ours, and its time is over."""

    expired_at: datetime


@dataclass(frozen=True, slots=True)
class BadSignature:
    """The link was not made by us, or was changed since."""


def sign(call_id: str, expires: int, key: bytes) -> str:
    """Sign a call id and an expiry (Unix seconds): HMAC-SHA256 as unpadded base64url.

    The fixed first word keeps the signature apart from whatever else the key may sign.
    """
    message = f"recording\x1f{call_id}\x1f{expires}".encode()
    return base64.urlsafe_b64encode(hmac.digest(key, message, hashlib.sha256)).rstrip(b"=").decode()


def link(
    public_url: str, call_id: str, *, now: datetime, key: bytes, ttl_s: float = DEFAULT_TTL_S
) -> tuple[str, datetime]:
    """Make a link that works for `ttl_s` seconds from `now`; answer it with the moment at which it ends.

    `public_url` may carry a path, which stays in front.
    """
    expires_at = (now.astimezone(UTC) + timedelta(seconds=ttl_s)).replace(microsecond=0)
    expires = int(expires_at.timestamp())
    base = public_url.rstrip("/")
    return f"{base}/recordings/{call_id}?expires={expires}&signature={sign(call_id, expires, key)}", expires_at


def verify(
    call_id: str, expires_text: str, signature: str, *, keys: Sequence[bytes], now: datetime
) -> Valid | Expired | BadSignature:
    """Judge a link as it came in. Any of `keys` may have signed it; all are compared, each in constant time."""
    if not _EXPIRES.fullmatch(expires_text):
        return BadSignature()
    expires = int(expires_text)
    given = signature.encode("utf-8", "backslashreplace")
    ours = False
    for key in keys:
        ours |= hmac.compare_digest(sign(call_id, expires, key).encode(), given)
    if not ours:
        return BadSignature()
    expires_at = datetime.fromtimestamp(expires, UTC)
    return Valid(expires_at) if now < expires_at else Expired(expires_at)
