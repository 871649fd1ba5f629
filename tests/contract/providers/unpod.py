"""Unpod as a provider of the suite."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any

from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import SourceOptions
from relay.providers.unpod import UNPOD
from relay.providers.unpod.options import UnpodOptions
from relay.simulator.timeline import CallPlan
from relay.simulator.unpod import BASE_PATH, LIST, call_id
from tests.contract.providers.under_test import ListFault, Now, Refusal
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.unpod import FaultyUnpod

_TOKEN = "the-suite"
_ORG = "acme"


class UnpodUnderTest:
    """One organisation, whose list comes newest first in pages."""

    kind = UNPOD
    refusals: Sequence[Refusal] = (
        Refusal(
            "bad_parameters", 400, '{"status_code":400,"message":"Invalid parameters provided"}', UnexpectedResponse
        ),
        Refusal("no_org", 400, '{"message":"Org-Handle header is required"}', UnexpectedResponse),
        Refusal("no_org_as_206", 206, '{"message":"Org-Handle header is required"}', UnexpectedResponse),
        Refusal("bad_token", 401, '{"message":"Invalid or missing API token"}', Unauthorized),
        Refusal("bad_org", 403, '{"message":"Invalid organization handle"}', Unauthorized),
        Refusal("not_found", 404, '{"message":"Not found"}', UnexpectedResponse),
        Refusal("too_many", 429, '{"message":"Rate limit exceeded"}', RateLimited),
        Refusal("server_error", 500, '{"message":"Internal Server Error"}', Unavailable),
        Refusal("failure_in_a_good_answer", 200, '{"status_code":500,"message":"x","data":[]}', UnexpectedResponse),
        Refusal("no_rows", 200, '{"status_code":200,"message":"x"}', UnexpectedResponse),
    )

    def __init__(self, now: Now, zone: str) -> None:
        self.simulator = FaultyUnpod(clock=now)
        self.simulator.add_account(_TOKEN, handle=_ORG)

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[str]:
        async with self.simulator.serve() as url:
            yield url + BASE_PATH

    def serve(self) -> AbstractAsyncContextManager[str]:
        return self._serve()

    def options(self, base_url: str, **changes: Any) -> SourceOptions:
        return UnpodOptions.model_validate({"token": _TOKEN, "org_handle": _ORG, "base_url": base_url, **changes})

    def wrong_credentials(self, base_url: str) -> Sequence[SourceOptions]:
        return [self.options(base_url, token="not-a-token"), self.options(base_url, org_handle="other-org")]

    def add(self, plans: Iterable[CallPlan]) -> None:
        self.simulator.add_calls(_TOKEN, plans)

    def change(self, plan: CallPlan, *, at: datetime) -> None:
        self.simulator.change(_TOKEN, plan.rid, {"end_reason": f"changed-{at:%H%M%S%f}"}, at=at)

    def remove(self, plan: CallPlan) -> None:
        self.simulator.remove(_TOKEN, plan.rid)

    def key(self, plan: CallPlan) -> str:
        return call_id(plan)

    def inject(self, what: ListFault, *, times: int | None = 1) -> None:
        self.simulator.inject(Fault(kind=FaultKind(what), on=LIST, times=times))

    def refuse(self, refusal: Refusal, *, times: int | None = 1) -> None:
        fault = Fault(kind=FaultKind.STATUS, on=LIST, times=times, status=refusal.status, body=refusal.body)
        self.simulator.inject(fault)

    def clear_faults(self) -> None:
        self.simulator.clear_faults()

    @property
    def requests(self) -> int:
        return self.simulator.requests.total()
