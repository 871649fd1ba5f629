"""NFON Call History on the wire: requests out, rows in. Pure, and no row can make it raise.

Two versions of the document are about: `service`, `custom_data.crm`, and `destination_type`, `crm` with `call_id`,
`customer`, `extension` and `user_uuid`. Both are read. Neither names the unit of `from`, nor what a transcript looks
like; the vendor's examples show a `summary` text and call the rest "entries".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote, urlencode

import orjson
from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from relay.domain.call import Direction, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.numbers import read_number
from relay.domain.time import iso
from relay.errors import ProviderError, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import InvalidRow, excerpt
from relay.providers.parsing import Text, complaint, dumped, iso_time, kept, seconds, shrunk, shrunk_row, text

NAME: Final = "NFON"
MAPPING_VERSION: Final = 1
"""Raise it with every change of the mapping that changes a row's content."""

MOST_TRANSFERS: Final = 20
LONGEST_TRANSCRIPT: Final = 6_000
LONGEST_SUMMARY: Final = 2_000
"""Characters; an event has at most 20 KB."""
OLDER_THAN_ASKED: Final = timedelta(minutes=1)
"""A row that starts so long before what was asked for says that `from` was not understood."""
_MOST_ENTRIES: Final = 2_000
_LARGEST_CACHED_ROW_BYTES: Final = 4096
_CACHED_ROWS: Final = 8192

Unit = Literal["seconds", "milliseconds"]

_DIRECTIONS: Final[Mapping[str, Direction]] = {"inbound": Direction.INBOUND, "outbound": Direction.OUTBOUND}
_OUTCOMES: Final[Mapping[str, Outcome]] = {
    "answered": Outcome.ANSWERED,
    "missed": Outcome.NO_ANSWER,
    "cancelled": Outcome.CANCELLED,
    "canceled": Outcome.CANCELLED,
    "voicemail": Outcome.VOICEMAIL,
    "busy": Outcome.BUSY,
    "declined": Outcome.DECLINED,
    "rejected": Outcome.DECLINED,
    "failed": Outcome.FAILED,
}
"""The document has the first three and `unknown`; clients must tolerate new ones, whose likely names follow."""


# -- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose calls are asked for; None is the token's own user."""

    customer: str | None = None
    extension: str | None = None

    def parameters(self) -> dict[str, str]:
        given = {"customer": self.customer, "extension": self.extension}
        return {name: value for name, value in given.items() if value is not None}


def list_path(scope: Scope, since: datetime, unit: Unit, *, limit: int, offset: int = 0) -> str:
    """List the calls since `since`, oldest first. `to` is never sent: with the wrong unit it would empty the answer."""
    parameters = {"from": str(since_number(since, unit)), "sort": "asc", "limit": str(limit), "offset": str(offset)}
    return "/records?" + urlencode(parameters | scope.parameters())


def newest_path(scope: Scope) -> str:
    """Ask for the newest call, without a time whose unit could be mistaken."""
    return "/records?" + urlencode({"sort": "desc", "limit": "1"} | scope.parameters())


def stream_path(scope: Scope) -> str:
    """Listen to the calls as they come."""
    parameters = scope.parameters()
    return "/records" + (f"?{urlencode(parameters)}" if parameters else "")


def details_path(key: str) -> str:
    """Ask for all that is known of a call, its transcript too."""
    return f"/records/{quote(key, safe='')}?complete=true"


def since_number(since: datetime, unit: Unit) -> int:
    """Write the lower bound, a second early because "newer than" may be strict."""
    earlier = int(since.timestamp()) - 1
    return earlier * 1000 if unit == "milliseconds" else earlier


# -- the call list ----------------------------------------------------------------------------------------------------


def read_call_list(answer: object) -> list[object]:
    """Take the rows out of the call list's answer; raises UnexpectedResponse when it is none."""
    if isinstance(answer, list):
        return answer
    raise UnexpectedResponse("NFON sent a call list that is not a list; nothing of it was taken over")


def row_identity(row: object) -> str:
    """Name a row among others of one listing: by its uuid, else by all that it holds."""
    if isinstance(row, dict) and isinstance(row.get("uuid"), str):
        return str(row["uuid"])
    return repr(row)


def created_at(row: object) -> datetime | None:
    """Read when the call of a row began, where that can be told."""
    try:
        return _stamp(row.get("created")) if isinstance(row, dict) else None
    except ValueError:
        return None


def before(rows: Sequence[object], since: datetime) -> datetime | None:
    """Find the start of a call that nobody asked for: the earliest one well before `since`, if there is any."""
    starts = [start for row in rows if (start := created_at(row)) is not None]
    return min((start for start in starts if start < since - OLDER_THAN_ASKED), default=None)


class Newest:
    """Remembers the newest form of rows that change, so that an answer under way cannot bring an older one back."""

    def __init__(self, most: int = 2000) -> None:
        self._most = most
        self._rows: dict[str, tuple[tuple[str, bool], object]] = {}

    def of(self, row: object) -> object:
        """Give the row, or a newer form of it that was here before."""
        if not isinstance(row, dict) or not isinstance(row.get("uuid"), str):
            return row
        key, rank = row["uuid"], _rank(row)
        known = self._rows.get(key)
        if known is not None and known[0] > rank:
            return known[1]
        if rank != _UNRANKED:
            if known is None and len(self._rows) >= self._most:
                del self._rows[next(iter(self._rows))]
            self._rows[key] = (rank, row)
        return row


_UNRANKED: Final = ("", False)


def _rank(row: Json) -> tuple[str, bool]:
    """Order the forms of a row: by `updated`, and a transcript does not become unavailable."""
    transcription = row.get("transcription")
    available = isinstance(transcription, dict) and transcription.get("available") is True
    return iso(_stamp_or_none(row.get("updated"))) or "", available


# -- rows -------------------------------------------------------------------------------------------------------------


def _uuid(value: object) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable() and 1 <= len(value.strip()) <= 128:
        return value.strip()
    raise ValueError("uuid is not a short text")


def _stamp(value: object) -> datetime:
    wrong = "created is not a possible time such as 2025-06-03T10:12:34Z"
    if not isinstance(value, str) or not 19 <= len(value) <= 40:
        raise ValueError(wrong)
    try:
        stamp = iso_time(value.strip())
        stamp = stamp.replace(tzinfo=UTC) if stamp.tzinfo is None else stamp.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(wrong) from None
    if not 2000 <= stamp.year < 2100:
        raise ValueError("created is not in this century")
    return stamp


def _stamp_or_none(value: object) -> datetime | None:
    try:
        return _stamp(value)
    except ValueError:
        return None


def _maybe(model: type[BaseModel]) -> Any:
    def read(value: object) -> BaseModel | None:
        try:
            return model.model_validate(value)
        except ValidationError:
            return None

    return PlainValidator(read)


MaybeStamp = Annotated[datetime | None, PlainValidator(_stamp_or_none)]
Seconds = Annotated[float | None, PlainValidator(seconds)]


class Side(BaseModel):
    """A caller or callee. `service` is the older document's word for `destination_type`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: Text = None
    number: Text = None
    context: Text = None
    destination_type: Text = None
    service: Text = None


class Step(BaseModel):
    """One entry of `history`: where the call was before."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    caller: Annotated[Side | None, _maybe(Side)] = None
    callee: Annotated[Side | None, _maybe(Side)] = None
    updated: MaybeStamp = None


class Announced(BaseModel):
    """What a row says of its transcript."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    available: Annotated[bool, BeforeValidator(lambda value: value is True)] = False


def _steps(value: object) -> list[Step]:
    steps = [_maybe_step(item) for item in value[:MOST_TRANSFERS]] if isinstance(value, list) else []
    return [step for step in steps if step is not None]


def _maybe_step(item: object) -> Step | None:
    try:
        return Step.model_validate(item)
    except ValidationError:
        return None


class CallRow(BaseModel):
    """One record. Only `uuid` and `created` can make a row bad; the rest is read or left out.

    `created` is when the call was placed, not when the record was saved.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    uuid: Annotated[str, PlainValidator(_uuid)]
    created: Annotated[datetime, PlainValidator(_stamp)]
    duration: Seconds = None
    direction: Text = None
    status: Text = None
    caller: Annotated[Side | None, _maybe(Side)] = None
    callee: Annotated[Side | None, _maybe(Side)] = None
    history: Annotated[list[Step], PlainValidator(_steps)] = []
    transcription: Annotated[Announced | None, _maybe(Announced)] = None
    trunk_code: Text = None
    call_id: Text = None
    customer: Text = None
    extension: Text = None
    user_uuid: Text = None
    crm: Any = None
    older_crm: Any = Field(None, validation_alias=AliasPath("custom_data", "crm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Record):
    """A record with what its details hold. Its hash is that of the list's row, which is what comes back each poll."""

    row_hash: str

    def content_hash(self) -> str:
        return self.row_hash


def parse_rows(rows: Sequence[object], *, region: str) -> list[Record | InvalidRow]:
    """Read rows, most of which were there in the last poll too: an unchanged row is looked up, not read again."""
    return [_parse_again(row, region) for row in rows]


def _parse_again(row: object, region: str) -> Record | InvalidRow:
    again = dumped(row)
    if again is None or len(again) > _LARGEST_CACHED_ROW_BYTES:
        return parse_row(row, region=region)
    return _parse_once(again, region)


@lru_cache(maxsize=_CACHED_ROWS)
def _parse_once(again: bytes, region: str) -> Record | InvalidRow:
    return parse_row(orjson.loads(again), region=region)


def parse_row(row: object, *, region: str) -> Record | InvalidRow:
    """Read one row; whatever it is, it becomes a Record or a InvalidRow."""
    if not isinstance(row, dict):
        return InvalidRow("the row is not a JSON object", excerpt=excerpt({"row": shrunk(row)}))
    try:
        parsed = CallRow.model_validate(row)
    except ValidationError as error:
        return InvalidRow(complaint(error), key=text(row.get("uuid")), excerpt=excerpt(shrunk_row(row)))
    return _record(parsed, region, kept(row, CallRow.model_fields))


def _record(parsed: CallRow, region: str, raw: Json) -> Record:
    own = _owners_side(parsed)
    caller = _party(parsed.caller, region, own=own == "caller")
    callee = _party(parsed.callee, region, own=own == "callee")
    if own is not None:
        ours = caller if own == "caller" else callee
        ours = replace(ours, user_id=parsed.user_uuid, extension=ours.extension or parsed.extension)
        caller, callee = (ours, callee) if own == "caller" else (caller, ours)
    direction = _direction(parsed, caller, callee)
    internal = {"caller": caller, "callee": callee}[own] if own else None
    external = None
    if direction is not Direction.INTERNAL and own:
        external = callee if own == "caller" else caller
    known = parsed.duration is not None
    return Record(
        key=parsed.uuid,
        started_at=parsed.created,
        local_date=parsed.created.date().isoformat(),
        direction=direction,
        outcome=_OUTCOMES.get((parsed.status or "").lower(), Outcome.UNKNOWN),
        status_raw=parsed.status,
        caller=caller,
        callee=callee,
        external=external,
        internal=internal,
        ended_at=parsed.created + timedelta(seconds=parsed.duration) if parsed.duration is not None else None,
        duration_seconds=parsed.duration,
        derived=("ended_at",) if known else (),
        transcription={"available": parsed.transcription.available} if parsed.transcription else None,
        transfers=tuple(_transfer(step, region) for step in parsed.history),
        custom=_custom(parsed),
        raw=raw,
    )


def _owners_side(parsed: CallRow) -> Literal["caller", "callee"] | None:
    """Tell which side is the owner's: `direction` is seen from there, and each user has a record of their own."""
    match (parsed.direction or "").lower():
        case "outbound":
            return "caller"
        case "inbound":
            return "callee"
    inside = [_is_extension(side) for side in (parsed.caller, parsed.callee)]
    if inside == [True, False]:
        return "caller"
    return "callee" if inside == [False, True] else None


def _direction(parsed: CallRow, caller: Party, callee: Party) -> Direction:
    if _is_extension(parsed.caller) and _is_extension(parsed.callee):
        return Direction.INTERNAL
    return _DIRECTIONS.get((parsed.direction or "").lower(), Direction.UNKNOWN)


_CONTEXTS: Final[Mapping[str, NumberType]] = {
    "emergency": NumberType.EMERGENCY,
    "short": NumberType.SHORT,
    "conference": NumberType.CONFERENCE,
}


def _is_extension(side: Side | None) -> bool:
    """A K-number as context, or one that the document will have some day, means a number of that customer."""
    if side is None or not side.number or not side.context:
        return False
    return side.context.lower() != "global" and side.context.lower() not in _CONTEXTS


def _party(side: Side | None, region: str, *, own: bool) -> Party:
    if side is None or (side.number is None and side.name is None):
        return Party(internal=own)
    context = (side.context or "").lower()
    raw = side.number
    if raw is None:
        party = Party(type=NumberType.ANONYMOUS if not own else NumberType.UNKNOWN, internal=own)
    elif context == "global":
        party = _global(raw, region, own=own)
    elif context in _CONTEXTS:
        party = Party(raw=raw, type=_CONTEXTS[context], internal=own)
    elif context:
        party = Party(raw=raw, type=NumberType.EXTENSION, extension=raw, internal=True)
    else:
        party = read_number(raw, region, internal=own)
    return replace(party, name=side.name)


def _global(raw: str, region: str, *, own: bool) -> Party:
    """E.164 without its plus sign; withheld callers come as words."""
    digits = raw.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        return replace(read_number(raw, region, internal=own), raw=raw)
    party = read_number(f"+{digits}", region, internal=own)
    return replace(party, raw=raw)


def _transfer(step: Step, region: str) -> Json:
    made: Json = {"at": iso(step.updated)}
    for name, side in (("from", step.caller), ("to", step.callee)):
        if side is not None:
            party = _party(side, region, own=False)
            kind = side.destination_type or side.service
            made[name] = {
                "number": party.number,
                "raw": party.raw,
                "extension": party.extension,
                "name": party.name,
                "destination_type": kind,
            }
    return made


def _custom(parsed: CallRow) -> Json:
    found: Json = {
        "call_id": parsed.call_id,
        "customer": parsed.customer,
        "extension": parsed.extension,
        "user_uuid": parsed.user_uuid,
        "trunk_code": parsed.trunk_code,
        "crm": _crm(parsed.crm if parsed.crm is not None else parsed.older_crm),
        "destination_type": (parsed.callee.destination_type or parsed.callee.service) if parsed.callee else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _crm(value: object) -> object:
    small = shrunk(value)
    again = dumped(small)
    return small if again is not None and len(again) <= 2048 else None


# -- details ----------------------------------------------------------------------------------------------------------


def has_more(record: Record) -> bool:
    """Tell whether a record's details hold a transcript."""
    return bool(record.transcription and record.transcription.get("available"))


def not_yet(record: Record) -> Record:
    """Take a record as it was before its transcript: it will be found changed, and its details asked for again."""
    return replace(record, transcription={"available": False})


def completed(record: Record, answer: object | None) -> Record:
    """Add the transcript that the details hold; None when they could not be had for good."""
    transcription: Json = {"available": True, "summary": None, "transcript": None, "truncated": False}
    found = answer.get("transcription") if isinstance(answer, dict) else None
    if isinstance(found, dict):
        summary = _long_text(found.get("summary"))
        transcript = next((t for name in _TRANSCRIPTS if (t := _transcript(found.get(name)))), "")
        transcription |= {
            "summary": summary[:LONGEST_SUMMARY] or None,
            "transcript": transcript[:LONGEST_TRANSCRIPT] or None,
            "truncated": len(summary) > LONGEST_SUMMARY or len(transcript) > LONGEST_TRANSCRIPT,
        }
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(Record)}
    values["transcription"] = transcription
    return Completed(**values, row_hash=record.content_hash())


_TRANSCRIPTS: Final = ("transcript", "entries", "transcripts", "segments", "text")
_SPEAKERS: Final = ("speaker", "name", "speaker_name", "participant", "role", "channel")
_WORDS: Final = ("text", "transcript", "content", "message")


def _transcript(value: object) -> str:
    """Write a transcript as lines, "speaker: words" where entries name one."""
    if isinstance(value, dict):
        value = next((value[name] for name in _TRANSCRIPTS if name in value), None)
    if isinstance(value, list):
        return "\n".join(line for entry in value[:_MOST_ENTRIES] if (line := _entry(entry)))
    return _long_text(value)


def _entry(entry: object) -> str:
    if not isinstance(entry, dict):
        return _long_text(entry)
    words = next((said for name in _WORDS if (said := _long_text(entry.get(name)))), "")
    speaker = next((who for name in _SPEAKERS if (who := text(entry.get(name)))), None)
    return f"{speaker}: {words}" if speaker and words else words


def _long_text(value: object) -> str:
    """Keep text with its lines, without what cannot be printed."""
    if not isinstance(value, str):
        return ""
    some = value[: 2 * LONGEST_TRANSCRIPT]
    return "".join(char for char in some if char == "\n" or char.isprintable()).strip()


# -- tokens -----------------------------------------------------------------------------------------------------------


class Granted(BaseModel):
    """What a token endpoint answers (RFC 6749, section 5.1). Without `refresh_token` the one used stays good."""

    access_token: Annotated[str, Field(min_length=1, max_length=16_384)]
    refresh_token: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    expires_in: Seconds = None


def read_grant(answer: object) -> Granted:
    """Read the tokens; raises UnexpectedResponse when there is none that could be sent."""
    try:
        granted = Granted.model_validate(answer)
    except ValidationError:
        raise UnexpectedResponse(
            "NFON's login sent an answer without an access token; nothing of it was taken over"
        ) from None
    if not (granted.access_token.isascii() and granted.access_token.isprintable() and " " not in granted.access_token):
        raise UnexpectedResponse("NFON's login sent an access token that cannot be sent; nothing of it was taken over")
    return granted


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal(status: int, headers: Mapping[str, str], *, what: str, host: str, now: datetime) -> ProviderError:
    """Turn an unwanted answer into the error that says so; `what` is what was asked for, as in "the call list"."""
    return parsing.refusal(status, headers, name=NAME, what=what, host=host, now=now)
