"""WebFones on the wire: requests out, rows in. Pure, and no row can make it raise.

The documents are WebFones' Call Log Access API 3.1 and Contact API 3.0. They leave out the zone of the times, most
fields of a row and all dispositions but one: what is missing stays None, what is unknown stays in `raw`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote
from zoneinfo import ZoneInfo

import orjson
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from relay.domain.call import Contact, Direction, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.numbers import match_key, national_digits, read_number
from relay.errors import ProviderError, UnexpectedResponse
from relay.providers import parsing
from relay.providers.base import ContactChanges, InvalidRow, excerpt
from relay.providers.parsing import Text, complaint, dumped, given_up, iso_time, kept, seconds, shrunk, shrunk_row, text

NAME: Final = "WebFones"
MAPPING_VERSION: Final = 1
"""Raise it with every change of the mapping that changes a row's content."""

MOST_CONTACTS_PER_NUMBER: Final = 20
_LARGEST_CACHED_ROW_BYTES: Final = 2048
_CACHED_ROWS: Final = 8192
_CLOCK_SKEW: Final = timedelta(minutes=5)

_STAMP: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:?[0-9]{2})?"
)
_NOT_LETTERS: Final = re.compile(r"[^A-Z]+")

_DIRECTIONS: Final[Mapping[str, Direction]] = {
    "INCOMING": Direction.INBOUND,
    "INBOUND": Direction.INBOUND,
    "IN": Direction.INBOUND,
    "OUTGOING": Direction.OUTBOUND,
    "OUTBOUND": Direction.OUTBOUND,
    "OUT": Direction.OUTBOUND,
    "INTERNAL": Direction.INTERNAL,
    "LOCAL": Direction.INTERNAL,
}

_OUTCOMES: Final[Mapping[str, Outcome]] = {
    word: outcome
    for outcome, words in {
        Outcome.ANSWERED: ("ANSWERED", "ANSWER", "COMPLETED", "COMPLETE", "CONNECTED", "SUCCESS"),
        Outcome.NO_ANSWER: ("NO ANSWER", "NOANSWER", "NOT ANSWERED", "UNANSWERED", "MISSED", "TIMEOUT"),
        Outcome.BUSY: ("BUSY", "USER BUSY"),
        Outcome.FAILED: ("FAILED", "FAILURE", "CONGESTION", "CHANUNAVAIL", "UNAVAILABLE", "UNREACHABLE", "ERROR"),
        Outcome.CANCELLED: ("CANCEL", "CANCELED", "CANCELLED", "ORIGINATOR CANCEL"),
        Outcome.VOICEMAIL: ("VOICEMAIL", "VOICE MAIL", "VM"),
        Outcome.DECLINED: ("DECLINED", "DECLINE", "REJECTED", "REJECT"),
        Outcome.ABANDONED: ("ABANDONED", "ABANDON"),
    }.items()
    for word in words
}


# -- asking -----------------------------------------------------------------------------------------------------------


def records_path(since: datetime, zone: ZoneInfo) -> str:
    """Build the path and query that lists the calls after `since`, percent-encoded as in the document's examples."""
    return f"/call_log/records_after_timestamp?timestamp={quote(query_time(since, zone), safe='')}"


def query_time(since: datetime, zone: ZoneInfo) -> str:
    """Write the lower bound in the zone of the rows, so that no row of a call at or after `since` compares below it.

    One second earlier, because `after` may mean strictly after. Where a clock change will show the hour a second
    time, later calls carry smaller times than `since`: the text goes back by the length of the change.
    """
    local = (since.astimezone(UTC) - timedelta(seconds=1)).astimezone(zone)
    change = _offset(local, fold=0) - _offset(local, fold=1)
    if local.fold == 0 and change > timedelta(0):
        local -= change
    return local.strftime("%Y-%m-%d %H:%M:%S")


def _offset(local: datetime, *, fold: Literal[0, 1]) -> timedelta:
    return local.replace(fold=fold).utcoffset() or timedelta(0)


# -- the call list ----------------------------------------------------------------------------------------------------


class CallListAnswer(BaseModel):
    """`GET /call_log/records_after_timestamp`: everything in one body. The rows are checked one by one, later."""

    success: bool = True
    count: int | None = None
    records: list[Any]


def read_call_list(answer: object) -> list[object]:
    """Take the rows out of the call list's answer; raises UnexpectedResponse when the answer contradicts itself."""
    try:
        envelope = CallListAnswer.model_validate(answer)
    except ValidationError:
        raise UnexpectedResponse(
            "WebFones sent a call list without a list of records; nothing of it was taken over"
        ) from None
    if not envelope.success:
        raise UnexpectedResponse("WebFones says that listing the calls did not succeed; it will be asked again")
    if envelope.count is not None and envelope.count != len(envelope.records):
        raise UnexpectedResponse(
            f"WebFones announced {envelope.count} calls and sent {len(envelope.records)}; nothing of it was taken over"
        )
    return envelope.records


def _rid(value: object) -> str:
    if isinstance(value, str) and value.isascii() and value.strip().isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63:
        return str(value)
    raise ValueError("rid is not a positive whole number")


def _stamp(value: object) -> datetime:
    wrong = "call_timestamp is not a possible time of the form YYYY-MM-DD HH:MM:SS"
    if not isinstance(value, str) or not _STAMP.fullmatch(value.strip()):
        raise ValueError(wrong)
    try:
        stamp = iso_time(value.strip())
    except ValueError:
        raise ValueError(wrong) from None
    if not 2000 <= stamp.year < 2100:
        raise ValueError("call_timestamp is not in this century")
    return stamp


def _stamp_or_none(value: object) -> datetime | None:
    try:
        return _stamp(value)
    except ValueError:
        return None


MaybeStamp = Annotated[datetime | None, PlainValidator(_stamp_or_none)]


class CallRow(BaseModel):
    """One row of the call list. Only `rid` and `call_timestamp` can make a row bad; the rest is read or left out.

    The times and durations are not in the document, which ends its list of fields with "..."; likely names are tried.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    rid: Annotated[str, PlainValidator(_rid)]
    call_timestamp: Annotated[datetime, PlainValidator(_stamp)]
    cidname_outside: Text = None
    cidext_inside: Text = None
    direction: Text = None
    cidnumber_outside: Text = None
    cidnumber_inside: Text = None
    disposition: Text = None
    duration: Annotated[float | None, PlainValidator(seconds)] = Field(
        None, validation_alias=AliasChoices("duration", "call_duration", "billsec")
    )
    answered: MaybeStamp = Field(None, validation_alias=AliasChoices("answer_timestamp", "answer_time", "answered_at"))
    ended: MaybeStamp = Field(None, validation_alias=AliasChoices("end_timestamp", "end_time", "ended_at"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondReading(Record):
    """A call in the hour that the clock showed twice, taken for the second time round.

    Which time it was is judged by when the row is seen, and the row is seen again later: its hash is that of the first
    reading, so that judging again is never a change.
    """

    first_reading_hash: str

    def content_hash(self) -> str:
        return self.first_reading_hash


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A row that means different things at different times: still under way, or in the hour that is shown twice."""

    record: Record
    second: Record | None

    def at(self, seen_at: datetime) -> Record:
        if self.second is None or self.second.started_at > seen_at + _CLOCK_SKEW:
            return given_up(self.record, seen_at)
        second = given_up(self.second, seen_at)
        first = replace(self.record, finished=second.finished)
        values = {field.name: getattr(second, field.name) for field in fields(Record)}
        return SecondReading(**values, first_reading_hash=first.content_hash())


def parse_row(row: object, *, zone: ZoneInfo, region: str, seen_at: datetime) -> Record | InvalidRow:
    """Read one row; whatever it is, it becomes a Record or a InvalidRow. `zone` is that of its times."""
    read = _read(row, zone, region)
    return read.at(seen_at) if isinstance(read, _Unsettled) else read


def parse_rows(rows: Sequence[object], *, zone: ZoneInfo, region: str, seen_at: datetime) -> list[Record | InvalidRow]:
    """Read rows, most of which were there in the last poll too: an unchanged row is looked up, not read again."""
    return [_parse_again(row, zone, region, seen_at) for row in rows]


def _parse_again(row: object, zone: ZoneInfo, region: str, seen_at: datetime) -> Record | InvalidRow:
    again = dumped(row)
    if again is None or len(again) > _LARGEST_CACHED_ROW_BYTES:
        return parse_row(row, zone=zone, region=region, seen_at=seen_at)
    read = _read_once(again, zone, region)
    return read.at(seen_at) if isinstance(read, _Unsettled) else read


@lru_cache(maxsize=_CACHED_ROWS)
def _read_once(row: bytes, zone: ZoneInfo, region: str) -> Record | InvalidRow | _Unsettled:
    return _read(orjson.loads(row), zone, region)


def _read(row: object, zone: ZoneInfo, region: str) -> Record | InvalidRow | _Unsettled:
    if not isinstance(row, dict):
        return InvalidRow("the row is not a JSON object", excerpt=excerpt({"row": shrunk(row)}))
    try:
        parsed = CallRow.model_validate(row)
    except ValidationError as error:
        return InvalidRow(complaint(error), key=_key_of(row), excerpt=excerpt(shrunk_row(row)))
    first, second = _instants(parsed.call_timestamp, zone)
    raw = kept(row, CallRow.model_fields)
    record = _record(parsed, first, zone, region, raw)
    if second is not None:
        return _Unsettled(record, _record(parsed, second, zone, region, raw))
    return record if record.finished else _Unsettled(record, None)


def _key_of(row: Json) -> str | None:
    try:
        return _rid(row.get("rid"))
    except ValueError:
        return None


def _instants(stamp: datetime, zone: ZoneInfo) -> tuple[datetime, datetime | None]:
    """Place a stamp in time: the instant, and a second one where the zone's clock shows that time twice.

    A time that the clock skips is read as if it had not been put forward yet.
    """
    if stamp.tzinfo is not None:
        return stamp.astimezone(UTC), None
    first = stamp.replace(tzinfo=zone, fold=0).astimezone(UTC)
    second = stamp.replace(tzinfo=zone, fold=1).astimezone(UTC)
    return first, second if second > first else None


def _at_or_after(stamp: datetime | None, zone: ZoneInfo, started_at: datetime) -> datetime | None:
    """Place a later moment of the call: the first instant that is not before its start."""
    if stamp is None:
        return None
    return next((one for one in _instants(stamp, zone) if one is not None and one >= started_at), None)


def _record(parsed: CallRow, started_at: datetime, zone: ZoneInfo, region: str, raw: Json) -> Record:
    direction = _DIRECTIONS.get(_words(parsed.direction), Direction.UNKNOWN)
    inside, outside = _inside(parsed, region), _outside(parsed, region, direction)
    caller, callee = (outside, inside) if direction in (Direction.INBOUND, Direction.UNKNOWN) else (inside, outside)
    ended_at = _at_or_after(parsed.ended, zone, started_at)
    said = _words(parsed.disposition)
    under_way = ended_at is None and (parsing.under_way(said) or (not parsed.disposition and not parsed.duration))
    outcome = _OUTCOMES.get(said, Outcome.UNKNOWN)
    return Record(
        key=parsed.rid,
        started_at=started_at,
        local_date=parsed.call_timestamp.date().isoformat(),
        direction=direction,
        outcome=outcome,
        finished=not under_way,
        audio=outcome is Outcome.ANSWERED,
        status_raw=parsed.disposition,
        caller=caller,
        callee=callee,
        external=None if direction is Direction.INTERNAL else outside,
        internal=inside,
        answered_at=_at_or_after(parsed.answered, zone, started_at),
        ended_at=ended_at,
        duration_seconds=parsed.duration,
        raw=raw,
    )


def _words(text: str | None) -> str:
    return _NOT_LETTERS.sub(" ", (text or "").upper()).strip()


def _inside(parsed: CallRow, region: str) -> Party:
    """The account's side: its number and the extension, which either column may carry."""
    party = read_number(parsed.cidnumber_inside, region, internal=True)
    if party.raw is None and parsed.cidext_inside:
        return Party(raw=parsed.cidext_inside, type=NumberType.EXTENSION, extension=parsed.cidext_inside, internal=True)
    return replace(party, extension=parsed.cidext_inside or party.extension)


def _outside(parsed: CallRow, region: str, direction: Direction) -> Party:
    party = read_number(parsed.cidnumber_outside, region, internal=direction is Direction.INTERNAL)
    return replace(party, name=parsed.cidname_outside)


# -- contacts ---------------------------------------------------------------------------------------------------------


class ContactRow(BaseModel):
    """One contact of `POST /contacts/contacts/search/phones`. What else it may hold is dropped, an echoed key too."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    uuid: Annotated[str, BeforeValidator(text)]
    firstname: Text = None
    lastname: Text = None
    organization: Text = None
    email: Text = None
    external_id: Text = None
    mobile_phone: Text = None


class VersionedRow(BaseModel):
    """One changed or deleted contact of `GET /contacts/contactsAfterVersion/{version}`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Annotated[int, Field(ge=0, lt=2**63)]


class ContactChangesAnswer(BaseModel):
    """`GET /contacts/contactsAfterVersion/{version}`."""

    updated: list[VersionedRow]
    deleted: list[VersionedRow] = []


def lookup_digits(numbers: Sequence[str], region: str) -> dict[str, str]:
    """Choose what is asked for each E.164 number; whatever is none, an extension above all, is left out."""
    return {number: digits for number in numbers if (digits := national_digits(number, region))}


def read_contacts(answer: object, asked: Mapping[str, str]) -> dict[str, list[Contact]]:
    """Sort the found contacts under the numbers that were asked for: `asked` is what `lookup_digits` gave.

    The server strips a leading 1 and punctuation before it compares, so both sides are brought to that form. Two
    numbers that only differ in that 1 are told apart by their exact text, or not at all.
    """
    if not isinstance(answer, dict):
        raise UnexpectedResponse(
            "WebFones sent a contact search that is not a JSON object; the contacts were not taken over"
        )
    by_key: dict[str, object] = {match_key(str(name)): found for name, found in answer.items()}
    keys = [match_key(digits) for digits in asked.values()]
    if answer and not any(key in by_key for key in keys):
        raise UnexpectedResponse(
            "WebFones sent a contact search about numbers that were not asked for; it was not taken over"
        )
    contacts: dict[str, list[Contact]] = {}
    for number, digits in asked.items():
        key = match_key(digits)
        found = answer.get(digits) if digits in answer or keys.count(key) > 1 else by_key.get(key)
        contacts[number] = _contacts(found, key)
    return contacts


def _contacts(found: object, key: str) -> list[Contact]:
    if found is None:
        return []
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise UnexpectedResponse("WebFones sent a contact search without lists of contacts; it was not taken over")
    rows = [row for item in found if (row := _contact_row(item)) is not None]
    rows.sort(key=lambda row: match_key(row.mobile_phone or "") != key)
    return [_contact(row) for row in rows[:MOST_CONTACTS_PER_NUMBER]]


def _contact_row(item: object) -> ContactRow | None:
    try:
        return ContactRow.model_validate(item)
    except ValidationError:
        return None


def _contact(row: ContactRow) -> Contact:
    name = " ".join(part for part in (row.firstname, row.lastname) if part)
    return Contact(
        id=row.uuid,
        external_id=row.external_id,
        name=name or None,
        organization=row.organization,
        email=row.email,
    )


def read_changes(answer: object, version: int) -> ContactChanges:
    """Read which version the address book has now; raises UnexpectedResponse when that cannot be told."""
    try:
        changes = ContactChangesAnswer.model_validate(answer)
    except ValidationError:
        raise UnexpectedResponse("WebFones sent contact changes without versions; they were not taken over") from None
    newest = max((row.version for row in (*changes.updated, *changes.deleted)), default=version)
    return ContactChanges(version=max(newest, version), changed=newest > version)


# -- health -----------------------------------------------------------------------------------------------------------


class HealthAnswer(BaseModel):
    """`GET /health`: whether the gateway runs; needs no key."""

    status: Text = None
    services: list[Text] = []


class ServiceStatus(BaseModel):
    """One entry of `StatusAnswer`; its `endpoint` is an inner address and is not shown."""

    status: Text = None


class StatusAnswer(BaseModel):
    """`GET /status`: how each service is; needs the key."""

    status: Text = None
    services: dict[str, ServiceStatus] = {}


def health_line(answer: object) -> tuple[bool, str]:
    """Say in a line how the gateway is, and whether that is well."""
    try:
        health = HealthAnswer.model_validate(answer)
    except ValidationError:
        return False, "gateway: an answer that its document does not know"
    services = ", ".join(name for name in health.services if name)
    return health.status in ("healthy", "ok"), f"gateway: {health.status or 'unknown'}" + (
        services and f" ({services})"
    )


def status_line(answer: object) -> tuple[bool, str]:
    """Say in a line how the services are, and whether that is well."""
    try:
        status = StatusAnswer.model_validate(answer)
    except ValidationError:
        return False, "services: an answer that its document does not know"
    services = [f"{text(name) or '?'} {one.status or 'unknown'}" for name, one in sorted(status.services.items())]
    well = status.status in ("healthy", "ok") and all(one.status == "online" for one in status.services.values())
    return well, "key accepted; services: " + (", ".join(services) or status.status or "unknown")


# -- errors and headers -----------------------------------------------------------------------------------------------


def refusal(
    status: int, body: bytes, headers: Mapping[str, str], *, what: str, host: str, now: datetime
) -> ProviderError:
    """Turn an unwanted answer into the error that says so; `what` is what was asked for, as in "the call list"."""
    return parsing.refusal(
        status,
        headers,
        name=NAME,
        what=what,
        host=host,
        now=now,
        credential="key",
        bucket="ip" if b"this ip" in body.lower() else "key",
    )


def recording_missing(status: int, body: bytes) -> Literal["no recording", "no call"] | None:
    """Tell the two documented 404s and the 400 of a recording apart; None when the answer is something else."""
    text = body.lower()
    if status == 404 and b"no recording available" in text:
        return "no recording"
    if status == 400 or (status == 404 and b"recording not found" in text):
        return "no call"
    return None
