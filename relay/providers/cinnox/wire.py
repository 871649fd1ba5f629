"""CINNOX on the wire: requests out, rows in. Pure, and no row can make it raise.

The documents are the data API's `call-log`, `call-detail` and `conference-detail`. They describe the same calls with
different columns, so rows are merged by `hid`, then by `callID`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote, urlencode

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from relay.domain.call import Direction, InvalidRow, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.numbers import read_number
from relay.domain.time import iso
from relay.errors import ProviderError, RateLimited, Unavailable, UnexpectedResponse
from relay.providers import parsing
from relay.providers.parsing import ErrorResponse, OptionalTime, Seconds, Text, malformed, seconds, text, words

NAME: Final = "CINNOX"
# Raise it with every change of the mapping that changes a record's content.
MAPPING_VERSION: Final = 1

ListName = Literal["call-detail", "call-log", "conference-detail"]
# A range with more rows is read in halves.
MAX_ROWS: Final = 5_000
# A range this short is not halved any further.
SHORTEST_RANGE: Final = timedelta(minutes=2)
# How far a range is extended on both sides: the lists date one call a little apart, and both rows must be in it.
EDGE: Final = timedelta(seconds=30)
# Rows; only a server that ignores the offset has more for one range.
LONGEST_LIST: Final = 200_000

# No phone number is longer, and int() takes quadratic time.
_MAX_DIGITS: Final = 40
_MAX_PARTICIPANTS: Final = 64
_DIGITS: Final = re.compile(r"\+?[0-9]{1,20}")

_DIRECTIONS: Final[Mapping[str, Direction]] = {
    "INBOUND": Direction.INBOUND,
    "INCOMING": Direction.INBOUND,
    "IN": Direction.INBOUND,
    "OUTBOUND": Direction.OUTBOUND,
    "OUTGOING": Direction.OUTBOUND,
    "OUT": Direction.OUTBOUND,
    "INTERNAL": Direction.INTERNAL,
}

# The statuses of the section Call Status Metrics.
_OUTCOMES: Final[Mapping[str, Outcome]] = {
    "CALL ENDED": Outcome.ANSWERED,
    "DECLINED": Outcome.DECLINED,
    "BUSY": Outcome.BUSY,
    "NOT ANSWERED": Outcome.NO_ANSWER,
    "CANCELLED": Outcome.CANCELLED,
    "CANCELED": Outcome.CANCELLED,
    "ABANDONED": Outcome.ABANDONED,
    "UNREACHABLE": Outcome.FAILED,
    "CALL FAILED": Outcome.FAILED,
}

# The end reason, and the outcome it implies for a row without a known status.
# The vendor's full table (Last Response Code & Bye Reason) was not available: any other reason is passed on as it is.
_BYE_REASONS: Final[Mapping[str, tuple[str, Outcome]]] = {
    "HANG UP": ("hangup", Outcome.UNKNOWN),
    "HANGUP": ("hangup", Outcome.UNKNOWN),
    "NORMAL HANG UP": ("hangup", Outcome.UNKNOWN),
    "NORMAL": ("hangup", Outcome.UNKNOWN),
    "BUSY": ("busy", Outcome.BUSY),
    "USER BUSY": ("busy", Outcome.BUSY),
    "NO ANSWER": ("no_answer", Outcome.NO_ANSWER),
    "NOT ANSWERED": ("no_answer", Outcome.NO_ANSWER),
    "DECLINED": ("declined", Outcome.DECLINED),
    "CANCELLED": ("cancelled", Outcome.CANCELLED),
    "CONGESTION": ("congestion", Outcome.FAILED),
    "BARRED": ("barred", Outcome.FAILED),
    "CALL BARRED": ("barred", Outcome.FAILED),
    "BEARER CAPABILITY": ("bearer_capability", Outcome.FAILED),
    "BEARER CAPABILITY NOT AVAILABLE": ("bearer_capability", Outcome.FAILED),
}


# -- requests ---------------------------------------------------------------------------------------------------------


def list_path(name: ListName, app_id: str, *, first: datetime, last: datetime, offset: int, limit: int) -> str:
    """Build the path and query of one page. With only one end of the range the server answers `6451000`."""
    query = {"startAt": iso_ms(first), "endAt": iso_ms(last), "offset": offset, "limit": limit}
    return f"/v1/api/apps/{quote(app_id, safe='')}/data/{name}?{urlencode(query)}"


def iso_ms(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def halves(first: datetime, last: datetime) -> tuple[tuple[datetime, datetime], tuple[datetime, datetime]] | None:
    """Split a range in two; None when it is too short.

    They overlap by a second, since the document does not say whether a range includes its ends.
    """
    if last - first <= SHORTEST_RANGE:
        return None
    middle = first + (last - first) / 2
    return (first, middle), (middle - timedelta(seconds=1), last)


def recording_path(template: str, *, app_id: str, call_id: str) -> str:
    return template.replace("{app_id}", quote(app_id, safe="")).replace("{call_id}", quote(call_id, safe=""))


# -- responses --------------------------------------------------------------------------------------------------------


def load_json(body: bytes) -> object:
    """Parse a JSON body with exact numbers.

    Phone numbers are JSON Numbers, and a float has too few digits for those of 16 digits and more.
    """
    return parsing.load_lenient_json(body, name=NAME, parse_int=_whole, parse_float=_exact)


def _whole(digits: str) -> int | None:
    return int(digits) if len(digits) <= _MAX_DIGITS else None


def _exact(number_text: str) -> int | float | None:
    """Read `8.529876543210e12` as the whole number that it is, and any other as a fraction."""
    try:
        number = Decimal(number_text)
    except InvalidOperation:
        return None
    if not number.is_finite() or number.adjusted() > _MAX_DIGITS:
        return None
    return int(number) if number.adjusted() >= -_MAX_DIGITS and number == number.to_integral_value() else float(number)


class CinnoxList(BaseModel):
    """Any of the lists, or an error; rows are validated one by one."""

    code: int = 0
    message: Text = None
    result: list[Any] | None = None


def read_list(document: object, *, what: str, host: str) -> list[object]:
    """Return the rows of a list; raises the error that its code stands for, which may come with status 200."""
    listed = parsing.validate_response(CinnoxList, document, name=NAME, what=what)
    if listed.code not in (0, 200):
        raise error_of_code(listed.code, listed.message, what=what, host=host)
    if listed.result is None and not (isinstance(document, dict) and "result" in document):
        raise malformed(NAME, what, "result is missing")
    return listed.result or []


class CinnoxBadParameter(UnexpectedResponse):
    """CINNOX rejected a parameter, or misses one."""


def error_of_code(
    code: int, message: str | None, *, what: str, host: str, retry_after_s: float | None = None
) -> ProviderError:
    source = f"{NAME} at {host}"
    # The message may quote what was requested, numbers included.
    detail = f"{code}: {parsing.mask_digits(message[:100])}" if message else str(code)
    match code:
        case 6451010:  # Too many requests; the document states no limit
            return RateLimited(
                f"{source} received too many requests ({what}). Requests resume when its limit allows.",
                bucket="key",
                retry_after_s=retry_after_s,
            )
        case 6451001:  # Bad response
            return Unavailable(f"{source} failed to return {what} ({code}). The request will be retried.")
        case 6451000:  # Bad parameter
            return CinnoxBadParameter(f"{source} rejected a parameter of the request for {what} ({detail}).")
        case 6450001:  # Method not found
            return UnexpectedResponse(f"{source} does not have the method for {what} ({code}). Check base_url.")
        case _:
            return UnexpectedResponse(f"{source} answered the request for {what} with an undocumented code ({detail}).")


def error_of(response: ErrorResponse) -> ProviderError:
    """Map an error response: by the code in its body where there is one, else by its status."""
    by_status = parsing.provider_error(response, name=NAME)
    if response.status in (401, 403, 429) or 300 <= response.status < 400:
        return by_status
    try:
        failure = parsing.parse_or_none(CinnoxList, load_json(response.body))
    except UnexpectedResponse:
        return by_status
    if failure is None or failure.code == 0:
        return by_status
    by_code = error_of_code(
        failure.code,
        failure.message,
        what=response.what,
        host=response.host,
        retry_after_s=parsing.rate_limit_reset_s(response.headers, response.received_at),
    )
    return by_status if response.status >= 500 and not isinstance(by_code, RateLimited) else by_code


# -- merging ----------------------------------------------------------------------------------------------------------


def merge(rows: Sequence[object], others: Sequence[object], conferences: Sequence[object]) -> list[object]:
    """Merge the rows that the lists have of one call into one.

    `rows` take precedence: `others` only fill in missing columns and missing calls. A conference gets its participants
    from `conferences`, and replaces the rows of its participants' own legs.
    """
    merged: list[object] = []
    place: dict[str, int] = {}
    by_call: dict[str, int] = {}
    for row in (*rows, *others):
        if not isinstance(row, dict):
            merged.append(row)
            continue
        hid, call_id = _id(row.get("hid")), _id(row.get("callID"))
        at = place.get(hid) if hid else None
        if at is None and call_id and (not hid or _id(_dict(merged, by_call.get(call_id)).get("hid")) is None):
            at = by_call.get(call_id)
        if at is None:
            at = len(merged)
            merged.append(row)
        else:
            merged[at] = _filled(_dict(merged, at), row)
        if hid:
            place.setdefault(hid, at)
        if call_id:
            by_call.setdefault(call_id, at)
    return _with_participants(merged, conferences)


def _dict(rows: Sequence[object], at: int | None) -> Json:
    row = rows[at] if at is not None else None
    return row if isinstance(row, dict) else {}


def _filled(row: Json, other: Json) -> Json:
    """Fill in missing columns, inside nested objects too."""
    filled = dict(row)
    for name, value in other.items():
        mine = filled.get(name)
        if isinstance(mine, dict) and isinstance(value, dict):
            filled[name] = _filled(mine, value)
        elif mine is None or mine == "":
            filled[name] = value
    return filled


def is_conference(row: object) -> bool:
    return isinstance(row, dict) and str(row.get("type", "")).strip().lower() == "conference"


def _with_participants(rows: list[object], conferences: Sequence[object]) -> list[object]:
    by_id = {
        id_: conference["callConferenceList"]
        for conference in conferences
        if isinstance(conference, dict) and isinstance(conference.get("callConferenceList"), list)
        for id_ in _conference_ids(conference)
    }
    leg_hids: set[str | None] = set()
    merged: list[object] = []
    for row in rows:
        legs = None
        if isinstance(row, dict) and is_conference(row):
            legs = next((by_id[id_] for id_ in _conference_ids(row) if id_ in by_id), None)
        if legs is not None and isinstance(row, dict):
            leg_hids |= {_id(leg.get("hid")) for leg in legs if isinstance(leg, dict)} - {_id(row.get("hid")), None}
            row = {**row, "callConferenceList": legs}
        merged.append(row)
    return [row for row in merged if not (isinstance(row, dict) and _id(row.get("hid")) in leg_hids)]


def _conference_ids(row: Json) -> list[str]:
    """The ids of a conference, the most specific first; the name keeps a hid from matching a callID."""
    names = ("hid", "conferenceID", "callID", "roomID")
    return [f"{name}={value}" for name in names if (value := _id(row.get(name)))]


def _id(value: object) -> str | None:
    return text(value)


# -- rows -------------------------------------------------------------------------------------------------------------


def phone(value: object) -> str | None:
    """Read a phone number; the document has them as Numbers, country code first, so the plus is put back."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return f"+{value}" if value > 0 else None
    number = text(value)
    return f"+{number.lstrip('+')}" if number and _DIGITS.fullmatch(number) and len(number) > 6 else number


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _object(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _key(value: object) -> str:
    key = text(value)
    if key is None:
        raise ValueError("the row has neither hid nor callID")
    return key


Phone = Annotated[str | None, PlainValidator(phone)]
Flag = Annotated[bool | None, PlainValidator(_flag)]


class CinnoxSide(BaseModel):
    """`callerInfo` or `calleeInfo`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    displayName: Text = None
    eid: Text = None
    isStaff: Flag = None
    phoneNumber: Phone = None


class CinnoxRow(BaseModel):
    """One call of the merged lists. Only `callDate`, or no identity at all, can invalidate it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: Annotated[str, PlainValidator(_key)] = Field(validation_alias=AliasChoices("hid", "callID"))
    call_id: Text = Field(None, alias="callID")
    room_id: Text = Field(None, alias="roomID")
    inquiry_id: Text = Field(None, alias="inquiryID")
    case_number: Text = Field(None, alias="displayCaseNumber")
    type: Text = None
    status: Text = Field(None, validation_alias=AliasChoices("status", "callStatus"))
    direction: Text = Field(None, alias="callDirection")
    started_at: Annotated[datetime, parsing.required_utc_time("callDate")] = Field(alias="callDate")
    ended_at: OptionalTime = Field(None, alias="callEndTime")
    duration: Seconds = Field(None, alias="callDuration")
    bye_reason: Text = Field(None, alias="byeReason")
    release_party: Text = Field(None, alias="releaseParty")
    virtual_number: Phone = Field(None, alias="virtualNumber")
    media: Text = Field(None, alias="mediaType")
    caller: Phone = None
    callee: Phone = None
    caller_info: Annotated[CinnoxSide, BeforeValidator(_object)] = Field(CinnoxSide(), alias="callerInfo")
    callee_info: Annotated[CinnoxSide, BeforeValidator(_object)] = Field(CinnoxSide(), alias="calleeInfo")
    legs: Annotated[list[Any], BeforeValidator(lambda value: value if isinstance(value, list) else [])] = Field(
        [], alias="callConferenceList"
    )


_COLUMNS: Final = {
    str(name): True
    for field, info in CinnoxRow.model_fields.items()
    for name in (
        info.validation_alias.choices if isinstance(info.validation_alias, AliasChoices) else (info.alias or field,)
    )
}


def parse_row(row: object, *, region: str, seen_at: datetime) -> Record | InvalidRow:
    parsed = _parse(row, region)
    return parsing.finished_by_age(parsed, seen_at) if isinstance(parsed, Record) else parsed


@parsing.memoise_rows
def _parse(row: Any, region: str) -> Record | InvalidRow:
    # An unusable hid must not keep callID from being the key.
    has_hid = not isinstance(row, dict) or _id(row.get("hid")) is not None
    columns = row if has_hid else {name: value for name, value in row.items() if name != "hid"}
    valid = parsing.validate_row(CinnoxRow, columns, key="hid", start="callDate")
    return valid if isinstance(valid, InvalidRow) else _record(valid, region, parsing.raw_row(row, _COLUMNS))


def _record(row: CinnoxRow, region: str, raw: Json) -> Record:
    direction = _direction(row)
    outbound = direction is Direction.OUTBOUND
    ours = row.virtual_number
    caller = _party(row.caller_info, row.caller or (ours if outbound else None), region, direction, caller=True)
    callee_number = row.callee or (ours if direction is Direction.INBOUND else None)
    callee = _party(row.callee_info, callee_number, region, direction, caller=False)
    external, internal = _sides(direction, caller, callee)
    end_reason, outcome_by_reason = _BYE_REASONS.get(words(row.bye_reason), (row.bye_reason, Outcome.UNKNOWN))
    status = words(row.status)
    outcome = _OUTCOMES.get(status, Outcome.UNKNOWN)
    ended_at = row.ended_at if row.ended_at is not None and row.ended_at >= row.started_at else None
    conference = (row.type or "").lower() == "conference"
    in_progress = parsing.in_progress(status, ended_at, row.duration)
    if outcome is Outcome.UNKNOWN and not in_progress:
        outcome = outcome_by_reason
    return Record(
        key=row.key,
        started_at=row.started_at,
        local_date=row.started_at.date().isoformat(),
        direction=direction,
        outcome=outcome,
        kind="conference" if conference else "call",
        finished=not in_progress,
        audio=outcome is Outcome.ANSWERED and not conference and row.call_id is not None,
        status_raw=row.status,
        end_reason=end_reason,
        ended_by=_released(row.release_party),
        caller=caller,
        callee=callee,
        external=external,
        internal=internal,
        ended_at=ended_at,
        duration_seconds=row.duration,
        participants=tuple(_participants(row.legs, region)),
        custom=_custom(row),
        raw=raw,
    )


def _direction(row: CinnoxRow) -> Direction:
    """The direction of the row, else the one that follows from who is staff."""
    direction = _DIRECTIONS.get(words(row.direction))
    if direction is not None:
        return direction
    calling, called = row.caller_info.isStaff, row.callee_info.isStaff
    if calling is None and called is None:
        return Direction.UNKNOWN
    if calling and called:
        return Direction.INTERNAL
    return Direction.OUTBOUND if calling else Direction.INBOUND


def _party(side: CinnoxSide, number: str | None, region: str, direction: Direction, *, caller: bool) -> Party:
    internal = direction is Direction.INTERNAL or direction is (Direction.OUTBOUND if caller else Direction.INBOUND)
    read = read_number(side.phoneNumber or number, region, internal=internal)
    return Party(
        number=read.number,
        raw=read.raw,
        type=read.type,
        extension=read.extension,
        name=side.displayName,
        country=read.country,
        internal=internal,
        user_id=side.eid,
    )


def _sides(direction: Direction, caller: Party, callee: Party) -> tuple[Party | None, Party | None]:
    if direction is Direction.INBOUND:
        return caller, callee
    if direction is Direction.OUTBOUND:
        return callee, caller
    return None, caller if direction is Direction.INTERNAL else None


def _participants(legs: Sequence[object], region: str) -> Iterable[Json]:
    """Read the participants of a conference; whatever is not an object is left out."""
    for leg in legs[:_MAX_PARTICIPANTS]:
        if not isinstance(leg, dict):
            continue
        side = CinnoxSide.model_validate(_object(leg.get("participantInfo") or leg.get("calleeInfo") or leg))
        number = side.phoneNumber or phone(leg.get("phoneNumber")) or phone(leg.get("callee"))
        read = read_number(number, region, internal=bool(side.isStaff))
        reason = text(leg.get("byeReason"))
        yield {
            "id": _id(leg.get("hid")),
            "number": read.number,
            "raw": read.raw,
            "name": side.displayName,
            "user_id": side.eid,
            "internal": side.isStaff,
            "started_at": iso(parsing.utc_time_or_none(leg.get("callDate") or leg.get("startTime"))),
            "ended_at": iso(parsing.utc_time_or_none(leg.get("callEndTime") or leg.get("endTime"))),
            "duration_seconds": seconds(leg.get("callDuration", leg.get("duration"))),
            "end_reason": _BYE_REASONS.get(words(reason), (reason, None))[0],
        }


def _custom(row: CinnoxRow) -> Json:
    values = {
        "call_id": row.call_id,
        "room_id": row.room_id,
        "inquiry_id": row.inquiry_id,
        "case_number": row.case_number,
        "media": row.media,
    }
    return {name: value for name, value in values.items() if value is not None}


def _released(party: str | None) -> str | None:
    lowered = (party or "").lower()
    return lowered if lowered in ("caller", "callee") else party
