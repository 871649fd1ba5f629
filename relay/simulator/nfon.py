"""An NFON as its Call History document describes it: a list, details, and a stream of new and changed records."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

import orjson

from relay.domain.json import Json
from relay.simulator.provider import Account, FakeProvider, FakeRequest, FakeResponse, authorization, shown_at
from relay.simulator.server import Listener
from relay.simulator.timeline import CallPlan, Scalar

_TICK_S = 0.02
_STATUSES = {"ANSWERED": "answered", "NO ANSWER": "missed", "BUSY": "busy", "FAILED": "unknown"}
_TRANSCRIBED_AT = "transcribed_at"


class NfonEndpoint(StrEnum):
    RECORDS = "records"
    DETAILS = "details"
    STREAM = "stream"


@dataclass(slots=True)
class NfonAccount(Account):
    """One user's call history; `key` is the access token that reads it."""

    customer: str = "K9999"
    extension: str = "1001"


class FakeNfon(FakeProvider[NfonAccount]):
    name = "nfon"
    account_type = NfonAccount
    list_endpoint = NfonEndpoint.RECORDS
    default_limit = 25
    max_limit = 1000
    heartbeat_s: float | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wake_ups: set[asyncio.Event] = set()

    def add_calls(self, key: str, plans: Iterable[CallPlan]) -> None:
        super().add_calls(key, plans)
        self.wake_streams()

    def change(self, key: str, rid: int, fields: Mapping[str, Scalar], *, at: datetime | None = None) -> CallPlan:
        plan = super().change(key, rid, fields, at=at)
        self.wake_streams()
        return plan

    def transcribe(self, key: str, rid: int, *, summary: str = "They agreed.", words: str = "Hello. Yes.") -> None:
        self.change(key, rid, {_TRANSCRIBED_AT: _text(self.clock()), "summary": summary, "words": words})

    def uuid_of(self, key: str, rid: int) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"nfon/{key}/{rid}"))

    def call_id(self, key: str, plan: CallPlan) -> str:
        return self.uuid_of(key, plan.rid)

    def source_options(self, key: str) -> Json:
        return {"token": key}

    def endpoint_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        if method != "GET":
            return None
        if path == "/records":
            wants_stream = "text/event-stream" in headers.get("Accept", "")
            return NfonEndpoint.STREAM if wants_stream else NfonEndpoint.RECORDS
        return NfonEndpoint.DETAILS if path.startswith("/records/") else None

    def token_of(self, headers: Mapping[str, str]) -> str:
        token = authorization(headers, "Bearer")
        return token if token in self.accounts else ""

    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        if request.key and not self.accounts[request.key].revoked:
            return None
        return FakeResponse(401, {"error": "invalid token"})

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        match request.endpoint:
            case NfonEndpoint.STREAM:
                headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
                return FakeResponse(200, headers=headers, stream=partial(self.events, request))
            case NfonEndpoint.DETAILS:
                return self._details(request, now)
            case _:
                try:
                    return FakeResponse(200, self.records(request.key, request.query, now))
                except ValueError:
                    return FakeResponse(400, {"error": "invalid parameter"})

    def records(self, key: str, query: Mapping[str, str], now: datetime) -> list[Json]:
        """List as `GET /records` does; raises ValueError for parameters that make no sense."""
        account = self.accounts[key]
        own = account.customer, account.extension
        if (query.get("customer", own[0]), query.get("extension", own[1])) != own:
            return []
        since, until = float(query.get("from", "-inf")), float(query.get("to", "inf"))
        limit, offset = int(query.get("limit", "0")), int(query.get("offset", "0"))
        sort = query.get("sort", "desc")
        if limit < 0 or offset < 0 or sort not in ("asc", "desc"):
            raise ValueError("bad parameter")
        plans = [plan for plan in self.visible(key, now) if since < plan.started_at.timestamp() < until]
        plans.sort(key=lambda plan: (plan.started_at, plan.rid), reverse=sort == "desc")
        page_size = min(limit or self.default_limit, self.max_limit)
        return [self.row(account, plan, now) for plan in plans[offset : offset + page_size]]

    def row(self, account: NfonAccount, plan: CallPlan, now: datetime, *, complete: bool = False) -> Json:
        shown, columns = shown_at(plan, now)
        outbound = shown.direction == "OUTGOING"
        user = {"name": "Alice", "number": account.extension, "context": account.customer}
        other = {
            "name": shown.outside_name,
            "number": "1" + "".join(char for char in plan.outside_number if char.isdigit()),
            "context": "global",
        }
        status = _STATUSES.get(shown.disposition, "unknown")
        row: Json = {
            "uuid": self.uuid_of(account.key, plan.rid),
            "duration": int((plan.ended_at - plan.started_at).total_seconds()) if plan.answered else 0,
            "direction": "outbound" if outbound else "inbound",
            "caller": user if outbound else other,
            "callee": other if outbound else user,
            "status": "cancelled" if outbound and status == "missed" else status,
            "created": _text(plan.started_at),
            "call_id": f"call-{plan.rid}",
            "customer": account.customer,
            "extension": account.extension,
            "user_uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, account.key)),
        }
        summary, words = columns.pop("summary", ""), columns.pop("words", "")
        if columns.pop(_TRANSCRIBED_AT, None):
            row["transcription"] = {"available": True}
            if complete:
                row["transcription"] |= {"summary": summary, "transcript": [{"speaker": "Alice", "text": words}]}
        changed_at = [change.at for change in plan.changes if change.at <= now]
        if changed_at:
            row["updated"] = _text(changed_at[-1])
        return {**row, **columns}

    async def events(self, request: FakeRequest, listener: Listener) -> AsyncGenerator[bytes, None]:
        """Stream a chunk per event: a record, each time that something about its call becomes visible."""
        wake_up = asyncio.Event()
        self._wake_ups.add(wake_up)
        number, quiet_s, looked_at = 0, 0.0, self.clock()
        rows = self.replayed(request.key, looked_at)
        try:
            while not listener.closing.is_set() and self.may_stream(request):
                for row in rows:
                    yield b"id: %d\ndata: %s\n\n" % (number, orjson.dumps(row))
                    number += 1
                if self.heartbeat_s is not None and quiet_s >= self.heartbeat_s:
                    yield b": heartbeat\n\n"
                    quiet_s = 0.0
                # A call becomes visible by the clock alone, so a tick looks for it when no change wakes the stream.
                try:
                    async with asyncio.timeout(_TICK_S):
                        await wake_up.wait()
                except TimeoutError:
                    quiet_s += _TICK_S
                wake_up.clear()
                now = self.clock()
                rows, looked_at = self._changed(request.key, looked_at, now), now
        finally:
            self._wake_ups.discard(wake_up)

    def replayed(self, key: str, now: datetime) -> list[Json]:
        """The records that a new stream starts with. The document promises none."""
        return []

    def may_stream(self, request: FakeRequest) -> bool:
        return not self.accounts[request.key].revoked

    def wake_streams(self) -> None:
        for wake_up in self._wake_ups:
            wake_up.set()

    def _details(self, request: FakeRequest, now: datetime) -> FakeResponse:
        uuid_text = request.path.removeprefix("/records/")
        for plan in self.visible(request.key, now):
            if self.uuid_of(request.key, plan.rid) == uuid_text:
                return FakeResponse(200, self.row(self.accounts[request.key], plan, now, complete=True))
        return FakeResponse(404, {"error": "record not found"})

    def _changed(self, key: str, after: datetime, until: datetime) -> list[Json]:
        plans = [
            plan
            for plan in self.visible(key, until)
            if any(after < at <= until for at in (plan.visible_at, *(change.at for change in plan.changes)))
        ]
        return [self.row(self.accounts[key], plan, until) for plan in plans]


def _text(instant: datetime) -> str:
    utc = instant.astimezone(UTC)
    return utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds").replace("+00:00", "Z")
