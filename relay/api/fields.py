"""Types and conversions that the request and response models share."""

import base64
import re
import secrets
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AfterValidator, AwareDatetime, Field

from relay.api.problems import invalid
from relay.domain.time import from_ms
from relay.settings import ID_PATTERN

EVENT_ID: Final = r"^evt_[a-z2-7]{26}$"
CALL_ID: Final = r"^call_[a-z2-7]{26}$"


def _utc(instant: datetime) -> datetime:
    # The year first: converting a time of the year 1 or 9999 to UTC overflows.
    if 1999 <= instant.year <= 2200 and 2000 <= (utc := instant.astimezone(UTC)).year < 2200:
        return utc
    raise ValueError("must be a time from 2000 to 2199")


# A time with its zone, in the centuries that have calls.
Instant = Annotated[AwareDatetime, AfterValidator(_utc)]
Id = Annotated[str, Field(pattern=ID_PATTERN, description="lower-case letters, digits, - and _; at most 63")]


def check_id(name: str) -> None:
    if not re.fullmatch(ID_PATTERN, name):
        raise invalid("id", "must have 1 to 63 lower-case letters, digits, - and _, and start with a letter or a digit")


def new_id(prefix: str) -> str:
    return f"{prefix}_{base64.b32encode(secrets.token_bytes(10)).decode().lower()}"


def instant(ms: float) -> datetime | None:
    """Convert a time of the store; 0 is never."""
    return from_ms(ms) if ms else None


def to_ms(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp() * 1000)
