"""An Unpod as its document and its open server behave: pages newest first, filters by whole days, 400 past the end."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta

from relay.domain.json import Json
from relay.simulator.provider import (
    Account,
    FakeProvider,
    FakeRequest,
    FakeResponse,
    authorization,
    instant_text,
    international,
    shown_at,
)
from relay.simulator.timeline import CallPlan

LIST = "list"
BASE_PATH = "/api/v2/platform"
LIST_PATH = f"{BASE_PATH}/call-logs/"
_STATUSES = {"ANSWERED": "completed", "NO ANSWER": "missed", "BUSY": "failed", "FAILED": "failed"}
_REASONS = {"ANSWERED": "caller_hangup", "NO ANSWER": "no_answer"}
_DIRECTIONS = {"INCOMING": "inbound", "OUTGOING": "outbound"}


class FakeUnpod(FakeProvider[Account]):
    """Organisations by token; the account's handle is the organisation's."""

    name = "unpod"
    list_endpoint = LIST
    base_path = BASE_PATH
    max_page_size = 100

    def call_id(self, key: str, plan: CallPlan) -> str:
        return call_id(plan)

    def source_options(self, key: str) -> Json:
        return {"org_handle": self.accounts[key].handle, "token": key}

    def endpoint_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        return LIST if method == "GET" and path == LIST_PATH else None

    def token_of(self, headers: Mapping[str, str]) -> str:
        return authorization(headers, "Token")

    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        account = self.accounts.get(request.key)
        if account is None or account.revoked:
            return _failure(401, "Invalid or missing API token")
        handle = request.headers.get("Org-Handle")
        if not handle:
            return _failure(400, "Org-Handle header is required")
        return None if handle == account.handle else _failure(403, "Invalid organization handle")

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        try:
            page = int(request.query.get("page", "1"))
            page_size = min(int(request.query.get("page_size", "20")), self.max_page_size)
            first = _day(request.query.get("start_date"), time.min, datetime(2000, 1, 1, tzinfo=UTC))
            last = _day(request.query.get("end_date"), time.max, now + timedelta(days=366))
        except ValueError:
            return _failure(400, "Invalid parameters provided")
        if page < 1 or page_size < 1:
            return _failure(400, "Invalid parameters provided")
        plans = self.accounts[request.key].between(first, last, now)[::-1]
        begin = (page - 1) * page_size
        if page > 1 and begin >= len(plans):
            return _failure(400, "Failed to fetch logs.")
        body = {
            "status_code": 200,
            "message": "Call logs fetched successfully",
            "data": [self.row(plan, now) for plan in plans[begin : begin + page_size]],
            "count": len(plans),
        }
        return FakeResponse(200, body, rows="data")

    def row(self, plan: CallPlan, now: datetime) -> Json:
        shown, columns = shown_at(plan, now)
        outside, inside = international(shown.outside_number), international(shown.inside_number)
        outgoing = shown.direction == "OUTGOING"
        talk_s = (plan.ended_at - plan.started_at).total_seconds() if shown.answered else 0
        return {
            "id": call_id(plan),
            "source_number": inside if outgoing else outside,
            "destination_number": outside if outgoing else inside,
            "call_type": _DIRECTIONS.get(shown.direction, "both"),
            "call_status": _STATUSES.get(shown.disposition, shown.disposition),
            "creation_time": instant_text(plan.started_at),
            "start_time": instant_text(plan.started_at) if shown.answered else None,
            "end_time": instant_text(plan.ended_at) if shown.answered else None,
            "call_duration": str(timedelta(seconds=int(talk_s))),
            "end_reason": _REASONS.get(shown.disposition, "failed"),
            "bridge": 1,
            **columns,
        }


def call_id(plan: CallPlan) -> str:
    return f"call_{plan.rid:012x}"


def _day(text: str | None, edge: time, default: datetime) -> datetime:
    """Read a filter: only the day of an instant counts."""
    return datetime.combine(date.fromisoformat(text[:10]), edge, tzinfo=UTC) if text else default


def _failure(status: int, message: str) -> FakeResponse:
    return FakeResponse(status, {"status_code": status, "message": message})
