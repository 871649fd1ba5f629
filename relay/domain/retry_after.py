"""The `Retry-After` header (RFC 9110 §10.2.3), as subscribers, providers and the relay itself send it: pure."""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

_SECONDS: Final = re.compile(r"[0-9]{1,40}(\.[0-9]{1,20})?", re.ASCII)
_MAX_CHARS: Final = 100


def parse_retry_after(text: str | None, now: datetime, *, longest_s: float) -> float | None:
    """Return the seconds to wait, from 0 to `longest_s`; None when the header is missing or malformed.

    A date in the past is 0. Fractions of a second are not in the RFC, but some servers send them.
    """
    if not text or len(text) > _MAX_CHARS:
        return None
    number = text.strip()  # of more characters than float() accepts around a number
    if _SECONDS.fullmatch(number):
        return min(float(number), longest_s)
    date = parse_http_date(text)
    return None if date is None else min(max((date - now).total_seconds(), 0.0), longest_s)


def parse_http_date(text: str | None) -> datetime | None:
    """Return an HTTP date (RFC 9110 §5.6.7) as an aware time; None when it is missing or malformed."""
    if not text or len(text) > _MAX_CHARS:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    # The asctime form and `-0000` name no zone; HTTP dates are UTC.
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date
