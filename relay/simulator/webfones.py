"""A WebFones that behaves as its two documents say (call log 3.1, contacts 3.0), and misbehaves when told to.

One list of calls in the account's own time, recordings, and an address book. Where the documents are silent, the choice
is an attribute of `WebfonesSimulator`.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal
from zoneinfo import ZoneInfo

import orjson
from pydantic import BaseModel, ConfigDict, Field

from relay.domain.json import Json
from relay.simulator.switchboard import (
    Account,
    Answer,
    Asked,
    Control,
    Fault,
    Faults,
    Mischief,
    Switchboard,
    bearer,
    instant_text,
    recording_of,
)
from relay.simulator.timeline import CallPlan, Person

_TIMESTAMP = "%Y-%m-%d %H:%M:%S"
_EVER = datetime.max.replace(tzinfo=UTC)
_LONGEST_TURN_BACK = timedelta(hours=3)
"""No zone turns its clocks back by more: what began longer ago than that never shows a later time."""


class Kind(StrEnum):
    """What a request is for."""

    RECORDS = "records"
    RECORDING = "recording"
    SEARCH = "search"
    CHANGES = "changes"
    HEALTH = "health"
    STATUS = "status"


_PATHS = {
    ("GET", "/call_log/records_after_timestamp"): Kind.RECORDS,
    ("POST", "/contacts/contacts/search/phones"): Kind.SEARCH,
    ("GET", "/health"): Kind.HEALTH,
    ("GET", "/status"): Kind.STATUS,
}
_PATHS_WITH_ARGUMENT = {
    ("GET", "/call_log/recording"): Kind.RECORDING,
    ("GET", "/contacts/contactsAfterVersion"): Kind.CHANGES,
}
_CALL_LOG = (Kind.RECORDS, Kind.RECORDING)
_TOO_MANY = "Too many requests {}, please try again later."
_ERRORS: Mapping[int, Json] = {
    401: {"error": "Missing API key"},
    403: {"error": "Invalid API key"},
    429: {"error": _TOO_MANY.format("for this API key")},
    502: {"error": "Failed to fetch recording"},
    503: {"error": "Contacts service unavailable", "message": "The contacts service is currently unreachable."},
}
_CONTACTS_ERRORS: Mapping[int, Json] = {
    401: {
        "error": "API key is required",
        "message": "Please provide API key in x-api-key header or Authorization header",
    },
    403: {"error": "Invalid API key", "message": "The provided API key is not valid or has been revoked"},
}
_NO_RECORDING = Answer(404, {"error": "No recording available"})


class ContactCard(BaseModel):
    """An entry of the address book, with the fields of the contacts document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uuid: str
    firstname: str = ""
    lastname: str = ""
    organization: str = ""
    organization_flag: bool = False
    user_id: int = 1
    phone_numbers: tuple[str, ...] = ()
    mobile_phone: str = ""
    email: str = ""
    external_id: str | None = None
    note: str = ""
    version: int = 0
    groups: tuple[str, ...] = ()

    def numbers(self) -> set[str]:
        return {normalised(number) for number in (self.mobile_phone, *self.phone_numbers)} - {""}


@dataclass(slots=True)
class Customer(Account):
    """One customer, with an address book and the zone in which its rows tell the time."""

    zone: str = "UTC"
    version: int = 0
    contacts: dict[str, ContactCard] = field(default_factory=dict)
    deleted: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        ZoneInfo(self.zone)


class NewContact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    fields: dict[str, Any]


class GoneContact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    uuid: str


class WebfonesControl(Control):
    """What `POST /_control` takes besides."""

    contacts: list[NewContact] = Field(default_factory=list)
    deleted_contacts: list[GoneContact] = Field(default_factory=list)
    inclusive: bool | None = None
    clock_skew_s: float | None = None


class WebfonesSimulator(Switchboard[Customer]):
    """Accounts by API key.

    The attributes may be changed at any time: `inclusive` (whether the list returns rows of the very second that was
    asked for), `reply_keys` (how the numbers of a contact search come back), `clock_skew_s` (how far the provider's
    clock is ahead: row times and the `Date` header show it).
    """

    account_type = Customer

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int = 1_000,
        window_s: float = 900.0,
        rate_limit_headers: bool = False,
        inclusive: bool = False,
        reply_keys: Literal["asked", "normalised"] = "normalised",
    ) -> None:
        super().__init__(clock=clock, limit=limit, window_s=window_s, rate_limit_headers=rate_limit_headers)
        self.inclusive = inclusive
        self.reply_keys = reply_keys
        self.clock_skew_s = 0.0

    def put_contact(self, key: str, **fields: Any) -> ContactCard:
        """Create a contact, or update the one with the same uuid; the version counts on."""
        account = self.accounts[key]
        account.version += 1
        fields.setdefault("uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, f"{key}/{account.version}")))
        known = account.contacts.get(fields["uuid"])
        before = known.model_dump() if known else {}
        card = ContactCard(**{**before, **fields, "version": account.version})
        account.contacts[card.uuid] = card
        return card

    def put_people(self, key: str, everyone: Iterable[Person]) -> None:
        """Fill the address book with those of a timeline's people who are not strangers."""
        for person in everyone:
            if not person.stranger:
                self.put_contact(
                    key,
                    firstname=person.firstname,
                    lastname=person.lastname,
                    organization=person.organization,
                    mobile_phone=person.number,
                    email=person.email,
                    external_id=f"CRM-{person.number[-6:]}",
                )

    def delete_contact(self, key: str, contact_uuid: str, *, now: datetime | None = None) -> None:
        account = self.accounts[key]
        del account.contacts[contact_uuid]
        account.version += 1
        deleted_at = instant_text(now or self.clock())
        account.deleted.append({"uuid": contact_uuid, "version": account.version, "deleted_at": deleted_at})

    def records(self, key: str, timestamp: str, now: datetime, *, faults: Sequence[Fault] = ()) -> Answer:
        """Answer the call list as it would be at `now`, with only the faults that are given."""
        asked = Asked(Kind.RECORDS, key, query={"timestamp": timestamp})
        return self.respond(asked, now, {fault.what: fault for fault in faults})

    def kind_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        start, _, argument = path.rpartition("/")
        return _PATHS.get((method, path)) or (_PATHS_WITH_ARGUMENT.get((method, start)) if argument else None)

    def token_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("x-api-key") or bearer(headers, "Bearer")

    def refused(self, asked: Asked) -> Answer | None:
        if asked.kind == Kind.HEALTH:
            return None
        errors = _ERRORS if asked.kind in _CALL_LOG else _CONTACTS_ERRORS
        if not asked.key:
            return Answer(401, errors[401])
        account = self.accounts.get(asked.key)
        return Answer(403, errors[403]) if account is None or account.revoked else None

    def answer(self, asked: Asked, now: datetime) -> Answer:
        """Answer as the document of this path says."""
        if asked.kind == Kind.HEALTH:
            services = ["contacts", "sms", "call_logs"]
            return Answer(200, {"status": "healthy", "timestamp": instant_text(now), "services": services})
        account, argument = self.accounts[asked.key], asked.path.rpartition("/")[2]
        match asked.kind:
            case Kind.RECORDS:
                return self._records(account, asked.query.get("timestamp"), now)
            case Kind.RECORDING:
                return _recording(account, argument, now)
            case Kind.SEARCH:
                return self._search(account, asked.body)
            case Kind.CHANGES:
                return _changes_after(account, argument)
            case _:
                online = {"contacts": {"status": "online", "endpoint": "control.webfones.net:4044/api"}}
                return Answer(200, {"status": "ok", "timestamp": instant_text(now), "services": online})

    def too_many(self, asked: Asked) -> Answer:
        whose = "for this API key" if self.bucket_of(asked) == asked.key else "from this IP"
        return Answer(429, {"error": _TOO_MANY.format(whose)})

    def error_body(self, status: int, now: datetime) -> Json:
        """What the documents give for it."""
        if status == 500:
            message = "An unexpected error occurred"
            return {"error": "Internal server error", "message": message, "timestamp": instant_text(now)}
        return _ERRORS.get(status) or super().error_body(status, now)

    def garbage_rows(self, asked: Asked, at: datetime) -> list[Any]:
        text = self._text(self.accounts[asked.key], at)
        since = _told(asked.query["timestamp"]).strftime(_TIMESTAMP)
        return [*garbage_rows(text), *(odd_rows(text) if text > since else ())]

    def bucket_of(self, asked: Asked) -> str | None:
        """The call log is limited by key, everything else by address, and `/health` not at all."""
        if asked.kind == Kind.HEALTH:
            return None
        return asked.key if asked.key and asked.kind in _CALL_LOG else f"ip:{asked.address}"

    def spoilt(self, answer: Answer, asked: Asked, faults: Faults, now: datetime) -> Answer:
        if answer.pieces is not None and Mischief.NO_RECORDING in faults:
            return _NO_RECORDING
        if answer.pieces is not None and (truncate := faults.get(Mischief.TRUNCATE)):
            plan = self.accounts[asked.key].plans[int(asked.path.rpartition("/")[2])]
            return recording_of(plan, share=truncate.share)
        spoilt = super().spoilt(answer, asked, faults, now)
        if spoilt.rows is None or not isinstance(spoilt.body, dict):
            return spoilt
        success = Mischief.SUCCESS_FALSE not in faults
        rows = spoilt.body["records"] if success else []
        count = len(rows) + (Mischief.WRONG_COUNT in faults)
        return replace(spoilt, body={"success": success, "count": count, "records": rows})

    def order(self, message: bytes) -> None:
        wish = WebfonesControl.model_validate_json(message)
        self.obey(wish)
        for contact in wish.contacts:
            self.put_contact(contact.key, **contact.fields)
        for gone in wish.deleted_contacts:
            self.delete_contact(gone.key, gone.uuid)
        for name in ("inclusive", "clock_skew_s"):
            value = getattr(wish, name)
            if value is not None:
                setattr(self, name, value)

    def state(self) -> Json:
        """What `GET /_control` shows, with what is in the address books."""
        state = super().state()
        for key, account in self.accounts.items():
            book = {"zone": account.zone, "contacts": len(account.contacts), "version": account.version}
            state["accounts"][key] |= book
        return state | {"clock_skew_s": self.clock_skew_s}

    def _records(self, account: Customer, timestamp: str | None, now: datetime) -> Answer:
        if not timestamp:
            return Answer(400, {"error": "Missing timestamp in query"})
        try:
            told = _told(timestamp)
            ahead = timedelta(seconds=self.clock_skew_s)
            first = told.replace(tzinfo=ZoneInfo(account.zone)) - ahead - _LONGEST_TURN_BACK
        except (ValueError, OverflowError):
            return Answer(400, {"error": "Invalid timestamp format"})
        since = told.strftime(_TIMESTAMP)
        texts = sorted((self._text(account, p.started_at), p.rid) for p in account.between(first, _EVER, now))
        new = (text for text in texts if text[0] > since or (self.inclusive and text[0] == since))
        rows = [_row(account.plans[rid], text, now) for text, rid in new]
        return Answer(200, {"success": True, "count": len(rows), "records": rows}, rows="records")

    def _search(self, account: Customer, body: bytes) -> Answer:
        try:
            asked = orjson.loads(body)["phone_numbers"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            asked = None
        if not isinstance(asked, list) or not all(isinstance(number, str) for number in asked):
            return Answer(400, {"error": "phone_numbers must be an array of strings"})
        found: Json = {}
        for number in asked:
            bare = normalised(number)
            cards = [card.model_dump(mode="json") for card in account.contacts.values() if bare in card.numbers()]
            found[bare if self.reply_keys == "normalised" else number] = cards
        return Answer(200, found)

    def _text(self, account: Customer, instant: datetime) -> str:
        """A time as the account's rows show it."""
        told = instant + timedelta(seconds=self.clock_skew_s)
        return told.astimezone(ZoneInfo(account.zone)).strftime(_TIMESTAMP)

    def told_now(self) -> datetime:
        return self.clock() + timedelta(seconds=self.clock_skew_s)


def normalised(number: str) -> str:
    """What the contact search makes of a number: digits only, a leading 1 gone. The extension 101 becomes 01."""
    return "".join(char for char in number if char in "0123456789").removeprefix("1")


def garbage_rows(text: str) -> list[Any]:
    """Rows that no client should believe; `text` is the start of those that have a possible one."""
    good: Json = {
        "rid": 900_000_001,
        "call_timestamp": text,
        "cidname_outside": "GARBAGE",
        "cidext_inside": "3299",
        "direction": "INCOMING",
        "cidnumber_outside": "(202) 555-0199",
        "cidnumber_inside": "(202) 555-0100, x3299",
        "disposition": "NO ANSWER",
    }
    without_rid = {name: value for name, value in good.items() if name != "rid"}
    return [
        without_rid,
        {**good, "rid": None},
        {**good, "rid": "not a number"},
        {**good, "rid": 900_000_002, "call_timestamp": "2025-02-30 25:61:00"},
        {**good, "rid": 900_000_003, "call_timestamp": None},
        {**good, "rid": 900_000_004, "call_timestamp": "0000-00-00 00:00:00"},
        "a row that is text",
        None,
        ["a", "list"],
    ]


def odd_rows(text: str) -> list[Any]:
    """Rows that are strange but mean something: a client has to normalise them, each with a rid of its own."""
    good = {"call_timestamp": text, "direction": "INCOMING", "disposition": "NO ANSWER", "cidext_inside": "3298"}
    return [
        {**good, "rid": "900000101", "cidname_outside": "RID AS TEXT", "cidnumber_outside": "(202) 555-0101"},
        {**good, "rid": 900_000_102, "cidname_outside": "N" * 100_000, "cidnumber_outside": "(202) 555-0102"},
        {**good, "rid": 900_000_103, "cidname_outside": "☎️ Zoë 🦊", "cidnumber_outside": "☎"},
        {**good, "rid": 900_000_104, "cidname_outside": None, "cidnumber_outside": None, "cidext_inside": None},
        {**good, "rid": 900_000_105, "cidname_outside": "NUMBER", "cidnumber_outside": 2025550105, "cidext_inside": 7},
    ]


def _recording(account: Customer, rid: str, now: datetime) -> Answer:
    if not (rid.isascii() and rid.isdigit()):
        return Answer(400, {"error": "Invalid record ID"})
    plan = account.plans.get(int(rid))
    if plan is None or plan.visible_at > now:
        return Answer(404, {"error": "Recording not found"})
    return _NO_RECORDING if plan.recording_at is None or plan.recording_at > now else recording_of(plan)


def _changes_after(account: Customer, version: str) -> Answer:
    """As in the document, `updated` carries no numbers."""
    if not (version.isascii() and version.isdigit()):
        return Answer(400, {"error": "Invalid version"})
    shown = {"uuid", "firstname", "lastname", "version", "groups"}
    cards = sorted(account.contacts.values(), key=lambda card: card.version)
    updated = [card.model_dump(mode="json", include=shown) for card in cards if card.version > int(version)]
    deleted = [entry for entry in account.deleted if entry["version"] > int(version)]
    return Answer(200, {"updated": updated, "deleted": deleted})


def _row(plan: CallPlan, text: str, now: datetime) -> Json:
    row: Json = {
        "rid": plan.rid,
        "call_timestamp": text,
        "cidname_outside": plan.outside_name,
        "cidext_inside": plan.extension,
        "direction": plan.direction,
        "cidnumber_outside": plan.outside_number,
        "cidnumber_inside": plan.inside_number,
        "disposition": plan.disposition,
        **plan.extra,
    }
    for change in plan.changes:
        if change.at <= now:
            row.update(change.fields)
    return row


def _told(timestamp: str) -> datetime:
    """A time in the account's zone; raises ValueError for one that is none."""
    return datetime.strptime(timestamp.strip(), _TIMESTAMP)  # noqa: DTZ007 - the zone is the account's
