"""What the fake providers share: accounts, calls that become visible in time, request counters, HTTP and `/_control`.

A provider is a subclass that knows its paths, credentials and rows. What it answers is a function of its state and an
instant (`respond`), so tests with a manual clock need no HTTP; `serve` puts the same answers on the loopback interface.
"""

import asyncio
import ssl
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar, Final, Generic, TypeVar

import orjson
from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from relay.domain.json import Json
from relay.simulator.audio import audio_chunks
from relay.simulator.server import Listener, json_response, listen
from relay.simulator.timeline import CallPlan, Change, Scalar

_FIRST_RID: Final = 211_159
# Timelines name what changes by WebFones' columns; these are the fields of `CallPlan` behind them.
_PLAN_FIELDS: Final = {
    "cidname_outside": "outside_name",
    "cidnumber_outside": "outside_number",
    "cidnumber_inside": "inside_number",
    "cidext_inside": "extension",
    "direction": "direction",
    "disposition": "disposition",
}

Stream = Callable[[Listener], AsyncGenerator[bytes, None]]


@dataclass(frozen=True, slots=True)
class FakeRequest:
    """A request to a provider; `key` is the account's, empty when the credential belongs to none."""

    endpoint: str
    key: str
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    base_url: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True)
class FakeResponse:
    """A status and a JSON or text body. `rows` names the list in an object; `stream` is sent instead of a body."""

    status: int
    body: Json | list[Any] | str = ""
    rows: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Stream | None = None

    def encoded(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else orjson.dumps(self.body)


@dataclass(slots=True)
class Account:
    """One customer: calls by rid, and in order of their starts. `handle` is the organisation or app, if any."""

    key: str
    handle: str = "acme"
    revoked: bool = False
    plans: dict[int, CallPlan] = field(default_factory=dict)
    by_start: list[tuple[datetime, int]] = field(default_factory=list)
    feed: Iterator[CallPlan] = field(default_factory=lambda: iter(()))
    upcoming: CallPlan | None = None

    def put(self, plan: CallPlan) -> None:
        self.remove(plan.rid)
        self.plans[plan.rid] = plan
        insort(self.by_start, (plan.started_at, plan.rid))

    def remove(self, rid: int) -> None:
        old = self.plans.pop(rid, None)
        if old is not None:
            del self.by_start[bisect_left(self.by_start, (old.started_at, rid))]

    def pull(self, now: datetime) -> None:
        while self.upcoming is not None and self.upcoming.started_at <= now:
            self.put(self.upcoming)
            self.upcoming = next(self.feed, None)

    def between(self, first: datetime, last: datetime, now: datetime) -> list[CallPlan]:
        """The calls that started from `first` to `last`, both included, and are visible now; oldest first."""
        plans: list[CallPlan] = []
        for started_at, rid in self.by_start[bisect_left(self.by_start, (first, -1)) :]:
            if started_at > last:
                break
            if self.plans[rid].visible_at <= now:
                plans.append(self.plans[rid])
        return plans


A = TypeVar("A", bound=Account)


class NewCall(BaseModel):
    """A call in a control message; what is left out is as in `FakeProvider.appear`."""

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


class ProviderControl(BaseModel):
    """The body of `POST /_control`: calls that appear now."""

    model_config = ConfigDict(extra="forbid")

    calls: list[NewCall] = Field(default_factory=list)


class FakeProvider(ABC, Generic[A]):
    """Accounts by API key or token, and what is answered about them.

    `clock` is read when a request arrives and again when it is answered. `requests` counts by (key, endpoint),
    `statuses` by (key, endpoint, status).
    """

    name: ClassVar[str]
    account_type: ClassVar[type[Any]] = Account
    control_type: ClassVar[type[ProviderControl]] = ProviderControl
    base_path: ClassVar[str] = ""
    list_endpoint: ClassVar[str]
    has_recordings: ClassVar[bool] = False

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.clock = clock
        self.accounts: dict[str, A] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[tuple[str, str, int]] = Counter()

    # Accounts and calls

    def add_account(self, key: str, **fields: Any) -> A:
        return self.accounts.setdefault(key, self.account_type(key, **fields))

    def add_calls(self, key: str, plans: Iterable[CallPlan]) -> None:
        """Add calls, or replace those with the same rid; each is listed from its `visible_at` on."""
        for plan in plans:
            self.accounts[key].put(plan)

    def feed(self, key: str, plans: Iterator[CallPlan]) -> None:
        """Take calls from an endless iterator, in order of their start, when their time comes."""
        account = self.accounts[key]
        account.feed, account.upcoming = plans, next(plans, None)

    def appear(self, key: str, *, now: datetime | None = None, talk_s: float = 30.0, **fields: Any) -> CallPlan:
        """Add a call that ended now and is visible at once; `fields` are those of `CallPlan`."""
        now = now or self.clock()
        ended_at = fields.pop("ended_at", now)
        plan = CallPlan(
            rid=fields.pop("rid", max(self.accounts[key].plans, default=_FIRST_RID - 1) + 1),
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

    def visible(self, key: str, now: datetime) -> list[CallPlan]:
        """Every call that an unfiltered list would show at `now`, by rid."""
        account = self.accounts[key]
        account.pull(now)
        return sorted((plan for plan in account.plans.values() if plan.visible_at <= now), key=lambda plan: plan.rid)

    # What each kind of provider defines

    @abstractmethod
    def endpoint_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        """Name the endpoint that a request is for, or None: 404."""

    @abstractmethod
    def token_of(self, headers: Mapping[str, str]) -> str:
        """Read the key of the account that a request is for; empty when it names none."""

    @abstractmethod
    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        """Refuse a wrong credential; None when it is right or none is needed."""

    @abstractmethod
    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        """Answer as the provider's document says."""

    @abstractmethod
    def call_id(self, key: str, plan: CallPlan) -> str:
        """Name a call as its row does. No two providers name calls alike, so one subscriber tells them apart."""

    @abstractmethod
    def source_options(self, key: str) -> Json:
        """Build the options of a relay source that reads this account, without its URL."""

    def over_limit(self, request: FakeRequest, now: datetime) -> FakeResponse | None:
        """Count a request against the provider's rate limit; the refusal, when it exceeds it."""
        return None

    # Requests

    def respond(self, request: FakeRequest, now: datetime) -> FakeResponse:
        if request.key in self.accounts:
            self.accounts[request.key].pull(now)
        return self.refuse(request) or self.answer(request, now)

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        """Listen until the block ends; yields the base URL."""
        return listen(self.handle, host=host, port=port, ssl_context=ssl_context)

    async def handle(self, http: web.BaseRequest, listener: Listener) -> web.StreamResponse:
        if http.path == "/_control":
            return await self._control(http)
        endpoint = self.endpoint_of(http.method, http.path, http.headers)
        if endpoint is None:
            return json_response({"error": "Not found"}, status=404)
        request = FakeRequest(
            endpoint,
            self.token_of(http.headers),
            path=http.path,
            query=http.query,
            headers=http.headers,
            body=await http.read(),
            base_url=f"{http.scheme}://{http.host}",
            address=http.remote or "",
        )
        self.requests[request.key, endpoint] += 1
        refusal = self.over_limit(request, self.clock())
        if refusal is not None:
            return await self.send(http, request, refusal, listener)
        return await self.reply(http, request, listener)

    async def reply(self, http: web.BaseRequest, request: FakeRequest, listener: Listener) -> web.StreamResponse:
        return await self.send(http, request, self.respond(request, self.clock()), listener)

    async def send(
        self, http: web.BaseRequest, request: FakeRequest, response: FakeResponse, listener: Listener
    ) -> web.StreamResponse:
        self.statuses[request.key, request.endpoint, response.status] += 1
        content_type = "text/html" if isinstance(response.body, str) else "application/json"
        headers = {"Content-Type": content_type, **response.headers}
        if response.stream is None:
            return web.Response(status=response.status, body=response.encoded(), headers=headers)
        streamed = web.StreamResponse(status=response.status, headers=headers)
        await streamed.prepare(http)
        async with aclosing(response.stream(listener)) as chunks:
            async for chunk in chunks:
                await streamed.write(chunk)
        return streamed

    # Control

    async def _control(self, http: web.BaseRequest) -> web.Response:
        if http.method != "GET":
            try:
                self.control(self.control_type.model_validate_json(await http.read()))
            except (ValidationError, ValueError, KeyError, TypeError) as error:
                return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return json_response(self.state())

    def control(self, message: Any) -> None:
        """Apply a message of `control_type`; raises ValueError, KeyError or TypeError for one that makes no sense."""
        for call in message.calls:
            self.appear(call.key, **call.model_dump(exclude_none=True, exclude={"key"}))

    def state(self) -> Json:
        """What `/_control` answers: by account the requests, their statuses, and the calls that are visible."""
        now = self.clock()
        return {
            "now": instant_text(now),
            "accounts": {
                key: {
                    "revoked": account.revoked,
                    "requests": {str(name): n for (owner, name), n in sorted(self.requests.items()) if owner == key},
                    "statuses": {
                        f"{name} {status}": n
                        for (owner, name, status), n in sorted(self.statuses.items())
                        if owner == key
                    },
                    "visible": [asdict(plan) for plan in self.visible(key, now)],
                }
                for key, account in self.accounts.items()
            },
        }


def shown_at(plan: CallPlan, now: datetime) -> tuple[CallPlan, dict[str, Scalar]]:
    """A call after the changes that have come by `now`, and the columns that were changed by the row's own names."""
    fields: dict[str, Any] = {}
    columns: dict[str, Scalar] = dict(plan.extra)
    for change in plan.changes:
        if change.at <= now:
            for name, value in change.fields.items():
                if name in _PLAN_FIELDS:
                    fields[_PLAN_FIELDS[name]] = value
                else:
                    columns[name] = value
    return (replace(plan, **fields) if fields else plan), columns


def international(number: str) -> str:
    """Write a timeline's number as E.164: `(202) 555-0100, x3203` is `+12025550100`."""
    digits = "".join(char for char in number.partition(",")[0] if char in "0123456789")
    return f"+1{digits}" if len(digits) == 10 else digits


def instant_text(instant: datetime) -> str:
    """Write an instant as most providers do: `2025-07-01T20:54:53.000Z`."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def authorization(headers: Mapping[str, str], scheme: str) -> str:
    """The token of an Authorization header with this scheme; empty when there is none."""
    sent_scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if sent_scheme.lower() == scheme.lower() else ""


def recording_response(plan: CallPlan) -> FakeResponse:
    headers = {
        "Content-Type": "audio/wav",
        "Content-Length": str(plan.recording_bytes),
        "Content-Disposition": f'inline; filename="recording-{plan.rid}.wav"',
    }
    return FakeResponse(200, headers=headers, stream=partial(_audio, plan))


async def _audio(plan: CallPlan, _listener: Listener) -> AsyncGenerator[bytes, None]:
    for chunk in audio_chunks(plan.rid, plan.recording_bytes):
        yield chunk
        await asyncio.sleep(0)
