"""NFON as a provider of the suite, polled: its stream has tests of its own."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any

from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import SourceOptions
from relay.providers.nfon import NFON
from relay.providers.nfon.options import NfonOptions
from relay.simulator.nfon import NfonEndpoint
from relay.simulator.timeline import CallPlan
from tests.contract.providers.under_test import ListFault, Now, Refusal
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.nfon import FaultyNfon

_TOKEN = "the-suite"


class NfonUnderTest:
    """One user's history; rows come oldest first, a page a request. They carry their zone, so the account has none."""

    kind = NFON
    refusals: Sequence[Refusal] = (
        Refusal("bad_parameter", 400, '{"error":"invalid parameter"}', UnexpectedResponse),
        Refusal("invalid_token", 401, '{"error":"invalid token"}', Unauthorized),
        Refusal("not_permitted", 403, '{"error":"not permitted"}', Unauthorized),
        Refusal("too_many", 429, '{"error":"too many requests"}', RateLimited),
        Refusal("server_error", 500, '{"error":"internal error"}', Unavailable),
        Refusal("unavailable", 503, '{"error":"service unavailable"}', Unavailable),
    )

    def __init__(self, now: Now, zone: str) -> None:
        self.simulator = FaultyNfon(clock=now)
        self.simulator.add_account(_TOKEN)

    def serve(self) -> AbstractAsyncContextManager[str]:
        return self.simulator.serve()

    def options(self, base_url: str, **changes: Any) -> SourceOptions:
        return NfonOptions.model_validate({"token": _TOKEN, "base_url": base_url, "stream": False, **changes})

    def wrong_credentials(self, base_url: str) -> Sequence[SourceOptions]:
        return [self.options(base_url, token="not-a-token")]

    def add(self, plans: Iterable[CallPlan]) -> None:
        self.simulator.add_calls(_TOKEN, plans)

    def change(self, plan: CallPlan, *, at: datetime) -> None:
        self.simulator.change(_TOKEN, plan.rid, {"cidname_outside": f"CHANGED {at:%H%M%S%f}"}, at=at)

    def remove(self, plan: CallPlan) -> None:
        self.simulator.remove(_TOKEN, plan.rid)

    def key(self, plan: CallPlan) -> str:
        return self.simulator.uuid_of(_TOKEN, plan.rid)

    def inject(self, what: ListFault, *, times: int | None = 1) -> None:
        self.simulator.inject(Fault(kind=FaultKind(what), on=NfonEndpoint.RECORDS, times=times))

    def refuse(self, refusal: Refusal, *, times: int | None = 1) -> None:
        fault = Fault(
            kind=FaultKind.STATUS, on=NfonEndpoint.RECORDS, times=times, status=refusal.status, body=refusal.body
        )
        self.simulator.inject(fault)

    def clear_faults(self) -> None:
        self.simulator.clear_faults()

    @property
    def requests(self) -> int:
        return self.simulator.requests.total()
