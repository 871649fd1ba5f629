"""An Unpod that behaves as its document and its open server do, and misbehaves when told to.

Newest first by pages, whole days in the filter, 400 past the last page. Where document and samples differ, the choice
is an attribute of `UnpodSimulator`.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal
from urllib.parse import urlencode

from relay.domain.json import Json
from relay.simulator.switchboard import (
    UNLIMITED,
    Account,
    Answer,
    Asked,
    Switchboard,
    as_it_looks,
    bearer,
    instant_text,
    international,
)
from relay.simulator.timeline import CallPlan

LIST = "list"
BASE_PATH = "/api/v2/platform"
_PATH = f"{BASE_PATH}/call-logs/"
_STATUSES = {"ANSWERED": "completed", "NO ANSWER": "missed", "BUSY": "failed", "FAILED": "failed"}
_REASONS = {"ANSWERED": "caller_hangup", "NO ANSWER": "no_answer"}
_DIRECTIONS = {"INCOMING": "inbound", "OUTGOING": "outbound"}


class UnpodSimulator(Switchboard[Account]):
    """Organisations by token; the account's handle is the organisation's.

    The attributes may be changed at any time: `with_id` and `with_next` (whether rows and answers carry them),
    `durations` (how `call_duration` is written), `most_rows` of a page whatever was asked for, `no_org_status`
    (what a missing handle answers), `with_count`.
    """

    account_type = Account

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int = UNLIMITED,
        window_s: float = 60.0,
        with_id: bool = True,
        with_next: bool = False,
        with_count: bool = True,
        durations: Literal["clock", "whole", "fraction"] = "clock",
        most_rows: int = 100,
        no_org_status: Literal[206, 400] = 400,
    ) -> None:
        super().__init__(clock=clock, limit=limit, window_s=window_s)
        self.with_id = with_id
        self.with_next = with_next
        self.with_count = with_count
        self.durations = durations
        self.most_rows = most_rows
        self.no_org_status = no_org_status

    def kind_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        return LIST if method == "GET" and path == _PATH else None

    def token_of(self, headers: Mapping[str, str]) -> str:
        return bearer(headers, "Token")

    def refused(self, asked: Asked) -> Answer | None:
        account = self.accounts.get(asked.key)
        if account is None or account.revoked:
            return _failure(401, "Invalid or missing API token")
        handle = asked.headers.get("Org-Handle")
        if not handle:
            return _failure(self.no_org_status, "Org-Handle header is required")
        return None if handle == account.handle else _failure(403, "Invalid organization handle")

    def answer(self, asked: Asked, now: datetime) -> Answer:
        """Answer `/call-logs/` as it would be at `now`."""
        try:
            page = int(asked.query.get("page", "1"))
            page_size = min(int(asked.query.get("page_size", "20")), self.most_rows)
            first = _day(asked.query.get("start_date"), time.min, datetime(2000, 1, 1, tzinfo=UTC))
            last = _day(asked.query.get("end_date"), time.max, now + timedelta(days=366))
        except ValueError:
            return _failure(400, "Invalid parameters provided")
        if page < 1 or page_size < 1:
            return _failure(400, "Invalid parameters provided")
        plans = self.accounts[asked.key].between(first, last, now)[::-1]
        begin = (page - 1) * page_size
        if page > 1 and begin >= len(plans):
            return _failure(400, "Failed to fetch logs.")
        rows = [self.row(plan, now) for plan in plans[begin : begin + page_size]]
        body: Json = {"status_code": 200, "message": "Call logs fetched successfully", "data": rows}
        if self.with_count:
            body["count"] = len(plans)
        if self.with_next:
            query = urlencode({**asked.query, "page": page + 1})
            body["next"] = f"{asked.base_url}{_PATH}?{query}" if begin + page_size < len(plans) else None
        return Answer(200, body, rows="data")

    def too_many(self, asked: Asked) -> Answer:
        return _failure(429, "Rate limit exceeded", {"Retry-After": "30"})

    def garbage_rows(self, asked: Asked, at: datetime) -> list[Any]:
        good = {
            "id": "call_garbage",
            "source_number": "+12025550199",
            "destination_number": "+12025550100",
            "call_type": "inbound",
            "call_status": "missed",
            "creation_time": instant_text(at),
        }
        nobody = {"id": None, "source_number": None, "destination_number": None}
        return [
            {**good, "creation_time": None},
            {**good, "creation_time": "2025-02-30T25:61:00Z"},
            {**good, "creation_time": 0},
            {name: value for name, value in good.items() if name != "creation_time"},
            {**good, **nobody},
            "a row that is text",
            None,
            ["a", "list"],
        ]

    def row(self, plan: CallPlan, now: datetime) -> Json:
        """A call as the list shows it at `now`."""
        shown, columns = as_it_looks(plan, now)
        outside, inside = international(shown.outside_number), international(shown.inside_number)
        outgoing = shown.direction == "OUTGOING"
        talk_s = (plan.ended_at - plan.started_at).total_seconds()
        row: Json = {
            "source_number": inside if outgoing else outside,
            "destination_number": outside if outgoing else inside,
            "call_type": _DIRECTIONS.get(shown.direction, "both"),
            "call_status": _STATUSES.get(shown.disposition, shown.disposition),
            "creation_time": instant_text(plan.started_at),
            "start_time": instant_text(plan.started_at) if shown.answered else None,
            "end_time": instant_text(plan.ended_at) if shown.answered else None,
            "call_duration": self._duration(talk_s if shown.answered else 0.0),
            "end_reason": _REASONS.get(shown.disposition, "failed"),
        }
        if self.with_id:
            row |= {"id": call_id(plan), "bridge": 1}
        return {**row, **columns}

    def _duration(self, talk_s: float) -> str | int | float:
        if self.durations == "clock":
            return str(timedelta(seconds=int(talk_s)))
        return int(talk_s) if self.durations == "whole" else talk_s


def call_id(plan: CallPlan) -> str:
    """The id of a call's row."""
    return f"call_{plan.rid:012x}"


def _day(text: str | None, edge: time, default: datetime) -> datetime:
    """Read a filter: of a moment only its day counts."""
    return datetime.combine(date.fromisoformat(text[:10]), edge, tzinfo=UTC) if text else default


def _failure(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, {"status_code": status, "message": message}, headers=headers or {})
