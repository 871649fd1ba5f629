"""WebFones as a provider of the suite."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any

from relay.errors import RateLimited, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import SourceOptions
from relay.providers.webfones import WEBFONES
from relay.providers.webfones.options import WebfonesOptions
from relay.simulator.timeline import CallPlan
from relay.simulator.webfones import WebFonesEndpoint
from tests.contract.providers.under_test import ListFault, Now, Refusal
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.webfones import FaultyWebFones

_KEY = "the-suite"


class WebFonesUnderTest:
    """One account; the whole list comes in one body."""

    kind = WEBFONES
    refusals: Sequence[Refusal] = (
        Refusal("bad_timestamp", 400, '{"error":"Invalid timestamp format"}', UnexpectedResponse),
        Refusal("missing_key", 401, '{"error":"Missing API key"}', Unauthorized),
        Refusal("invalid_key", 403, '{"error":"Invalid API key"}', Unauthorized),
        Refusal("too_many", 429, '{"error":"Too many requests for this API key"}', RateLimited),
        Refusal("server_error", 500, '{"error":"Internal server error"}', Unavailable),
        Refusal("bad_gateway", 502, '{"error":"Bad gateway"}', Unavailable),
        Refusal("unavailable", 503, '{"error":"Service unavailable"}', Unavailable),
    )

    def __init__(self, now: Now, zone: str) -> None:
        self.simulator = FaultyWebFones(clock=now, limit=1_000_000)
        self.simulator.add_account(_KEY, zone=zone)
        self._zone = zone

    def serve(self) -> AbstractAsyncContextManager[str]:
        return self.simulator.serve()

    def options(self, base_url: str, **changes: Any) -> SourceOptions:
        given = {"api_key": _KEY, "base_url": base_url, "timezone": self._zone, **changes}
        return WebfonesOptions.model_validate(given)

    def wrong_credentials(self, base_url: str) -> Sequence[SourceOptions]:
        return [self.options(base_url, api_key="not-a-key")]

    def add(self, plans: Iterable[CallPlan]) -> None:
        self.simulator.add_calls(_KEY, plans)

    def change(self, plan: CallPlan, *, at: datetime) -> None:
        self.simulator.change(_KEY, plan.rid, {"cidname_outside": f"CHANGED {at:%H%M%S%f}"}, at=at)

    def remove(self, plan: CallPlan) -> None:
        self.simulator.remove(_KEY, plan.rid)

    def key(self, plan: CallPlan) -> str:
        return str(plan.rid)

    def inject(self, what: ListFault, *, times: int | None = 1) -> None:
        self.simulator.inject(Fault(kind=FaultKind(what), on=WebFonesEndpoint.RECORDS, times=times))

    def refuse(self, refusal: Refusal, *, times: int | None = 1) -> None:
        fault = Fault(
            kind=FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, times=times, status=refusal.status, body=refusal.body
        )
        self.simulator.inject(fault)

    def clear_faults(self) -> None:
        self.simulator.clear_faults()

    @property
    def requests(self) -> int:
        return self.simulator.requests.total()
