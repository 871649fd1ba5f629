"""Reads what any provider may send without trusting it: values, rows, JSON, error responses, headers. Pure."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Concatenate, Final, Literal, ParamSpec, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, PlainValidator, ValidationError

from relay.domain.call import InvalidRow, Record
from relay.domain.json import Json
from relay.domain.retry_after import parse_http_date, parse_retry_after
from relay.errors import ProviderError, RateLimited, Unauthorized, Unavailable, UnexpectedResponse

MAX_TEXT_CHARS: Final = 256
# A call that is still in progress this long after its start never ends in the list, and is published as it is.
LONGEST_CALL: Final = timedelta(hours=24)
_MAX_CACHED_ROWS: Final = 8192
_MAX_CACHED_ROW_BYTES: Final = 4096
_MAX_RAW_BYTES: Final = 8192
# A provider that states more than a day has made a mistake, or will say so again.
LONGEST_CLOSED_S: Final = 86_400.0

_CLOCK: Final = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,2}):([0-9]{2})(?:\.[0-9]+)?")
_SECONDS: Final = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?")
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:[Zz]|[+-][0-9]{2}:?[0-9]{2})?"
)
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOT_LETTERS: Final = re.compile(r"[^A-Z]+")
_INNER_DIGIT: Final = re.compile(r"[0-9](?=[0-9]{2})")
_AUDIO_TYPE: Final = re.compile(r"audio/[a-z0-9][a-z0-9.+-]{0,63}")
_RESET_PARAMETER: Final = re.compile(r"\b(?:reset|t)\s*=\s*([0-9]{1,10})")

_IN_PROGRESS: Final = frozenset(
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

P = ParamSpec("P")
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


# -- values -----------------------------------------------------------------------------------------------------------


def text(value: object) -> str | None:
    """Return text trimmed, cut to MAX_TEXT_CHARS and free of control characters; None when the value is not text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        value = str(value)
    if not isinstance(value, str):
        return None
    return _UNPRINTABLE.sub(" ", value[: 4 * MAX_TEXT_CHARS]).strip()[:MAX_TEXT_CHARS].rstrip() or None


# A field that is None when it is not text: it never invalidates its row.
Text = Annotated[str | None, BeforeValidator(text)]


def words(value: str | None) -> str:
    """Bring a status to one form: upper case, single blanks, letters only."""
    return _NOT_LETTERS.sub(" ", (value or "").upper()).strip()


def seconds(value: object) -> float | None:
    """Read 207, "207", 207.5 or "0:03:27"; whole seconds stay int, implausible values become None."""
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        hours, minutes, rest = (int(part or 0) for part in clock.groups())
        value = hours * 3600 + minutes * 60 + rest
    if isinstance(value, str) and _SECONDS.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 7 * 86_400:
        return None
    return int(value) if value == int(value) else round(value, 3)


Seconds = Annotated[float | None, PlainValidator(seconds)]


def iso_time(value: object, field: str) -> datetime:
    """Read an ISO 8601 time, naive where it names no zone; raises ValueError that names `field`."""
    invalid = f"{field} is not a valid time; expected the form 2025-07-01 20:54:53"
    if not isinstance(value, str) or not _TIME.fullmatch(value.strip()):
        raise ValueError(invalid)
    normalised = value.strip().upper().replace("Z", "+00:00")
    # From Python 3.13 on, fromisoformat reads hour 24 as the next day.
    if normalised[11:13] == "24":
        raise ValueError(invalid)
    try:
        time = datetime.fromisoformat(normalised)
    except ValueError:
        raise ValueError(invalid) from None
    if not 2000 <= time.year < 2100:
        raise ValueError(f"{field} is not in this century")
    return time


def utc_time(value: object, field: str) -> datetime:
    """Read an ISO 8601 time as aware UTC, which is also assumed where it names no zone; raises ValueError."""
    time = iso_time(value, field)
    try:
        utc = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{field} is not a valid time") from None
    if not 2000 <= utc.year < 2100:
        raise ValueError(f"{field} is not in this century")
    return utc


def utc_time_or_none(value: object) -> datetime | None:
    try:
        return utc_time(value, "")
    except ValueError:
        return None


def required_utc_time(field: str) -> PlainValidator:
    """Validate a time that a row cannot do without."""
    return PlainValidator(lambda value: utc_time(value, field))


OptionalTime = Annotated[datetime | None, PlainValidator(utc_time_or_none)]


# -- rows -------------------------------------------------------------------------------------------------------------


def memoise_rows(parse: Callable[Concatenate[object, P], T]) -> Callable[Concatenate[object, P], T]:
    """Cache a parser by the JSON of its row: polls overlap, so nearly every row was in the last one too.

    A huge row, or one that orjson cannot write, is parsed each time.
    """

    @lru_cache(maxsize=_MAX_CACHED_ROWS)
    def parse_json(row_json: bytes, *args: P.args, **kwargs: P.kwargs) -> T:
        return parse(orjson.loads(row_json), *args, **kwargs)

    def parse_row(row: object, /, *args: P.args, **kwargs: P.kwargs) -> T:
        row_json = dump_json(row)
        if row_json is None or len(row_json) > _MAX_CACHED_ROW_BYTES:
            return parse(row, *args, **kwargs)
        return parse_json(row_json, *args, **kwargs)  # type: ignore[arg-type]  # the arguments are hashable

    return parse_row


def validate_row(
    model: type[Model], row: object, *, key: str, start: str, read_key: Callable[[object], str | None] = text
) -> Model | InvalidRow:
    """Validate a row; the column `key` identifies it in the quarantine, as far as `read_key` accepts its value, and the
    column `start` dates it."""
    if not isinstance(row, dict):
        return InvalidRow("the row is not a JSON object", excerpt=excerpt({"row": shrink(row)}))
    try:
        return model.model_validate(row)
    except ValidationError as error:
        return invalid_row(first_problem(error), row, key=read_key(row.get(key)), start=row.get(start))


def invalid_row(reason: str, row: Json, *, key: str | None = None, start: object = None) -> InvalidRow:
    """Quarantine a row under the id `key`; `start` is the value that dates it."""
    return InvalidRow(reason, key=key, excerpt=excerpt(shrink_row(row)), local_date=_date(start))


def _date(value: object) -> str | None:
    """Read the date of a time that may be invalid otherwise."""
    try:
        return date.fromisoformat(str(value)[:10]).isoformat()
    except ValueError:
        return None


def parse_or_none(model: type[Model], value: object) -> Model | None:
    """Parse a part of a row that may be missing or malformed."""
    try:
        return model.model_validate(value)
    except ValidationError:
        return None


def first_problem(error: ValidationError) -> str:
    """Describe what is wrong with a row, without its values."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else "the row"
    return f"{name} is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")


def in_progress(status: str, ended_at: datetime | None, duration_s: float | None) -> bool:
    """Whether a call is not over yet: by its status (as `words` gives it), else because nothing says that it ended."""
    return ended_at is None and (status in _IN_PROGRESS or (not status and not duration_s))


def finished_by_age(record: Record, seen_at: datetime) -> Record:
    """Treat a call that started more than LONGEST_CALL ago as finished, so that it is published at all."""
    if record.finished or seen_at - record.started_at < LONGEST_CALL:
        return record
    return replace(record, finished=True)


def excerpt(row: Json, *, max_chars: int = 120) -> str:
    """Cut a row down to what may be logged: of each run of digits only the last two are shown."""
    return _INNER_DIGIT.sub("•", str(row)[: 4 * max_chars])[:max_chars]


def mask_digits(text: str) -> str:
    """Hide phone numbers in a text for messages: of each run of digits only the last two are shown."""
    return _INNER_DIGIT.sub("•", text)


# -- JSON -------------------------------------------------------------------------------------------------------------


def load_json(body: bytes, *, name: str) -> object:
    """Parse a JSON body, leniently if need be: one invalid character must not hide the other rows."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return load_lenient_json(body, name=name)


def load_lenient_json(body: bytes, *, name: str, **hooks: Callable[[str], object]) -> object:
    """Parse a JSON body with the standard library, which takes invalid UTF-8 and number `hooks`."""
    try:
        return json.loads(body.decode("utf-8-sig", "replace"), parse_constant=lambda _name: None, **hooks)  # type: ignore[arg-type]  # hooks are callables
    except (ValueError, RecursionError):
        raise UnexpectedResponse(
            f"{name} answered with something that is not JSON; check base_url, and any proxy in between"
        ) from None


def dump_json(value: object) -> bytes | None:
    """Serialise a value; None when orjson cannot."""
    try:
        return orjson.dumps(value)
    except (TypeError, RecursionError):
        return None


def raw_row(row: Any, columns: Mapping[str, Any]) -> Json:
    """Return a valid row for `Record.raw`: whole, else shrunk, else only its known `columns`, whichever fits first."""
    candidate: Json
    for candidate in (row, shrink_row(row)):
        row_json = dump_json(candidate)
        if row_json is not None and len(row_json) <= _MAX_RAW_BYTES:
            return candidate
    return {name: value for name, value in shrink_row(row).items() if name in columns}


def shrink_row(row: Json) -> Json:
    shrunk: Json = shrink(row)
    return shrunk


def shrink(value: Any, depth: int = 0) -> Any:
    """Cut a JSON value down: long text, deep nesting, many members, numbers beyond 64 bits."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int | float | None):
        return value if not isinstance(value, int) or abs(value) < 2**63 else None
    if depth == 4:
        return None
    if isinstance(value, dict):
        return {text(name) or "": shrink(item, depth + 1) for name, item in list(value.items())[:64]}
    if isinstance(value, list):
        return [shrink(item, depth + 1) for item in value[:64]]
    return text(str(value))


# -- responses --------------------------------------------------------------------------------------------------------


def validate_response(model: type[Model], document: object, *, name: str, what: str) -> Model:
    """Validate the frame of a response; raises UnexpectedResponse. `what` is what was requested: "the call list"."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise malformed(name, what, first_problem(error)) from None


def malformed(name: str, what: str, problem: str) -> UnexpectedResponse:
    """A response with status 200 that contradicts the provider's document."""
    return UnexpectedResponse(f"{name} sent a malformed response for {what}: {problem}. Nothing of it was ingested.")


def paging_ignored(name: str, what: str) -> UnexpectedResponse:
    """A list whose pages repeat: the server ignores the offset, so the calls behind the first page stay unread."""
    return UnexpectedResponse(f"{name} returned the same page of {what} for another offset, so the rest is unreadable")


def endless_list(name: str, what: str, size: str) -> UnexpectedResponse:
    """A list longer than any real one."""
    return UnexpectedResponse(f"{name} did not end {what} after {size}. Check base_url, and page_size.")


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """A response of the wrong status. `what` is what was requested, as in "the call list"."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    what: str
    host: str
    received_at: datetime


def provider_error(
    response: ErrorResponse, *, name: str, credential: str = "token", bucket: Literal["key", "ip"] = "key"
) -> ProviderError:
    """Map a status to the error tree. `credential` is the provider's word for it, `bucket` what a 429 counts by."""
    status, source, what = response.status, f"{name} at {response.host}", response.what
    if status in (401, 403):
        return Unauthorized(
            f"{source} rejected the {credential} for {what} ({status}). Set a {credential} that is valid for it.",
            status=status,
        )
    if status == 429:
        counted_by = "this IP address" if bucket == "ip" else f"this {credential}"
        return RateLimited(
            f"{source} received too many requests for {counted_by} ({what}). Requests resume when its limit allows.",
            bucket=bucket,
            retry_after_s=rate_limit_reset_s(response.headers, response.received_at),
        )
    if status >= 500:
        return Unavailable(f"{source} failed to return {what} ({status}). The request will be retried.")
    if 300 <= status < 400:
        return UnexpectedResponse(
            f"{source} redirected the request for {what} ({status}). Redirects are not followed because they would "
            f"carry the {credential} along; set base_url to the address of the API."
        )
    return UnexpectedResponse(
        f"{source} answered the request for {what} with the undocumented status {status}. Check base_url."
    )


def rate_limit_reset_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return the seconds until requests are allowed again, by the first valid header; None without one.

    The RateLimit headers are those of the IETF draft and of express-rate-limit, which WebFones seems to run.
    """
    hints = (
        parse_retry_after(headers.get("Retry-After"), now, longest_s=LONGEST_CLOSED_S),
        _plain_seconds(headers.get("RateLimit-Reset")),
        _reset_parameter(headers.get("RateLimit")),
        _until_epoch(headers.get("X-RateLimit-Reset"), now),
    )
    return next((min(max(hint, 1.0), LONGEST_CLOSED_S) for hint in hints if hint is not None), None)


def _plain_seconds(value: str | None) -> float | None:
    value = (value or "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) <= 9 else None


def _reset_parameter(value: str | None) -> float | None:
    match = _RESET_PARAMETER.search(value or "")
    return float(match.group(1)) if match else None


def _until_epoch(value: str | None, now: datetime) -> float | None:
    value = (value or "").strip()
    if not (value.isascii() and value.isdigit() and len(value) <= 10):
        return None
    # `X-RateLimit-Reset` is seconds since 1970 with most servers, and seconds from now with some.
    reset = float(value)
    return reset - now.timestamp() if reset > 10**9 else reset


def server_time(headers: Mapping[str, str]) -> datetime | None:
    """Return the response's `Date`, aware UTC; None when it is missing or malformed."""
    date = parse_http_date(headers.get("Date"))
    try:
        return date.astimezone(UTC) if date else None
    except OverflowError:
        return None


def audio_type(content_type: str | None) -> str | None:
    """Return the media type to store audio under; None when the response is text, and so not audio."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind.startswith("text/") or kind.endswith(("/json", "+json", "/xml", "+xml")):
        return None
    return kind if _AUDIO_TYPE.fullmatch(kind) else "application/octet-stream"
