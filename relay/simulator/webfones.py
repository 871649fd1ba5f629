"""A WebFones that behaves as its two documents say (call log 3.1, contacts 3.0), and misbehaves when told to.

What it knows and what it answers are pure functions of its state and an instant, so that tests on a virtual clock need
no HTTP. `serve` puts the same answers on the loopback interface. Where the documents are silent, the choice is an
attribute of `WebfonesSimulator`.
"""

import asyncio
import hashlib
import math
import random
import ssl
import struct
import uuid
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache
from typing import Any, Literal
from urllib.parse import unquote
from zoneinfo import ZoneInfo

import orjson
from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from relay.model import Json
from relay.providers.base import ZoneName
from relay.simulator.loopback import Line, hang_up, json_response, listening
from relay.simulator.timeline import CallPlan, Change, Person, Scalar

_TIMESTAMP = "%Y-%m-%d %H:%M:%S"
_SAMPLE_RATE_HZ = 8_000
_WAV_HEADER_BYTES = 44


class Kind(StrEnum):
    """What a request is for."""

    RECORDS = "records"
    RECORDING = "recording"
    SEARCH = "search"
    CHANGES = "changes"
    HEALTH = "health"
    STATUS = "status"


class Mischief(StrEnum):
    """What can be done to a request instead of, or on top of, answering it as documented."""

    STATUS = "status"
    HANG = "hang"
    SLOW = "slow"
    DROP = "drop"
    NOT_JSON = "not_json"
    PARTIAL = "partial"
    SUCCESS_FALSE = "success_false"
    WRONG_COUNT = "wrong_count"
    GARBAGE = "garbage"
    SHUFFLE = "shuffle"
    HUGE = "huge"
    TRUNCATE = "truncate"
    NO_RECORDING = "no_recording"


class Fault(BaseModel):
    """One misbehaviour. It hits requests that match `on` and `key` (None: any), `times` of them (None: until told off).

    `status` is for STATUS, `delay_s` for SLOW, `rows` for HUGE, `share` (of the audio that is sent) for TRUNCATE,
    `seed` for SHUFFLE, `body` replaces the documented error body of STATUS. The rows of GARBAGE start `at` (when the
    fault was added), so that they are the same in each answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Mischief
    on: Kind | None = None
    key: str | None = None
    times: int | None = Field(1, ge=1)
    status: int = Field(500, ge=200, le=599)
    delay_s: float = Field(1.0, ge=0)
    rows: int = Field(1_000, ge=0)
    share: float = Field(0.5, ge=0, lt=1)
    seed: int = 0
    body: str | None = None
    at: AwareDatetime | None = None

    def hits(self, kind: Kind, key: str | None) -> bool:
        return (self.on is None or self.on is kind) and (self.key is None or self.key == key)


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and a body, JSON or text; HUGE adds `filler_rows` to the list without holding them."""

    status: int
    body: Json | list[Any] | str
    headers: Mapping[str, str] = field(default_factory=dict)
    filler_rows: int = 0

    def chunks(self) -> Iterator[bytes]:
        """Encode piece by piece."""
        if isinstance(self.body, str):
            yield self.body.encode()
        elif self.filler_rows and isinstance(self.body, dict):
            rows, head = self.body["records"], {**self.body, "records": []}
            yield orjson.dumps(head).removesuffix(b"]}")
            encoded = (orjson.dumps(row) for row in _with_filler(rows, self.filler_rows))
            first = next(encoded, b"")
            yield first
            for batch in _batches(encoded, 500):
                yield b"," + b",".join(batch)
            yield b"]}"
        else:
            yield orjson.dumps(self.body)

    def encoded(self) -> bytes:
        return b"".join(self.chunks())


@dataclass(frozen=True, slots=True)
class AudioAnswer:
    """A recording to be sent; fewer than `size_bytes` when `sent_bytes` says so."""

    rid: int
    size_bytes: int
    sent_bytes: int

    @property
    def headers(self) -> dict[str, str]:
        return {
            "Content-Type": "audio/wav",
            "Content-Length": str(self.size_bytes),
            "Content-Disposition": f'inline; filename="recording-{self.rid}.wav"',
        }

    def chunks(self) -> Iterator[bytes]:
        left = self.sent_bytes
        for chunk in audio_chunks(self.rid, self.size_bytes):
            if left <= 0:
                return
            yield chunk[:left]
            left -= len(chunk)


@dataclass(slots=True)
class FixedWindow:
    """A limiter as Express middleware has it: so many requests from the first one on, then none until the end."""

    limit: int
    window_s: float
    opened_at: datetime | None = None
    used: int = 0

    def hit(self, now: datetime) -> bool:
        """Count a request; whether it is let through."""
        if self.opened_at is None or (now - self.opened_at).total_seconds() >= self.window_s:
            self.opened_at, self.used = now, 0
        self.used += 1
        return self.used <= self.limit

    def headers(self, now: datetime) -> dict[str, str]:
        elapsed_s = (now - self.opened_at).total_seconds() if self.opened_at else 0.0
        reset_s = str(max(0, math.ceil(self.window_s - elapsed_s)))
        return {
            "RateLimit-Policy": f"{self.limit};w={self.window_s:.0f}",
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(max(0, self.limit - self.used)),
            "RateLimit-Reset": reset_s,
            **({"Retry-After": reset_s} if self.used > self.limit else {}),
        }


@dataclass(slots=True)
class Meter:
    """Counts requests and remembers the most that any window of `window_s`, wherever it begins, has held."""

    window_s: float
    total: int = 0
    peak: int = 0
    recent: deque[datetime] = field(default_factory=deque)

    def hit(self, now: datetime) -> None:
        self.total += 1
        self.recent.append(now)
        while (now - self.recent[0]).total_seconds() >= self.window_s:
            self.recent.popleft()
        self.peak = max(self.peak, len(self.recent))


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
class Account:
    """One customer: calls in the order of the text that its rows show as their start, an address book, a zone."""

    key: str
    zone: ZoneInfo
    revoked: bool = False
    version: int = 0
    plans: dict[int, CallPlan] = field(default_factory=dict)
    by_text: list[tuple[str, int]] = field(default_factory=list)
    contacts: dict[str, ContactCard] = field(default_factory=dict)
    deleted: list[Json] = field(default_factory=list)
    feed: Iterator[CallPlan] | None = None
    upcoming: CallPlan | None = None


class WebfonesSimulator:
    """Accounts by API key, what they answer, and how they misbehave.

    `clock` is asked once a request. The attributes may be changed at any time: `limit` and `window_s` of the request
    limits, `rate_limit_headers`, `inclusive` (whether the list returns rows of the very second that was asked for),
    `reply_keys` (how the numbers of a contact search come back).
    """

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
        self.clock = clock
        self.limit = limit
        self.window_s = window_s
        self.rate_limit_headers = rate_limit_headers
        self.inclusive = inclusive
        self.reply_keys = reply_keys
        self.accounts: dict[str, Account] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[tuple[str, Kind]] = Counter()
        self.statuses: Counter[tuple[str, Kind, int]] = Counter()
        self._skew = timedelta(0)
        self._windows: dict[str, FixedWindow] = {}
        self._meters: dict[str, Meter] = {}

    # What there is

    def add_account(self, key: str, *, zone: str = "UTC") -> Account:
        """Open an account; one that is there already stays as it is."""
        return self.accounts.setdefault(key, Account(key, ZoneInfo(zone)))

    def add_calls(self, key: str, plans: Iterable[CallPlan]) -> None:
        """Add calls, or replace those with the same rid; rows show only when their time has come."""
        account = self.accounts[key]
        for plan in plans:
            self._put(account, plan)

    def feed(self, key: str, plans: Iterator[CallPlan]) -> None:
        """Take calls from an endless iterator, in order of their start, as their time comes."""
        account = self.accounts[key]
        account.feed, account.upcoming = plans, next(plans, None)

    def appear(self, key: str, *, now: datetime | None = None, talk_s: float = 30.0, **fields: Any) -> CallPlan:
        """Let a call that ended this moment be seen at once; `fields` are those of `CallPlan`."""
        now = now or self.clock()
        account = self.accounts[key]
        ended_at = fields.pop("ended_at", now)
        plan = CallPlan(
            rid=fields.pop("rid", max(account.plans, default=211_158) + 1),
            started_at=fields.pop("started_at", (ended_at - timedelta(seconds=talk_s)).replace(microsecond=0)),
            ended_at=ended_at,
            visible_at=fields.pop("visible_at", now),
            **fields,
        )
        self._put(account, plan)
        return plan

    def change(self, key: str, rid: int, fields: Mapping[str, Scalar], *, at: datetime | None = None) -> CallPlan:
        """Let a row show other values from `at` (now) on."""
        account = self.accounts[key]
        plan = account.plans[rid]
        changes = sorted((*plan.changes, Change(at or self.clock(), dict(fields))), key=lambda change: change.at)
        account.plans[rid] = replace(plan, changes=tuple(changes))
        return account.plans[rid]

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
        deleted_at = _instant_text(now or self.clock())
        account.deleted.append({"uuid": contact_uuid, "version": account.version, "deleted_at": deleted_at})

    def visible(self, key: str, now: datetime) -> list[CallPlan]:
        """The ledger: every call that the list would show at `now` to somebody who asks for all, by rid."""
        account = self.accounts[key]
        self._pull(account, now)
        return sorted((plan for plan in account.plans.values() if plan.visible_at <= now), key=lambda plan: plan.rid)

    # How it behaves

    def misbehave(self, *faults: Fault) -> None:
        """Add faults; of those with `times`, the oldest is used up first."""
        now = self.clock()
        self.faults.extend(fault if fault.at else fault.model_copy(update={"at": now}) for fault in faults)

    def behave(self, kind: Kind | None = None) -> None:
        """Take back the faults of a kind of request, or all."""
        self.faults = [fault for fault in self.faults if kind is not None and fault.on is not kind]

    @property
    def clock_skew_s(self) -> float:
        """How far the provider's clock is ahead: row times and the `Date` header show it."""
        return self._skew.total_seconds()

    @clock_skew_s.setter
    def clock_skew_s(self, seconds: float) -> None:
        self._skew = timedelta(seconds=seconds)
        for account in self.accounts.values():
            account.by_text = sorted((self._text(account, plan), rid) for rid, plan in account.plans.items())

    def spend(self, key: str, requests: int, *, now: datetime | None = None) -> None:
        """Use up requests of a key's limit, as the customer's own integrations do."""
        for _ in range(requests):
            self._window(f"key:{key}").hit(now or self.clock())

    def reset_limits(self) -> None:
        """Forget every limiter's window, as a restart of the provider does."""
        self._windows.clear()

    def peak(self, key: str) -> int:
        """The most requests with this key in any window of `window_s`, wherever it begins; refused ones count."""
        meter = self._meters.get(key)
        return meter.peak if meter else 0

    # What it answers: pure but for taking calls from a feed

    def records(
        self, api_key: str | None, timestamp_text: str | None, now: datetime, *, faults: Sequence[Fault] = ()
    ) -> Answer:
        """Answer `/call_log/records_after_timestamp` as it would be at `now`, with only the faults that are given."""
        if refused := _refused_status(faults, now) or self._refused_key(api_key, _CALL_LOG_REFUSALS):
            return refused
        if not timestamp_text:
            return Answer(400, {"error": "Missing timestamp in query"})
        try:
            since = datetime.strptime(timestamp_text.strip(), _TIMESTAMP).strftime(_TIMESTAMP)  # noqa: DTZ007
        except ValueError:
            return Answer(400, {"error": "Invalid timestamp format"})
        account = self.accounts[api_key or ""]
        self._pull(account, now)
        rows = self._rows(account, since, now)
        good = Answer(200, {"success": True, "count": len(rows), "records": rows})
        return _spoilt(good, faults, lambda at: self._local_text(account, at or now), since=since)

    def recording(
        self, api_key: str | None, rid_text: str, now: datetime, *, faults: Sequence[Fault] = ()
    ) -> Answer | AudioAnswer:
        """Answer `/call_log/recording/{rid}`."""
        if refused := _refused_status(faults, now) or self._refused_key(api_key, _CALL_LOG_REFUSALS):
            return refused
        if not (rid_text.isascii() and rid_text.isdigit()):
            return Answer(400, {"error": "Invalid record ID"})
        account = self.accounts[api_key or ""]
        self._pull(account, now)
        plan = account.plans.get(int(rid_text))
        if plan is None or plan.visible_at > now:
            return Answer(404, {"error": "Recording not found"})
        whats = {fault.what: fault for fault in faults}
        if plan.recording_at is None or plan.recording_at > now or Mischief.NO_RECORDING in whats:
            return Answer(404, {"error": "No recording available"})
        truncate = whats.get(Mischief.TRUNCATE)
        sent_bytes = int(plan.recording_bytes * truncate.share) if truncate else plan.recording_bytes
        return AudioAnswer(plan.rid, plan.recording_bytes, sent_bytes)

    def search(self, api_key: str | None, body: bytes, now: datetime, *, faults: Sequence[Fault] = ()) -> Answer:
        """Answer `/contacts/contacts/search/phones`."""
        if refused := _refused_status(faults, now) or self._refused_key(api_key, _CONTACTS_REFUSALS):
            return refused
        try:
            asked = orjson.loads(body)["phone_numbers"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            asked = None
        if not isinstance(asked, list) or not all(isinstance(number, str) for number in asked):
            return Answer(400, {"error": "phone_numbers must be an array of strings"})
        cards = self.accounts[api_key or ""].contacts.values()
        found: Json = {}
        for number in asked:
            bare = normalised(number)
            reply_key = bare if self.reply_keys == "normalised" else number
            found[reply_key] = [card.model_dump(mode="json") for card in cards if bare in card.numbers()]
        return _spoilt(Answer(200, found), faults)

    def changes_after(
        self, api_key: str | None, version_text: str, now: datetime, *, faults: Sequence[Fault] = ()
    ) -> Answer:
        """Answer `/contacts/contactsAfterVersion/{version}`; as in the document, `updated` carries no numbers."""
        if refused := _refused_status(faults, now) or self._refused_key(api_key, _CONTACTS_REFUSALS):
            return refused
        if not (version_text.isascii() and version_text.isdigit()):
            return Answer(400, {"error": "Invalid version"})
        account, version = self.accounts[api_key or ""], int(version_text)
        shown = {"uuid", "firstname", "lastname", "version", "groups"}
        cards = sorted(account.contacts.values(), key=lambda card: card.version)
        updated = [card.model_dump(mode="json", include=shown) for card in cards if card.version > version]
        deleted = [entry for entry in account.deleted if entry["version"] > version]
        return _spoilt(Answer(200, {"updated": updated, "deleted": deleted}), faults)

    def health(self, now: datetime, *, faults: Sequence[Fault] = ()) -> Answer:
        """Answer `/health`, which needs no key."""
        body = {"status": "healthy", "timestamp": _instant_text(now), "services": ["contacts", "sms", "call_logs"]}
        return _refused_status(faults, now) or _spoilt(Answer(200, body), faults)

    def status(self, api_key: str | None, now: datetime, *, faults: Sequence[Fault] = ()) -> Answer:
        """Answer `/status`."""
        if refused := _refused_status(faults, now) or self._refused_key(api_key, _CONTACTS_REFUSALS):
            return refused
        services = {"contacts": {"status": "online", "endpoint": "control.webfones.net:4044/api"}}
        return _spoilt(Answer(200, {"status": "ok", "timestamp": _instant_text(now), "services": services}), faults)

    # Over HTTP

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        """Listen until the block ends; yields the base URL."""
        return listening(self._handle, host=host, port=port, ssl_context=ssl_context)

    async def _handle(self, request: web.BaseRequest, line: Line) -> web.StreamResponse:
        path = unquote(request.raw_path.partition("?")[0])
        if path == "/_control":
            return await self._control(request)
        routed = _route(request.method, path)
        if routed is None:
            return json_response({"error": "Not found"}, status=404)
        kind, argument = routed
        key, now = _key_of(request.headers), self.clock()
        refused, headers = self._admit(kind, key, request.remote or "", now)
        if refused is not None:
            self._note(key, kind, refused.status)
            return await self._send(request, refused, headers)
        faults = self._take(kind, key)
        for fault in faults:
            match fault.what:
                case Mischief.HANG:
                    await line.wait(None)
                    return await hang_up(request)
                case Mischief.SLOW:
                    await line.wait(fault.delay_s)
                case Mischief.DROP:
                    return await hang_up(request, reset=True)
                case _:
                    pass
        answer = await self._answer(request, kind, argument, key, faults)
        if isinstance(answer, AudioAnswer):
            self._note(key, kind, 200)
            return await _send_audio(request, answer, headers)
        self._note(key, kind, answer.status)
        return await self._send(request, answer, headers)

    async def _answer(
        self, request: web.BaseRequest, kind: Kind, argument: str, key: str | None, faults: Sequence[Fault]
    ) -> Answer | AudioAnswer:
        now = self.clock()
        match kind:
            case Kind.RECORDS:
                return self.records(key, request.query.get("timestamp"), now, faults=faults)
            case Kind.RECORDING:
                return self.recording(key, argument, now, faults=faults)
            case Kind.SEARCH:
                return self.search(key, await request.read(), now, faults=faults)
            case Kind.CHANGES:
                return self.changes_after(key, argument, now, faults=faults)
            case Kind.HEALTH:
                return self.health(now, faults=faults)
            case Kind.STATUS:
                return self.status(key, now, faults=faults)

    def _admit(self, kind: Kind, key: str | None, address: str, now: datetime) -> tuple[Answer | None, dict[str, str]]:
        """Count the request and ask the limiter: the call log's is per key, that of everything else per address."""
        self.requests[key or "", kind] += 1
        if key is not None:
            self._meters.setdefault(key, Meter(self.window_s)).hit(now)
        if kind is Kind.HEALTH:
            return None, {}
        per_key = key is not None and kind in (Kind.RECORDS, Kind.RECORDING)
        window = self._window(f"key:{key}" if per_key else f"ip:{address}")
        allowed = window.hit(now)
        headers = window.headers(now) if self.rate_limit_headers else {}
        return (None if allowed else _too_many("API key" if per_key else "IP")), headers

    def _window(self, bucket: str) -> FixedWindow:
        window = self._windows.setdefault(bucket, FixedWindow(self.limit, self.window_s))
        window.limit, window.window_s = self.limit, self.window_s
        return window

    def _take(self, kind: Kind, key: str | None) -> list[Fault]:
        """The faults that hit this request, one of each sort, oldest first; those with `times` are used up by it."""
        taken: dict[Mischief, Fault] = {}
        left: list[Fault] = []
        for fault in self.faults:
            if fault.what in taken or not fault.hits(kind, key):
                left.append(fault)
                continue
            taken[fault.what] = fault
            if fault.times is None:
                left.append(fault)
            elif fault.times > 1:
                left.append(fault.model_copy(update={"times": fault.times - 1}))
        self.faults = left
        return list(taken.values())

    def _note(self, key: str | None, kind: Kind, status: int) -> None:
        self.statuses[key or "", kind, status] += 1

    async def _send(self, request: web.BaseRequest, answer: Answer, headers: Mapping[str, str]) -> web.StreamResponse:
        content_type = "text/html" if isinstance(answer.body, str) else "application/json"
        all_headers = {**headers, **answer.headers, "Content-Type": content_type, **self._date()}
        if not answer.filler_rows:
            return web.Response(status=answer.status, body=answer.encoded(), headers=all_headers)
        response = web.StreamResponse(status=answer.status, headers=all_headers)
        await response.prepare(request)
        for chunk in answer.chunks():
            await response.write(chunk)
        return response

    def _date(self) -> dict[str, str]:
        return {"Date": (self.clock() + self._skew).astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")}

    async def _control(self, request: web.BaseRequest) -> web.Response:
        if request.method == "GET":
            return json_response(self.state())
        try:
            wish = Control.model_validate_json(await request.read())
            self.obey(wish)
        except (ValidationError, ValueError, KeyError) as error:
            return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return json_response(self.state())

    def obey(self, wish: "Control") -> None:
        """Do what a control message asks, in the order of its fields."""
        for account in wish.accounts:
            self.add_account(account.key, zone=account.zone).revoked = account.revoked
        for name in ("limit", "window_s", "rate_limit_headers", "inclusive", "clock_skew_s"):
            value = getattr(wish, name)
            if value is not None:
                setattr(self, name, value)
        for call in wish.calls:
            given = call.model_dump(exclude_none=True, exclude={"key"})
            self.appear(call.key, **given)
        for change in wish.changes:
            self.change(change.key, change.rid, change.fields, at=change.at)
        for contact in wish.contacts:
            self.put_contact(contact.key, **contact.fields)
        for gone in wish.deleted_contacts:
            self.delete_contact(gone.key, gone.uuid)
        if wish.behave is not False:
            for kind in [None] if wish.behave is True else wish.behave:
                self.behave(kind)
        self.misbehave(*wish.faults)
        for key, requests in wish.spend.items():
            self.spend(key, requests)
        if wish.reset_limits:
            self.reset_limits()

    def state(self) -> Json:
        """What `GET /_control` shows: settings, faults, counters, and the calls that have become visible."""
        now = self.clock()
        return {
            "now": _instant_text(now),
            "limit": self.limit,
            "window_s": self.window_s,
            "clock_skew_s": self.clock_skew_s,
            "faults": [fault.model_dump(mode="json") for fault in self.faults],
            "accounts": {key: self._account_state(key, now) for key in self.accounts},
        }

    def _account_state(self, key: str, now: datetime) -> Json:
        account = self.accounts[key]
        return {
            "zone": account.zone.key,
            "revoked": account.revoked,
            "contacts": len(account.contacts),
            "version": account.version,
            "requests": {kind.value: self.requests[key, kind] for kind in Kind},
            "statuses": {f"{k} {status}": n for (who, k, status), n in sorted(self.statuses.items()) if who == key},
            "peak": self.peak(key),
            "visible": [asdict(plan) for plan in self.visible(key, now)],
        }

    # State

    def _put(self, account: Account, plan: CallPlan) -> None:
        old = account.plans.get(plan.rid)
        if old is not None:
            entry = (self._text(account, old), plan.rid)
            del account.by_text[bisect_left(account.by_text, entry)]
        account.plans[plan.rid] = plan
        insort(account.by_text, (self._text(account, plan), plan.rid))

    def _pull(self, account: Account, now: datetime) -> None:
        while account.upcoming is not None and account.feed is not None and account.upcoming.started_at <= now:
            self._put(account, account.upcoming)
            account.upcoming = next(account.feed, None)

    def _text(self, account: Account, plan: CallPlan) -> str:
        return self._local_text(account, plan.started_at)

    def _local_text(self, account: Account, instant: datetime) -> str:
        return (instant + self._skew).astimezone(account.zone).strftime(_TIMESTAMP)

    def _rows(self, account: Account, since: str, now: datetime) -> list[Any]:
        edge = (since, -1) if self.inclusive else (since, math.inf)
        first = bisect_right(account.by_text, edge)
        texts = account.by_text[first:]
        return [_row(account.plans[rid], text, now) for text, rid in texts if account.plans[rid].visible_at <= now]

    def _refused_key(self, api_key: str | None, refusals: tuple[Json, Json]) -> Answer | None:
        missing, invalid = refusals
        if not api_key:
            return Answer(401, missing)
        if api_key not in self.accounts or self.accounts[api_key].revoked:
            return Answer(403, invalid)
        return None


_CALL_LOG_REFUSALS: tuple[Json, Json] = ({"error": "Missing API key"}, {"error": "Invalid API key"})
_CONTACTS_REFUSALS: tuple[Json, Json] = (
    {
        "error": "API key is required",
        "message": "Please provide API key in x-api-key header or Authorization header",
    },
    {"error": "Invalid API key", "message": "The provided API key is not valid or has been revoked"},
)


class NewAccount(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str = Field(min_length=1)
    zone: ZoneName = "UTC"
    revoked: bool = False


class NewCall(BaseModel):
    """A call of a control message; what is left out is as `WebfonesSimulator.appear` has it."""

    model_config = ConfigDict(extra="forbid")

    key: str
    rid: int | None = None
    started_at: AwareDatetime | None = None
    ended_at: AwareDatetime | None = None
    visible_at: AwareDatetime | None = None
    recording_at: AwareDatetime | None = None
    talk_s: float | None = Field(None, ge=0)
    direction: str | None = None
    disposition: str | None = None
    outside_number: str | None = None
    outside_name: str | None = None
    inside_number: str | None = None
    extension: str | None = None
    recording_bytes: int | None = None
    extra: dict[str, Scalar] | None = None


class NewChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    rid: int
    fields: dict[str, Scalar]
    at: AwareDatetime | None = None


class NewContact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    fields: dict[str, Any]


class GoneContact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    uuid: str


class Control(BaseModel):
    """What `POST /_control` takes; all may be left out. `behave`: true, or the kinds whose faults are taken back."""

    model_config = ConfigDict(extra="forbid")

    accounts: list[NewAccount] = Field(default_factory=list)
    calls: list[NewCall] = Field(default_factory=list)
    changes: list[NewChange] = Field(default_factory=list)
    contacts: list[NewContact] = Field(default_factory=list)
    deleted_contacts: list[GoneContact] = Field(default_factory=list)
    faults: list[Fault] = Field(default_factory=list)
    behave: bool | list[Kind] = False
    limit: int | None = Field(None, ge=0)
    window_s: float | None = Field(None, gt=0)
    rate_limit_headers: bool | None = None
    inclusive: bool | None = None
    clock_skew_s: float | None = None
    spend: dict[str, int] = Field(default_factory=dict)
    reset_limits: bool = False


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


def audio_chunks(rid: int, size_bytes: int) -> Iterator[bytes]:
    """The WAV of a call: a short melody of its own, the same bytes each time, in pieces of at most a second."""
    header = _wav_header(size_bytes - _WAV_HEADER_BYTES)
    yield header
    left = size_bytes - len(header)
    second = 0
    while left > 0:
        note = hashlib.sha256(f"{rid}:{second}".encode()).digest()[0] % 8
        chunk = _tone(note)[:left]
        yield chunk
        left -= len(chunk)
        second += 1


def audio_sha256(rid: int, size_bytes: int) -> str:
    """What the audio of a call must hash to when it has arrived whole."""
    digest = hashlib.sha256()
    for chunk in audio_chunks(rid, size_bytes):
        digest.update(chunk)
    return digest.hexdigest()


@cache
def _tone(note: int) -> bytes:
    """One second of a note, 8 kHz, 16 bit, mono, fading in and out."""
    pitch_hz = (262, 294, 330, 349, 392, 440, 494, 523)[note]
    turn = 2 * math.pi * pitch_hz / _SAMPLE_RATE_HZ
    samples = (
        int(6_000 * math.sin(turn * index) * math.sin(math.pi * index / _SAMPLE_RATE_HZ))
        for index in range(_SAMPLE_RATE_HZ)
    )
    return struct.pack(f"<{_SAMPLE_RATE_HZ}h", *samples)


def _wav_header(data_bytes: int) -> bytes:
    """RIFF, PCM, one channel (the canonical 44 bytes)."""
    riff = struct.pack("<4sI4s", b"RIFF", 36 + data_bytes, b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _SAMPLE_RATE_HZ, 2 * _SAMPLE_RATE_HZ, 2, 16)
    return riff + form + struct.pack("<4sI", b"data", data_bytes)


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


def _spoilt(
    answer: Answer,
    faults: Sequence[Fault],
    local_text: Callable[[datetime | None], str] = str,
    *,
    since: str = "",
) -> Answer:
    """What the faults make of a good answer; those that are about rows leave other answers alone."""
    for fault in faults:
        body = answer.body
        rows: list[Any] | None = body["records"] if isinstance(body, dict) and "records" in body else None
        match fault.what:
            case Mischief.NOT_JSON:
                answer = replace(answer, body="<html><body><h1>It works!</h1></body></html>", filler_rows=0)
            case Mischief.PARTIAL:
                answer = replace(answer, status=206, body={"message": "Partial content"}, filler_rows=0)
            case Mischief.SUCCESS_FALSE if rows is not None:
                answer = replace(answer, body={"success": False, "count": 0, "records": []}, filler_rows=0)
            case Mischief.WRONG_COUNT if rows is not None:
                answer = replace(answer, body={"success": True, "count": len(rows) + 1, "records": rows})
            case Mischief.SHUFFLE if rows is not None:
                shuffled = random.Random(fault.seed).sample(rows, len(rows))  # noqa: S311  # nothing secret
                answer = replace(answer, body={"success": True, "count": len(rows), "records": shuffled})
            case Mischief.GARBAGE if rows is not None:
                text = local_text(fault.at)
                mixed = _mixed(rows, [*garbage_rows(text), *(odd_rows(text) if text > since else ())])
                answer = replace(answer, body={"success": True, "count": len(mixed), "records": mixed})
            case Mischief.HUGE if rows is not None:
                head = {"success": True, "count": len(rows) + fault.rows, "records": rows}
                answer = replace(answer, body=head, filler_rows=fault.rows)
            case _:
                pass
    return answer


def _mixed(rows: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Put the others between the rows, one by one."""
    mixed: list[Any] = []
    for index in range(max(len(rows), len(others))):
        mixed += others[index : index + 1]
        mixed += rows[index : index + 1]
    return mixed


def _with_filler(rows: Sequence[Any], count: int) -> Iterator[Any]:
    """The rows, then `count` old ones that differ in their rid only."""
    yield from rows
    filler = CallPlan(rid=0, started_at=_LONG_AGO, ended_at=_LONG_AGO, visible_at=_LONG_AGO)
    template = _row(filler, _LONG_AGO.strftime(_TIMESTAMP), _LONG_AGO)
    for index in range(count):
        yield {**template, "rid": 1_000_000_000 + index}


_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def _batches(items: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _refused_status(faults: Sequence[Fault], now: datetime) -> Answer | None:
    """The error answer of a STATUS fault, with the body that the documents give for it."""
    fault = next((fault for fault in faults if fault.what is Mischief.STATUS), None)
    if fault is None:
        return None
    if fault.body is not None:
        return Answer(fault.status, fault.body)
    bodies: dict[int, Json] = {
        401: {"error": "Missing API key"},
        403: {"error": "Invalid API key"},
        429: {"error": "Too many requests for this API key, please try again later."},
        500: {
            "error": "Internal server error",
            "message": "An unexpected error occurred",
            "timestamp": _instant_text(now),
        },
        502: {"error": "Failed to fetch recording"},
        503: {"error": "Contacts service unavailable", "message": "The contacts service is currently unreachable."},
    }
    return Answer(fault.status, bodies.get(fault.status, {"error": f"HTTP {fault.status}"}))


def _too_many(whose: Literal["API key", "IP"]) -> Answer:
    words = "for this API key" if whose == "API key" else "from this IP"
    return Answer(429, {"error": f"Too many requests {words}, please try again later."})


_GET_ARGUMENT = {
    "/call_log/recording/": Kind.RECORDING,
    "/contacts/contactsAfterVersion/": Kind.CHANGES,
}
_GET = {
    "/call_log/records_after_timestamp": Kind.RECORDS,
    "/health": Kind.HEALTH,
    "/status": Kind.STATUS,
}


def _route(method: str, path: str) -> tuple[Kind, str] | None:
    if method == "POST" and path == "/contacts/contacts/search/phones":
        return Kind.SEARCH, ""
    if method != "GET":
        return None
    if kind := _GET.get(path):
        return kind, ""
    for prefix, kind in _GET_ARGUMENT.items():
        argument = path.removeprefix(prefix)
        if argument != path and argument and "/" not in argument:
            return kind, argument
    return None


def _key_of(headers: Mapping[str, str]) -> str | None:
    """The API key of either header; `x-api-key` wins."""
    key = headers.get("x-api-key")
    if key:
        return key
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


async def _send_audio(request: web.BaseRequest, answer: AudioAnswer, headers: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={**headers, **answer.headers})
    await response.prepare(request)
    for chunk in answer.chunks():
        await response.write(chunk)
        await asyncio.sleep(0)
    if answer.sent_bytes < answer.size_bytes:
        return await hang_up(request)
    return response


def _instant_text(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
