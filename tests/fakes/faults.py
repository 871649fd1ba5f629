"""Fault injection for a fake provider: what can happen to a request instead of, or on top of, the documented answer."""

import random
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.domain.json import Json
from relay.simulator.provider import A, FakeProvider, FakeRequest, FakeResponse, ProviderControl
from relay.simulator.server import Listener
from relay.simulator.timeline import Scalar
from tests.fakes.wire import CutShort, hang_up

_BLANK = b" " * 65_536


class FaultKind(StrEnum):
    """From SUCCESS_FALSE on they are for answers that only some providers give, and leave others alone.

    The last six are for streams: each event twice, in tiny pieces, after garbage, after a huge event, a cut after the
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
    """One fault. It hits `times` requests (None: all until cleared) that match `on` and `key` (None: any).

    `status` is for STATUS, and `body` replaces the documented one; `delay_s` is for SLOW, `size_bytes` for HUGE,
    `seed` for SHUFFLE, `share` (of the audio that is sent) for TRUNCATE. The rows of GARBAGE start `at` (when the fault
    was injected), so that they are the same in each answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind
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

    def hits(self, request: FakeRequest) -> bool:
        return self.on in (None, request.endpoint) and self.key in (None, request.key)


Faults = Mapping[FaultKind, Fault]
"""The faults that hit one request, at most one of each kind."""


class NewAccount(BaseModel):
    """An account in a control message; further fields are those of the provider's accounts."""

    model_config = ConfigDict(extra="allow")

    key: str = Field(min_length=1)
    revoked: bool = False


class NewChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    rid: int
    fields: dict[str, Scalar]
    at: AwareDatetime | None = None


class FaultControl(ProviderControl):
    """The body of `POST /_control`. `removed` are rids by account; `clear_faults`: true, or endpoints."""

    accounts: list[NewAccount] = Field(default_factory=list)
    changes: list[NewChange] = Field(default_factory=list)
    removed: dict[str, list[int]] = Field(default_factory=dict)
    faults: list[Fault] = Field(default_factory=list)
    clear_faults: bool | list[str] = False


class FaultInjection(FakeProvider[A]):
    """A fake provider whose answers can be made to fail."""

    control_type = FaultControl

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.faults: list[Fault] = []
        self.agents: set[str] = set()

    def inject(self, *faults: Fault) -> None:
        """Add faults; the oldest of a kind is used up first."""
        now = self.clock()
        self.faults.extend(fault if fault.at else fault.model_copy(update={"at": now}) for fault in faults)

    def clear_faults(self, endpoint: str | None = None) -> None:
        """Remove the faults of an endpoint, or all."""
        self.faults = [fault for fault in self.faults if endpoint is not None and fault.on != endpoint]

    def remove(self, key: str, rid: int) -> None:
        """Let the provider forget a call."""
        self.accounts[key].remove(rid)

    # What each kind of provider defines

    @abstractmethod
    def garbage_rows(self, request: FakeRequest, at: datetime) -> list[Any]:
        """Build rows that no client should accept; those with a valid start have `at`."""

    def error_body(self, status: int, now: datetime) -> Json:
        """The documented body of an error status."""
        return {"error": f"HTTP {status}"}

    def provider_now(self) -> datetime:
        """The time by the provider's own clock."""
        return self.clock()

    def spoil(self, response: FakeResponse, request: FakeRequest, faults: Faults, now: datetime) -> FakeResponse:
        """Apply faults to a good response; those about rows leave other responses alone."""
        body = response.body
        if isinstance(body, list):
            return replace(response, body=self._spoil_rows(body, request, faults, now))
        if response.rows is None or not isinstance(body, dict):
            return response
        rows = self._spoil_rows(body[response.rows], request, faults, now)
        return replace(response, body={**body, response.rows: rows})

    def _spoil_rows(self, rows: list[Any], request: FakeRequest, faults: Faults, now: datetime) -> list[Any]:
        if shuffle := faults.get(FaultKind.SHUFFLE):
            rows = random.Random(shuffle.seed).sample(rows, len(rows))
        if garbage := faults.get(FaultKind.GARBAGE):
            rows = _interleaved(rows, self.garbage_rows(request, garbage.at or now))
        return rows

    # Requests

    def respond_with(self, request: FakeRequest, now: datetime, faults: Faults) -> FakeResponse:
        """Answer as at `now`, with exactly these faults."""
        if error := faults.get(FaultKind.STATUS):
            body = self.error_body(error.status, now) if error.body is None else error.body
            response = FakeResponse(error.status, body, headers={"Content-Type": "application/json"})
        elif FaultKind.PARTIAL in faults:
            response = FakeResponse(206, {"message": "Partial content"})
        elif FaultKind.NOT_JSON in faults:
            response = FakeResponse(200, "<html><body><h1>It works!</h1></body></html>")
        else:
            response = self.spoil(self.respond(request, now), request, faults, now)
        huge = faults.get(FaultKind.HUGE)
        if huge is None or response.stream is not None:
            return response
        return replace(response, stream=partial(_padded, response.encoded(), huge.size_bytes))

    async def reply(self, http: web.BaseRequest, request: FakeRequest, listener: Listener) -> web.StreamResponse:
        self.agents.add(request.headers.get("User-Agent", ""))
        faults = self._take_faults(request)
        if FaultKind.HANG in faults:
            await listener.wait(None)
            return await hang_up(http)
        if slow := faults.get(FaultKind.SLOW):
            await listener.wait(slow.delay_s)
        if FaultKind.DROP in faults:
            return await hang_up(http, reset=True)
        return await self.send(http, request, self.respond_with(request, self.clock(), faults), listener)

    async def send(
        self, http: web.BaseRequest, request: FakeRequest, response: FakeResponse, listener: Listener
    ) -> web.StreamResponse:
        response = replace(response, headers={**response.headers, **self.response_headers(request)})
        try:
            return await super().send(http, request, response, listener)
        except CutShort:
            return await hang_up(http)

    def response_headers(self, request: FakeRequest) -> dict[str, str]:
        """Headers of every response."""
        return self.date_header()

    def date_header(self) -> dict[str, str]:
        return {"Date": self.provider_now().astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")}

    def _take_faults(self, request: FakeRequest) -> dict[FaultKind, Fault]:
        """Take the faults that hit this request, the oldest of each kind, and count them down."""
        taken: dict[FaultKind, Fault] = {}
        left: list[Fault] = []
        for fault in self.faults:
            if fault.kind in taken or not fault.hits(request):
                left.append(fault)
                continue
            taken[fault.kind] = fault
            if fault.times is None:
                left.append(fault)
            elif fault.times > 1:
                left.append(fault.model_copy(update={"times": fault.times - 1}))
        self.faults = left
        return taken

    # Control

    def control(self, message: Any) -> None:
        for account in message.accounts:
            self.add_account(account.key, **(account.model_extra or {})).revoked = account.revoked
        super().control(message)
        for change in message.changes:
            self.change(change.key, change.rid, change.fields, at=change.at)
        for key, rids in message.removed.items():
            for rid in rids:
                self.remove(key, rid)
        if message.clear_faults is not False:
            for endpoint in [None] if message.clear_faults is True else message.clear_faults:
                self.clear_faults(endpoint)
        self.inject(*message.faults)

    def state(self) -> Json:
        return super().state() | {"faults": [fault.model_dump(mode="json") for fault in self.faults]}


def _interleaved(rows: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    mixed: list[Any] = []
    for index in range(max(len(rows), len(others))):
        mixed += others[index : index + 1]
        mixed += rows[index : index + 1]
    return mixed


async def _padded(body: bytes, size_bytes: int, _listener: Listener) -> AsyncGenerator[bytes, None]:
    """A body after so many bytes of whitespace."""
    for _ in range(size_bytes // len(_BLANK)):
        yield _BLANK
    yield body
