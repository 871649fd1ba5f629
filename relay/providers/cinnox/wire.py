"""CINNOX on the wire: requests out, rows in. Pure, and no row can make it raise.

The documents are the data API's `call-log`, `call-detail` and `conference-detail`. They describe the same calls with
different columns, so rows are merged by `hid`, then by `callID`. Numbers are JSON Numbers and read without a float.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote, urlencode

import orjson
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from relay.domain.call import Direction, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.numbers import read_number
from relay.domain.time import iso
from relay.errors import ProviderError, RateLimited, Unavailable, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import InvalidRow, excerpt
from relay.providers.parsing import MaybeStamp, Text, complaint, dumped, given_up, kept, seconds, shrunk, shrunk_row

NAME: Final = "CINNOX"
MAPPING_VERSION: Final = 1
"""Raise it with every change of the mapping that changes a row's content."""

ListName = Literal["call-detail", "call-log", "conference-detail"]
MOST_ROWS: Final = 5_000
"""A range with more rows is read in halves."""
SHORTEST_RANGE: Final = timedelta(minutes=2)
"""A range that is not halved any more."""
EDGE: Final = timedelta(seconds=30)
"""How far over its ends a range is read, so that lists that date a call a little apart have both of its rows."""
LONGEST_LIST: Final = 200_000
"""More rows than any range has: a server that does not heed the offset."""

TOO_MANY: Final = 6451010
BAD_PARAMETER: Final = 6451000
BAD_RESPONSE: Final = 6451001
NO_METHOD: Final = 6450001

_MOST_DIGITS: Final = 40
_MOST_PARTICIPANTS: Final = 64
_LARGEST_CACHED_ROW_BYTES: Final = 4096
_CACHED_ROWS: Final = 8192
_NOT_LETTERS: Final = re.compile(r"[^A-Z]+")
_INNER_DIGIT: Final = re.compile(r"[0-9](?=[0-9]{2})")
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
"""The eight statuses of Call Status Metrics."""

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
"""How a call ended, and the outcome that this means where the row has no status that we know.

The vendor's full table was not to be had: a reason that is not here stays as it is written."""


# -- asking -----------------------------------------------------------------------------------------------------------


def list_path(name: ListName, app_id: str, *, first: datetime, last: datetime, offset: int, limit: int) -> str:
    """Build the path and query of one page; the server wants both ends of the range or neither."""
    query = {"startAt": iso_ms(first), "endAt": iso_ms(last), "offset": offset, "limit": limit}
    return f"/v1/api/apps/{quote(app_id, safe='')}/data/{name}?{urlencode(query)}"


def iso_ms(moment: datetime) -> str:
    """Write an instant as the document has it: `2022-11-07T00:00:00.000Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def halves(first: datetime, last: datetime) -> tuple[tuple[datetime, datetime], tuple[datetime, datetime]] | None:
    """Split a range in two that overlap by a second, whatever the server takes for its ends; None when too short."""
    if last - first <= SHORTEST_RANGE:
        return None
    middle = first + (last - first) / 2
    return (first, middle), (middle - timedelta(seconds=1), last)


def recording_path(template: str, *, app_id: str, call_id: str) -> str:
    """Fill the configured path in."""
    return template.replace("{app_id}", quote(app_id, safe="")).replace("{call_id}", quote(call_id, safe=""))


# -- answers ----------------------------------------------------------------------------------------------------------


def load_json(body: bytes) -> object:
    """Read a JSON body with its numbers exact: a phone number of 15 digits and more must not pass through a float."""
    try:
        return json.loads(
            body.decode("utf-8-sig", "replace"), parse_int=_whole, parse_float=_exact, parse_constant=lambda _name: None
        )
    except (ValueError, RecursionError):
        raise UnexpectedResponse(
            f"{NAME} sent something that is not JSON; check base_url, and any proxy in between"
        ) from None


def _whole(text: str) -> int | None:
    return int(text) if len(text) <= _MOST_DIGITS else None


def _exact(text: str) -> int | float | None:
    """Read `8.529876543210e12` as the whole number that it is, and what is none as a fraction."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not number.is_finite() or number.adjusted() > _MOST_DIGITS:
        return None
    return int(number) if number.adjusted() >= -_MOST_DIGITS and number == number.to_integral_value() else float(number)


class ListAnswer(BaseModel):
    """Any of the lists. The rows are checked one by one, later."""

    code: int = 0
    message: Text = None
    result: list[Any] | None = None


def read_list(answer: object, *, what: str, host: str) -> list[object]:
    """Take the rows out of an answer; raises the error that its code means."""
    try:
        read = ListAnswer.model_validate(answer)
    except ValidationError:
        raise UnexpectedResponse(
            f"{NAME} sent {what} without a list of results; nothing of it was taken over"
        ) from None
    if read.code not in (0, 200):
        raise coded(read.code, read.message, what=what, host=host)
    if read.result is None and not (isinstance(answer, dict) and "result" in answer):
        raise UnexpectedResponse(f"{NAME} sent {what} without a list of results; nothing of it was taken over")
    return read.result or []


class BadParameter(UnexpectedResponse):
    """CINNOX does not take a parameter, or misses one."""


def coded(code: int, message: str | None, *, what: str, host: str) -> ProviderError:
    """Name the error that a code of CINNOX means; digits of its message are masked as in a row."""
    said = f": {_INNER_DIGIT.sub('•', message[:100])}" if message else ""
    if code == TOO_MANY:
        return RateLimited(
            f"{NAME} at {host} says there were too many requests ({what}); asking pauses for now",
            bucket="key",
            retry_after_s=None,
        )
    if code == BAD_RESPONSE:
        return Unavailable(f"{NAME} at {host} failed to answer {what} ({code}); it will be asked again")
    if code == BAD_PARAMETER:
        return BadParameter(f"{NAME} at {host} does not take what was asked for {what} ({code}{said})")
    if code == NO_METHOD:
        return UnexpectedResponse(f"{NAME} at {host} has no such method for {what} ({code}); check base_url")
    return UnexpectedResponse(
        f"{NAME} at {host} answered {what} with code {code}, which its document does not know{said}"
    )


def refusal(
    status: int, body: bytes, headers: Mapping[str, str], *, what: str, host: str, now: datetime
) -> ProviderError:
    """Turn an unwanted answer into the error that says so: by the code in its body where it has one."""
    usual = parsing.refusal(status, headers, name=NAME, what=what, host=host, now=now)
    if status in (401, 403, 429) or 300 <= status < 400:
        return usual
    try:
        failure = ListAnswer.model_validate(load_json(body))
    except (UnexpectedResponse, ValidationError):
        return usual
    if failure.code == 0:
        return usual
    named = coded(failure.code, failure.message, what=what, host=host)
    if isinstance(named, RateLimited):
        return RateLimited(str(named), bucket="key", retry_after_s=parsing.retry_after_s(headers, now))
    return usual if status >= 500 else named


# -- merging ----------------------------------------------------------------------------------------------------------


def merge(rows: Sequence[object], others: Sequence[object], conferences: Sequence[object]) -> list[object]:
    """Make one row of what the lists say of one call.

    `rows` go first: `others` only fill in what they leave out, and add the calls that they do not have. A conference
    takes its participants from `conferences`, and the rows of its participants' own legs into itself.
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
    """Fill in what a row leaves out, inside its nested objects too."""
    filled = dict(row)
    for name, value in other.items():
        mine = filled.get(name)
        if isinstance(mine, dict) and isinstance(value, dict):
            filled[name] = _filled(mine, value)
        elif mine is None or mine == "":
            filled[name] = value
    return filled


def is_conference(row: object) -> bool:
    """Whether a row says that it is one."""
    return isinstance(row, dict) and str(row.get("type", "")).strip().lower() == "conference"


def _with_participants(rows: list[object], conferences: Sequence[object]) -> list[object]:
    known = [one for one in conferences if isinstance(one, dict) and isinstance(one.get("callConferenceList"), list)]
    if not known:
        return rows
    by_id = {name: one for one in known for name in _conference_ids(one)}
    folded: set[str] = set()
    made: list[object] = []
    for row in rows:
        found = None
        if is_conference(row) and isinstance(row, dict):
            found = next((by_id[name] for name in _conference_ids(row) if name in by_id), None)
        if found is not None and isinstance(row, dict):
            own = _id(row.get("hid"))
            legs = {_id(leg.get("hid")) for leg in found["callConferenceList"] if isinstance(leg, dict)}
            folded |= {leg for leg in legs if leg and leg != own}
            row = {**row, "callConferenceList": found["callConferenceList"]}
        made.append(row)
    return [row for row in made if not (isinstance(row, dict) and _id(row.get("hid")) in folded)]


def _conference_ids(row: Json) -> list[str]:
    """What a conference goes by, the surest first; a hid is not taken for a callID."""
    names = ("hid", "conferenceID", "callID", "roomID")
    return [f"{name}={value}" for name in names if (value := _id(row.get(name)))]


def _id(value: object) -> str | None:
    return parsing.text(value)


# -- rows -------------------------------------------------------------------------------------------------------------


def phone(value: object) -> str | None:
    """Read a phone number: a whole number is its digits with the country code, so it gets its plus back."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return f"+{value}" if value > 0 else None
    said = parsing.text(value)
    return f"+{said.lstrip('+')}" if said and _DIGITS.fullmatch(said) and len(said) > 6 else said


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _object(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _began(value: object) -> datetime:
    return parsing.stamp(value, "callDate")


def _hid(value: object) -> str:
    said = parsing.text(value)
    if said is None:
        raise ValueError("the row has neither hid nor callID")
    return said


Phone = Annotated[str | None, PlainValidator(phone)]
Flag = Annotated[bool | None, PlainValidator(_flag)]


class Side(BaseModel):
    """`callerInfo` or `calleeInfo`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    displayName: Text = None
    eid: Text = None
    isStaff: Flag = None
    phoneNumber: Phone = None


class CallRow(BaseModel):
    """One call as the lists have it. Only `callDate` and no identity at all can make a row bad."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: Annotated[str, PlainValidator(_hid)] = Field(validation_alias=AliasChoices("hid", "callID"))
    call_id: Text = Field(None, alias="callID")
    room_id: Text = Field(None, alias="roomID")
    inquiry_id: Text = Field(None, alias="inquiryID")
    case_number: Text = Field(None, alias="displayCaseNumber")
    type: Text = None
    status: Text = Field(None, validation_alias=AliasChoices("status", "callStatus"))
    direction: Text = Field(None, alias="callDirection")
    began: Annotated[datetime, PlainValidator(_began)] = Field(alias="callDate")
    ended: MaybeStamp = Field(None, alias="callEndTime")
    duration: Annotated[float | None, PlainValidator(seconds)] = Field(None, alias="callDuration")
    bye_reason: Text = Field(None, alias="byeReason")
    release_party: Text = Field(None, alias="releaseParty")
    virtual_number: Phone = Field(None, alias="virtualNumber")
    media: Text = Field(None, alias="mediaType")
    caller: Phone = None
    callee: Phone = None
    caller_info: Annotated[Side, BeforeValidator(_object)] = Field(Side(), alias="callerInfo")
    callee_info: Annotated[Side, BeforeValidator(_object)] = Field(Side(), alias="calleeInfo")
    legs: Annotated[list[Any], BeforeValidator(lambda value: value if isinstance(value, list) else [])] = Field(
        [], alias="callConferenceList"
    )


_COLUMNS: Final = {
    str(name): True
    for field, info in CallRow.model_fields.items()
    for name in (
        info.validation_alias.choices if isinstance(info.validation_alias, AliasChoices) else (info.alias or field,)
    )
}


def parse_rows(rows: Iterable[object], *, region: str, seen_at: datetime) -> list[Record | InvalidRow]:
    """Read merged rows, most of which were there in the last poll too: an unchanged row is looked up, not read."""
    return [_parse(row, region, seen_at) for row in rows]


def _parse(row: object, region: str, seen_at: datetime) -> Record | InvalidRow:
    again = dumped(row)
    cached = again is not None and len(again) <= _LARGEST_CACHED_ROW_BYTES
    read = _read_once(again, region) if again is not None and cached else _read(row, region)
    return given_up(read, seen_at) if isinstance(read, Record) else read


@lru_cache(maxsize=_CACHED_ROWS)
def _read_once(row: bytes, region: str) -> Record | InvalidRow:
    return _read(orjson.loads(row), region)


def _read(row: object, region: str) -> Record | InvalidRow:
    if not isinstance(row, dict):
        return InvalidRow("the row is not a JSON object", excerpt=excerpt({"row": shrunk(row)}))
    given = row if _id(row.get("hid")) else {name: value for name, value in row.items() if name != "hid"}
    try:
        parsed = CallRow.model_validate(given)
    except ValidationError as error:
        return InvalidRow(complaint(error), key=_id(row.get("hid")), excerpt=excerpt(shrunk_row(row)))
    return _record(parsed, region, kept(row, _COLUMNS))


def _record(row: CallRow, region: str, raw: Json) -> Record:
    direction = _direction(row)
    outbound = direction is Direction.OUTBOUND
    ours = row.virtual_number
    caller = _party(row.caller_info, row.caller or (ours if outbound else None), region, direction, caller=True)
    callee_number = row.callee or (ours if direction is Direction.INBOUND else None)
    callee = _party(row.callee_info, callee_number, region, direction, caller=False)
    external, internal = _sides(direction, caller, callee)
    end_reason, outcome_by_reason = _BYE_REASONS.get(_words(row.bye_reason), (row.bye_reason, Outcome.UNKNOWN))
    said = _words(row.status)
    outcome = _OUTCOMES.get(said, Outcome.UNKNOWN)
    ended_at = row.ended if row.ended is not None and row.ended >= row.began else None
    conference = (row.type or "").lower() == "conference"
    under_way = ended_at is None and (parsing.under_way(said) or (not said and not row.duration))
    if outcome is Outcome.UNKNOWN and not under_way:
        outcome = outcome_by_reason
    return Record(
        key=row.key,
        started_at=row.began,
        local_date=row.began.date().isoformat(),
        direction=direction,
        outcome=outcome,
        kind="conference" if conference else "call",
        finished=not under_way,
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


def _direction(row: CallRow) -> Direction:
    """The direction that the row names; else who of the two is staff tells."""
    named = _DIRECTIONS.get(_words(row.direction))
    if named is not None:
        return named
    calling, called = row.caller_info.isStaff, row.callee_info.isStaff
    if calling is None and called is None:
        return Direction.UNKNOWN
    if calling and called:
        return Direction.INTERNAL
    return Direction.OUTBOUND if calling else Direction.INBOUND


def _party(side: Side, number: str | None, region: str, direction: Direction, *, caller: bool) -> Party:
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
    """Who of the two is outside, and who is inside."""
    if direction is Direction.INBOUND:
        return caller, callee
    if direction is Direction.OUTBOUND:
        return callee, caller
    return None, caller if direction is Direction.INTERNAL else None


def _participants(legs: Sequence[object], region: str) -> Iterable[Json]:
    """Read who took part in a conference; what is no object is left out."""
    for leg in legs[:_MOST_PARTICIPANTS]:
        if not isinstance(leg, dict):
            continue
        side = Side.model_validate(_object(leg.get("participantInfo") or leg.get("calleeInfo") or leg))
        number = side.phoneNumber or phone(leg.get("phoneNumber")) or phone(leg.get("callee"))
        read = read_number(number, region, internal=bool(side.isStaff))
        reason = parsing.text(leg.get("byeReason"))
        yield {
            "id": _id(leg.get("hid")),
            "number": read.number,
            "raw": read.raw,
            "name": side.displayName,
            "user_id": side.eid,
            "internal": side.isStaff,
            "started_at": iso(parsing.stamp_or_none(leg.get("callDate") or leg.get("startTime"))),
            "ended_at": iso(parsing.stamp_or_none(leg.get("callEndTime") or leg.get("endTime"))),
            "duration_seconds": seconds(leg.get("callDuration", leg.get("duration"))),
            "end_reason": _BYE_REASONS.get(_words(reason), (reason, None))[0],
        }


def _custom(row: CallRow) -> Json:
    values = {
        "call_id": row.call_id,
        "room_id": row.room_id,
        "inquiry_id": row.inquiry_id,
        "case_number": row.case_number,
        "media": row.media,
    }
    return {name: value for name, value in values.items() if value is not None}


def _released(party: str | None) -> str | None:
    said = (party or "").lower()
    return said if said in ("caller", "callee") else party


def _words(text: str | None) -> str:
    return _NOT_LETTERS.sub(" ", (text or "").upper()).strip()
