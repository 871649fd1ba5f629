"""Signed links to recordings: they work without a token until they expire, and cannot be forged or extended.

The signature covers the call id and the expiry and nothing else, so a proxy may put any prefix before the path.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from relay.domain.json import Json
from relay.recordings.storage import RecordingStorage
from relay.store.calls import StoredCall

# The longest for which object stores sign (S3, Signature Version 4), so that both kinds of links last alike.
LINK_TTL_S = 7 * 86_400

_EXPIRES = re.compile(r"[1-9][0-9]{0,10}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Valid:
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Expired:
    expired_at: datetime


@dataclass(frozen=True, slots=True)
class BadSignature:
    """The link was not issued by us, or was modified."""


def sign(call_id: str, expires: int, key: bytes) -> str:
    """Sign a call id and an expiry (Unix seconds): HMAC-SHA256 as unpadded base64url."""
    # The constant prefix keeps these signatures apart from others that the same key may make.
    message = f"recording\x1f{call_id}\x1f{expires}".encode()
    return base64.urlsafe_b64encode(hmac.digest(key, message, hashlib.sha256)).rstrip(b"=").decode()


def link(
    public_url: str, call_id: str, *, now: datetime, key: bytes, ttl_s: float = LINK_TTL_S
) -> tuple[str, datetime]:
    """Build a link that works for `ttl_s` seconds from `now`; return it with its expiry.

    `public_url` may have a path, which is kept as a prefix.
    """
    expires_at = (now.astimezone(UTC) + timedelta(seconds=ttl_s)).replace(microsecond=0)
    expires = int(expires_at.timestamp())
    base = public_url.rstrip("/")
    return f"{base}/recordings/{call_id}?expires={expires}&signature={sign(call_id, expires, key)}", expires_at


def verify(
    call_id: str, expires_text: str, signature: str, *, keys: Sequence[bytes], now: datetime
) -> Valid | Expired | BadSignature:
    """Verify a link. Any of `keys` may have signed it (an older one, after a rotation)."""
    # One spelling only: int() would also accept " 1", "+1", "1_0" and non-ASCII digits.
    if not _EXPIRES.fullmatch(expires_text):
        return BadSignature()
    expires = int(expires_text)
    encoded = signature.encode("utf-8", "backslashreplace")
    authentic = False
    for key in keys:  # all of them, in constant time
        authentic |= hmac.compare_digest(sign(call_id, expires, key).encode(), encoded)
    if not authentic:
        return BadSignature()
    expires_at = datetime.fromtimestamp(expires, UTC)
    return Valid(expires_at) if now < expires_at else Expired(expires_at)


class LinkIssuer:
    """Issues the links in events and API responses: ours and signed, or presigned by the object store.

    Without `public_url`, and without presigning, there are none.
    """

    def __init__(
        self,
        storage: RecordingStorage,
        find_call: Callable[[str], Awaitable[StoredCall | None]],
        *,
        kind: Literal["relay", "presigned"],
        public_url: str | None,
        key: bytes,
    ) -> None:
        self._storage = storage
        self._find_call = find_call
        self._kind = kind
        self.public_url = public_url
        self._key = key

    async def for_event(self, document: Json) -> tuple[str, datetime] | None:
        """Issue the link that goes into an event, if its call has a stored recording."""
        call = document["data"].get("call")
        if call is None or call["recording"]["status"] != "available":
            return None
        return await self.for_call(call["id"])

    async def for_call(self, call_id: str) -> tuple[str, datetime] | None:
        """Issue a link to the stored recording of a call; return it with its expiry."""
        now = datetime.now(UTC)
        if self._kind == "presigned":
            call = await self._find_call(call_id)
            if call is None or call.recording is None or "path" not in call.recording:
                return None
            url = await self._storage.presign(call.recording["path"], LINK_TTL_S)
            if url is not None:
                return url, datetime.fromtimestamp(int(now.timestamp()) + LINK_TTL_S, UTC)
        if self.public_url is None:
            return None
        return link(self.public_url, call_id, now=now, key=self._key)
