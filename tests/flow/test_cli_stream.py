"""`relay tail` and `relay listen`: live events in the terminal, and posted to a program under development."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from tests.flow.api import TOKEN, ApiClient
from tests.flow.cli import environ_for, run, start


async def wait_for_line(process: asyncio.subprocess.Process, text: str) -> str:
    """Wait for a line on stderr and return it."""
    assert process.stderr is not None
    async with asyncio.timeout(30):
        async for line in process.stderr:
            if text in line.decode():
                return line.decode()
    raise AssertionError(f"{text!r} never appeared on stderr")


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    """Serve on loopback."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_tail_prints_events_as_they_are_published(api: ApiClient) -> None:
    """One JSON document per line, only what the filters match, until --count."""
    process = await start(
        "tail", "--json", "--count", "2", "--type", "call.*", "--source", "main", environ=environ_for(api.base, TOKEN)
    )
    await wait_for_line(process, "Listening at")

    await api.post("/v1/subscriptions/a/test")
    first = await api.publish_call("main", "1")
    second = await api.publish_call("main", "2")
    out, _ = await process.communicate()

    events = [json.loads(line) for line in out.splitlines()]
    assert [each["id"] for each in events] == [first, second]
    assert process.returncode == 0


async def test_ctrl_c_is_the_normal_end_of_tail(api: ApiClient) -> None:
    """Exit code 0 and no further output."""
    process = await start("tail", environ=environ_for(api.base, TOKEN))
    await wait_for_line(process, "Listening at")
    eid = await api.publish_call("main", "1")
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()

    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()

    assert eid in line
    assert "inbound  no_answer" in line
    assert (process.returncode, out, err) == (0, b"", b"")


def event(number: int) -> dict[str, Any]:
    data = {"subscription": {"id": "a", "reason": f"number {number}"}}
    return {"id": f"evt_{number}", "type": "subscription.failing", "timestamp": "2026-11-20T12:00:00Z", "data": data}


async def test_tail_resumes_after_the_last_event_when_the_stream_breaks() -> None:
    """Reported once, reopened with Last-Event-ID, and events that cannot be resent are noted."""
    asked: list[str | None] = []

    async def stream(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Last-Event-ID"))
        if len(asked) == 2:
            return web.json_response({"code": "store_unavailable", "detail": "Not now."}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        number = len(asked)
        gap = b'event: gap\ndata: {"missed":7}\n\n' if number == 3 else b""
        document = json.dumps(event(number)).encode()
        await response.write(b"retry: 10\n\n" + gap + b": hello\n\nid: evt_%d\ndata: %s\n\n" % (number, document))
        return response

    async with serving(web.get("/v1/events/stream", stream)) as url:
        ran = await run("tail", "--count", "2", "--json", "--after", "evt_0", environ=environ_for(url, "t"))

    assert ran.code == 0, ran.err
    assert [each["id"] for each in ran.lines] == ["evt_1", "evt_3"]
    assert asked == ["evt_0", "evt_1", "evt_1"]
    assert "Disconnected: the stream ended. Reconnecting …" in ran.err
    assert ran.err.count("Disconnected") == 1
    assert "Reconnected." in ran.err
    assert "7 events published meanwhile" in ran.err


async def test_a_stream_that_is_refused_at_first_is_not_retried() -> None:
    """Retrying would never succeed."""

    async def stream(_: web.Request) -> web.Response:
        return web.json_response({"code": "not_found", "detail": "Source not found."}, status=404)

    async with serving(web.get("/v1/events/stream", stream)) as url:
        ran = await run("tail", "--source", "unknown", environ=environ_for(url, "t"))

    assert (ran.code, ran.out, ran.err) == (1, "", "Source not found.\n")


async def test_an_invalid_stream_ends_with_a_message() -> None:
    """No traceback, whatever the server sends."""

    async def stream(_: web.Request) -> web.Response:
        return web.Response(text="data: {not json\n\n", content_type="text/event-stream")

    async with serving(web.get("/v1/events/stream", stream)) as url:
        ran = await run("tail", environ=environ_for(url, "t"))

    assert ran.code == 1
    assert f"the stream of {url} cannot be read" in ran.err


Hook = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def listening(api: ApiClient, hook: Hook, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `relay listen`, forwarding to a program."""
    async with serving(web.post("/hook", hook)) as url:
        process = await start(
            "listen", "--forward", f"{url}/hook", "--json", *options, environ=environ_for(api.base, TOKEN)
        )
        try:
            await wait_for_line(process, "Listening at")
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def next_line(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return json.loads(await process.stdout.readline())


async def test_listen_posts_what_a_subscriber_would_be_sent(api: ApiClient) -> None:
    """Signed with the printed secret; each answer is shown; the API token is not forwarded."""
    got: list[tuple[bytes, dict[str, str]]] = []

    async def hook(request: web.Request) -> web.Response:
        got.append((await request.read(), dict(request.headers)))
        return web.Response(status=200 if len(got) == 1 else 500, text="thank\nyou \x1b[31m")

    async with listening(api, hook) as process:
        secret = (await next_line(process))["secret"]
        eid = await api.publish_call("main", "1")
        first = await next_line(process)
        await api.publish_call("main", "2")
        second = await next_line(process)

    body, headers = got[0]
    verified = Webhook(secret).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 44).verify(body, headers)
    assert verified["id"] == eid == headers["webhook-id"]
    assert headers["Content-Type"] == "application/json"
    assert TOKEN not in str(headers)
    assert (first["event_id"], first["event_type"], first["status"]) == (eid, "call.completed", 200)
    assert first["answer"].startswith("thank you")
    assert second["status"] == 500


async def test_listen_follows_no_redirect_and_survives_a_broken_connection(api: ApiClient) -> None:
    """Each is a result like any other, and the next event is posted."""
    asked: list[str] = []

    async def hook(request: web.Request) -> web.Response:
        asked.append(request.path)
        if len(asked) == 2 and request.transport is not None:
            request.transport.abort()
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    async with listening(api, hook, "--payload", "flat") as process:
        await next_line(process)
        await api.publish_call("main", "1")
        redirected = await next_line(process)
        await api.publish_call("main", "2")
        cut_off = await next_line(process)

    assert (redirected["status"], redirected["answer"]) == (302, "a redirect; redirects are not followed")
    assert cut_off["status"] is None
    assert cut_off["answer"].startswith("no valid HTTP answer")
    assert asked == ["/hook", "/hook"]


async def test_listen_reports_a_program_that_is_not_running(api: ApiClient, free_port: int, tmp_path: Any) -> None:
    """A secret from a file is not printed."""
    secret = tmp_path / "secret"
    secret.write_text("whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz\n")
    process = await start(
        "listen", "--forward", f"localhost:{free_port}/hook", "--count", "1", "--secret", f"@{secret}",
        environ=environ_for(api.base, TOKEN),
    )  # fmt: skip
    await wait_for_line(process, "Listening at")

    await api.publish_call("main", "1")
    out, err = await process.communicate()

    assert process.returncode == 0
    assert b"cannot connect: connection refused" in out
    assert b"whsec_" not in out + err


@pytest.mark.parametrize("forward", ["ftp://localhost/x", "http://", "http://localhost:0/", "http://a b/"])
async def test_listen_rejects_an_invalid_address(forward: str) -> None:
    """Before any connection is opened."""
    ran = await run("listen", "--forward", forward, environ=environ_for("http://127.0.0.1:9", "t"))

    assert ran.code == 2
    assert ran.err.startswith("--forward: must look like http://localhost:3000/hook: ")
