"""CINNOX as a provider of the suite."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any

from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import SourceOptions
from relay.providers.cinnox import CINNOX
from relay.providers.cinnox.options import CinnoxOptions
from relay.simulator.cinnox import DETAIL, hid
from relay.simulator.timeline import CallPlan
from tests.contract.providers.under_test import ListFault, Now, Refusal
from tests.fakes.cinnox import FaultyCinnox
from tests.fakes.faults import Fault, FaultKind

_TOKEN = "the-suite"
_APP = "app-1"


class CinnoxUnderTest:
    """One tenant, whose calls are in two lists by offset and limit."""

    kind = CINNOX
    refusals: Sequence[Refusal] = (
        Refusal("no_method", 400, '{"code":6450001,"message":"method not found"}', UnexpectedResponse),
        Refusal("half_a_range", 400, '{"code":6451000,"message":"missing one of startAt, endAt"}', UnexpectedResponse),
        Refusal("high_limit", 400, '{"code":6451000,"message":"exceed maximum limit 500"}', UnexpectedResponse),
        Refusal("bad_response", 400, '{"code":6451001,"message":"bad response"}', Unavailable),
        Refusal("too_many", 400, '{"code":6451010,"message":"Too many requests"}', RateLimited),
        Refusal("too_many_in_a_good_answer", 200, '{"code":6451010,"message":"Too many requests"}', RateLimited),
        Refusal("too_many_as_429", 429, "{}", RateLimited),
        Refusal("bad_token", 401, '{"code":6450003,"message":"unauthorized"}', Unauthorized),
        Refusal("bad_app", 403, '{"code":6450004,"message":"app not allowed"}', Unauthorized),
        Refusal("server_error", 500, "{}", Unavailable),
        Refusal("unknown_code", 400, '{"code":1234567,"message":"?"}', UnexpectedResponse),
        Refusal("no_rows", 200, '{"code":0}', UnexpectedResponse),
    )

    def __init__(self, now: Now, zone: str) -> None:
        self.simulator = FaultyCinnox(clock=now)
        self.simulator.add_account(_TOKEN, handle=_APP)

    def serve(self) -> AbstractAsyncContextManager[str]:
        return self.simulator.serve()

    def options(self, base_url: str, **changes: Any) -> SourceOptions:
        given = {"token": _TOKEN, "app_id": _APP, "base_url": base_url, "settle_s": 0, **changes}
        return CinnoxOptions.model_validate(given)

    def wrong_credentials(self, base_url: str) -> Sequence[SourceOptions]:
        return [self.options(base_url, token="not-a-token"), self.options(base_url, app_id="app-2")]

    def add(self, plans: Iterable[CallPlan]) -> None:
        self.simulator.add_calls(_TOKEN, plans)

    def change(self, plan: CallPlan, *, at: datetime) -> None:
        self.simulator.change(_TOKEN, plan.rid, {"cidname_outside": f"CHANGED {at:%H%M%S%f}"}, at=at)

    def remove(self, plan: CallPlan) -> None:
        self.simulator.remove(_TOKEN, plan.rid)

    def key(self, plan: CallPlan) -> str:
        return hid(plan)

    def inject(self, what: ListFault, *, times: int | None = 1) -> None:
        self.simulator.inject(Fault(kind=FaultKind(what), on=DETAIL, times=times))

    def refuse(self, refusal: Refusal, *, times: int | None = 1) -> None:
        fault = Fault(kind=FaultKind.STATUS, on=DETAIL, times=times, status=refusal.status, body=refusal.body)
        self.simulator.inject(fault)

    def clear_faults(self) -> None:
        self.simulator.clear_faults()

    @property
    def requests(self) -> int:
        return self.simulator.requests.total()
