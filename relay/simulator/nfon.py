"""An NFON that behaves as its Call History document says, and misbehaves when told to.

What it knows and what it lists are pure functions of its state and an instant. `serve` puts the same answers on the
loopback interface, with the event stream and a login that renews tokens. Where the document is silent, the choice is
an attribute of `NfonSimulator`.
"""

import asyncio
import random
import secrets
import ssl
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal
from urllib.parse import unquote

import orjson
from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.model import Json
from relay.simulator.loopback import Line, hang_up, json_response, listening
from relay.simulator.timeline import CallPlan, Change, Scalar

_TICK_S = 0.02
_STATUSES = {"ANSWERED": "answered", "NO ANSWER": "missed", "BUSY": "busy", "FAILED": "unknown"}
_TRANSCRIBED = "transcribed_at"


class Kind(StrEnum):
    """What a request is for."""

    RECORDS = "records"
    DETAILS = "details"
    STREAM = "stream"
    DELETE = "delete"
    TOKEN = "token"  # noqa: S105 - a kind of request


class Mischief(StrEnum):
    """What can be done to a request instead of, or on top of, answering it as documented.

    The last six are for streams: each event twice, in tiny pieces, with garbage in front, with a huge event in front,
    a cut after the first event, or an answer that is no stream.
    """

    STATUS = "status"
    HANG = "hang"
    SLOW = "slow"
    DROP = "drop"
    NOT_JSON = "not_json"
    PARTIAL = "partial"
    NOT_A_LIST = "not_a_list"
    GARBAGE = "garbage"
    SHUFFLE = "shuffle"
    HUGE = "huge"
    DUPLICATE = "duplicate"
    SPLIT = "split"
    BAD_EVENTS = "bad_events"
    HUGE_EVENT = "huge_event"
    CUT = "cut"
    NO_STREAM = "no_stream"


class Fault(BaseModel):
    """One misbehaviour. It hits requests that match `on`, `times` of them (None: until told off).

    `status` and `body` are for STATUS, `delay_s` for SLOW, `rows` for HUGE, `seed` for SHUFFLE. The rows of GARBAGE
    start `at` (when the fault was added), so that they are the same in each answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Mischief
    on: Kind | None = None
    times: int | None = Field(1, ge=1)
    status: int = Field(500, ge=200, le=599)
    delay_s: float = Field(1.0, ge=0)
    rows: int = Field(1_000, ge=0)
    seed: int = 0
    body: str | None = None
    at: AwareDatetime | None = None


@dataclass(slots=True)
class Account:
    """One user's call history; `key` is the access token that reads it, until the login gives others."""

    key: str
    customer: str = "K9999"
    extension: str = "1001"
    revoked: bool = False
    plans: dict[int, CallPlan] = field(default_factory=dict)
    feed: Iterator[CallPlan] | None = None
    upcoming: CallPlan | None = None


@dataclass(slots=True)
class Login:
    """A login's refresh token, the only one that is good; each use gives another."""

    account: str
    refresh_token: str
    retired: set[str] = field(default_factory=set)
    dead: bool = False


class NfonSimulator:
    """Accounts by access token, what they answer, and how they misbehave.

    `clock` is asked once a request. The attributes may be changed at any time: `from_unit`, `default_limit` (where
    none, or 0, is asked for), `most_rows` (of one answer, whatever is asked for), `version` of the document, `replay`
    (how many calls a stream sends at its begin), `heartbeat_s` (a comment while there is nothing to say; None: none),
    `access_ttl_s` of tokens from the login, `rotate` (whether a refresh token is good once only).
    """

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        from_unit: Literal["seconds", "milliseconds"] = "seconds",
        default_limit: int = 25,
        most_rows: int = 1000,
        version: Literal[1, 2] = 2,
        replay: int = 0,
        heartbeat_s: float | None = None,
        access_ttl_s: float = 300.0,
        rotate: bool = True,
    ) -> None:
        self.clock = clock
        self.from_unit = from_unit
        self.default_limit = default_limit
        self.most_rows = most_rows
        self.version = version
        self.replay = replay
        self.heartbeat_s = heartbeat_s
        self.access_ttl_s = access_ttl_s
        self.rotate = rotate
        self.accounts: dict[str, Account] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[tuple[str, Kind]] = Counter()
        self.statuses: Counter[tuple[Kind, int]] = Counter()
        self.streams_open = 0
        self.streams_most = 0
        self.streams_expired = 0
        self.events_sent = 0
        self.reused_refresh_tokens = 0
        self.agents: set[str] = set()
        self._access: dict[str, tuple[str, datetime]] = {}
        self._logins: list[Login] = []
        self._stirred: set[asyncio.Event] = set()
        self._drops: set[asyncio.Event] = set()

    # What there is

    def add_account(self, key: str, *, customer: str = "K9999", extension: str = "1001") -> Account:
        """Open an account; one that is there already stays as it is."""
        return self.accounts.setdefault(key, Account(key, customer, extension))

    def add_login(self, key: str, refresh_token: str) -> None:
        """Let a refresh token give access tokens for an account."""
        self._logins.append(Login(key, refresh_token))

    def expire_tokens(self) -> None:
        """Refuse all access tokens that the login has given so far."""
        self._access.clear()

    def add_calls(self, key: str, plans: Iterable[CallPlan]) -> None:
        """Add calls, or replace those with the same rid; rows show only when their time has come."""
        self.accounts[key].plans.update((plan.rid, plan) for plan in plans)
        self._stir()

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
        self.add_calls(key, [plan])
        return plan

    def change(self, key: str, rid: int, fields: Mapping[str, Scalar], *, at: datetime | None = None) -> CallPlan:
        """Let a row show other values from `at` (now) on."""
        account = self.accounts[key]
        plan = account.plans[rid]
        changes = sorted((*plan.changes, Change(at or self.clock(), dict(fields))), key=lambda change: change.at)
        account.plans[rid] = replace(plan, changes=tuple(changes))
        self._stir()
        return account.plans[rid]

    def transcribe(self, key: str, rid: int, *, summary: str = "They agreed.", words: str = "Hello. Yes.") -> None:
        """Let the transcript of a call be ready now; its row is streamed again."""
        self.change(key, rid, {_TRANSCRIBED: _text(self.clock()), "summary": summary, "words": words})

    def remove(self, key: str, rid: int) -> None:
        """Let the user delete a call from the history."""
        del self.accounts[key].plans[rid]

    def visible(self, key: str, now: datetime) -> list[CallPlan]:
        """The ledger: every call that the list would show at `now` to somebody who asks for all, by rid."""
        account = self.accounts[key]
        self._pull(account, now)
        return sorted((plan for plan in account.plans.values() if plan.visible_at <= now), key=lambda plan: plan.rid)

    def uuid_of(self, key: str, rid: int) -> str:
        """Name a call as its row does."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"nfon/{key}/{rid}"))

    # How it behaves

    def misbehave(self, *faults: Fault) -> None:
        """Add faults; of those with `times`, the oldest is used up first."""
        now = self.clock()
        self.faults.extend(fault if fault.at else fault.model_copy(update={"at": now}) for fault in faults)

    def behave(self, kind: Kind | None = None) -> None:
        """Take back the faults of a kind of request, or all."""
        self.faults = [fault for fault in self.faults if kind is not None and fault.on is not kind]

    def drop_streams(self) -> None:
        """Cut every open stream."""
        for drop in self._drops:
            drop.set()

    # What it answers: pure but for taking calls from a feed

    def records(self, key: str, query: Mapping[str, str], now: datetime) -> list[Any]:
        """List as `GET /records` does; raises ValueError for parameters that make no sense."""
        account = self.accounts[key]
        wanted = query.get("customer"), query.get("extension")
        if wanted != (None, None) and any(w not in (None, own) for w, own in _pairs(wanted, account)):
            return []
        unit = 1000 if self.from_unit == "milliseconds" else 1
        since = float(query["from"]) / unit if "from" in query else float("-inf")
        until = float(query["to"]) / unit if "to" in query else float("inf")
        limit, offset = int(query.get("limit", "0")), int(query.get("offset", "0"))
        sort = query.get("sort", "desc")
        if limit < 0 or offset < 0 or sort not in ("asc", "desc"):
            raise ValueError("bad parameter")
        plans = [p for p in self.visible(key, now) if since < p.started_at.timestamp() < until]
        plans.sort(key=lambda plan: (plan.started_at, plan.rid), reverse=sort == "desc")
        most = min(limit or self.default_limit, self.most_rows)
        return [self.row(account, plan, now) for plan in plans[offset : offset + most]]

    def row(self, account: Account, plan: CallPlan, now: datetime, *, complete: bool = False) -> Json:
        """Write a call as a record of the chosen version of the document."""
        shown, updated_at = _shown(plan, now)
        outbound = shown.pop("direction", plan.direction) == "OUTGOING"
        ours = {
            "name": "Alice",
            "number": str(shown.pop("extension", account.extension)),
            "context": account.customer,
        }
        theirs: Json = {
            "name": shown.pop("cidname_outside", plan.outside_name),
            "number": "1" + "".join(char for char in plan.outside_number if char.isdigit()),
            "context": "global",
        }
        status = _STATUSES.get(str(shown.pop("disposition", plan.disposition)), "unknown")
        if outbound and status == "missed":
            status = "cancelled"
        row: Json = {
            "uuid": self.uuid_of(account.key, plan.rid),
            "duration": int((plan.ended_at - plan.started_at).total_seconds()) if plan.answered else 0,
            "direction": "outbound" if outbound else "inbound",
            "caller": ours if outbound else theirs,
            "callee": theirs if outbound else ours,
            "status": status,
            "created": _text(plan.started_at),
        }
        transcribed = shown.pop(_TRANSCRIBED, None)
        summary, words = shown.pop("summary", ""), shown.pop("words", "")
        transcribable = shown.pop("transcription", None)
        if transcribed or transcribable:
            row["transcription"] = {"available": transcribed is not None}
            if complete and transcribed:
                entries = [{"speaker": "Alice", "text": words}]
                row["transcription"] |= {"summary": summary, "transcript": entries}
        if updated_at is not None:
            row["updated"] = _text(updated_at)
        crm = shown.pop("crm", None)
        if crm is not None:
            row |= {"crm": crm} if self.version == 2 else {"custom_data": {"crm": crm}}
        transferred = shown.pop("transferred_from", None)
        if transferred is not None:
            word = "destination_type" if self.version == 2 else "service"
            callee = {"name": "Test Group", "number": str(transferred), "context": account.customer, word: "group"}
            row["history"] = [{"callee": callee, "updated": _text(plan.started_at)}]
        if self.version == 2:
            row |= {
                "call_id": f"call-{plan.rid}",
                "customer": account.customer,
                "extension": account.extension,
                "user_uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, account.key)),
            }
        return {**row, **plan.extra, **shown}

    # Over HTTP

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        """Listen until the block ends; yields the base URL. The login is at `/token` under it."""
        return listening(self._handle, host=host, port=port, ssl_context=ssl_context)

    async def _handle(self, request: web.BaseRequest, line: Line) -> web.StreamResponse:
        path = unquote(request.raw_path.partition("?")[0])
        kind = _kind(request, path)
        if kind is None:
            return json_response({"error": "not found"}, status=404)
        key = self._account_of(request)
        self.requests[key or "", kind] += 1
        self.agents.add(request.headers.get("User-Agent", ""))
        faults = self._take(kind)
        for fault in faults:
            match fault.what:
                case Mischief.HANG:
                    await line.wait(None)
                    return await hang_up(request)
                case Mischief.SLOW:
                    await line.wait(fault.delay_s)
                case Mischief.DROP:
                    return await hang_up(request, reset=True)
                case Mischief.STATUS:
                    self.statuses[kind, fault.status] += 1
                    body = (fault.body or orjson.dumps({"error": f"HTTP {fault.status}"}).decode()).encode()
                    return web.Response(status=fault.status, body=body, content_type="application/json")
                case _:
                    pass
        if kind is Kind.TOKEN:
            answer = await self._grant(request)
        elif key is None or self.accounts[key].revoked:
            answer = json_response({"error": "invalid token"}, status=401)
        elif kind is Kind.STREAM:
            self.statuses[kind, 200] += 1
            return await self._stream(request, line, self.accounts[key], {fault.what for fault in faults})
        else:
            answer = self._answer(request, kind, key, path, faults)
        self.statuses[kind, answer.status] += 1
        answer.headers["Date"] = self.clock().astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        return answer

    def _answer(
        self, request: web.BaseRequest, kind: Kind, key: str, path: str, faults: Sequence[Fault]
    ) -> web.Response:
        now = self.clock()
        account = self.accounts[key]
        if kind is Kind.DELETE:
            account.plans.clear()
            return web.Response(status=204)
        if kind is Kind.DETAILS:
            wanted = path.removeprefix("/records/")
            plan = next((p for p in self.visible(key, now) if self.uuid_of(key, p.rid) == wanted), None)
            if plan is None:
                return json_response({"error": "record not found"}, status=404)
            return json_response(self.row(account, plan, now, complete=True))
        try:
            rows = self.records(key, request.query, now)
        except ValueError:
            return json_response({"error": "invalid parameter"}, status=400)
        return _spoilt(rows, faults, now)

    def _account_of(self, request: web.BaseRequest) -> str | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        if token in self._access:
            key, until = self._access[token]
            return key if self.clock() < until else None
        # An account with a login is only read with what the login gives.
        return token if token in self.accounts and token not in {login.account for login in self._logins} else None

    async def _grant(self, request: web.BaseRequest) -> web.Response:
        form = await request.post()
        sent = str(form.get("refresh_token", ""))
        login = next((one for one in self._logins if sent == one.refresh_token or sent in one.retired), None)
        if form.get("grant_type") != "refresh_token" or login is None or login.dead:
            return json_response({"error": "invalid_grant"}, status=400)
        if sent != login.refresh_token:
            # RFC 9700, section 4.14.2: a retired token that comes back ends the login.
            login.dead = True
            self.reused_refresh_tokens += 1
            return json_response({"error": "invalid_grant"}, status=400)
        access = secrets.token_urlsafe(16)
        self._access[access] = (login.account, self.clock() + timedelta(seconds=self.access_ttl_s))
        granted = {"access_token": access, "token_type": "Bearer", "expires_in": self.access_ttl_s}
        if self.rotate:
            login.retired.add(sent)
            login.refresh_token = secrets.token_urlsafe(16)
            granted["refresh_token"] = login.refresh_token
        return json_response(granted)

    async def _stream(
        self, request: web.BaseRequest, line: Line, account: Account, whats: set[Mischief]
    ) -> web.StreamResponse:
        if Mischief.NO_STREAM in whats:
            return json_response([])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        stirred, drop = asyncio.Event(), asyncio.Event()
        self._stirred.add(stirred)
        self._drops.add(drop)
        self.streams_open += 1
        self.streams_most = max(self.streams_most, self.streams_open)
        try:
            await self._tell(request, response, line, account, whats, stirred, drop)
        finally:
            self.streams_open -= 1
            self._stirred.discard(stirred)
            self._drops.discard(drop)
        if drop.is_set():
            return await hang_up(request, reset=True)
        return response

    async def _tell(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        line: Line,
        account: Account,
        whats: set[Mischief],
        stirred: asyncio.Event,
        drop: asyncio.Event,
    ) -> None:
        """Send what appears and what changes, until the line closes or the stream is dropped."""
        _, until = self._access.get(_bearer(request), ("", datetime.max.replace(tzinfo=UTC)))
        looked_at = self.clock()
        rows = [self.row(account, plan, looked_at) for plan in self.visible(account.key, looked_at)]
        due = sorted(rows, key=lambda row: str(row["created"]))[-self.replay :] if self.replay else []
        number, quiet_s = 0, 0.0
        while not (line.closing.is_set() or drop.is_set()) and self.clock() < until:
            for row in due:
                await self._send(response, row, number, whats)
                number += 1
                if Mischief.CUT in whats:
                    drop.set()
                    return
            if self.heartbeat_s is not None and quiet_s >= self.heartbeat_s:
                await response.write(b": still here\n\n")
                quiet_s = 0.0
            try:
                async with asyncio.timeout(_TICK_S):
                    await stirred.wait()
            except TimeoutError:
                quiet_s += _TICK_S
            stirred.clear()
            now = self.clock()
            plans = [plan for plan in self.visible(account.key, now) if _moved(plan, looked_at, now)]
            due, looked_at = [self.row(account, plan, now) for plan in plans], now
        self.streams_expired += int(self.clock() >= until)

    async def _send(self, response: web.StreamResponse, row: Json, number: int, whats: set[Mischief]) -> None:
        event = b"id: %d\ndata: %s\n\n" % (number, orjson.dumps(row))
        if Mischief.BAD_EVENTS in whats:
            event = b'data: {"uuid": \n\n: a comment\nevent: odd\ndata: [1]\n\n' + event
        if Mischief.HUGE_EVENT in whats:
            event = b"data: " + b"x" * (1100 * 1024) + b"\n\n" + event
        if Mischief.DUPLICATE in whats:
            event += event
        if Mischief.SPLIT in whats:
            for start in range(0, len(event), 7):
                await response.write(event[start : start + 7])
                await asyncio.sleep(0)
        else:
            await response.write(event)
        self.events_sent += 1

    def _stir(self) -> None:
        for stirred in self._stirred:
            stirred.set()

    def _take(self, kind: Kind) -> list[Fault]:
        """The faults that hit this request, one of each sort, oldest first; those with `times` are used up by it."""
        taken: dict[Mischief, Fault] = {}
        left: list[Fault] = []
        for fault in self.faults:
            if fault.what in taken or fault.on not in (None, kind):
                left.append(fault)
                continue
            taken[fault.what] = fault
            if fault.times is None:
                left.append(fault)
            elif fault.times > 1:
                left.append(fault.model_copy(update={"times": fault.times - 1}))
        self.faults = left
        return list(taken.values())

    def _pull(self, account: Account, now: datetime) -> None:
        while account.upcoming is not None and account.feed is not None and account.upcoming.started_at <= now:
            account.plans[account.upcoming.rid] = account.upcoming
            account.upcoming = next(account.feed, None)


def garbage_rows(text: str) -> list[Any]:
    """Rows that no client should believe; `text` is the start of those that have a possible one."""
    good = {"uuid": "garbage-1", "created": text, "status": "missed", "direction": "inbound"}
    return [
        {name: value for name, value in good.items() if name != "uuid"},
        {**good, "uuid": None},
        {**good, "uuid": "x" * 1000},
        {**good, "created": "2025-02-30T25:61:00Z"},
        {**good, "created": None},
        {**good, "created": 1748945554},
        "a row that is text",
        None,
        ["a", "list"],
    ]


def _spoilt(rows: list[Any], faults: Sequence[Fault], now: datetime) -> web.Response:
    status = 200
    body: Any = rows
    for fault in faults:
        match fault.what:
            case Mischief.NOT_JSON:
                return web.Response(text="<html><body><h1>It works!</h1></body></html>", content_type="text/html")
            case Mischief.PARTIAL:
                status, body = 206, {"error": "partial"}
            case Mischief.NOT_A_LIST:
                body = {"records": rows}
            case Mischief.GARBAGE:
                body = _mixed(rows, garbage_rows(_text(fault.at or now)))
            case Mischief.SHUFFLE:
                body = random.Random(fault.seed).sample(rows, len(rows))  # noqa: S311 - nothing secret
            case Mischief.HUGE:
                filler = {"uuid": "filler", "created": _text(now), "status": "answered", "note": "x" * 200}
                body = [*rows, *({**filler, "uuid": f"filler-{index}"} for index in range(fault.rows))]
            case _:
                pass
    return json_response(body, status=status)


def _mixed(rows: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Put the others between the rows, one by one."""
    mixed: list[Any] = []
    for index in range(max(len(rows), len(others))):
        mixed += others[index : index + 1]
        mixed += rows[index : index + 1]
    return mixed


def _shown(plan: CallPlan, now: datetime) -> tuple[dict[str, Any], datetime | None]:
    """What the row's changes come to at `now`, and when the last of them was."""
    shown: dict[str, Any] = {}
    updated_at = None
    for change in plan.changes:
        if change.at <= now:
            shown.update(change.fields)
            updated_at = change.at
    return shown, updated_at


def _moved(plan: CallPlan, after: datetime, until: datetime) -> bool:
    """Whether something about a call came to light after one instant, and not after the other."""
    return any(after < at <= until for at in (plan.visible_at, *(change.at for change in plan.changes)))


def _pairs(wanted: tuple[str | None, str | None], account: Account) -> list[tuple[str | None, str]]:
    return list(zip(wanted, (account.customer, account.extension), strict=True))


def _kind(request: web.BaseRequest, path: str) -> Kind | None:
    if path == "/token" and request.method == "POST":
        return Kind.TOKEN
    if path != "/records" and not path.startswith("/records/"):
        return None
    if request.method == "DELETE":
        return Kind.DELETE
    if request.method != "GET":
        return None
    if path != "/records":
        return Kind.DETAILS
    return Kind.STREAM if "text/event-stream" in request.headers.get("Accept", "") else Kind.RECORDS


def _bearer(request: web.BaseRequest) -> str:
    return request.headers.get("Authorization", "").partition(" ")[2]


def _text(instant: datetime) -> str:
    utc = instant.astimezone(UTC)
    return utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds").replace("+00:00", "Z")
