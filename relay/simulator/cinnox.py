"""A CINNOX that behaves as its documents say, and misbehaves when told to.

The same calls in two lists, and conferences with those who took part. Where the documents are silent, the choice is an
attribute of `CinnoxSimulator`.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

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
    recording_of,
)
from relay.simulator.timeline import CallPlan

DETAIL: Final = "call-detail"
LOG: Final = "call-log"
CONFERENCES: Final = "conference-detail"
RECORDING: Final = "recording-file"
RECORDING_PATH: Final = "/v1/api/apps/{app_id}/data/recording-file?callID={call_id}"
"""How this simulator offers Get Recording File; CINNOX's own path is not confirmed."""

_MOST_ROWS: Final = 500
_STATUSES = {
    "ANSWERED": ("Call Ended", "hang up"),
    "NO ANSWER": ("Not Answered", "no answer"),
    "BUSY": ("Busy", "busy"),
    "FAILED": ("Call Failed", "congestion"),
}
_DIRECTIONS = {"INCOMING": "inbound", "OUTGOING": "outbound"}


class CinnoxSimulator(Switchboard[Account]):
    """Tenants by token; the account's handle is the App ID.

    The attributes may be changed at any time: `newest_first` (the order of rows), `log_needs_call_id` (whether
    `call-log` insists on the callID that its document marks as required).
    """

    account_type = Account

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int = UNLIMITED,
        window_s: float = 60.0,
        newest_first: bool = False,
        log_needs_call_id: bool = False,
    ) -> None:
        super().__init__(clock=clock, limit=limit, window_s=window_s)
        self.newest_first = newest_first
        self.log_needs_call_id = log_needs_call_id
        self._conferences: dict[tuple[str, int], tuple[CallPlan, ...]] = {}

    def add_conference(self, key: str, plan: CallPlan, legs: Sequence[CallPlan]) -> None:
        """Add a conference; each who takes part has a leg of its own, with a hid of its own."""
        self.add_calls(key, [plan])
        self._conferences[key, plan.rid] = tuple(legs)

    def kind_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        start, _, kind = path.rpartition("/")
        known = method == "GET" and start.startswith("/v1/api/apps/") and start.endswith("/data")
        return kind if known and kind in (DETAIL, LOG, CONFERENCES, RECORDING) else None

    def token_of(self, headers: Mapping[str, str]) -> str:
        return bearer(headers, "Bearer")

    def refused(self, asked: Asked) -> Answer | None:
        account = self.accounts.get(asked.key)
        if account is None or account.revoked:
            return Answer(401, {"code": 6450003, "message": "unauthorized"})
        app_id = asked.path.split("/")[4]
        return None if app_id == account.handle else Answer(403, {"code": 6450004, "message": "app not allowed"})

    def answer(self, asked: Asked, now: datetime) -> Answer:
        """Answer one of the lists, or a recording."""
        account = self.accounts[asked.key]
        if asked.kind == RECORDING:
            return self._recording(account, asked.query, now)
        if asked.kind == LOG and self.log_needs_call_id and not asked.query.get("callID"):
            return _bad("callID is required")
        start, end = asked.query.get("startAt"), asked.query.get("endAt")
        if bool(start) != bool(end):
            return _bad("missing one of startAt, endAt")
        try:
            first = _instant(start) if start else datetime(2000, 1, 1, tzinfo=UTC)
            last = _instant(end) if end else now
            offset, limit = int(asked.query.get("offset", "0")), int(asked.query.get("limit", "20"))
        except ValueError:
            return _bad("invalid parameter")
        if offset < 0 or limit < 0:
            return _bad("negative offset" if offset < 0 else "negative limit")
        if limit > _MOST_ROWS:
            return _bad(f"exceed maximum limit {_MOST_ROWS}")
        if last < first:
            return _bad("endAt is prior to startAt")
        plans = account.between(first, last, now)
        if asked.kind == CONFERENCES:
            plans = [plan for plan in plans if (account.key, plan.rid) in self._conferences]
        if self.newest_first:
            plans.reverse()
        rows = [self._row(account, asked.kind, plan, now) for plan in plans[offset : offset + limit]]
        return Answer(200, {"code": 0, "result": rows}, rows="result")

    def too_many(self, asked: Asked) -> Answer:
        return Answer(400, {"code": 6451010, "message": "Too many requests"})

    def garbage_rows(self, asked: Asked, at: datetime) -> list[Any]:
        good = {"hid": "hid-garbage", "callID": "call-garbage", "status": "Busy", "callDate": instant_text(at)}
        return [
            {**good, "callDate": None},
            {**good, "hid": "hid-garbage-2", "callID": None, "callDate": "2025-02-30T25:61:00Z"},
            {**good, "hid": "hid-garbage-3", "callID": None, "callDate": 0},
            {"status": "Busy", "callDate": instant_text(at)},
            "a row that is text",
            None,
            ["a", "list"],
        ]

    def _recording(self, account: Account, query: Mapping[str, str], now: datetime) -> Answer:
        if not query.get("callID"):
            return _bad("callID or conferenceID is required")
        plan = next((each for each in account.plans.values() if call_id(each) == query["callID"]), None)
        if plan is None or plan.recording_at is None or plan.recording_at > now:
            return Answer(404, {"code": 6451000, "message": "recording not found"})
        return recording_of(plan)

    def _row(self, account: Account, kind: str, plan: CallPlan, now: datetime) -> Json:
        legs = self._conferences.get((account.key, plan.rid))
        if kind == CONFERENCES:
            return {"hid": hid(plan), "callID": call_id(plan), "callConferenceList": [_leg(leg) for leg in legs or ()]}
        shown, columns = as_it_looks(plan, now)
        row = _detail(shown) if kind == DETAIL else _log(shown)
        if legs is not None:
            row["type"] = "conference"
        return {**row, **columns}


def hid(plan: CallPlan) -> str:
    """The record id of a call's row."""
    return f"hid-{plan.rid}"


def call_id(plan: CallPlan) -> str:
    """The id of a call itself."""
    return f"call-{plan.rid}"


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


def _detail(plan: CallPlan) -> Json:
    outside, inside = _digits(plan.outside_number), _digits(plan.inside_number)
    outgoing = plan.direction == "OUTGOING"
    return {
        **_common(plan),
        "callDirection": _DIRECTIONS.get(plan.direction, plan.direction),
        "caller": inside if outgoing else outside,
        "callee": outside if outgoing else inside,
    }


def _log(plan: CallPlan) -> Json:
    outgoing = plan.direction == "OUTGOING"
    staff = {"displayName": None, "eid": f"staff-{plan.extension}", "isStaff": True}
    visitor = {"displayName": plan.outside_name, "isStaff": False}
    caller = {**(staff if outgoing else visitor), "serviceId": "acme"}
    caller["phoneNumber"] = _digits(plan.inside_number if outgoing else plan.outside_number)
    return {
        **_common(plan),
        "roomID": f"room-{plan.rid}",
        "inquiryID": f"inquiry-{plan.rid}",
        "byeReason": _STATUSES.get(plan.disposition, (None, plan.disposition))[1],
        "releaseParty": "Caller",
        "virtualNumber": _digits(plan.inside_number),
        "mediaType": "audio",
        "callerInfo": caller,
        "calleeInfo": {**(visitor if outgoing else staff), "serviceId": "acme"},
    }


def _leg(plan: CallPlan) -> Json:
    return {
        "hid": hid(plan),
        "displayName": plan.outside_name,
        "phoneNumber": _digits(plan.outside_number),
        "isStaff": False,
        "callDate": instant_text(plan.started_at),
        "callEndTime": instant_text(plan.ended_at),
        "callDuration": int((plan.ended_at - plan.started_at).total_seconds()),
        "byeReason": "hang up",
    }


def _digits(number: str) -> int:
    """A phone number as this provider writes it: a JSON Number with the country code."""
    return int(international(number).lstrip("+") or 0)


def _instant(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError("RFC 3339 has a zone")
    return moment


def _bad(message: str) -> Answer:
    return Answer(400, {"code": 6451000, "message": message})
