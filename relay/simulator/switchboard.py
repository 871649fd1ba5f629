"""What simulated providers that list rows have in common: accounts, calls that show when their time comes, mischief.

A provider is a subclass that knows its paths, its credentials and its rows; everything else is here. Time is asked from
the clock that was handed in, once a request.
"""

import random
import ssl
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relay.model import Json
from relay.simulator.loopback import Line, hang_up, json_response, listening
from relay.simulator.timeline import CallPlan, Change, Scalar
from relay.simulator.webfones import FixedWindow, Meter, NewCall, NewChange

_NATIVE: Final = {
    "cidname_outside": "outside_name",
    "cidnumber_outside": "outside_number",
    "cidnumber_inside": "inside_number",
    "cidext_inside": "extension",
    "direction": "direction",
    "disposition": "disposition",
}
"""The names by which a timeline's changes call what every provider knows in its own way."""


class Mischief(StrEnum):
    """What can be done to a request instead of, or on top of, answering it as documented."""

    STATUS = "status"
    HANG = "hang"
    SLOW = "slow"
    DROP = "drop"
    NOT_JSON = "not_json"
    PARTIAL = "partial"
    GARBAGE = "garbage"
    SHUFFLE = "shuffle"
    HUGE = "huge"


class Fault(BaseModel):
    """One misbehaviour. It hits requests that match `on` and `key` (None: any), `times` of them (None: until told off).

    `status` and `body` are for STATUS, `delay_s` for SLOW, `size_bytes` for HUGE, `seed` for SHUFFLE.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Mischief
    on: str | None = None
    key: str | None = None
    times: int | None = Field(1, ge=1)
    status: int = Field(500, ge=200, le=599)
    body: str | None = None
    delay_s: float = Field(1.0, ge=0)
    size_bytes: int = Field(8 * 1024 * 1024, ge=0)
    seed: int = 0

    def hits(self, kind: str, key: str) -> bool:
        return (self.on is None or self.on == kind) and (self.key is None or self.key == key)


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and a body: JSON, text as it is, or audio in pieces. `rows` names the list in the body."""

    status: int
    body: Json | str
    rows: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    audio: Iterator[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as a provider looks at it."""

    kind: str
    query: Mapping[str, str]
    base_url: str
    path: str


@dataclass(slots=True)
class Account:
    """One customer: calls by rid, and in the order of their starts."""

    key: str
    handle: str
    revoked: bool = False
    plans: dict[int, CallPlan] = field(default_factory=dict)
    by_start: list[tuple[datetime, int]] = field(default_factory=list)
    feed: Iterator[CallPlan] | None = None
    upcoming: CallPlan | None = None

    def put(self, plan: CallPlan) -> None:
        """Add a call, or replace the one with the same rid."""
        self.forget(plan.rid)
        self.plans[plan.rid] = plan
        insort(self.by_start, (plan.started_at, plan.rid))

    def forget(self, rid: int) -> None:
        """Remove a call, if it is there."""
        old = self.plans.pop(rid, None)
        if old is not None:
            del self.by_start[bisect_left(self.by_start, (old.started_at, rid))]

    def pull(self, now: datetime) -> None:
        """Take what has begun from the feed."""
        while self.upcoming is not None and self.feed is not None and self.upcoming.started_at <= now:
            self.put(self.upcoming)
            self.upcoming = next(self.feed, None)

    def between(self, first: datetime, last: datetime, now: datetime) -> list[CallPlan]:
        """The calls of a range, both ends included, that can be seen now; oldest first, as they look now."""
        begin = bisect_left(self.by_start, (first, -1))
        found: list[CallPlan] = []
        for started_at, rid in self.by_start[begin:]:
            if started_at > last:
                break
            plan = self.plans[rid]
            if plan.visible_at <= now:
                found.append(plan)
        return found


class Control(BaseModel):
    """What `POST /_control` takes; all may be left out. `removed` are rids by account."""

    model_config = ConfigDict(extra="forbid")

    accounts: list[str] = Field(default_factory=list)
    calls: list[NewCall] = Field(default_factory=list)
    changes: list[NewChange] = Field(default_factory=list)
    removed: dict[str, list[int]] = Field(default_factory=dict)
    faults: list[Fault] = Field(default_factory=list)
    behave: bool = False


class Switchboard:
    """Accounts by token, each with one handle (organisation, app), what they answer, and how they misbehave."""

    first_rid: int = 211_159

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int | None = None,
        window_s: float = 60.0,
    ) -> None:
        self.clock = clock
        self.limit = limit
        self.window_s = window_s
        self.accounts: dict[str, Account] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[tuple[str, str, int]] = Counter()
        self._windows: dict[str, FixedWindow] = {}
        self._meters: dict[str, Meter] = {}

    # What there is

    def add_account(self, key: str, *, handle: str = "acme") -> Account:
        """Open an account; one that is there already stays as it is."""
        return self.accounts.setdefault(key, Account(key, handle))

    def add_calls(self, key: str, plans: Iterable[CallPlan]) -> None:
        """Add calls, or replace those with the same rid; rows show only when their time has come."""
        for plan in plans:
            self.accounts[key].put(plan)

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
            rid=fields.pop("rid", max(account.plans, default=self.first_rid - 1) + 1),
            started_at=fields.pop("started_at", (ended_at - timedelta(seconds=talk_s)).replace(microsecond=0)),
            ended_at=ended_at,
            visible_at=fields.pop("visible_at", now),
            **fields,
        )
        account.put(plan)
        return plan

    def change(self, key: str, rid: int, fields: Mapping[str, Scalar], *, at: datetime | None = None) -> CallPlan:
        """Let a row show other values from `at` (now) on: those a timeline names, or the row's own columns."""
        account = self.accounts[key]
        plan = account.plans[rid]
        changes = sorted((*plan.changes, Change(at or self.clock(), dict(fields))), key=lambda change: change.at)
        account.plans[rid] = replace(plan, changes=tuple(changes))
        return account.plans[rid]

    def remove(self, key: str, rid: int) -> None:
        """Forget a call."""
        self.accounts[key].forget(rid)

    def visible(self, key: str, now: datetime) -> list[CallPlan]:
        """The ledger: every call that the list would show at `now` to somebody who asks for all, by rid."""
        account = self.accounts[key]
        account.pull(now)
        return sorted((plan for plan in account.plans.values() if plan.visible_at <= now), key=lambda plan: plan.rid)

    # How it behaves

    def misbehave(self, *faults: Fault) -> None:
        """Add faults; of those with `times`, the oldest is used up first."""
        self.faults.extend(faults)

    def behave(self) -> None:
        """Take back all faults."""
        self.faults = []

    def peak(self, key: str) -> int:
        """The most requests with this key in any window of `window_s`, wherever it begins; refused ones count."""
        meter = self._meters.get(key)
        return meter.peak if meter else 0

    # What a provider says in its own way

    def kind_of(self, method: str, path: str) -> str | None:
        """What a request is for; None: nothing is there."""
        raise NotImplementedError

    def refused(self, headers: Mapping[str, str], asked: Asked) -> Answer | None:
        """The refusal of a wrong credential; None: it is right."""
        raise NotImplementedError

    def token_of(self, headers: Mapping[str, str]) -> str:
        """The token that a request carries; empty when it has none."""
        raise NotImplementedError

    def answer(self, account: Account, asked: Asked, now: datetime) -> Answer:
        """The documented answer."""
        raise NotImplementedError

    def too_many(self) -> Answer:
        """The answer to one request too many."""
        raise NotImplementedError

    def garbage_rows(self, now: datetime) -> list[Any]:
        """Rows that no client should believe."""
        raise NotImplementedError

    # Over HTTP

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        """Listen until the block ends; yields the base URL."""
        return listening(self._handle, host=host, port=port, ssl_context=ssl_context)

    async def _handle(self, request: web.BaseRequest, line: Line) -> web.StreamResponse:
        if request.path == "/_control":
            return await self._control(request)
        kind = self.kind_of(request.method, request.path)
        if kind is None:
            return json_response({"message": "Not found"}, status=404)
        key, now = self.token_of(request.headers), self.clock()
        self.requests[key, kind] += 1
        self._meters.setdefault(key, Meter(self.window_s)).hit(now)
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
        base_url = f"{request.scheme}://{request.host}"
        answer = self._answer(request.headers, Asked(kind, request.query, base_url, request.path), key, faults)
        self.statuses[key, kind, answer.status] += 1
        padding = sum(fault.size_bytes for fault in faults if fault.what is Mischief.HUGE)
        date = self.clock().astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        return await _send(request, replace(answer, headers={**answer.headers, "Date": date}), padding)

    def _answer(self, headers: Mapping[str, str], asked: Asked, key: str, faults: Sequence[Fault]) -> Answer:
        now = self.clock()
        for fault in faults:
            match fault.what:
                case Mischief.STATUS:
                    return Answer(fault.status, fault.body or "", headers={"Content-Type": "application/json"})
                case Mischief.PARTIAL:
                    return Answer(206, {"message": "Partial content"})
                case Mischief.NOT_JSON:
                    return Answer(200, "<html><body><h1>It works!</h1></body></html>")
                case _:
                    pass
        if self.limit is not None:
            window = self._windows.setdefault(key, FixedWindow(self.limit, self.window_s))
            window.limit, window.window_s = self.limit, self.window_s
            if not window.hit(now):
                return self.too_many()
        refusal = self.refused(headers, asked)
        if refusal is not None:
            return refusal
        account = self.accounts[key]
        account.pull(now)
        return self._spoilt(self.answer(account, asked, now), faults, now)

    def _spoilt(self, answer: Answer, faults: Sequence[Fault], now: datetime) -> Answer:
        """What the faults about rows make of a good answer."""
        if answer.rows is None or isinstance(answer.body, str):
            return answer
        rows: list[Any] = answer.body[answer.rows]
        for fault in faults:
            if fault.what is Mischief.SHUFFLE:
                rows = random.Random(fault.seed).sample(rows, len(rows))  # noqa: S311  # nothing secret
            if fault.what is Mischief.GARBAGE:
                rows = _mixed(rows, self.garbage_rows(now))
        return replace(answer, body={**answer.body, answer.rows: rows})

    def _take(self, kind: str, key: str) -> list[Fault]:
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

    async def _control(self, request: web.BaseRequest) -> web.Response:
        if request.method == "GET":
            return json_response(self.state())
        try:
            self.obey(Control.model_validate_json(await request.read()))
        except (ValidationError, ValueError, KeyError) as error:
            return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return json_response(self.state())

    def obey(self, wish: Control) -> None:
        """Do what a control message asks, in the order of its fields."""
        for key in wish.accounts:
            self.add_account(key)
        for call in wish.calls:
            self.appear(call.key, **call.model_dump(exclude_none=True, exclude={"key"}))
        for change in wish.changes:
            self.change(change.key, change.rid, change.fields, at=change.at)
        for key, rids in wish.removed.items():
            for rid in rids:
                self.remove(key, rid)
        if wish.behave:
            self.behave()
        self.misbehave(*wish.faults)

    def state(self) -> Json:
        """What `GET /_control` shows: faults, counters, and the calls that have become visible."""
        now = self.clock()
        return {
            "now": instant_text(now),
            "faults": [fault.model_dump(mode="json") for fault in self.faults],
            "accounts": {
                key: {
                    "revoked": account.revoked,
                    "requests": {kind: n for (who, kind), n in sorted(self.requests.items()) if who == key},
                    "statuses": {f"{k} {s}": n for (who, k, s), n in sorted(self.statuses.items()) if who == key},
                    "peak": self.peak(key),
                    "visible": [asdict(plan) for plan in self.visible(key, now)],
                }
                for key, account in self.accounts.items()
            },
        }


def as_it_looks(plan: CallPlan, now: datetime) -> tuple[CallPlan, dict[str, Scalar]]:
    """A call after the changes that have come, and the columns that were changed by their own name."""
    fields: dict[str, Any] = {}
    columns: dict[str, Scalar] = dict(plan.extra)
    for change in plan.changes:
        if change.at <= now:
            for name, value in change.fields.items():
                if name in _NATIVE:
                    fields[_NATIVE[name]] = value
                else:
                    columns[name] = value
    return (replace(plan, **fields) if fields else plan), columns


def international(number: str) -> str:
    """A number of a timeline as E.164: `(202) 555-0100, x3203` is `+12025550100`."""
    digits = "".join(char for char in number.partition(",")[0] if char in "0123456789")
    return f"+1{digits}" if len(digits) == 10 else digits


def instant_text(instant: datetime) -> str:
    """An instant as most providers write it: `2025-07-01T20:54:53.000Z`."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bearer(headers: Mapping[str, str], scheme: str) -> str:
    """The token of an Authorization header of this scheme; empty when it is another one."""
    said, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if said.lower() == scheme.lower() else ""


def _mixed(rows: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Put the others between the rows, one by one."""
    mixed: list[Any] = []
    for index in range(max(len(rows), len(others))):
        mixed += others[index : index + 1]
        mixed += rows[index : index + 1]
    return mixed


async def _send(request: web.BaseRequest, answer: Answer, padding: int) -> web.StreamResponse:
    headers = dict(answer.headers)
    if answer.audio is None and not padding:
        text = isinstance(answer.body, str)
        headers.setdefault("Content-Type", "text/html" if text else "application/json")
        body = answer.body.encode() if isinstance(answer.body, str) else orjson.dumps(answer.body)
        return web.Response(status=answer.status, body=body, headers=headers)
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    blank = b" " * 65_536
    for _ in range(padding // len(blank)):
        await response.write(blank)
    if answer.audio is None:
        await response.write(answer.body.encode() if isinstance(answer.body, str) else orjson.dumps(answer.body))
        return response
    for chunk in answer.audio:
        await response.write(chunk)
    return response
