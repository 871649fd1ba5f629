"""WebFones on the wire: requests out, rows in. Pure, and no row can make it raise.

The documents are the Call Log Access API 3.1 and the Contact API 3.0. They leave out the time zone, most columns of a
row and all dispositions but one: what is missing stays None, what is unknown stays in `raw`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote
from zoneinfo import ZoneInfo

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from relay.domain.call import Contact, Direction, InvalidRow, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.numbers import match_key, national_digits, read_number
from relay.errors import ProviderError
from relay.providers import parsing
from relay.providers.base import ContactChanges, NoRecordingYet, NoSuchCall
from relay.providers.parsing import ErrorResponse, Seconds, Text, finished_by_age, malformed, parse_or_none, text, words

NAME: Final = "WebFones"
# Raise it with every change of the mapping that changes a record's content.
MAPPING_VERSION: Final = 1

CALL_LIST: Final = "the call list"
CONTACT_SEARCH: Final = "a contact search"
CONTACT_CHANGES: Final = "the contact changes"

MAX_CONTACTS_PER_NUMBER: Final = 20
_CLOCK_SKEW: Final = timedelta(minutes=5)

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
    spelling: outcome
    for outcome, spellings in {
        Outcome.ANSWERED: ("ANSWERED", "ANSWER", "COMPLETED", "COMPLETE", "CONNECTED", "SUCCESS"),
        Outcome.NO_ANSWER: ("NO ANSWER", "NOANSWER", "NOT ANSWERED", "UNANSWERED", "MISSED", "TIMEOUT"),
        Outcome.BUSY: ("BUSY", "USER BUSY"),
        Outcome.FAILED: ("FAILED", "FAILURE", "CONGESTION", "CHANUNAVAIL", "UNAVAILABLE", "UNREACHABLE", "ERROR"),
        Outcome.CANCELLED: ("CANCEL", "CANCELED", "CANCELLED", "ORIGINATOR CANCEL"),
        Outcome.VOICEMAIL: ("VOICEMAIL", "VOICE MAIL", "VM"),
        Outcome.DECLINED: ("DECLINED", "DECLINE", "REJECTED", "REJECT"),
        Outcome.ABANDONED: ("ABANDONED", "ABANDON"),
    }.items()
    for spelling in spellings
}


# -- requests ---------------------------------------------------------------------------------------------------------


def records_path(since: datetime, zone: ZoneInfo) -> str:
    """Build the path and query that lists the calls after `since`, percent-encoded as in the document's examples."""
    return f"/call_log/records_after_timestamp?timestamp={quote(query_time(since, zone), safe='')}"


def query_time(since: datetime, zone: ZoneInfo) -> str:
    """Write the lower bound in the zone of the rows, so that no row of a call at or after `since` compares below it."""
    # "Only return calls after this timestamp" may mean strictly after, hence one second earlier.
    local = (since.astimezone(UTC) - timedelta(seconds=1)).astimezone(zone)
    # Where the clock will be set back, later calls repeat the hour and carry smaller times than `since`.
    change = _offset(local, fold=0) - _offset(local, fold=1)
    if local.fold == 0 and change > timedelta(0):
        local -= change
    return local.strftime("%Y-%m-%d %H:%M:%S")


def _offset(local: datetime, *, fold: Literal[0, 1]) -> timedelta:
    return local.replace(fold=fold).utcoffset() or timedelta(0)


# -- the call list ----------------------------------------------------------------------------------------------------


class WebfonesCallList(BaseModel):
    """`GET /call_log/records_after_timestamp`; rows are validated one by one."""

    success: bool = True
    count: int | None = None
    records: list[Any]


def read_call_list(document: object) -> list[object]:
    """Return the rows of a call list; raises UnexpectedResponse when the response contradicts itself."""
    listed = parsing.validate_response(WebfonesCallList, document, name=NAME, what=CALL_LIST)
    if not listed.success:
        raise malformed(NAME, CALL_LIST, "success is false")
    if listed.count is not None and listed.count != len(listed.records):
        raise malformed(NAME, CALL_LIST, f"count is {listed.count}, but there are {len(listed.records)} records")
    return listed.records


def _rid(value: object) -> str:
    if isinstance(value, str) and value.isascii() and value.strip().isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63:
        return str(value)
    raise ValueError("rid is not a positive whole number")


def _rid_or_none(value: object) -> str | None:
    try:
        return _rid(value)
    except ValueError:
        return None


def _time_or_none(value: object) -> datetime | None:
    try:
        return parsing.iso_time(value, "")
    except ValueError:
        return None


LocalTime = Annotated[datetime, PlainValidator(lambda value: parsing.iso_time(value, "call_timestamp"))]
OptionalLocalTime = Annotated[datetime | None, PlainValidator(_time_or_none)]


class WebfonesRow(BaseModel):
    """One row of the call list. Only `rid` and `call_timestamp` can invalidate it.

    Times and durations are not documented (the list of fields ends with "..."), so likely names are tried.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    rid: Annotated[str, PlainValidator(_rid)]
    call_timestamp: LocalTime
    cidname_outside: Text = None
    cidext_inside: Text = None
    direction: Text = None
    cidnumber_outside: Text = None
    cidnumber_inside: Text = None
    disposition: Text = None
    duration: Seconds = Field(None, validation_alias=AliasChoices("duration", "call_duration", "billsec"))
    answered: OptionalLocalTime = Field(
        None, validation_alias=AliasChoices("answer_timestamp", "answer_time", "answered_at")
    )
    ended: OptionalLocalTime = Field(None, validation_alias=AliasChoices("end_timestamp", "end_time", "ended_at"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPassRecord(Record):
    """A call in the hour that the clock shows twice, dated to the second pass.

    Which pass it was depends on when the row is seen, and it is seen again later. So the hash stays that of the first
    pass: a later judgement is never a change.
    """

    first_pass_hash: str

    def content_hash(self) -> str:
        return self.first_pass_hash


@dataclass(frozen=True, slots=True)
class _Ambiguous:
    """A row whose meaning depends on when it is seen: in progress, or in the hour that the clock shows twice."""

    record: Record
    second_pass: Record | None

    def at(self, seen_at: datetime) -> Record:
        if self.second_pass is None or self.second_pass.started_at > seen_at + _CLOCK_SKEW:
            return finished_by_age(self.record, seen_at)
        second = finished_by_age(self.second_pass, seen_at)
        first = replace(self.record, finished=second.finished)
        values = {field.name: getattr(second, field.name) for field in fields(Record)}
        return SecondPassRecord(**values, first_pass_hash=first.content_hash())


def parse_row(row: object, *, zone: ZoneInfo, region: str, seen_at: datetime) -> Record | InvalidRow:
    parsed = _parse(row, zone, region)
    return parsed.at(seen_at) if isinstance(parsed, _Ambiguous) else parsed


@parsing.memoise_rows
def _parse(row: object, zone: ZoneInfo, region: str) -> Record | InvalidRow | _Ambiguous:
    valid = parsing.validate_row(WebfonesRow, row, key="rid", start="call_timestamp", read_key=_rid_or_none)
    if isinstance(valid, InvalidRow):
        return valid
    first, second = _instants(valid.call_timestamp, zone)
    raw = parsing.raw_row(row, WebfonesRow.model_fields)
    record = _record(valid, first, zone, region, raw)
    if second is not None:
        return _Ambiguous(record, _record(valid, second, zone, region, raw))
    return record if record.finished else _Ambiguous(record, None)


def _instants(time: datetime, zone: ZoneInfo) -> tuple[datetime, datetime | None]:
    """Convert a row's time to UTC; there are two where the zone's clock shows it twice.

    A time that the clock skips is read as if the clock had not been put forward yet.
    """
    if time.tzinfo is not None:
        return time.astimezone(UTC), None
    first = time.replace(tzinfo=zone, fold=0).astimezone(UTC)
    second = time.replace(tzinfo=zone, fold=1).astimezone(UTC)
    return first, second if second > first else None


def _at_or_after(time: datetime | None, zone: ZoneInfo, started_at: datetime) -> datetime | None:
    """Convert a later time of the call: the first instant that is not before its start."""
    if time is None:
        return None
    return next((instant for instant in _instants(time, zone) if instant is not None and instant >= started_at), None)


def _record(row: WebfonesRow, started_at: datetime, zone: ZoneInfo, region: str, raw: Json) -> Record:
    direction = _DIRECTIONS.get(words(row.direction), Direction.UNKNOWN)
    inside, outside = _inside(row, region), _outside(row, region, direction)
    caller, callee = (outside, inside) if direction in (Direction.INBOUND, Direction.UNKNOWN) else (inside, outside)
    ended_at = _at_or_after(row.ended, zone, started_at)
    # A disposition without any letter is still one: such a call is over.
    status = words(row.disposition) or row.disposition or ""
    outcome = _OUTCOMES.get(status, Outcome.UNKNOWN)
    return Record(
        key=row.rid,
        started_at=started_at,
        local_date=row.call_timestamp.date().isoformat(),
        direction=direction,
        outcome=outcome,
        finished=not parsing.in_progress(status, ended_at, row.duration),
        audio=outcome is Outcome.ANSWERED,
        status_raw=row.disposition,
        caller=caller,
        callee=callee,
        external=None if direction is Direction.INTERNAL else outside,
        internal=inside,
        answered_at=_at_or_after(row.answered, zone, started_at),
        ended_at=ended_at,
        duration_seconds=row.duration,
        raw=raw,
    )


def _inside(row: WebfonesRow, region: str) -> Party:
    """The account's side. Its extension is in a column of its own, or behind the number."""
    party = read_number(row.cidnumber_inside, region, internal=True)
    if party.raw is None and row.cidext_inside:
        return Party(raw=row.cidext_inside, type=NumberType.EXTENSION, extension=row.cidext_inside, internal=True)
    return replace(party, extension=row.cidext_inside or party.extension)


def _outside(row: WebfonesRow, region: str, direction: Direction) -> Party:
    party = read_number(row.cidnumber_outside, region, internal=direction is Direction.INTERNAL)
    return replace(party, name=row.cidname_outside)


# -- contacts (Contact API 3.0) ---------------------------------------------------------------------------------------


class WebfonesContact(BaseModel):
    """One contact of `POST /contacts/contacts/search/phones`; other fields, such as an echoed API key, are dropped."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    uuid: Annotated[str, BeforeValidator(text)]
    firstname: Text = None
    lastname: Text = None
    organization: Text = None
    email: Text = None
    external_id: Text = None
    mobile_phone: Text = None


class WebfonesContactVersion(BaseModel):
    """One changed or deleted contact of `GET /contacts/contactsAfterVersion/{version}`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Annotated[int, Field(ge=0, lt=2**63)]


class WebfonesContactChanges(BaseModel):
    """`GET /contacts/contactsAfterVersion/{version}`."""

    updated: list[WebfonesContactVersion]
    deleted: list[WebfonesContactVersion] = []


def lookup_digits(numbers: Sequence[str], region: str) -> dict[str, str]:
    """Map E.164 numbers to the digits to search for; anything else, extensions above all, is left out."""
    return {number: digits for number in numbers if (digits := national_digits(number, region))}


def read_contacts(document: object, digits_of: Mapping[str, str]) -> dict[str, list[Contact]]:
    """Assign the contacts of a search to the numbers of `digits_of`, which is what `lookup_digits` returned."""
    if not isinstance(document, dict):
        raise malformed(NAME, CONTACT_SEARCH, "it is not a JSON object")
    # The server strips a leading 1 and punctuation before it compares (Notes), so both sides are brought to that form.
    by_key: dict[str, object] = {match_key(str(name)): contacts for name, contacts in document.items()}
    keys = [match_key(digits) for digits in digits_of.values()]
    if document and not any(key in by_key for key in keys):
        raise malformed(NAME, CONTACT_SEARCH, "it has none of the requested numbers")
    contacts: dict[str, list[Contact]] = {}
    for number, digits in digits_of.items():
        key = match_key(digits)
        # Two numbers that differ only in a leading 1 share a key: each then gets what has its exact digits, or nothing.
        exact = digits in document or keys.count(key) > 1
        contacts[number] = _contacts(document.get(digits) if exact else by_key.get(key), key)
    return contacts


def _contacts(matches: object, key: str) -> list[Contact]:
    if matches is None:
        return []
    if isinstance(matches, dict):
        matches = [matches]
    if not isinstance(matches, list):
        raise malformed(NAME, CONTACT_SEARCH, "it has something else than lists of contacts")
    rows = [row for item in matches if (row := parse_or_none(WebfonesContact, item)) is not None]
    rows.sort(key=lambda row: match_key(row.mobile_phone or "") != key)
    return [_contact(row) for row in rows[:MAX_CONTACTS_PER_NUMBER]]


def _contact(row: WebfonesContact) -> Contact:
    name = " ".join(part for part in (row.firstname, row.lastname) if part)
    return Contact(
        id=row.uuid,
        external_id=row.external_id,
        name=name or None,
        organization=row.organization,
        email=row.email,
    )


def read_changes(document: object, version: int) -> ContactChanges:
    """Return the version that the address book has now; raises UnexpectedResponse."""
    changes = parsing.validate_response(WebfonesContactChanges, document, name=NAME, what=CONTACT_CHANGES)
    newest = max((row.version for row in (*changes.updated, *changes.deleted)), default=version)
    return ContactChanges(version=max(newest, version), changed=newest > version)


# -- health -----------------------------------------------------------------------------------------------------------


class WebfonesHealth(BaseModel):
    """`GET /health`: whether the gateway runs; needs no key."""

    status: Text = None
    services: list[Text] = []


class WebfonesServiceStatus(BaseModel):
    """One service of `GET /status`; its `endpoint` is an internal address and never shown."""

    status: Text = None


class WebfonesStatus(BaseModel):
    """`GET /status`: the state of each service; needs the key."""

    status: Text = None
    services: dict[str, WebfonesServiceStatus] = {}


def health_line(document: object) -> tuple[bool, str]:
    """Describe the gateway's health: whether it is good, and a line about it."""
    health = parse_or_none(WebfonesHealth, document)
    if health is None:
        return False, "gateway: unexpected response"
    services = ", ".join(name for name in health.services if name)
    return health.status in ("healthy", "ok"), f"gateway: {health.status or 'unknown'}" + (
        services and f" ({services})"
    )


def status_line(document: object) -> tuple[bool, str]:
    """Describe the services' status: whether it is good, and a line about it."""
    status = parse_or_none(WebfonesStatus, document)
    if status is None:
        return False, "services: unexpected response"
    services = [
        f"{text(name) or '?'} {service.status or 'unknown'}" for name, service in sorted(status.services.items())
    ]
    online = all(service.status == "online" for service in status.services.values())
    ok = status.status in ("healthy", "ok") and online
    return ok, "key accepted; services: " + (", ".join(services) or status.status or "unknown")


# -- errors -----------------------------------------------------------------------------------------------------------


def error_of(response: ErrorResponse) -> ProviderError:
    """Map an error response. The text of a 429 names what was counted: "this API key" or "this IP"."""
    bucket: Literal["key", "ip"] = "ip" if b"this ip" in response.body.lower() else "key"
    return parsing.provider_error(response, name=NAME, credential="key", bucket=bucket)


def missing_recording(response: ErrorResponse) -> NoRecordingYet | NoSuchCall | None:
    """Tell the two documented 404s of a recording, and its 400, apart; None when the response is another error."""
    body = response.body.lower()
    if response.status == 404 and b"no recording available" in body:
        return NoRecordingYet()
    if response.status == 400 or (response.status == 404 and b"recording not found" in body):
        return NoSuchCall()
    return None
