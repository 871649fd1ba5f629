"""What the simulated providers have in common: accounts, calls that show when their time comes, limits, mischief.

A provider is a subclass that knows its paths, its credentials and its rows; everything else is here. What it answers is
a pure function of its state and an instant (`respond`), so that tests on a virtual clock need no HTTP; `serve` puts the
same answers on the loopback interface.
"""

import asyncio
import random
import ssl
import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, Final, Generic, TypeVar

import orjson
from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from relay.domain.json import Json
from relay.simulator.audio import audio_chunks
from relay.simulator.limits import FixedWindow, Meter
from relay.simulator.loopback import Line, hang_up, json_response, listening
from relay.simulator.timeline import CallPlan, Change, Scalar

UNLIMITED: Final = sys.maxsize
_BLANK: Final = b" " * 65_536
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
    """What can be done to a request instead of, or on top of, answering it as documented.

    From SUCCESS_FALSE on they are for answers that only some providers give, and leave others alone. The last six are
    for streams: each event twice, in tiny pieces, with garbage in front, with a huge event in front, a cut after the
    first event, or an answer that is no stream.
    """

    STATUS = "status"
    HANG = "hang"
    SLOW = "slow"
    DROP = "drop"
    NOT_JSON = "not_json"
    PARTIAL = "partial"
    GARBAGE = "garbage"
    SHUFFLE = "shuffle"
    HUGE = "huge"
    SUCCESS_FALSE = "success_false"
    WRONG_COUNT = "wrong_count"
    NOT_A_LIST = "not_a_list"
    TRUNCATE = "truncate"
    NO_RECORDING = "no_recording"
    DUPLICATE = "duplicate"
    SPLIT = "split"
    BAD_EVENTS = "bad_events"
    HUGE_EVENT = "huge_event"
    CUT = "cut"
    NO_STREAM = "no_stream"


class Fault(BaseModel):
    """One misbehaviour. It hits requests that match `on` and `key` (None: any), `times` of them (None: until told off).

    `status` is for STATUS, and `body` in place of the documented one; `delay_s` is for SLOW, `size_bytes` for HUGE,
    `seed` for SHUFFLE, `share` (of the audio that is sent) for TRUNCATE. The rows of GARBAGE start `at` (when the fault
    was added), so that they are the same in each answer.
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
    share: float = Field(0.5, ge=0, lt=1)
    at: AwareDatetime | None = None

    def hits(self, asked: "Asked") -> bool:
        return self.on in (None, asked.kind) and self.key in (None, asked.key)


Faults = Mapping[Mischief, Fault]
"""The faults that hit a request, one of each sort."""


class CutShort(Exception):
    """The provider ends the connection before all was sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and a body, JSON or text as it is; `rows` names the list in it. `pieces` are sent in its place."""

    status: int
    body: Json | list[Any] | str = ""
    rows: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Callable[[Line], AsyncGenerator[bytes, None]] | None = None

    def encoded(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else orjson.dumps(self.body)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as a provider looks at it; `key` is whose it is, empty when nobody knows."""

    kind: str
    key: str
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    base_url: str = ""
    address: str = ""


@dataclass(slots=True)
class Account:
    """One customer: calls by rid, and in the order of their starts. `handle` is the organisation or app, if any."""

    key: str
    handle: str = "acme"
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


A = TypeVar("A", bound=Account)


class NewAccount(BaseModel):
    """An account of a control message; more fields are those of the provider's accounts."""

    model_config = ConfigDict(extra="allow")

    key: str = Field(min_length=1)
    revoked: bool = False


class NewCall(BaseModel):
    """A call of a control message; what is left out is as `Switchboard.appear` has it."""

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


class Control(BaseModel):
    """What `POST /_control` takes; all may be left out.

    `removed` are rids by account. `behave`: true, or the kinds whose faults are taken back. `spend` are requests by
    account.
    """

    model_config = ConfigDict(extra="forbid")

    accounts: list[NewAccount] = Field(default_factory=list)
    calls: list[NewCall] = Field(default_factory=list)
    changes: list[NewChange] = Field(default_factory=list)
    removed: dict[str, list[int]] = Field(default_factory=dict)
    faults: list[Fault] = Field(default_factory=list)
    behave: bool | list[str] = False
    limit: int | None = Field(None, ge=0)
    window_s: float | None = Field(None, gt=0)
    rate_limit_headers: bool | None = None
    spend: dict[str, int] = Field(default_factory=dict)
    reset_limits: bool = False


class Switchboard(Generic[A]):
    """Accounts by key or token, what they answer, and how they misbehave.

    `clock` is asked when a request comes and when it is answered. `limit`, `window_s` and `rate_limit_headers` (whether
    answers tell what is left) may be changed at any time.
    """

    account_type: type[A]
    first_rid: int = 211_159

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int = UNLIMITED,
        window_s: float = 60.0,
        rate_limit_headers: bool = False,
    ) -> None:
        self.clock = clock
        self.limit = limit
        self.window_s = window_s
        self.rate_limit_headers = rate_limit_headers
        self.accounts: dict[str, A] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[tuple[str, str, int]] = Counter()
        self.agents: set[str] = set()
        self._windows: dict[str, FixedWindow] = {}
        self._meters: dict[str, Meter] = {}

    # What there is

    def add_account(self, key: str, **about: Any) -> A:
        """Open an account, with these of its fields; one that is there already stays as it is."""
        return self.accounts.setdefault(key, self.account_type(key, **about))

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
        self.add_calls(key, [plan])
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
        now = self.clock()
        self.faults.extend(fault if fault.at else fault.model_copy(update={"at": now}) for fault in faults)

    def behave(self, kind: str | None = None) -> None:
        """Take back the faults of a kind of request, or all."""
        self.faults = [fault for fault in self.faults if kind is not None and fault.on != kind]

    def spend(self, key: str, requests: int) -> None:
        """Use up requests of a key's limit, as the customer's own integrations do."""
        for _ in range(requests):
            self._window(key).hit(self.clock())

    def reset_limits(self) -> None:
        """Forget every limiter's window, as a restart of the provider does."""
        self._windows.clear()

    def peak(self, key: str) -> int:
        """The most requests with this key in any window of `window_s`, wherever it begins; refused ones count."""
        meter = self._meters.get(key)
        return meter.peak if meter else 0

    # What a provider says in its own way

    def kind_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        """What a request is for; None: nothing is there."""
        raise NotImplementedError

    def token_of(self, headers: Mapping[str, str]) -> str:
        """The key of the account that a request is for; empty when it names none."""
        raise NotImplementedError

    def refused(self, asked: Asked) -> Answer | None:
        """The refusal of a wrong credential; None: it is right, or none is needed."""
        raise NotImplementedError

    def answer(self, asked: Asked, now: datetime) -> Answer:
        """The documented answer."""
        raise NotImplementedError

    def too_many(self, asked: Asked) -> Answer:
        """The answer to one request too many."""
        return Answer(429, self.error_body(429, self.clock()))

    def error_body(self, status: int, now: datetime) -> Json:
        """What comes with an error status."""
        return {"error": f"HTTP {status}"}

    def garbage_rows(self, asked: Asked, at: datetime) -> list[Any]:
        """Rows that no client should believe; those that have a possible start have `at`."""
        raise NotImplementedError

    def bucket_of(self, asked: Asked) -> str | None:
        """With what a request is counted for the limit; None: with nothing."""
        return asked.key

    def spoilt(self, answer: Answer, asked: Asked, faults: Faults, now: datetime) -> Answer:
        """What faults make of a good answer; those about rows leave other answers alone."""
        if answer.rows is None or not isinstance(answer.body, dict):
            return answer
        rows: list[Any] = answer.body[answer.rows]
        if shuffle := faults.get(Mischief.SHUFFLE):
            rows = random.Random(shuffle.seed).sample(rows, len(rows))  # noqa: S311  # nothing secret
        if garbage := faults.get(Mischief.GARBAGE):
            rows = _mixed(rows, self.garbage_rows(asked, garbage.at or now))
        return replace(answer, body={**answer.body, answer.rows: rows})

    # What it answers: pure but for taking calls from a feed

    def respond(self, asked: Asked, now: datetime, faults: Faults) -> Answer:
        """Answer as it would at `now`, with only the faults that are given."""
        if error := faults.get(Mischief.STATUS):
            body = self.error_body(error.status, now) if error.body is None else error.body
            answer = Answer(error.status, body, headers={"Content-Type": "application/json"})
        elif Mischief.PARTIAL in faults:
            answer = Answer(206, {"message": "Partial content"})
        elif Mischief.NOT_JSON in faults:
            answer = Answer(200, "<html><body><h1>It works!</h1></body></html>")
        else:
            if asked.key in self.accounts:
                self.accounts[asked.key].pull(now)
            refused = self.refused(asked)
            answer = refused or self.spoilt(self.answer(asked, now), asked, faults, now)
        huge = faults.get(Mischief.HUGE)
        if huge is None or answer.pieces is not None:
            return answer
        return replace(answer, pieces=partial(_padded, answer.encoded(), huge.size_bytes))

    # Over HTTP

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        """Listen until the block ends; yields the base URL."""
        return listening(self._handle, host=host, port=port, ssl_context=ssl_context)

    async def _handle(self, request: web.BaseRequest, line: Line) -> web.StreamResponse:
        if request.path == "/_control":
            return await self._control(request)
        kind = self.kind_of(request.method, request.path, request.headers)
        if kind is None:
            return json_response({"error": "Not found"}, status=404)
        asked = Asked(
            kind,
            self.token_of(request.headers),
            path=request.path,
            query=request.query,
            headers=request.headers,
            body=await request.read(),
            base_url=f"{request.scheme}://{request.host}",
            address=request.remote or "",
        )
        refused, headers = self._ingest(asked, self.clock())
        faults = {} if refused else self._take(asked)
        if Mischief.HANG in faults:
            await line.wait(None)
            return await hang_up(request)
        if slow := faults.get(Mischief.SLOW):
            await line.wait(slow.delay_s)
        if Mischief.DROP in faults:
            return await hang_up(request, reset=True)
        answer = refused or self.respond(asked, self.clock(), faults)
        self.statuses[asked.key, kind, answer.status] += 1
        return await _send(request, line, replace(answer, headers={**answer.headers, **headers, **self._date()}))

    def _ingest(self, asked: Asked, now: datetime) -> tuple[Answer | None, Mapping[str, str]]:
        """Count the request and ask the limiter: its refusal, if it refuses, and headers for whatever the answer is."""
        self.requests[asked.key, asked.kind] += 1
        self.agents.add(asked.headers.get("User-Agent", ""))
        self._meters.setdefault(asked.key, Meter(self.window_s)).hit(now)
        bucket = self.bucket_of(asked)
        if bucket is None:
            return None, {}
        window = self._window(bucket)
        refused = None if window.hit(now) else self.too_many(asked)
        return refused, window.headers(now) if self.rate_limit_headers else {}

    def _window(self, bucket: str) -> FixedWindow:
        window = self._windows.setdefault(bucket, FixedWindow(self.limit, self.window_s))
        window.limit, window.window_s = self.limit, self.window_s
        return window

    def told_now(self) -> datetime:
        """What the provider's own clock says."""
        return self.clock()

    def _date(self) -> dict[str, str]:
        return {"Date": self.told_now().astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")}

    def _take(self, asked: Asked) -> dict[Mischief, Fault]:
        """The faults that hit this request, one of each sort, oldest first; those with `times` are used up by it."""
        taken: dict[Mischief, Fault] = {}
        left: list[Fault] = []
        for fault in self.faults:
            if fault.what in taken or not fault.hits(asked):
                left.append(fault)
                continue
            taken[fault.what] = fault
            if fault.times is None:
                left.append(fault)
            elif fault.times > 1:
                left.append(fault.model_copy(update={"times": fault.times - 1}))
        self.faults = left
        return taken

    async def _control(self, request: web.BaseRequest) -> web.Response:
        if request.method != "GET":
            try:
                self.order(await request.read())
            except (ValidationError, ValueError, KeyError, TypeError) as error:
                return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return json_response(self.state())

    def order(self, message: bytes) -> None:
        """Do what a control message asks; raises for one that makes no sense."""
        self.obey(Control.model_validate_json(message))

    def obey(self, wish: Control) -> None:
        """Do what a control message asks, in an order that makes sense."""
        for account in wish.accounts:
            self.add_account(account.key, **(account.model_extra or {})).revoked = account.revoked
        for name in ("limit", "window_s", "rate_limit_headers"):
            value = getattr(wish, name)
            if value is not None:
                setattr(self, name, value)
        for call in wish.calls:
            self.appear(call.key, **call.model_dump(exclude_none=True, exclude={"key"}))
        for change in wish.changes:
            self.change(change.key, change.rid, change.fields, at=change.at)
        for key, rids in wish.removed.items():
            for rid in rids:
                self.remove(key, rid)
        if wish.behave is not False:
            for kind in [None] if wish.behave is True else wish.behave:
                self.behave(kind)
        self.misbehave(*wish.faults)
        for key, requests in wish.spend.items():
            self.spend(key, requests)
        if wish.reset_limits:
            self.reset_limits()

    def state(self) -> Json:
        """What `GET /_control` shows: limits, faults, counters, and the calls that have become visible."""
        now = self.clock()
        return {
            "now": instant_text(now),
            "limit": self.limit,
            "window_s": self.window_s,
            "faults": [fault.model_dump(mode="json") for fault in self.faults],
            "accounts": {
                key: {
                    "revoked": account.revoked,
                    "requests": {str(kind): n for (who, kind), n in sorted(self.requests.items()) if who == key},
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


def recording_of(plan: CallPlan, *, share: float = 1.0) -> Answer:
    """The audio of a call; when a share is all that is sent, the connection ends with it."""
    headers = {
        "Content-Type": "audio/wav",
        "Content-Length": str(plan.recording_bytes),
        "Content-Disposition": f'inline; filename="recording-{plan.rid}.wav"',
    }
    return Answer(200, headers=headers, pieces=partial(_audio, plan, share))


def _mixed(rows: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Put the others between the rows, one by one."""
    mixed: list[Any] = []
    for index in range(max(len(rows), len(others))):
        mixed += others[index : index + 1]
        mixed += rows[index : index + 1]
    return mixed


async def _send(request: web.BaseRequest, line: Line, answer: Answer) -> web.StreamResponse:
    content_type = "text/html" if isinstance(answer.body, str) else "application/json"
    headers = {"Content-Type": content_type, **answer.headers}
    if answer.pieces is None:
        return web.Response(status=answer.status, body=answer.encoded(), headers=headers)
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    try:
        async with aclosing(answer.pieces(line)) as pieces:
            async for piece in pieces:
                await response.write(piece)
    except CutShort:
        return await hang_up(request)
    return response


async def _padded(body: bytes, size_bytes: int, _line: Line) -> AsyncGenerator[bytes, None]:
    """A body behind so much blank."""
    for _ in range(size_bytes // len(_BLANK)):
        yield _BLANK
    yield body


async def _audio(plan: CallPlan, share: float, _line: Line) -> AsyncGenerator[bytes, None]:
    left = int(plan.recording_bytes * share)
    for chunk in audio_chunks(plan.rid, plan.recording_bytes):
        if left <= 0:
            break
        yield chunk[:left]
        left -= len(chunk)
        await asyncio.sleep(0)
    if share < 1:
        raise CutShort
