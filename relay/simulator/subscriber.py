"""A subscriber that verifies every delivery, accepts it with 204, and reports what must never happen."""

import asyncio
import hmac
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Final, Protocol

import orjson
from aiohttp import web

from relay.delivery import signature
from relay.domain.json import Json
from relay.simulator.hook_log import Arrival, HookLog, HookReport, read_event
from relay.simulator.server import Listener, json_response, listen

# How far a timestamp may be from now: what the Standard Webhooks libraries allow.
_TOLERANCE_S: Final = 300


class Reply(Protocol):
    """How a verified delivery is answered. `accepts`: whether the subscriber acts on the event."""

    @property
    def accepts(self) -> bool: ...

    async def send(self, request: web.BaseRequest, listener: Listener) -> web.StreamResponse: ...


class Accept:
    accepts = True

    async def send(self, request: web.BaseRequest, listener: Listener) -> web.StreamResponse:
        return web.Response(status=204)


ACCEPT: Final = Accept()


class VerifyingSubscriber:
    """Any number of hooks at `/hook/{name}`, each with its own secrets.

    `verify_every` checks one signature in so many (1: all). `keep_bodies` keeps each event's first body for
    `events`; `keep_arrivals` keeps one `Arrival` per delivery. Both cost memory: a benchmark turns them off.
    """

    def __init__(self, *, verify_every: int = 1, keep_bodies: bool = True, keep_arrivals: bool = True) -> None:
        self.verify_every = verify_every
        self.keep_bodies = keep_bodies
        self.keep_arrivals = keep_arrivals
        self.hooks: dict[str, HookLog] = {}
        self._secrets: dict[str, Sequence[str]] = {}
        self._changed = asyncio.Event()

    def add_hook(self, name: str, *secrets: str) -> None:
        """Open `/hook/{name}`, or replace its secrets; any of them may sign, and without one nothing is verified.

        Raises ValueError for an invalid secret.
        """
        for secret in secrets:
            signature.decode_secret(secret)
        self._secrets[name] = secrets
        self.hooks.setdefault(name, HookLog(name))

    def reply_to(self, hook: str) -> Reply:
        """Choose how the next verified delivery to a hook is answered."""
        return ACCEPT

    def signature_error(self, secrets: Sequence[str], body: bytes, headers: Mapping[str, str]) -> str:
        """Say why no secret verifies a delivery; empty when one does."""
        return signature_error([signature.decode_secret(secret) for secret in secrets], body, headers, now=time.time())

    # What was received

    def arrivals(self, name: str) -> tuple[Arrival, ...]:
        return tuple(self.hooks[name].arrivals)

    def event(self, name: str, event_id: str) -> Json | None:
        body = self.hooks[name].bodies.get(event_id)
        event: Json | None = None if body is None else orjson.loads(body)
        return event

    def report(self, name: str) -> HookReport:
        return self.hooks[name].report()

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
        """Wait until `condition` is true, testing it at each delivery; raises TimeoutError when it stays false."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    # Over HTTP

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        return listen(self._handle, host=host, port=port, ssl_context=ssl_context)

    async def control(self, request: web.BaseRequest) -> web.Response:
        return json_response(self.state(arrivals="arrivals" in request.query))

    def state(self, *, arrivals: bool = False) -> Json:
        hooks: Json = {}
        for name, log in self.hooks.items():
            report = log.report()
            hooks[name] = {
                **asdict(report),
                "completed": sorted(report.completed),
                "problems": report.problems(),
                "in_flight": log.in_flight,
            }
            if arrivals:
                hooks[name]["arrivals"] = [asdict(arrival) for arrival in log.arrivals]
        return {"verify_every": self.verify_every, "hooks": hooks}

    async def _handle(self, request: web.BaseRequest, listener: Listener) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if path == "/_control":
            return await self.control(request)
        hook = self.hooks.get(path.removeprefix("/hook/"))
        if hook is None or not path.startswith("/hook/"):
            return json_response({"error": "no such hook"}, status=404)
        if request.method != "POST":
            return json_response({"error": "only POST"}, status=405)
        hook.in_flight += 1
        hook.in_flight_peak = max(hook.in_flight_peak, hook.in_flight)
        try:
            return await self.deliver(request, listener, hook)
        finally:
            hook.in_flight -= 1
            self._changed.set()

    async def deliver(self, request: web.BaseRequest, listener: Listener, hook: HookLog) -> web.StreamResponse:
        body = await request.read()
        hook.posts += 1
        secrets = self._secrets[hook.name]
        if secrets and (hook.posts - 1) % self.verify_every == 0:
            error = self.signature_error(secrets, body, request.headers)
            if error:
                hook.signature_reasons[error] += 1
                return web.Response(status=401)
        event = read_event(body)
        if event is None:
            hook.unreadable += 1
            return web.Response(status=400)
        reply = self.reply_to(hook.name)
        event_id = request.headers.get("webhook-id", event.id)
        call = hook.record(
            event,
            event_id,
            body,
            accepted=reply.accepts,
            keep_body=self.keep_bodies,
            keep_arrival=self.keep_arrivals,
        )
        self._changed.set()
        call.answering[event_id] += 1
        try:
            return await reply.send(request, listener)
        finally:
            call.answering[event_id] -= 1


def signature_error(keys: Sequence[bytes], body: bytes, headers: Mapping[str, str], *, now: float) -> str:
    """Say why no key verifies a delivery by Standard Webhooks 1.0; empty when one does. `now` is Unix time."""
    try:
        timestamp = int(headers.get("webhook-timestamp", ""))
    except ValueError:
        return "Missing or invalid timestamp"
    if abs(now - timestamp) > _TOLERANCE_S:
        return "Message timestamp too old" if timestamp < now else "Message timestamp too new"
    expected = signature.headers(headers.get("webhook-id", ""), timestamp, body, keys)["webhook-signature"].split()
    received = headers.get("webhook-signature", "").split(" ")
    # On bytes: a header may hold anything, and compare_digest refuses text that is not ASCII.
    matches = [hmac.compare_digest(a.encode(), b.encode("utf-8", "replace")) for a in expected for b in received]
    return "" if any(matches) else "No matching signature found"
