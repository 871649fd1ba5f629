"""What any provider may have written, read without believing too much: text, seconds, JSON, headers, refusals. Pure."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BeforeValidator, PlainValidator, ValidationError

from relay.domain.call import Record
from relay.domain.json import Json
from relay.domain.retry_after import parse_http_date, parse_retry_after
from relay.errors import ProviderError, RateLimited, Unauthorized, Unavailable, UnexpectedResponse

LONGEST_TEXT: Final = 256
LONGEST_CALL: Final = timedelta(hours=24)
"""A row that has not said after this that the call is over will not say so, and the call must be told."""
_LARGEST_RAW_BYTES: Final = 8192
_LONGEST_RETRY_AFTER_S: Final = 3600.0

_CLOCK: Final = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,2}):([0-9]{2})(?:\.[0-9]+)?")
_SECONDS: Final = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?")
_HOUR_24: Final = re.compile(r"[^0-9:.+-]24")
_STAMP: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:[Zz]|[+-][0-9]{2}:?[0-9]{2})?"
)
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_AUDIO_TYPE: Final = re.compile(r"audio/[a-z0-9][a-z0-9.+-]{0,63}")
_RESET_PARAMETER: Final = re.compile(r"\b(?:reset|t)\s*=\s*([0-9]{1,10})")

_UNDER_WAY: Final = frozenset(
    {
        "ACTIVE",
        "CALLING",
        "DIALING",
        "DIALLING",
        "HOLD",
        "IN CALL",
        "IN PROGRESS",
        "IN QUEUE",
        "INPROGRESS",
        "ON HOLD",
        "ONGOING",
        "PROGRESS",
        "QUEUED",
        "RING",
        "RINGING",
        "TALKING",
        "TRYING",
        "UP",
    }
)


# -- values -----------------------------------------------------------------------------------------------------------


def text(value: object) -> str | None:
    """Keep what can be read as text: trimmed, cut to LONGEST_TEXT, without control characters and half characters."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        value = str(value)
    if not isinstance(value, str):
        return None
    return _UNPRINTABLE.sub(" ", value[: 4 * LONGEST_TEXT]).strip()[:LONGEST_TEXT].rstrip() or None


Text = Annotated[str | None, BeforeValidator(text)]
"""A field of a row that is text where it can be, and None otherwise: it never makes the row bad."""


def seconds(value: object) -> float | None:
    """Read 207, "207", 207.5 or "0:03:27"; whole seconds stay whole, impossible ones become None."""
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        hours, minutes, rest = (int(part or 0) for part in clock.groups())
        value = hours * 3600 + minutes * 60 + rest
    if isinstance(value, str) and _SECONDS.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 7 * 86_400:
        return None
    return int(value) if value == int(value) else round(value, 3)


def under_way(status: str | None) -> bool:
    """Whether a status, in capitals and with single blanks, says that the call is not over."""
    return status in _UNDER_WAY


def given_up(record: Record, seen_at: datetime) -> Record:
    """Take a row for finished that has not said so a day after its start: it will not, and the call must be told."""
    if record.finished or seen_at - record.started_at < LONGEST_CALL:
        return record
    return replace(record, finished=True)


def iso_time(text: str) -> datetime:
    """Read an ISO 8601 time; raises ValueError. Hour 24 is none: Python reads it as the next day from 3.13 on."""
    if _HOUR_24.search(text):
        raise ValueError("there is no hour 24")
    return datetime.fromisoformat(text)


def stamp(value: object, name: str) -> datetime:
    """Read a time that carries its zone, as RFC 3339 has it; aware UTC. `name` is the column, for the complaint."""
    wrong = f"{name} is not a possible time of the form 2025-07-01T20:54:53Z"
    if not isinstance(value, str) or not _STAMP.fullmatch(value.strip()):
        raise ValueError(wrong)
    try:
        moment = iso_time(value.strip().upper().replace("Z", "+00:00"))
        moment = (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(wrong) from None
    if not 2000 <= moment.year < 2100:
        raise ValueError(f"{name} is not in this century")
    return moment


def stamp_or_none(value: object) -> datetime | None:
    """Read a time that may be missing, or be nonsense without harm."""
    try:
        return stamp(value, "")
    except ValueError:
        return None


MaybeStamp = Annotated[datetime | None, PlainValidator(stamp_or_none)]


def complaint(error: ValidationError) -> str:
    """Say in a sentence what is wrong with a row, without what it holds."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else "the row"
    return f"{name} is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")


# -- JSON -------------------------------------------------------------------------------------------------------------


def load_json(body: bytes, *, name: str) -> object:
    """Read a JSON body. One broken character must not hide all other rows: what orjson refuses is read tolerantly."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body.decode("utf-8-sig", "replace"), parse_constant=lambda _name: None)
    except (ValueError, RecursionError):
        raise UnexpectedResponse(
            f"{name} sent something that is not JSON; check base_url, and any proxy in between"
        ) from None


def dumped(row: object) -> bytes | None:
    """Write a row as JSON; None when JSON cannot say it again."""
    try:
        return orjson.dumps(row)
    except (TypeError, RecursionError):
        return None


def kept(row: Json, names: Mapping[str, Any]) -> Json:
    """Keep the row as it came; one that is huge, or that JSON cannot say again, only in part: at last its `names`."""
    for candidate in (row, shrunk_row(row)):
        again = dumped(candidate)
        if again is not None and len(again) <= _LARGEST_RAW_BYTES:
            return candidate
    return {name: value for name, value in shrunk_row(row).items() if name in names}


def shrunk_row(row: Json) -> Json:
    """Cut a row down to what JSON can say in little room."""
    made: Json = shrunk(row)
    return made


def shrunk(value: Any, depth: int = 0) -> Any:
    """Cut any JSON value down: long text, deep nesting, many members, numbers beyond 64 bits."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int | float | None):
        return value if not isinstance(value, int) or abs(value) < 2**63 else None
    if depth == 4:
        return None
    if isinstance(value, dict):
        return {text(name) or "": shrunk(item, depth + 1) for name, item in list(value.items())[:64]}
    if isinstance(value, list):
        return [shrunk(item, depth + 1) for item in value[:64]]
    return text(str(value))


# -- errors and headers -----------------------------------------------------------------------------------------------


def refusal(
    status: int,
    headers: Mapping[str, str],
    *,
    name: str,
    what: str,
    host: str,
    now: datetime,
    credential: str = "token",
    bucket: Literal["key", "ip"] = "key",
) -> ProviderError:
    """Turn an unwanted answer into the error that says so.

    `name` is the provider's, `what` is what was asked for, as in "the call list", `credential` what it calls its own.
    """
    if status in (401, 403):
        return Unauthorized(
            f"{name} at {host} refuses the {credential} for {what} ({status}); set one that is valid for it",
            status=status,
        )
    if status == 429:
        whose = "from this address" if bucket == "ip" else f"with this {credential}"
        return RateLimited(
            f"{name} at {host} says there were too many requests {whose} ({what}); asking pauses for now",
            bucket=bucket,
            retry_after_s=retry_after_s(headers, now),
        )
    if status >= 500:
        return Unavailable(f"{name} at {host} failed to answer {what} ({status}); it will be asked again")
    if 300 <= status < 400:
        return UnexpectedResponse(
            f"{name} at {host} redirects {what} ({status}), which is not followed since the {credential} would go "
            "along; set base_url to where the API is"
        )
    return UnexpectedResponse(
        f"{name} at {host} answered {what} with status {status}, which its document does not know"
    )


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Read how long to wait, in seconds, from the first usual header that can be believed; None when there is none."""
    hints = (
        parse_retry_after(headers.get("Retry-After"), now, longest_s=_LONGEST_RETRY_AFTER_S),
        _plain_seconds(headers.get("RateLimit-Reset")),
        _reset_parameter(headers.get("RateLimit")),
        _until_epoch(headers.get("X-RateLimit-Reset"), now),
    )
    return next((min(max(hint, 1.0), _LONGEST_RETRY_AFTER_S) for hint in hints if hint is not None), None)


def _plain_seconds(value: str | None) -> float | None:
    value = (value or "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) <= 9 else None


def _reset_parameter(value: str | None) -> float | None:
    found = _RESET_PARAMETER.search(value or "")
    return float(found.group(1)) if found else None


def _until_epoch(value: str | None, now: datetime) -> float | None:
    """`X-RateLimit-Reset` is the second of the reset since 1970, and with some servers the seconds until then."""
    value = (value or "").strip()
    if not (value.isascii() and value.isdigit() and len(value) <= 10):
        return None
    moment = float(value)
    return moment - now.timestamp() if moment > 10**9 else moment


def server_time(headers: Mapping[str, str]) -> datetime | None:
    """Read the answer's `Date`, aware UTC; None when it has none, or nonsense."""
    moment = parse_http_date(headers.get("Date"))
    try:
        return moment.astimezone(UTC) if moment else None
    except OverflowError:
        return None


def audio_type(content_type: str | None) -> str | None:
    """Name the audio's type for storage and links; None when the answer is text and so no audio at all."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind.startswith("text/") or kind.endswith(("/json", "+json", "/xml", "+xml")):
        return None
    return kind if _AUDIO_TYPE.fullmatch(kind) else "application/octet-stream"
