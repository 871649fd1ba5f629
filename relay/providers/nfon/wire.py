"""NFON Call History on the wire: requests out, rows in. Pure, and no row can make it raise.

Two versions of the document are in use: an older one with `service` and `custom_data.crm`, and a newer one with
`destination_type` and `crm`, plus `call_id`, `customer`, `extension` and `user_uuid`. Both are read. Neither shows a
transcript; the vendor's examples have a `summary` text and call the rest "entries".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote, urlencode

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from relay.domain.call import Direction, InvalidRow, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.numbers import read_number
from relay.domain.time import iso
from relay.errors import ProviderError
from relay.providers import parsing
from relay.providers.credentials import is_header_safe
from relay.providers.parsing import ErrorResponse, OptionalTime, Seconds, Text, malformed, parse_or_none, shrink, text

NAME: Final = "NFON"
# Raise it with every change of the mapping that changes a record's content.
MAPPING_VERSION: Final = 1

CALL_LIST: Final = "the call list"
MAX_TRANSFERS: Final = 20
MAX_TRANSCRIPT_CHARS: Final = 6_000
# An event has at most 20 KB.
MAX_SUMMARY_CHARS: Final = 2_000
# A row this long before the requested time shows that NFON did not understand `from`.
TOO_EARLY: Final = timedelta(minutes=1)
_MAX_ENTRIES: Final = 2_000
_MAX_CRM_BYTES: Final = 2048

Unit = Literal["seconds", "milliseconds"]

_DIRECTIONS: Final[Mapping[str, Direction]] = {"inbound": Direction.INBOUND, "outbound": Direction.OUTBOUND}
# The document has the first three and `unknown`, and demands that clients tolerate new ones; the rest are guesses.
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


# -- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose calls are listed; None is the token's own user."""

    customer: str | None = None
    extension: str | None = None

    def parameters(self) -> dict[str, str]:
        parameters = {"customer": self.customer, "extension": self.extension}
        return {name: value for name, value in parameters.items() if value is not None}


def list_path(scope: Scope, since: datetime, unit: Unit, *, limit: int, offset: int = 0) -> str:
    """Build the path of the calls since `since`, oldest first."""
    # `to` is never sent: in the wrong unit it would empty the list.
    parameters = {"from": str(since_number(since, unit)), "sort": "asc", "limit": str(limit), "offset": str(offset)}
    return "/records?" + urlencode(parameters | scope.parameters())


def newest_path(scope: Scope) -> str:
    """Build the path of the newest call, without a time whose unit could be mistaken."""
    return "/records?" + urlencode({"sort": "desc", "limit": "1"} | scope.parameters())


def stream_path(scope: Scope) -> str:
    parameters = scope.parameters()
    return "/records" + (f"?{urlencode(parameters)}" if parameters else "")


def details_path(key: str) -> str:
    return f"/records/{quote(key, safe='')}?complete=true"


def since_number(since: datetime, unit: Unit) -> int:
    """Write the lower bound, one second early, because "newer than this timestamp" may be strict."""
    earlier = int(since.timestamp()) - 1
    return earlier * 1000 if unit == "milliseconds" else earlier


# -- the call list ----------------------------------------------------------------------------------------------------


def read_call_list(document: object) -> list[object]:
    """Return the rows of a call list; raises UnexpectedResponse."""
    if isinstance(document, list):
        return document
    raise malformed(NAME, CALL_LIST, "it is not a list")


def row_identity(row: object) -> str:
    """Identify a row within one listing: by its uuid, else by its content."""
    if isinstance(row, dict) and isinstance(row.get("uuid"), str):
        return str(row["uuid"])
    return repr(row)


def created_at(row: object) -> datetime | None:
    """Return the start of a row's call, where it is valid."""
    return parsing.utc_time_or_none(row.get("created")) if isinstance(row, dict) else None


def before(rows: Sequence[object], since: datetime) -> datetime | None:
    """Return the earliest start well before `since`: a call that was not requested. None when there is none."""
    starts = [start for row in rows if (start := created_at(row)) is not None]
    return min((start for start in starts if start < since - TOO_EARLY), default=None)


class NewestRevisions:
    """Remembers the newest revision of each row, so that a page requested earlier cannot undo what the stream sent."""

    def __init__(self, max_rows: int = 2000) -> None:
        self._max_rows = max_rows
        self._rows: dict[str, tuple[tuple[str, bool], object]] = {}

    def of(self, row: object) -> object:
        """Return the row, or a newer revision of it that was seen before."""
        if not isinstance(row, dict) or not isinstance(row.get("uuid"), str):
            return row
        key, revision = row["uuid"], _revision(row)
        newest = self._rows.get(key)
        if newest is not None and newest[0] > revision:
            return newest[1]
        if revision != _FIRST_REVISION:
            if newest is None and len(self._rows) >= self._max_rows:
                del self._rows[next(iter(self._rows))]
            self._rows[key] = (revision, row)
        return row


_FIRST_REVISION: Final = ("", False)


def _revision(row: Json) -> tuple[str, bool]:
    """Order the revisions of a row: by `updated`; and a transcript never becomes unavailable again."""
    transcription = row.get("transcription")
    available = isinstance(transcription, dict) and transcription.get("available") is True
    return iso(parsing.utc_time_or_none(row.get("updated"))) or "", available


# -- rows -------------------------------------------------------------------------------------------------------------


def _uuid(value: object) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable() and 1 <= len(value.strip()) <= 128:
        return value.strip()
    raise ValueError("uuid is not a short text")


def _or_none(model: type[BaseModel]) -> PlainValidator:
    return PlainValidator(lambda value: parse_or_none(model, value))


class NfonSide(BaseModel):
    """A caller or callee. `service` is the name of `destination_type` in the older document."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: Text = None
    number: Text = None
    context: Text = None
    destination_type: Text = None
    service: Text = None


class NfonTransfer(BaseModel):
    """One entry of `history`: where the call was before."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    caller: Annotated[NfonSide | None, _or_none(NfonSide)] = None
    callee: Annotated[NfonSide | None, _or_none(NfonSide)] = None
    updated: OptionalTime = None


class NfonTranscription(BaseModel):
    """Whether a row has a transcript, which only its details contain."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    available: Annotated[bool, BeforeValidator(lambda value: value is True)] = False


def _transfers(value: object) -> list[NfonTransfer]:
    transfers = value[:MAX_TRANSFERS] if isinstance(value, list) else []
    return [transfer for item in transfers if (transfer := parse_or_none(NfonTransfer, item)) is not None]


class NfonRow(BaseModel):
    """One record. Only `uuid` and `created` (when the call was placed, not when it was saved) can invalidate it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    uuid: Annotated[str, PlainValidator(_uuid)]
    created: Annotated[datetime, parsing.required_utc_time("created")]
    duration: Seconds = None
    direction: Text = None
    status: Text = None
    caller: Annotated[NfonSide | None, _or_none(NfonSide)] = None
    callee: Annotated[NfonSide | None, _or_none(NfonSide)] = None
    history: Annotated[list[NfonTransfer], PlainValidator(_transfers)] = []
    transcription: Annotated[NfonTranscription | None, _or_none(NfonTranscription)] = None
    trunk_code: Text = None
    call_id: Text = None
    customer: Text = None
    extension: Text = None
    user_uuid: Text = None
    crm: Any = None
    older_crm: Any = Field(None, validation_alias=AliasPath("custom_data", "crm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscribedRecord(Record):
    """A record with its transcript. Its hash stays that of the list's row, which is what every poll sees again."""

    row_hash: str

    def content_hash(self) -> str:
        return self.row_hash


@parsing.memoise_rows
def parse_row(row: object, region: str) -> Record | InvalidRow:
    valid = parsing.validate_row(NfonRow, row, key="uuid", start="created")
    return (
        valid if isinstance(valid, InvalidRow) else _record(valid, region, parsing.raw_row(row, NfonRow.model_fields))
    )


def _record(row: NfonRow, region: str, raw: Json) -> Record:
    own = _owners_side(row)
    caller = _party(row.caller, region, own=own == "caller")
    callee = _party(row.callee, region, own=own == "callee")
    if own is not None:
        ours = caller if own == "caller" else callee
        ours = replace(ours, user_id=row.user_uuid, extension=ours.extension or row.extension)
        caller, callee = (ours, callee) if own == "caller" else (caller, ours)
    direction = _direction(row)
    internal = {"caller": caller, "callee": callee}[own] if own else None
    external = None
    if direction is not Direction.INTERNAL and own:
        external = callee if own == "caller" else caller
    # The unit of `duration` is not stated; the examples only make sense in seconds.
    ended_at = row.created + timedelta(seconds=row.duration) if row.duration is not None else None
    return Record(
        key=row.uuid,
        started_at=row.created,
        local_date=row.created.date().isoformat(),
        direction=direction,
        outcome=_OUTCOMES.get((row.status or "").lower(), Outcome.UNKNOWN),
        status_raw=row.status,
        caller=caller,
        callee=callee,
        external=external,
        internal=internal,
        ended_at=ended_at,
        duration_seconds=row.duration,
        derived=("ended_at",) if ended_at else (),
        transcription={"available": row.transcription.available} if row.transcription else None,
        transfers=tuple(_transfer(transfer, region) for transfer in row.history),
        custom=_custom(row),
        raw=raw,
    )


def _owners_side(row: NfonRow) -> Literal["caller", "callee"] | None:
    """Return the side of the record's owner: each user has a record of their own, with `direction` seen from there."""
    match (row.direction or "").lower():
        case "outbound":
            return "caller"
        case "inbound":
            return "callee"
    match _is_extension(row.caller), _is_extension(row.callee):
        case True, False:
            return "caller"
        case False, True:
            return "callee"
    return None


def _direction(row: NfonRow) -> Direction:
    if _is_extension(row.caller) and _is_extension(row.callee):
        return Direction.INTERNAL
    return _DIRECTIONS.get((row.direction or "").lower(), Direction.UNKNOWN)


_CONTEXTS: Final[Mapping[str, NumberType]] = {
    "emergency": NumberType.EMERGENCY,
    "short": NumberType.SHORT,
    "conference": NumberType.CONFERENCE,
}


def _is_extension(side: NfonSide | None) -> bool:
    """Whether a number belongs to the customer: its context is a K-number, or one that the document does not name."""
    if side is None or not side.number or not side.context:
        return False
    return side.context.lower() != "global" and side.context.lower() not in _CONTEXTS


def _party(side: NfonSide | None, region: str, *, own: bool) -> Party:
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
    """Read E.164 without its plus sign; a withheld number is a word."""
    digits = raw.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        return replace(read_number(raw, region, internal=own), raw=raw)
    party = read_number(f"+{digits}", region, internal=own)
    return replace(party, raw=raw)


def _transfer(transfer: NfonTransfer, region: str) -> Json:
    content: Json = {"at": iso(transfer.updated)}
    for name, side in (("from", transfer.caller), ("to", transfer.callee)):
        if side is not None:
            party = _party(side, region, own=False)
            content[name] = {
                "number": party.number,
                "raw": party.raw,
                "extension": party.extension,
                "name": party.name,
                "destination_type": side.destination_type or side.service,
            }
    return content


def _custom(row: NfonRow) -> Json:
    values: Json = {
        "call_id": row.call_id,
        "customer": row.customer,
        "extension": row.extension,
        "user_uuid": row.user_uuid,
        "trunk_code": row.trunk_code,
        "crm": _crm(row.crm if row.crm is not None else row.older_crm),
        "destination_type": (row.callee.destination_type or row.callee.service) if row.callee else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _crm(value: object) -> object:
    crm = shrink(value)
    crm_json = parsing.dump_json(crm)
    return crm if crm_json is not None and len(crm_json) <= _MAX_CRM_BYTES else None


# -- details ----------------------------------------------------------------------------------------------------------


def has_transcript(record: Record) -> bool:
    return bool(record.transcription and record.transcription.get("available"))


def without_transcript(record: Record) -> Record:
    """Return the record as it was before its transcript, so that a later poll sees a change and tries again."""
    return replace(record, transcription={"available": False})


def with_transcript(record: Record, details: object | None) -> Record:
    """Add the transcript in a record's details; None when they are unavailable for good."""
    transcription: Json = {"available": True, "summary": None, "transcript": None, "truncated": False}
    source = details.get("transcription") if isinstance(details, dict) else None
    if isinstance(source, dict):
        summary = _long_text(source.get("summary"))
        transcript = next((lines for name in _TRANSCRIPT_FIELDS if (lines := _transcript(source.get(name)))), "")
        transcription |= {
            "summary": summary[:MAX_SUMMARY_CHARS] or None,
            "transcript": transcript[:MAX_TRANSCRIPT_CHARS] or None,
            "truncated": len(summary) > MAX_SUMMARY_CHARS or len(transcript) > MAX_TRANSCRIPT_CHARS,
        }
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(Record)}
    values["transcription"] = transcription
    return TranscribedRecord(**values, row_hash=record.content_hash())


# The document does not show a transcript: these are the names that such APIs use.
_TRANSCRIPT_FIELDS: Final = ("transcript", "entries", "transcripts", "segments", "text")
_SPEAKER_FIELDS: Final = ("speaker", "name", "speaker_name", "participant", "role", "channel")
_WORDS_FIELDS: Final = ("text", "transcript", "content", "message")


def _transcript(value: object) -> str:
    """Write a transcript as lines, "speaker: words" where entries name a speaker."""
    if isinstance(value, dict):
        value = next((value[name] for name in _TRANSCRIPT_FIELDS if name in value), None)
    if isinstance(value, list):
        return "\n".join(line for entry in value[:_MAX_ENTRIES] if (line := _line(entry)))
    return _long_text(value)


def _line(entry: object) -> str:
    if not isinstance(entry, dict):
        return _long_text(entry)
    spoken = next((part for name in _WORDS_FIELDS if (part := _long_text(entry.get(name)))), "")
    speaker = next((label for name in _SPEAKER_FIELDS if (label := text(entry.get(name)))), None)
    return f"{speaker}: {spoken}" if speaker and spoken else spoken


def _long_text(value: object) -> str:
    """Return text with its line breaks, without other control characters."""
    if not isinstance(value, str):
        return ""
    beginning = value[: 2 * MAX_TRANSCRIPT_CHARS]
    return "".join(char for char in beginning if char == "\n" or char.isprintable()).strip()


# -- tokens -----------------------------------------------------------------------------------------------------------


class TokenGrant(BaseModel):
    """The response of a token endpoint (RFC 6749, section 5.1). Without `refresh_token` the one used stays valid."""

    access_token: Annotated[str, Field(min_length=1, max_length=16_384)]
    refresh_token: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    expires_in: Seconds = None


def read_grant(document: object) -> TokenGrant:
    """Return the granted tokens; raises UnexpectedResponse when there is none that could be sent in a header."""
    grant = parsing.validate_response(TokenGrant, document, name="NFON's login", what="a new access token")
    if not is_header_safe(grant.access_token):
        raise malformed("NFON's login", "a new access token", "access_token has characters that a header cannot carry")
    return grant


# -- errors -----------------------------------------------------------------------------------------------------------


def error_of(response: ErrorResponse) -> ProviderError:
    return parsing.provider_error(response, name=NAME)
