"""An Unpod that can fail, and that answers in each form that its document and its samples show."""

from dataclasses import replace
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlencode

from relay.domain.json import Json
from relay.simulator.provider import Account, FakeRequest, FakeResponse, instant_text
from relay.simulator.timeline import CallPlan
from relay.simulator.unpod import LIST_PATH, FakeUnpod
from tests.fakes.faults import FaultInjection


class FaultyUnpod(FaultInjection[Account], FakeUnpod):
    """`with_id`, `with_next`, `with_count`: whether rows and answers carry them. `durations`: how `call_duration` is
    written. `no_org_status`: the answer to a missing Org-Handle.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.with_id = True
        self.with_next = False
        self.with_count = True
        self.durations: Literal["clock", "whole", "fraction"] = "clock"
        self.no_org_status: Literal[206, 400] = 400

    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        refusal = super().refuse(request)
        if refusal is None or refusal.status != 400 or not isinstance(refusal.body, dict):
            return refusal
        return FakeResponse(self.no_org_status, {**refusal.body, "status_code": self.no_org_status})

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        response = super().answer(request, now)
        if response.rows is None or not isinstance(response.body, dict):
            return response
        body = dict(response.body)
        page = int(request.query.get("page", "1"))
        page_size = min(int(request.query.get("page_size", "20")), self.max_page_size)
        if self.with_next:
            query = urlencode({**request.query, "page": page + 1})
            has_next = page * page_size < body["count"]
            body["next"] = f"{request.base_url}{LIST_PATH}?{query}" if has_next else None
        if not self.with_count:
            del body["count"]
        return replace(response, body=body)

    def row(self, plan: CallPlan, now: datetime) -> Json:
        row = super().row(plan, now)
        if not self.with_id:
            del row["id"], row["bridge"]
        if self.durations != "clock":
            talk_s = (plan.ended_at - plan.started_at).total_seconds() if row["start_time"] else 0.0
            row["call_duration"] = int(talk_s) if self.durations == "whole" else talk_s
        return row

    def garbage_rows(self, request: FakeRequest, at: datetime) -> list[Any]:
        valid = {
            "id": "call_garbage",
            "source_number": "+12025550199",
            "destination_number": "+12025550100",
            "call_type": "inbound",
            "call_status": "missed",
            "creation_time": instant_text(at),
        }
        return [
            {**valid, "creation_time": None},
            {**valid, "creation_time": "2025-02-30T25:61:00Z"},
            {**valid, "creation_time": 0},
            {name: value for name, value in valid.items() if name != "creation_time"},
            {**valid, "id": None, "source_number": None, "destination_number": None},
            "a row that is text",
            None,
            ["a", "list"],
        ]
