"""The OpenAPI document against the running API: generated requests cause no crash and no undocumented response."""

import asyncio
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.flow.api import NAMES, OUTSIDE, SOURCE, ApiClient

CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
BOUNDED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
STREAM = "/v1/events/stream"


async def test_generated_requests_get_documented_responses(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid and invalid requests for every route, with ids that exist and that do not."""
    monkeypatch.setitem(NAMES, "api.webfones.com", ["127.0.0.1"])  # nothing listens there
    event = await api.publish_call("main", "1")
    call = (await api.get(f"/v1/events/{event}"))["data"]["call"]["id"]
    job = await api.post("/v1/subscriptions/a/replay", {"since": "2026-01-01T00:00:00Z"})
    await api.post("/v1/sources", {**SOURCE, "id": "made"})
    await api.post("/v1/subscriptions", {"id": "made", "url": OUTSIDE})
    known = {
        "source_id": ["main", "made"],
        "subscription_id": ["a", "made"],
        "event_id": [event],
        "call_id": [call],
        "delivery_id": [f"{event}.a"],
        "event_type": ["call.completed"],
        "job_id": [job["job"]],
    }

    tried = await asyncio.to_thread(_try_everything, api.base, api.token, known)

    document = await api.get("/openapi.json")
    assert tried == {path for path in document["paths"] if path != STREAM}


def _try_everything(base: str, token: str, known: dict[str, list[str]]) -> set[str]:
    """Send the requests in this thread, while the relay runs in its loop; returns the tested paths."""
    tried: set[str] = set()
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {token}"
        schema = schemathesis.openapi.from_dict(session.get(f"{base}/openapi.json", timeout=10).json())
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == STREAM:
                continue
            tried.add(operation.path)
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _try_one(operation, mode, base, session, known)
    return tried


def _try_one(
    operation: Any, mode: GenerationMode, base: str, session: requests.Session, known: dict[str, list[str]]
) -> None:
    @given(case=operation.as_strategy(generation_mode=mode), choice=st.integers(0, 3))
    @BOUNDED
    def ask(case: Any, choice: int) -> None:
        for name, ids in known.items():
            if choice and name in case.path_parameters:
                case.path_parameters[name] = ids[choice % len(ids)]
        response = case.call(base_url=base, session=session, headers=dict(session.headers), timeout=20)
        case.validate_response(response, checks=CHECKS)

    ask()
