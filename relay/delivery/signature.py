"""Sign requests as Standard Webhooks 1.0 specifies: pure, and tested against an independent verifier.

The signed text is `{webhook-id}.{webhook-timestamp}.{body}`, the signature HMAC-SHA256 in base64 after `v1,`. While a
secret is being rotated the header carries one signature per key, the newest first.
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import binascii
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

SECRET_PREFIX: Final = "whsec_"  # noqa: S105  the prefix of all, no secret
# The limits of Standard Webhooks: 192 to 512 bits.
MIN_KEY_BYTES: Final = 24
MAX_KEY_BYTES: Final = 64
_LONGEST_SECRET: Final = len(SECRET_PREFIX) + (MAX_KEY_BYTES + 2) // 3 * 4


def new_secret() -> str:
    return encode_secret(secrets.token_bytes(32))


def encode_secret(key: bytes) -> str:
    return SECRET_PREFIX + binascii.b2a_base64(key, newline=False).decode()


def decode_secret(text: str) -> bytes:
    """Decode a `whsec_…` secret; a ValueError says what is wrong with it without repeating it."""
    expected = f"must be {SECRET_PREFIX} followed by the standard base64 of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes"
    if not text.startswith(SECRET_PREFIX):
        raise ValueError(f"{expected}; it does not begin with {SECRET_PREFIX}")
    if len(text) > _LONGEST_SECRET:
        raise ValueError(f"{expected}; it is too long")
    try:
        key = binascii.a2b_base64(text[len(SECRET_PREFIX) :].encode("ascii"), strict_mode=True)
    except ValueError:
        raise ValueError(f"{expected}; what follows is not base64 (A–Z a–z 0–9 + / and = at the end)") from None
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"{expected}; it has {len(key)}")
    return key


def headers(event_id: str, timestamp: int, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """Build the three headers of one attempt. `timestamp` is in Unix seconds; `keys` are ordered, newest first."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join([_v1(key, signed) for key in keys]),
    }


def _v1(key: bytes, signed: bytes) -> str:
    return "v1," + binascii.b2a_base64(hmac.digest(key, signed, "sha256"), newline=False).decode()
