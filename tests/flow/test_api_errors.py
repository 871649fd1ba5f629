"""Error responses: every documented problem occurs as documented."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import aiohttp
import pytest
from redis.exceptions import ConnectionError as StoreConnectionError

from relay.api import route
from relay.api.problems import STATUSES, Code, ProblemDocument
from relay.api.route import MAX_BODY_BYTES
from relay.errors import StoreError
from relay.store.declarations import Declarations
from tests.flow.api import OUTSIDE, SOURCE, ApiClient

TESTS = Path(__file__).parent


def test_every_documented_problem_has_a_test() -> None:
    """Every code is named in a test of the API."""
    text = "".join(path.read_text() for path in TESTS.glob("test_api_*.py"))

    assert [code for code in get_args(Code) if f'"{code}"' not in text] == []
    assert set(STATUSES) == set(get_args(Code))


async def _raw(api: ApiClient, method: str, path: str, **options: Any) -> tuple[aiohttp.ClientResponse, Any]:
    headers = {"Authorization": f"Bearer {api.token}", **options.pop("headers", {})}
    async with api.http.request(method, api.base + path, headers=headers, **options) as answer:
        body = await answer.read()
    return answer, json.loads(body) if body else None


async def test_a_problem_has_the_shape_of_rfc_9457(api: ApiClient) -> None:
    """Media type, title, status, code and detail; it is not cached."""
    answer, problem = await _raw(api, "GET", "/v1/sources/unknown")

    assert answer.content_type == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert ProblemDocument.model_validate(problem).title == "Not Found"


@pytest.mark.parametrize("body", [b"", b"{", b"not json", b"\xff\xfe", b'{"a": NaN}', b'"\\ud800"', b"[" * 100_000])
async def test_what_is_not_json_is_refused(api: ApiClient, body: bytes) -> None:
    """400, whatever the bytes are."""
    answer, problem = await _raw(api, "POST", "/v1/sources", data=body, headers={"Content-Type": "application/json"})

    assert (answer.status, problem["code"]) == (400, "not_json")


@pytest.mark.parametrize("depth", [33, 900, 1_023])
async def test_deeply_nested_json_is_refused(api: ApiClient, depth: int) -> None:
    """422, not 500: validation would recurse into it."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        body = opening * depth + b"1" + closing * depth
        answer, problem = await _raw(
            api, "POST", "/v1/sources", data=body, headers={"Content-Type": "application/json"}
        )
        assert (answer.status, problem["code"]) == (422, "invalid")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_a_body_that_is_not_encoded_as_its_headers_say_is_refused(api: ApiClient, encoding: str) -> None:
    """400, not 500."""
    as_encoded = {"Content-Type": "application/json", "Content-Encoding": encoding}

    async with api.http.post(
        f"{api.base}/v1/tokens",
        data=b'{"name": "x"}',
        headers=as_encoded | {"Authorization": f"Bearer {api.token}"},
        skip_auto_headers=["Content-Encoding"],
    ) as answer:
        status = answer.status

    assert status == 400


async def test_a_body_that_does_not_arrive_in_time_is_refused(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """408, after 30 seconds."""
    monkeypatch.setattr(route, "BODY_TIMEOUT_S", 0.2)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    answer, problem = await _raw(
        api, "POST", "/v1/tokens", data=endless(), headers={"Content-Type": "application/json"}
    )

    assert (answer.status, problem["code"]) == (408, "request_timeout")


async def test_an_answer_does_not_name_the_server(api: ApiClient) -> None:
    """No version of Python or aiohttp."""
    answer, _ = await _raw(api, "GET", "/v1/sources")

    assert "Server" not in answer.headers


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"true"])
async def test_json_that_is_not_an_object_is_refused(api: ApiClient, body: bytes) -> None:
    """422, not 500."""
    for method, path in (("POST", "/v1/sources"), ("PATCH", "/v1/subscriptions/a"), ("POST", "/v1/tokens")):
        answer, problem = await _raw(api, method, path, data=body, headers={"Content-Type": "application/json"})
        assert (answer.status, problem["code"]) == (422, "invalid"), path


async def test_a_body_needs_the_content_type_of_json(api: ApiClient) -> None:
    """A form of another site cannot act as a client."""
    answer, problem = await _raw(api, "POST", "/v1/tokens", data=b"{}", headers={"Content-Type": "text/plain"})

    assert (answer.status, problem["code"]) == (415, "unsupported_media_type")
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_body_has_a_maximum_size(api: ApiClient) -> None:
    """1 MiB."""
    as_json = {"Content-Type": "application/json"}
    body = b'{"name": "' + b"x" * MAX_BODY_BYTES + b'"}'

    answer, problem = await _raw(api, "POST", "/v1/tokens", data=io.BytesIO(body), headers=as_json)

    assert (answer.status, problem["code"]) == (413, "too_large")


async def test_unknown_paths_and_methods(api: ApiClient) -> None:
    """404 and 405 are problems too, and 405 lists the allowed methods."""
    answer, problem = await _raw(api, "DELETE", "/v1/calls")

    assert (answer.status, problem["code"], answer.headers["Allow"]) == (405, "method_not_allowed", "GET")
    assert await api.problem("GET", "/v1/nothing") == (404, "not_found")
    assert await api.problem("GET", "/v1/sources/%00") == (404, "not_found")
    assert await api.problem("GET", "/v1/sources/%FF") == (404, "not_found")
    assert await api.problem("GET", "/v1/deliveries/%F0%9F%8E%B7.%C3%A4") == (404, "not_found")


async def test_endless_concurrent_changes_end_in_a_conflict(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some tries the change is refused, not forced."""
    await api.post("/v1/subscriptions", {"id": "crm", "url": OUTSIDE})
    await api.post("/v1/sources", {**SOURCE, "id": "new"})

    async def overtaken(*_: Any) -> None:
        return None

    monkeypatch.setattr(Declarations, "replace", overtaken)

    conflict = (409, "changed_meanwhile")
    assert await api.problem("PATCH", "/v1/subscriptions/crm", {"payload": "flat"}) == conflict
    assert await api.problem("PUT", "/v1/subscriptions/crm", {"url": OUTSIDE}) == conflict
    assert await api.problem("POST", "/v1/subscriptions/crm/rotate-secret") == conflict
    assert await api.problem("PATCH", "/v1/sources/new", {"timezone": "UTC"}) == conflict
    assert await api.problem("PUT", "/v1/sources/new", SOURCE) == conflict


@pytest.mark.parametrize("error", [StoreConnectionError("away"), StoreError("busy"), TimeoutError()])
async def test_an_unavailable_store_is_a_503(api: ApiClient, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """With a Retry-After, and not a 500."""

    async def unavailable(*_: Any) -> None:
        raise error

    monkeypatch.setattr(api.relay.runtime.store.events, "get", unavailable)
    answer, problem = await _raw(api, "GET", "/v1/events/evt_" + "a" * 26)

    assert (answer.status, problem["code"]) == (503, "store_unavailable")
    assert int(answer.headers["Retry-After"]) > 0


async def test_an_internal_error_reveals_nothing(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 is a problem document; the details are in the log."""

    async def broken(*_: Any) -> None:
        raise RuntimeError("the inside")

    monkeypatch.setattr(api.relay.runtime.store.events, "get", broken)
    status, problem = await api.request("GET", "/v1/events/evt_" + "a" * 26)

    assert (status, problem["code"]) == (500, "internal_error")
    assert "inside" not in str(problem)


async def test_probes_are_public_and_metrics_are_not(api: ApiClient) -> None:
    """/livez and /readyz are on both ports, /metrics on the internal one only."""
    for path, status in (("/livez", 200), ("/readyz", 200), ("/metrics", 404), ("/docs", 200), ("/openapi.json", 200)):
        async with api.http.get(api.base + path) as answer:
            assert answer.status == status, path


async def test_the_page_loads_no_other_resource(api: ApiClient) -> None:
    """No script, font or style; the content security policy forbids them."""
    async with api.http.get(api.base + "/docs") as answer:
        page = await answer.text()

    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "<script" not in page
    assert "src=" not in page
    assert "http://" not in page
    assert "https://" not in page.replace("https://api.webfones.com", "")
    assert "/v1/subscriptions/{subscription_id}/replay" in page
