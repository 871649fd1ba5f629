"""A WebFones as its documents describe it (call log 3.1, contacts 3.0): one call list, recordings, an address book."""

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

import orjson
from pydantic import BaseModel, ConfigDict

from relay.domain.json import Json
from relay.simulator.provider import (
    Account,
    FakeProvider,
    FakeRequest,
    FakeResponse,
    authorization,
    instant_text,
    recording_response,
)
from relay.simulator.timeline import CallPlan, Person

TIMESTAMP_FORMAT = "%Y-%m-%d %H:%M:%S"
_END_OF_TIME = datetime.max.replace(tzinfo=UTC)
# No zone turns its clocks back further: a call that began longer before an instant never shows a later time.
_ROW_TIME_MARGIN = timedelta(hours=4)


class WebFonesEndpoint(StrEnum):
    RECORDS = "records"
    RECORDING = "recording"
    SEARCH = "search"
    CHANGES = "changes"
    HEALTH = "health"
    STATUS = "status"


_PATHS = {
    ("GET", "/call_log/records_after_timestamp"): WebFonesEndpoint.RECORDS,
    ("POST", "/contacts/contacts/search/phones"): WebFonesEndpoint.SEARCH,
    ("GET", "/health"): WebFonesEndpoint.HEALTH,
    ("GET", "/status"): WebFonesEndpoint.STATUS,
}
_PATHS_WITH_ARGUMENT = {
    ("GET", "/call_log/recording"): WebFonesEndpoint.RECORDING,
    ("GET", "/contacts/contactsAfterVersion"): WebFonesEndpoint.CHANGES,
}
_CALL_LOG = (WebFonesEndpoint.RECORDS, WebFonesEndpoint.RECORDING)
_MISSING_KEY = {
    "error": "API key is required",
    "message": "Please provide API key in x-api-key header or Authorization header",
}
_INVALID_KEY = {"error": "Invalid API key", "message": "The provided API key is not valid or has been revoked"}


class ContactCard(BaseModel):
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
class WebFonesAccount(Account):
    """One customer, with an address book and the zone of its rows' times."""

    zone: str = "UTC"
    version: int = 0
    contacts: dict[str, ContactCard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ZoneInfo(self.zone)


@dataclass(slots=True)
class FixedWindow:
    """A limiter like Express middleware: so many requests from the first one on, then none until the window ends."""

    opened_at: datetime
    used: int = 0


class FakeWebFones(FakeProvider[WebFonesAccount]):
    """Accounts by API key; `limit` requests per `window_s`."""

    name = "webfones"
    account_type = WebFonesAccount
    list_endpoint = WebFonesEndpoint.RECORDS
    has_recordings = True

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int = 1_000,
        window_s: float = 900.0,
    ) -> None:
        super().__init__(clock=clock)
        self.limit = limit
        self.window_s = window_s
        self.windows: dict[str, FixedWindow] = {}

    def put_contact(self, key: str, **fields: Any) -> ContactCard:
        """Create a contact, or update the one with the same uuid; the account's version goes up."""
        account = self.accounts[key]
        account.version += 1
        fields.setdefault("uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, f"{key}/{account.version}")))
        old = account.contacts.get(fields["uuid"])
        card = ContactCard(**{**(old.model_dump() if old else {}), **fields, "version": account.version})
        account.contacts[card.uuid] = card
        return card

    def put_people(self, key: str, people: Iterable[Person]) -> None:
        for person in people:
            if not person.stranger:
                self.put_contact(key, **card_fields(person))

    def records(self, key: str, timestamp: str, now: datetime) -> FakeResponse:
        return self.respond(FakeRequest(WebFonesEndpoint.RECORDS, key, query={"timestamp": timestamp}), now)

    def call_id(self, key: str, plan: CallPlan) -> str:
        return str(plan.rid)

    def source_options(self, key: str) -> Json:
        return {"api_key": key, "timezone": self.accounts[key].zone}

    def endpoint_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        prefix, _, argument = path.rpartition("/")
        return _PATHS.get((method, path)) or (_PATHS_WITH_ARGUMENT.get((method, prefix)) if argument else None)

    def token_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("x-api-key") or authorization(headers, "Bearer")

    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        if request.endpoint == WebFonesEndpoint.HEALTH:
            return None
        if not request.key:
            return FakeResponse(401, {"error": "Missing API key"} if request.endpoint in _CALL_LOG else _MISSING_KEY)
        account = self.accounts.get(request.key)
        if account is None or account.revoked:
            return FakeResponse(403, {"error": "Invalid API key"} if request.endpoint in _CALL_LOG else _INVALID_KEY)
        return None

    def over_limit(self, request: FakeRequest, now: datetime) -> FakeResponse | None:
        bucket = self.bucket_of(request)
        if bucket is None or self.use(bucket, now) <= self.limit:
            return None
        scope = "for this API key" if bucket == request.key else "from this IP"
        return FakeResponse(429, {"error": f"Too many requests {scope}, please try again later."})

    def bucket_of(self, request: FakeRequest) -> str | None:
        """What a request is counted under: the call log by key, the rest by address, `/health` not at all."""
        if request.endpoint == WebFonesEndpoint.HEALTH:
            return None
        return request.key if request.key and request.endpoint in _CALL_LOG else f"ip:{request.address}"

    def use(self, bucket: str, now: datetime) -> int:
        """Count a request; how many the window has seen."""
        window = self.windows.get(bucket)
        if window is None or (now - window.opened_at).total_seconds() >= self.window_s:
            window = self.windows[bucket] = FixedWindow(now)
        window.used += 1
        return window.used

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        if request.endpoint == WebFonesEndpoint.HEALTH:
            services = ["contacts", "sms", "call_logs"]
            return FakeResponse(200, {"status": "healthy", "timestamp": instant_text(now), "services": services})
        account, argument = self.accounts[request.key], request.path.rpartition("/")[2]
        match request.endpoint:
            case WebFonesEndpoint.RECORDS:
                return self._records(account, request.query.get("timestamp"), now)
            case WebFonesEndpoint.RECORDING:
                return _recording(account, argument, now)
            case WebFonesEndpoint.SEARCH:
                return self._search(account, request.body)
            case WebFonesEndpoint.CHANGES:
                return self._changes_after(account, argument)
            case _:
                online = {"contacts": {"status": "online", "endpoint": "control.webfones.net:4044/api"}}
                return FakeResponse(200, {"status": "ok", "timestamp": instant_text(now), "services": online})

    def row_time(self, account: WebFonesAccount, instant: datetime) -> str:
        return instant.astimezone(ZoneInfo(account.zone)).strftime(TIMESTAMP_FORMAT)

    def is_after(self, row_time: str, timestamp: str) -> bool:
        """Whether the list shows a row to a client that asks for those after `timestamp`: strictly later ones."""
        return row_time > timestamp

    def state(self) -> Json:
        state = super().state()
        for key, account in self.accounts.items():
            state["accounts"][key] |= {"zone": account.zone, "contacts": len(account.contacts)}
        return state

    def _records(self, account: WebFonesAccount, timestamp: str | None, now: datetime) -> FakeResponse:
        if not timestamp:
            return FakeResponse(400, {"error": "Missing timestamp in query"})
        try:
            local = parse_timestamp(timestamp)
            first = local.replace(tzinfo=ZoneInfo(account.zone)) - _ROW_TIME_MARGIN
        except (ValueError, OverflowError):
            return FakeResponse(400, {"error": "Invalid timestamp format"})
        since = local.strftime(TIMESTAMP_FORMAT)
        plans = account.between(first, _END_OF_TIME, now)
        times = sorted((self.row_time(account, plan.started_at), plan.rid) for plan in plans)
        rows = [_row(account.plans[rid], text, now) for text, rid in times if self.is_after(text, since)]
        return FakeResponse(200, {"success": True, "count": len(rows), "records": rows}, rows="records")

    def _search(self, account: WebFonesAccount, body: bytes) -> FakeResponse:
        try:
            numbers = orjson.loads(body)["phone_numbers"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            numbers = None
        if not isinstance(numbers, list) or not all(isinstance(number, str) for number in numbers):
            return FakeResponse(400, {"error": "phone_numbers must be an array of strings"})
        normalised_numbers = [normalised(number) for number in numbers]
        cards = account.contacts.values()
        matches = {
            number: [card.model_dump(mode="json") for card in cards if number in card.numbers()]
            for number in normalised_numbers
        }
        return FakeResponse(200, matches)

    def _changes_after(self, account: WebFonesAccount, version: str) -> FakeResponse:
        """As in the document, `updated` carries no numbers."""
        if not (version.isascii() and version.isdigit()):
            return FakeResponse(400, {"error": "Invalid version"})
        columns = {"uuid", "firstname", "lastname", "version", "groups"}
        cards = sorted(account.contacts.values(), key=lambda card: card.version)
        updated = [card.model_dump(mode="json", include=columns) for card in cards if card.version > int(version)]
        return FakeResponse(200, {"updated": updated, "deleted": []})


def card_fields(person: Person) -> dict[str, str]:
    return {
        "firstname": person.firstname,
        "lastname": person.lastname,
        "organization": person.organization,
        "mobile_phone": person.number,
        "email": person.email,
        "external_id": f"CRM-{person.number[-6:]}",
    }


def normalised(number: str) -> str:
    """What the contact search makes of a number: digits only, a leading 1 removed. The extension 101 becomes 01."""
    return "".join(char for char in number if char in "0123456789").removeprefix("1")


def parse_timestamp(text: str) -> datetime:
    return datetime.strptime(text.strip(), TIMESTAMP_FORMAT)  # noqa: DTZ007 - the zone is the account's


def _recording(account: WebFonesAccount, rid: str, now: datetime) -> FakeResponse:
    if not (rid.isascii() and rid.isdigit()):
        return FakeResponse(400, {"error": "Invalid record ID"})
    plan = account.plans.get(int(rid))
    if plan is None or plan.visible_at > now:
        return FakeResponse(404, {"error": "Recording not found"})
    if plan.recording_at is None or plan.recording_at > now:
        return FakeResponse(404, {"error": "No recording available"})
    return recording_response(plan)


def _row(plan: CallPlan, row_time: str, now: datetime) -> Json:
    row: Json = {
        "rid": plan.rid,
        "call_timestamp": row_time,
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
