"""A CINNOX as its documents describe it: the same calls in two lists, and their recordings."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from relay.domain.json import Json
from relay.simulator.provider import (
    Account,
    FakeProvider,
    FakeRequest,
    FakeResponse,
    authorization,
    instant_text,
    international,
    recording_response,
    shown_at,
)
from relay.simulator.timeline import CallPlan

DETAIL: Final = "call-detail"
LOG: Final = "call-log"
CONFERENCES: Final = "conference-detail"
RECORDING: Final = "recording-file"
# How this fake offers Get Recording File; CINNOX's own path is not confirmed.
RECORDING_PATH: Final = "/v1/api/apps/{app_id}/data/recording-file?callID={call_id}"

_MAX_LIMIT: Final = 500
_STATUSES = {
    "ANSWERED": ("Call Ended", "hang up"),
    "NO ANSWER": ("Not Answered", "no answer"),
    "BUSY": ("Busy", "busy"),
    "FAILED": ("Call Failed", "congestion"),
}
_DIRECTIONS = {"INCOMING": "inbound", "OUTGOING": "outbound"}


class FakeCinnox(FakeProvider[Account]):
    """Tenants by token; the account's handle is the App ID."""

    name = "cinnox"
    list_endpoint = LOG
    has_recordings = True

    def call_id(self, key: str, plan: CallPlan) -> str:
        return hid(plan)

    def source_options(self, key: str) -> Json:
        return {
            "app_id": self.accounts[key].handle,
            "token": key,
            # The pages of the real list may shift while they are read, so its newest calls wait; these pages do not.
            "settle_s": 0,
            "recordings": True,
            "recording_path": RECORDING_PATH,
        }

    def endpoint_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        prefix, _, endpoint = path.rpartition("/")
        is_api = method == "GET" and prefix.startswith("/v1/api/apps/") and prefix.endswith("/data")
        return endpoint if is_api and endpoint in (DETAIL, LOG, CONFERENCES, RECORDING) else None

    def token_of(self, headers: Mapping[str, str]) -> str:
        return authorization(headers, "Bearer")

    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        account = self.accounts.get(request.key)
        if account is None or account.revoked:
            return FakeResponse(401, {"code": 6450003, "message": "unauthorized"})
        app_id = request.path.split("/")[4]
        return None if app_id == account.handle else FakeResponse(403, {"code": 6450004, "message": "app not allowed"})

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        account = self.accounts[request.key]
        if request.endpoint == RECORDING:
            return _recording(account, request.query, now)
        start, end = request.query.get("startAt"), request.query.get("endAt")
        if bool(start) != bool(end):
            return bad_request("missing one of startAt, endAt")
        try:
            first = _parse_instant(start) if start else datetime(2000, 1, 1, tzinfo=UTC)
            last = _parse_instant(end) if end else now
            offset, limit = int(request.query.get("offset", "0")), int(request.query.get("limit", "20"))
        except ValueError:
            return bad_request("invalid parameter")
        if offset < 0 or limit < 0:
            return bad_request("negative offset" if offset < 0 else "negative limit")
        if limit > _MAX_LIMIT:
            return bad_request(f"exceed maximum limit {_MAX_LIMIT}")
        if last < first:
            return bad_request("endAt is prior to startAt")
        rows = self.rows(account, request.endpoint, account.between(first, last, now), now)
        return FakeResponse(200, {"code": 0, "result": rows[offset : offset + limit]}, rows="result")

    def rows(self, account: Account, endpoint: str, plans: Sequence[CallPlan], now: datetime) -> list[Json]:
        if endpoint == CONFERENCES:
            return []
        write = detail_row if endpoint == DETAIL else log_row
        return [{**write(shown), **columns} for shown, columns in (shown_at(plan, now) for plan in plans)]


def hid(plan: CallPlan) -> str:
    return f"hid-{plan.rid}"


def call_id(plan: CallPlan) -> str:
    return f"call-{plan.rid}"


def _recording(account: Account, query: Mapping[str, str], now: datetime) -> FakeResponse:
    if not query.get("callID"):
        return bad_request("callID or conferenceID is required")
    plan = next((plan for plan in account.plans.values() if call_id(plan) == query["callID"]), None)
    if plan is None or plan.recording_at is None or plan.recording_at > now:
        return FakeResponse(404, {"code": 6451000, "message": "recording not found"})
    return recording_response(plan)


def _common(plan: CallPlan) -> Json:
    return {
        "hid": hid(plan),
        "callID": call_id(plan),
        "type": "call",
        "status": _STATUSES.get(plan.disposition, (plan.disposition, None))[0],
        "callDate": instant_text(plan.started_at),
        "callEndTime": instant_text(plan.ended_at),
        "callDuration": int((plan.ended_at - plan.started_at).total_seconds()) if plan.answered else 0,
    }


def detail_row(plan: CallPlan) -> Json:
    outside, inside = digits(plan.outside_number), digits(plan.inside_number)
    outgoing = plan.direction == "OUTGOING"
    return {
        **_common(plan),
        "callDirection": _DIRECTIONS.get(plan.direction, plan.direction),
        "caller": inside if outgoing else outside,
        "callee": outside if outgoing else inside,
    }


def log_row(plan: CallPlan) -> Json:
    outgoing = plan.direction == "OUTGOING"
    staff = {"displayName": None, "eid": f"staff-{plan.extension}", "isStaff": True}
    visitor = {"displayName": plan.outside_name, "isStaff": False}
    caller = {**(staff if outgoing else visitor), "serviceId": "acme"}
    caller["phoneNumber"] = digits(plan.inside_number if outgoing else plan.outside_number)
    return {
        **_common(plan),
        "roomID": f"room-{plan.rid}",
        "inquiryID": f"inquiry-{plan.rid}",
        "byeReason": _STATUSES.get(plan.disposition, (None, plan.disposition))[1],
        "releaseParty": "Caller",
        "virtualNumber": digits(plan.inside_number),
        "mediaType": "audio",
        "callerInfo": caller,
        "calleeInfo": {**(visitor if outgoing else staff), "serviceId": "acme"},
    }


def digits(number: str) -> int:
    """A phone number as this provider writes it: a JSON Number with the country code."""
    return int(international(number).lstrip("+") or 0)


def _parse_instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if instant.tzinfo is None:
        raise ValueError("an RFC 3339 time needs a zone")
    return instant


def bad_request(message: str) -> FakeResponse:
    return FakeResponse(400, {"code": 6451000, "message": message})
