"""The WebFones client: every documented answer, and every other one, ends in a value or a named error."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aioresponses import aioresponses
from pydantic import ValidationError
from yarl import URL

from relay.domain.call import Contact
from relay.errors import (
    OverBudget,
    ProviderError,
    RateLimited,
    SettingsError,
    Unauthorized,
    Unavailable,
    UnexpectedResponse,
)
from relay.providers import http as http_module
from relay.providers.base import Audio, CallPage, ContactChanges, NoRecordingYet, NoSuchCall, Purpose, Window
from relay.providers.webfones import WEBFONES
from relay.providers.webfones import client as client_module
from relay.providers.webfones.client import Webfones
from relay.providers.webfones.options import WebfonesOptions
from tests import aiohttp_shim
from tests.fakes.budget import FakeBudget

KEY = "wf-secret-key"
BASE = "https://api.webfones.com:2343"
LIST = f"{BASE}/call_log/records_after_timestamp?timestamp=2025-07-01 14:53:43"
RECORDING = f"{BASE}/call_log/recording/211159"
SEARCH = f"{BASE}/contacts/contacts/search/phones"
WINDOW = Window(since=datetime(2025, 7, 1, 14, 53, 44, tzinfo=UTC), until=datetime(2025, 7, 1, 21, tzinfo=UTC))
ROW = {"rid": 211159, "call_timestamp": "2025-07-01 20:54:53", "direction": "OUTGOING", "disposition": "ANSWERED"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def mocked() -> Iterator[aioresponses]:
    aiohttp_shim.install()
    with aioresponses() as answers:
        yield answers


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def options(**changes: Any) -> WebfonesOptions:
    given: dict[str, Any] = {"api_key": KEY, **changes}
    return WebfonesOptions(**given)


def connect(http: aiohttp.ClientSession, budget: FakeBudget | None = None, **changes: Any) -> Webfones:
    return Webfones(options(**changes), http, budget or FakeBudget())


async def listed(client: Webfones, window: Window = WINDOW) -> list[CallPage]:
    return [page async for page in client.pages(window)]


async def fetched(client: Webfones, key: str = "211159") -> bytes | NoRecordingYet | NoSuchCall:
    async with client.recording(key) as answer:
        if isinstance(answer, Audio):
            return b"".join([chunk async for chunk in answer.chunks])
        return answer


class Loopback:
    """A server on 127.0.0.1 that answers every request with one handler."""

    def __init__(self, base_url: str, requests: list[web.Request]) -> None:
        self.base_url = base_url
        self.requests = requests


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[Loopback]]]:
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> Loopback:
        seen: list[web.Request] = []

        async def answer(request: web.Request) -> web.StreamResponse:
            seen.append(request)
            return await handler(request)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return Loopback(f"http://127.0.0.1:{port}", seen)

    yield start
    for runner in runners:
        await runner.cleanup()


Serve = Callable[[Handler], Awaitable[Loopback]]


# -- the call list ----------------------------------------------------------------------------------------------------


async def test_a_call_list_becomes_a_page(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    budget = FakeBudget()
    body = orjson.dumps({"success": True, "count": 2, "records": [ROW, {"rid": None}]})
    mocked.get(LIST, body=body, headers={"Date": "Tue, 01 Jul 2025 21:00:00 GMT"})

    [page] = await listed(connect(http, budget))

    assert [type(row).__name__ for row in page.rows] == ["Record", "InvalidRow"]
    assert page.server_time == datetime(2025, 7, 1, 21, tzinfo=UTC)
    assert page.size_bytes == len(body)
    assert budget.spent == [Purpose.POLL]


async def test_no_calls_are_still_a_page(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    mocked.get(LIST, payload={"success": True, "count": 0, "records": []})

    [page] = await listed(connect(http))

    assert (list(page.rows), page.server_time) == ([], None)


@pytest.mark.parametrize(
    ("auth", "header", "value"), [("x-api-key", "x-api-key", KEY), ("bearer", "Authorization", f"Bearer {KEY}")]
)
async def test_the_key_is_sent_in_the_configured_header(
    mocked: aioresponses, http: aiohttp.ClientSession, auth: str, header: str, value: str
) -> None:
    mocked.get(LIST, payload={"records": []})

    await listed(connect(http, auth=auth, proxy_url="http://127.0.0.1:3128"))

    [[call]] = mocked.requests.values()
    assert call.kwargs["headers"][header] == value
    assert [name.lower() for name in call.kwargs["headers"] if name.lower() in ("x-api-key", "authorization")] == [
        header.lower()
    ]
    assert call.kwargs["allow_redirects"] is False
    assert call.kwargs["proxy"] == "http://127.0.0.1:3128"


async def test_the_lower_bound_is_in_the_sources_zone(serve: Serve, http: aiohttp.ClientSession) -> None:
    async def nothing(_request: web.Request) -> web.Response:
        return web.json_response({"success": True, "count": 0, "records": []})

    server = await serve(nothing)

    await listed(connect(http, base_url=server.base_url, timezone="America/New_York"))

    [request] = server.requests
    assert request.raw_path == "/call_log/records_after_timestamp?timestamp=2025-07-01%2010%3A53%3A43"


async def test_the_purpose_of_the_window_is_spent(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    budget = FakeBudget()
    mocked.get(LIST, payload={"records": []})

    await listed(connect(http, budget), Window(WINDOW.since, WINDOW.until, Purpose.BACKFILL))

    assert budget.spent == [Purpose.BACKFILL]


async def test_nothing_is_requested_beyond_the_budget(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    client = connect(http, FakeBudget(exhausted=True))

    with pytest.raises(OverBudget):
        await listed(client)
    with pytest.raises(OverBudget):
        await fetched(client)
    with pytest.raises(OverBudget):
        await client.search(["+12125551234"])
    with pytest.raises(OverBudget):
        await client.changes_after(1)
    health = await client.health()

    assert not health.ok
    assert not mocked.requests


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": 400, "payload": {"error": "Missing timestamp in query"}}, UnexpectedResponse),
        ({"status": 401, "payload": {"error": "Missing API key"}}, Unauthorized),
        ({"status": 403, "payload": {"error": "Invalid API key"}}, Unauthorized),
        ({"status": 404, "body": "<html>"}, UnexpectedResponse),
        ({"status": 204}, UnexpectedResponse),
        ({"status": 206, "payload": {"success": True, "count": 0, "records": []}}, UnexpectedResponse),
        ({"status": 302, "headers": {"Location": "https://elsewhere.example/"}}, UnexpectedResponse),
        ({"status": 429, "payload": {"error": "Too many requests for this API key"}}, RateLimited),
        ({"status": 500, "payload": {"error": "Internal server error"}}, Unavailable),
        ({"status": 503, "body": ""}, Unavailable),
        ({"status": 200, "body": "<html>login</html>"}, UnexpectedResponse),
        ({"status": 200, "payload": []}, UnexpectedResponse),
        ({"status": 200, "payload": {"success": False, "count": 0, "records": []}}, UnexpectedResponse),
        ({"status": 200, "payload": {"success": True, "count": 3, "records": [ROW]}}, UnexpectedResponse),
        ({"timeout": True}, Unavailable),
        ({"exception": aiohttp.ServerDisconnectedError()}, Unavailable),
        ({"exception": aiohttp.ClientPayloadError("cut")}, Unavailable),
        ({"exception": ConnectionResetError("reset")}, Unavailable),
    ],
)
async def test_every_other_response_is_an_error_without_the_key(
    mocked: aioresponses, http: aiohttp.ClientSession, answer: dict[str, Any], error: type[ProviderError]
) -> None:
    mocked.get(LIST, **answer)

    with pytest.raises(error) as caught:
        await listed(connect(http))

    assert type(caught.value) is error
    assert KEY not in str(caught.value)
    assert "WebFones" in str(caught.value)


async def test_a_redirect_is_not_followed(serve: Serve, http: aiohttp.ClientSession) -> None:
    """The key would be sent to the address of the redirect."""

    async def away(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    server = await serve(away)

    with pytest.raises(UnexpectedResponse, match="redirected"):
        await listed(connect(http, base_url=server.base_url))

    assert len(server.requests) == 1


async def test_a_429_names_its_bucket_and_its_wait(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    text = {"error": "Too many requests from this IP, please try again later."}
    mocked.get(LIST, status=429, payload=text, headers={"RateLimit-Reset": "600"})

    with pytest.raises(RateLimited) as caught:
        await listed(connect(http))

    assert (caught.value.bucket, caught.value.retry_after_s) == ("ip", 600)


async def test_a_closed_port_is_unavailable(http: aiohttp.ClientSession, free_port: int) -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
        await listed(connect(http, base_url=f"http://127.0.0.1:{free_port}"))


async def test_a_list_that_takes_too_long_is_unavailable(
    serve: Serve, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "LIST", aiohttp.ClientTimeout(total=0.1))
    let_go = asyncio.Event()

    async def stalls(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"records": [')
        await let_go.wait()
        return response

    server = await serve(stalls)

    with pytest.raises(Unavailable, match="too long"):
        await listed(connect(http, base_url=server.base_url))

    let_go.set()


async def test_a_list_that_is_cut_off_is_unavailable(serve: Serve, http: aiohttp.ClientSession) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"records": [')
        assert request.transport is not None
        request.transport.close()
        return response

    server = await serve(cut)

    with pytest.raises(Unavailable):
        await listed(connect(http, base_url=server.base_url))


async def test_a_long_list_is_cut_into_pages_in_order(serve: Serve, http: aiohttp.ClientSession) -> None:
    rows = [{**ROW, "rid": rid} for rid in range(1, 4502)]
    body = orjson.dumps({"success": True, "count": len(rows), "records": rows})

    async def many(_request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(body), headers={"Content-Encoding": "gzip"})

    server = await serve(many)

    pages = await listed(connect(http, base_url=server.base_url))

    assert [len(page.rows) for page in pages] == [2000, 2000, 501]
    assert [getattr(row, "key", None) for page in pages for row in page.rows] == [str(row["rid"]) for row in rows]
    assert sum(page.size_bytes for page in pages) == len(body)


async def test_a_body_over_a_mebibyte_is_parsed_off_the_event_loop(serve: Serve, http: aiohttp.ClientSession) -> None:
    filler = "x" * (2 * 1024 * 1024)
    body = orjson.dumps({"success": True, "count": 1, "records": [{**ROW, "filler": filler}]})

    async def big(_request: web.Request) -> web.Response:
        return web.Response(body=body)

    server = await serve(big)

    [page] = await listed(connect(http, base_url=server.base_url))

    assert getattr(page.rows[0], "key", None) == "211159"


async def test_a_body_that_decompresses_beyond_the_limit_is_rejected(
    serve: Serve, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes may unpack to gigabytes; what counts is what they unpack to."""
    monkeypatch.setattr(http_module, "MAX_BODY_BYTES", 1024 * 1024)
    bomb = gzip.compress(b" " * (8 * 1024 * 1024))
    assert len(bomb) < 10_000

    async def explode(_request: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    server = await serve(explode)

    with pytest.raises(UnexpectedResponse, match="more than 1 MiB"):
        await listed(connect(http, base_url=server.base_url))


# -- recordings -------------------------------------------------------------------------------------------------------


async def test_a_recording_is_streamed_as_it_arrives(serve: Serve, http: aiohttp.ClientSession) -> None:
    """The first part can be taken while the rest has not been sent."""
    budget = FakeBudget()
    first, rest = b"RIFF" + b"\0" * 60, bytes(range(256)) * 4096
    first_was_taken = asyncio.Event()

    async def audio(request: web.Request) -> web.StreamResponse:
        length = str(len(first) + len(rest))
        response = web.StreamResponse(headers={"Content-Type": "audio/wav; rate=8000", "Content-Length": length})
        await response.prepare(request)
        await response.write(first)
        await first_was_taken.wait()
        await response.write(rest)
        return response

    server = await serve(audio)

    async with connect(http, budget, base_url=server.base_url).recording("211159", purpose=Purpose.RETRY) as answer:
        assert isinstance(answer, Audio)
        taken = [await anext(answer.chunks)]
        first_was_taken.set()
        taken += [chunk async for chunk in answer.chunks]

    assert b"".join(taken) == first + rest
    assert (answer.content_type, answer.size_bytes) == ("audio/wav", len(first) + len(rest))
    assert server.requests[0].path == "/call_log/recording/211159"
    assert server.requests[0].headers["Accept-Encoding"] == "identity"
    assert budget.spent == [Purpose.RETRY]


async def test_a_recording_of_unknown_length_has_no_size(serve: Serve, http: aiohttp.ClientSession) -> None:
    async def audio(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-unheard-of"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"RIFF")
        return response

    server = await serve(audio)

    async with connect(http, base_url=server.base_url).recording("211159") as answer:
        assert isinstance(answer, Audio)
        assert [chunk async for chunk in answer.chunks] == [b"RIFF"]

    assert (answer.content_type, answer.size_bytes) == ("application/octet-stream", None)


async def test_a_recording_can_be_abandoned_half_way(serve: Serve, http: aiohttp.ClientSession) -> None:
    async def audio(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(1024 * 1024), content_type="audio/wav")

    server = await serve(audio)
    client = connect(http, base_url=server.base_url)

    async def give_up() -> None:
        async with client.recording("211159") as answer:
            assert isinstance(answer, Audio)
            await anext(answer.chunks)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await give_up()

    assert await fetched(client) == bytes(1024 * 1024)


async def test_a_recording_that_is_cut_off_is_unavailable(serve: Serve, http: aiohttp.ClientSession) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "audio/wav", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"RIFF")
        assert request.transport is not None
        request.transport.close()
        return response

    server = await serve(cut)

    with pytest.raises(Unavailable, match="a recording"):
        await fetched(connect(http, base_url=server.base_url))


async def test_a_recording_that_stalls_is_unavailable(
    serve: Serve, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "AUDIO", aiohttp.ClientTimeout(total=None, sock_read=0.1))
    let_go = asyncio.Event()

    async def stalls(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "audio/wav"})
        await response.prepare(request)
        await response.write(b"RIFF")
        await let_go.wait()
        return response

    server = await serve(stalls)

    with pytest.raises(Unavailable, match="too long"):
        await fetched(connect(http, base_url=server.base_url))

    let_go.set()


@pytest.mark.parametrize(
    ("status", "text", "answer"),
    [
        (404, "No recording available", NoRecordingYet()),
        (404, "Recording not found", NoSuchCall()),
        (400, "Invalid record ID", NoSuchCall()),
    ],
)
async def test_a_call_without_a_recording_is_a_value(
    mocked: aioresponses,
    http: aiohttp.ClientSession,
    status: int,
    text: str,
    answer: NoRecordingYet | NoSuchCall,
) -> None:
    mocked.get(RECORDING, status=status, payload={"error": text})

    assert await fetched(connect(http)) == answer


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": 404, "body": "<html>nginx"}, UnexpectedResponse),
        ({"status": 401}, Unauthorized),
        ({"status": 429}, RateLimited),
        ({"status": 502, "payload": {"error": "Failed to fetch recording"}}, Unavailable),
        ({"status": 206, "body": b"RIFF", "content_type": "audio/wav"}, UnexpectedResponse),
        ({"status": 302, "headers": {"Location": "https://storage.example/"}}, UnexpectedResponse),
        ({"status": 200, "payload": {"error": "none"}}, UnexpectedResponse),
        ({"status": 200, "body": "<html>", "content_type": "text/html"}, UnexpectedResponse),
        ({"status": 200, "body": b"", "content_type": "audio/wav"}, UnexpectedResponse),
        ({"timeout": True}, Unavailable),
    ],
)
async def test_a_recording_that_is_not_audio_is_an_error(
    mocked: aioresponses, http: aiohttp.ClientSession, answer: dict[str, Any], error: type[ProviderError]
) -> None:
    mocked.get(RECORDING, **answer)

    with pytest.raises(error):
        await fetched(connect(http))


@pytest.mark.parametrize("key", ["", "../../status", "1/2", "12a", "٣"])
async def test_a_key_that_is_not_a_number_is_never_requested(
    mocked: aioresponses, http: aiohttp.ClientSession, key: str
) -> None:
    assert await fetched(connect(http), key) == NoSuchCall()
    assert not mocked.requests


# -- contacts ---------------------------------------------------------------------------------------------------------


async def test_contacts_are_searched_by_digits_and_returned_by_e164(
    mocked: aioresponses, http: aiohttp.ClientSession
) -> None:
    budget = FakeBudget()
    mocked.post(SEARCH, payload={"2125551234": [{"uuid": "1", "firstname": "John", "api_key": "x"}], "4165551234": []})

    contacts = await connect(http, budget).search(["+12125551234", "+14165551234", "3203"])

    assert contacts == {"+12125551234": [Contact(id="1", name="John")], "+14165551234": [], "3203": ()}
    [[call]] = mocked.requests.values()
    assert call.kwargs["json"] == {"phone_numbers": ["2125551234", "4165551234"]}
    assert budget.spent == [Purpose.CONTACTS]


async def test_extensions_alone_are_not_looked_up(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    budget = FakeBudget()

    assert await connect(http, budget).search(["3203", "x12"]) == {"3203": (), "x12": ()}
    assert not mocked.requests
    assert not budget.spent


async def test_more_numbers_than_one_request_may_carry_are_rejected(http: aiohttp.ClientSession) -> None:
    client = connect(http)

    with pytest.raises(ValueError, match="at most 50"):
        await client.search([f"+1212555{n:04d}" for n in range(client.batch + 1)])


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": 403}, Unauthorized),
        ({"status": 503, "payload": {"error": "Contacts service unavailable"}}, Unavailable),
        ({"payload": []}, UnexpectedResponse),
        ({"payload": {"error": "odd"}}, UnexpectedResponse),
        ({"body": "<html>"}, UnexpectedResponse),
        ({"timeout": True}, Unavailable),
    ],
)
async def test_a_failed_search_is_an_error_without_numbers(
    mocked: aioresponses, http: aiohttp.ClientSession, answer: dict[str, Any], error: type[ProviderError]
) -> None:
    mocked.post(SEARCH, **answer)

    with pytest.raises(error) as caught:
        await connect(http).search(["+12125551234"])

    assert "2125551234" not in str(caught.value)


async def test_the_address_book_reports_its_newest_version(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    mocked.get(
        f"{BASE}/contacts/contactsAfterVersion/4",
        payload={"updated": [{"uuid": "a", "version": 5}], "deleted": [{"uuid": "b", "version": 6}]},
    )

    assert await connect(http).changes_after(4) == ContactChanges(version=6, changed=True)


# -- health -----------------------------------------------------------------------------------------------------------


async def test_health_takes_two_requests_and_only_one_carries_the_key(
    mocked: aioresponses, http: aiohttp.ClientSession
) -> None:
    budget = FakeBudget()
    mocked.get(f"{BASE}/health", payload={"status": "healthy", "services": ["contacts", "call_logs"]})
    mocked.get(f"{BASE}/status", payload={"status": "ok", "services": {"contacts": {"status": "online"}}})

    health = await connect(http, budget).health()

    assert health.ok
    assert list(health.lines) == [
        "gateway: healthy (contacts, call_logs)",
        "key accepted; services: contacts online",
    ]
    assert len(budget.spent) == 2
    keyed = {url.path: "x-api-key" in call.kwargs["headers"] for (_, url), [call] in mocked.requests.items()}
    assert keyed == {"/health": False, "/status": True}


async def test_bad_health_is_reported_and_never_raised(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    mocked.get(f"{BASE}/health", timeout=True)
    mocked.get(f"{BASE}/status", status=403)

    health = await connect(http).health()

    assert not health.ok
    assert "too long" in health.lines[0]
    assert "rejected the key" in health.lines[1]


# -- options ----------------------------------------------------------------------------------------------------------


async def test_a_key_file_is_read_for_each_request(
    mocked: aioresponses, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    client = connect(http, api_key=None, api_key_file=path)
    mocked.get(LIST, payload={"records": []}, repeat=True)

    path.write_text("first\n")
    await listed(client)
    path.write_text("second\n")
    await listed(client)

    [calls] = mocked.requests.values()
    assert [call.kwargs["headers"]["x-api-key"] for call in calls] == ["first", "second"]


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two words", b"\xff\xfe", "schlüssel".encode()])
async def test_a_key_file_without_a_key_is_an_error_and_nothing_is_requested(
    mocked: aioresponses, http: aiohttp.ClientSession, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    budget = FakeBudget()
    client = connect(http, budget, api_key=None, api_key_file=path)

    with pytest.raises(SettingsError, match="api_key_file"):
        WEBFONES.credential(options(api_key=None, api_key_file=path))
    with pytest.raises(SettingsError, match="api_key_file"):
        await listed(client)
    assert not budget.spent
    assert not mocked.requests


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"api_key": None}, "exactly one"),
        ({"api_key_file": Path("/run/secrets/key")}, "exactly one"),
        ({"api_key": ""}, "single word"),
        ({"api_key": "two words"}, "single word"),
        ({"api_key": "line\nbreak"}, "single word"),
        ({"base_url": "api.webfones.com"}, "base_url"),
        ({"base_url": "ftp://api.webfones.com"}, "base_url"),
        ({"base_url": "https://"}, "base_url"),
        ({"base_url": "https://host:99999"}, "base_url"),
        ({"base_url": "https://user:pw@host"}, "user name"),
        ({"base_url": "https://host/?a=1"}, "base_url"),
        ({"base_url": "https://ho st"}, "base_url"),
        ({"auth": "basic"}, "x-api-key"),
        ({"timezone": "Mars/Olympus"}, "not a valid time zone"),
        ({"colour": "green"}, "colour"),
    ],
)
def test_an_invalid_option_is_rejected_without_showing_the_key(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        options(**changes)

    assert sentence in str(caught.value)
    assert KEY not in str(caught.value)


def test_options_hide_the_key_and_strip_the_url() -> None:
    given = options(base_url="https://pbx.example:2343/api/")

    assert given.base_url == "https://pbx.example:2343/api"
    assert KEY not in repr(given)
    assert WEBFONES.credential(given) == KEY
    assert options().base_url == BASE


async def test_the_registry_can_connect(mocked: aioresponses, http: aiohttp.ClientSession) -> None:
    mocked.get(LIST, payload={"records": []})

    provider = WEBFONES.connect(WEBFONES.options(api_key=KEY), http, FakeBudget())
    pages = [page async for page in provider.calls.pages(WINDOW)]

    assert len(pages) == 1
    assert provider.recordings is not None
    assert provider.contacts is not None
    assert [str(url.with_query(None)) for _, url in mocked.requests] == [str(URL(LIST).with_query(None))]
