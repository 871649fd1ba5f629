"""A CINNOX that can fail, with conferences, and whose undocumented behaviour can be chosen."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from relay.domain.json import Json
from relay.simulator.cinnox import CONFERENCES, LOG, FakeCinnox, bad_request, call_id, digits, hid
from relay.simulator.provider import Account, FakeRequest, FakeResponse, instant_text
from relay.simulator.timeline import CallPlan
from tests.fakes.faults import FaultInjection


class FaultyCinnox(FaultInjection[Account], FakeCinnox):
    """`newest_first`: the order of rows. `log_needs_call_id`: whether `call-log` insists on the callID that its
    document marks as required.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.newest_first = False
        self.log_needs_call_id = False
        self._conferences: dict[tuple[str, int], Sequence[CallPlan]] = {}

    def add_conference(self, key: str, plan: CallPlan, legs: Sequence[CallPlan]) -> None:
        """Add a conference; each participant has a leg with a hid of its own."""
        self.add_calls(key, [plan])
        self._conferences[key, plan.rid] = legs

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        if request.endpoint == LOG and self.log_needs_call_id and not request.query.get("callID"):
            return bad_request("callID is required")
        return super().answer(request, now)

    def rows(self, account: Account, endpoint: str, plans: Sequence[CallPlan], now: datetime) -> list[Json]:
        if self.newest_first:
            plans = plans[::-1]
        if endpoint == CONFERENCES:
            conferences = [plan for plan in plans if (account.key, plan.rid) in self._conferences]
            return [_conference_row(plan, self._conferences[account.key, plan.rid]) for plan in conferences]
        rows = super().rows(account, endpoint, plans, now)
        for plan, row in zip(plans, rows, strict=True):
            if (account.key, plan.rid) in self._conferences:
                row["type"] = "conference"
        return rows

    def garbage_rows(self, request: FakeRequest, at: datetime) -> list[Any]:
        valid = {"hid": "hid-garbage", "callID": "call-garbage", "status": "Busy", "callDate": instant_text(at)}
        return [
            {**valid, "callDate": None},
            {**valid, "hid": "hid-garbage-2", "callID": None, "callDate": "2025-02-30T25:61:00Z"},
            {**valid, "hid": "hid-garbage-3", "callID": None, "callDate": 0},
            {"status": "Busy", "callDate": instant_text(at)},
            "a row that is text",
            None,
            ["a", "list"],
        ]


def _conference_row(plan: CallPlan, legs: Sequence[CallPlan]) -> Json:
    return {"hid": hid(plan), "callID": call_id(plan), "callConferenceList": [_leg(leg) for leg in legs]}


def _leg(plan: CallPlan) -> Json:
    return {
        "hid": hid(plan),
        "displayName": plan.outside_name,
        "phoneNumber": digits(plan.outside_number),
        "isStaff": False,
        "callDate": instant_text(plan.started_at),
        "callEndTime": instant_text(plan.ended_at),
        "callDuration": int((plan.ended_at - plan.started_at).total_seconds()),
        "byeReason": "hang up",
    }
