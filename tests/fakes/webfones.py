"""A WebFones that can fail, and whose undocumented behaviour can be chosen."""

import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from relay.domain.json import Json
from relay.simulator.audio import audio_chunks
from relay.simulator.provider import FakeRequest, FakeResponse, instant_text
from relay.simulator.server import Listener
from relay.simulator.timeline import CallPlan
from relay.simulator.webfones import (
    TIMESTAMP_FORMAT,
    FakeWebFones,
    WebFonesAccount,
    WebFonesEndpoint,
    normalised,
    parse_timestamp,
)
from tests.fakes.faults import Fault, FaultControl, FaultInjection, FaultKind, Faults
from tests.fakes.wire import CutShort

_NO_RECORDING = FakeResponse(404, {"error": "No recording available"})
_ERRORS: dict[int, Json] = {
    401: {"error": "Missing API key"},
    403: {"error": "Invalid API key"},
    429: {"error": "Too many requests for this API key, please try again later."},
    502: {"error": "Failed to fetch recording"},
    503: {"error": "Contacts service unavailable", "message": "The contacts service is currently unreachable."},
}


class NewContact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: str
    fields: dict[str, Any]


class WebFonesControl(FaultControl):
    """What `POST /_control` takes besides. `spend` are requests by key."""

    contacts: list[NewContact] = Field(default_factory=list)
    limit: int | None = Field(None, ge=0)
    spend: dict[str, int] = Field(default_factory=dict)
    reset_limits: bool = False


@dataclass(slots=True)
class Meter:
    """Counts requests, and the most that any window of `window_s`, wherever it begins, has seen."""

    window_s: float
    peak: int = 0
    recent: deque[datetime] = field(default_factory=deque)

    def hit(self, now: datetime) -> None:
        self.recent.append(now)
        while (now - self.recent[0]).total_seconds() >= self.window_s:
            self.recent.popleft()
        self.peak = max(self.peak, len(self.recent))


class FaultyWebFones(FaultInjection[WebFonesAccount], FakeWebFones):
    """`inclusive`: whether the list shows rows of the very second that is asked for. `reply_keys`: how a contact search
    writes the numbers. `clock_skew_s`: how far the provider's clock is ahead, in row times and the `Date` header.
    `rate_limit_headers`: whether responses say what is left of the limit.
    """

    control_type = WebFonesControl

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inclusive = False
        self.reply_keys: Literal["requested", "normalised"] = "normalised"
        self.clock_skew_s = 0.0
        self.rate_limit_headers = False
        self._meters: dict[str, Meter] = {}
        self._deleted: dict[str, list[Json]] = {}

    def records(self, key: str, timestamp: str, now: datetime, *, faults: Sequence[Fault] = ()) -> FakeResponse:
        """Answer the call list as it would be at `now`, with exactly these faults."""
        request = FakeRequest(WebFonesEndpoint.RECORDS, key, query={"timestamp": timestamp})
        return self.respond_with(request, now, {fault.kind: fault for fault in faults})

    def delete_contact(self, key: str, contact_uuid: str) -> None:
        account = self.accounts[key]
        del account.contacts[contact_uuid]
        account.version += 1
        entry = {"uuid": contact_uuid, "version": account.version, "deleted_at": instant_text(self.clock())}
        self._deleted.setdefault(key, []).append(entry)

    # Limits

    def over_limit(self, request: FakeRequest, now: datetime) -> FakeResponse | None:
        self._meters.setdefault(request.key, Meter(self.window_s)).hit(now)
        return super().over_limit(request, now)

    def spend(self, key: str, requests: int) -> None:
        """Use up requests of a key's limit, as the customer's own integrations do."""
        for _ in range(requests):
            self.use(key, self.clock())

    def reset_limits(self) -> None:
        """Forget every limiter's window, as a restart of the provider does."""
        self.windows.clear()

    def peak(self, key: str) -> int:
        """The most requests with this key in any window of `window_s`, wherever it begins; refused ones count."""
        meter = self._meters.get(key)
        return meter.peak if meter else 0

    def response_headers(self, request: FakeRequest) -> dict[str, str]:
        headers = super().response_headers(request)
        window = self.windows.get(self.bucket_of(request) or "")
        if not self.rate_limit_headers or window is None:
            return headers
        elapsed_s = (self.clock() - window.opened_at).total_seconds()
        reset_s = str(max(0, math.ceil(self.window_s - elapsed_s)))
        return {
            **headers,
            "RateLimit-Policy": f"{self.limit};w={self.window_s:.0f}",
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(max(0, self.limit - window.used)),
            "RateLimit-Reset": reset_s,
            **({"Retry-After": reset_s} if window.used > self.limit else {}),
        }

    # Answers

    def row_time(self, account: WebFonesAccount, instant: datetime) -> str:
        return super().row_time(account, instant + timedelta(seconds=self.clock_skew_s))

    def is_after(self, row_time: str, timestamp: str) -> bool:
        return super().is_after(row_time, timestamp) or (self.inclusive and row_time == timestamp)

    def provider_now(self) -> datetime:
        return self.clock() + timedelta(seconds=self.clock_skew_s)

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        response = super().answer(request, now)
        if not isinstance(response.body, dict) or response.status != 200:
            return response
        match request.endpoint:
            case WebFonesEndpoint.SEARCH if self.reply_keys == "requested":
                numbers = orjson.loads(request.body)["phone_numbers"]
                return replace(response, body={number: response.body[normalised(number)] for number in numbers})
            case WebFonesEndpoint.CHANGES:
                version = int(request.path.rpartition("/")[2])
                deleted = [entry for entry in self._deleted.get(request.key, ()) if entry["version"] > version]
                return replace(response, body={**response.body, "deleted": deleted})
            case _:
                return response

    def error_body(self, status: int, now: datetime) -> Json:
        if status == 500:
            message = "An unexpected error occurred"
            return {"error": "Internal server error", "message": message, "timestamp": instant_text(now)}
        return _ERRORS.get(status) or super().error_body(status, now)

    def garbage_rows(self, request: FakeRequest, at: datetime) -> list[Any]:
        text = self.row_time(self.accounts[request.key], at)
        since = parse_timestamp(request.query["timestamp"]).strftime(TIMESTAMP_FORMAT)
        return [*invalid_rows(text), *(unusual_rows(text) if text > since else ())]

    def spoil(self, response: FakeResponse, request: FakeRequest, faults: Faults, now: datetime) -> FakeResponse:
        if response.stream is not None and FaultKind.NO_RECORDING in faults:
            return _NO_RECORDING
        if response.stream is not None and (truncate := faults.get(FaultKind.TRUNCATE)):
            plan = self.accounts[request.key].plans[int(request.path.rpartition("/")[2])]
            return replace(response, stream=partial(_truncated_audio, plan, truncate.share))
        spoiled = super().spoil(response, request, faults, now)
        if spoiled.rows is None or not isinstance(spoiled.body, dict):
            return spoiled
        success = FaultKind.SUCCESS_FALSE not in faults
        rows = spoiled.body["records"] if success else []
        count = len(rows) + (FaultKind.WRONG_COUNT in faults)
        return replace(spoiled, body={"success": success, "count": count, "records": rows})

    # Control

    def control(self, message: Any) -> None:
        super().control(message)
        if message.limit is not None:
            self.limit = message.limit
        for contact in message.contacts:
            self.put_contact(contact.key, **contact.fields)
        for key, requests in message.spend.items():
            self.spend(key, requests)
        if message.reset_limits:
            self.reset_limits()


async def _truncated_audio(plan: CallPlan, share: float, _listener: Listener) -> AsyncGenerator[bytes, None]:
    left = int(plan.recording_bytes * share)
    for chunk in audio_chunks(plan.rid, plan.recording_bytes):
        if left <= 0:
            break
        yield chunk[:left]
        left -= len(chunk)
    raise CutShort


def invalid_rows(row_time: str) -> list[Any]:
    """Rows that no client should accept; `row_time` is the start of those that have a valid one."""
    valid: Json = {
        "rid": 900_000_001,
        "call_timestamp": row_time,
        "cidname_outside": "GARBAGE",
        "cidext_inside": "3299",
        "direction": "INCOMING",
        "cidnumber_outside": "(202) 555-0199",
        "cidnumber_inside": "(202) 555-0100, x3299",
        "disposition": "NO ANSWER",
    }
    without_rid = {name: value for name, value in valid.items() if name != "rid"}
    return [
        without_rid,
        {**valid, "rid": None},
        {**valid, "rid": "not a number"},
        {**valid, "rid": 900_000_002, "call_timestamp": "2025-02-30 25:61:00"},
        {**valid, "rid": 900_000_003, "call_timestamp": None},
        {**valid, "rid": 900_000_004, "call_timestamp": "0000-00-00 00:00:00"},
        "a row that is text",
        None,
        ["a", "list"],
    ]


def unusual_rows(row_time: str) -> list[Any]:
    """Rows in unusual form that a client has to normalise, each with a rid of its own."""
    valid = {"call_timestamp": row_time, "direction": "INCOMING", "disposition": "NO ANSWER", "cidext_inside": "3298"}
    return [
        {**valid, "rid": "900000101", "cidname_outside": "RID AS TEXT", "cidnumber_outside": "(202) 555-0101"},
        {**valid, "rid": 900_000_102, "cidname_outside": "N" * 100_000, "cidnumber_outside": "(202) 555-0102"},
        {**valid, "rid": 900_000_103, "cidname_outside": "☎️ Zoë 🦊", "cidnumber_outside": "☎"},
        {**valid, "rid": 900_000_104, "cidname_outside": None, "cidnumber_outside": None, "cidext_inside": None},
        {**valid, "rid": 900_000_105, "cidname_outside": "NUMBER", "cidnumber_outside": 2025550105, "cidext_inside": 7},
    ]
