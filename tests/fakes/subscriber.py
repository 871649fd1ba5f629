"""A subscriber that answers each delivery as scripted, and verifies signatures with the independent library."""

import asyncio
import random
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from relay.domain.json import Json
from relay.simulator.hook_log import HookLog, HookReport
from relay.simulator.server import Listener, json_response
from relay.simulator.subscriber import ACCEPT, Reply, VerifyingSubscriber
from tests.fakes.wire import hang_up, write_raw

_CHUNK = b"x" * 65_536
_GZIP_STEP_BYTES = 1 << 20


class ReplyKind(StrEnum):
    """How a POST is answered."""

    ANSWER = "answer"
    HANG = "hang"
    ACT_THEN_HANG = "act_then_hang"
    DRIP = "drip"
    DRIP_HEAD = "drip_head"
    HALF_HEAD = "half_head"
    RESET = "reset"
    ENDLESS = "endless"
    BIG = "big"
    GZIP_BOMB = "gzip_bomb"


_SENDS_STATUS = {ReplyKind.ANSWER, ReplyKind.DRIP, ReplyKind.ENDLESS, ReplyKind.BIG, ReplyKind.GZIP_BOMB}


class ScriptedReply(BaseModel):
    """How to answer the next `times` deliveries (None: all from now on).

    `delay_s` passes before anything is sent. `probability` below 1 makes it flaky: the other deliveries are accepted.
    `size_bytes` is the body of BIG (as sent) and of GZIP_BOMB (as unpacked), `every_s` the pace of DRIP and DRIP_HEAD.
    A redirect is an ANSWER with a 3xx and a `Location`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ReplyKind = ReplyKind.ANSWER
    status: int = Field(200, ge=200, le=599)
    times: int | None = Field(None, ge=1)
    headers: dict[str, str] = Field(default_factory=dict)
    body: str = ""
    delay_s: float = Field(0.0, ge=0)
    every_s: float = Field(1.0, gt=0)
    size_bytes: int = Field(1_000_000_000, ge=0)
    probability: float = Field(1.0, ge=0, le=1)

    @property
    def accepts(self) -> bool:
        return self.kind is ReplyKind.ACT_THEN_HANG or (self.kind in _SENDS_STATUS and self.status < 300)

    async def send(self, request: web.BaseRequest, listener: Listener) -> web.StreamResponse:
        if self.delay_s:
            await listener.wait(self.delay_s)
        match self.kind:
            case ReplyKind.ANSWER:
                return web.Response(status=self.status, headers=self.headers, text=self.body or None)
            case ReplyKind.HANG | ReplyKind.ACT_THEN_HANG:
                await listener.wait(None)
                return await hang_up(request)
            case ReplyKind.RESET:
                return await hang_up(request, reset=True)
            case ReplyKind.HALF_HEAD:
                write_raw(request, f"HTTP/1.1 {self.status} OK\r\nContent-Type: text/pl".encode())
                return await hang_up(request)
            case ReplyKind.DRIP_HEAD:
                return await self._drip_head(request, listener)
            case ReplyKind.DRIP:
                return await self._stream(request, {}, _drip(listener, self.every_s))
            case ReplyKind.ENDLESS:
                return await self._stream(request, {}, _endless(listener))
            case ReplyKind.BIG:
                return await self._stream(request, {"Content-Length": str(self.size_bytes)}, _big(self.size_bytes))
            case ReplyKind.GZIP_BOMB:
                return await self._stream(request, {"Content-Encoding": "gzip"}, _gzip_bomb(self.size_bytes))

    async def _stream(
        self, request: web.BaseRequest, headers: Mapping[str, str], chunks: AsyncIterator[bytes]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=self.status, headers={**self.headers, **headers})
        await response.prepare(request)
        async for chunk in chunks:
            await response.write(chunk)
        return response

    async def _drip_head(self, request: web.BaseRequest, listener: Listener) -> web.Response:
        head = f"HTTP/1.1 {self.status} OK\r\nContent-Length: 0\r\nX-Padding: {'.' * 100_000}\r\n\r\n"
        for char in head:
            if listener.closing.is_set() or request.transport is None:
                break
            write_raw(request, char.encode())
            await listener.wait(self.every_s)
        return await hang_up(request)


class SubscriberControl(BaseModel):
    """The body of `POST /_control`; `hooks` (secrets) and `replies` are by the hook's name."""

    model_config = ConfigDict(extra="forbid")

    hooks: dict[str, list[str]] = Field(default_factory=dict)
    replies: dict[str, list[ScriptedReply]] = Field(default_factory=dict)
    verify_every: int | None = Field(None, ge=1)
    forget: bool = False


@dataclass(frozen=True, slots=True)
class SubscriberReport:
    """The reports of all hooks, by name."""

    hooks: Mapping[str, HookReport]

    def lost(self, expected: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """`HookReport.lost` of each hook that lost anything."""
        wanted = set(expected)
        return {name: lost for name, hook in self.hooks.items() if (lost := hook.lost(wanted))}

    def problems(self) -> tuple[str, ...]:
        return tuple(f"{name}: {sentence}" for name, hook in self.hooks.items() for sentence in hook.problems())

    @property
    def duplicates(self) -> int:
        """How often an event was accepted again, over all hooks."""
        return sum(sum(hook.duplicates.values()) for hook in self.hooks.values())


class ScriptedSubscriber(VerifyingSubscriber):
    """A verifying subscriber whose hooks reply as scripted."""

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._rng = random.Random(seed)
        self._scripts: dict[str, deque[ScriptedReply]] = {}
        self._last_headers: dict[str, Mapping[str, str]] = {}

    def script(self, name: str, *replies: ScriptedReply) -> None:
        """Reply in these ways, one after the other as their `times` run out, and then accept."""
        if name not in self.hooks:
            raise KeyError(name)
        self._scripts[name] = deque(replies)

    def forget(self) -> None:
        """Forget every delivery; hooks, secrets and scripts stay."""
        self.hooks = {name: HookLog(name) for name in self.hooks}

    def last_headers(self, name: str) -> Mapping[str, str]:
        """The headers of a hook's newest POST, names in lower case."""
        return {header.lower(): value for header, value in self._last_headers.get(name, {}).items()}

    def received(self, name: str) -> int:
        return self.hooks[name].received

    def accepted(self, name: str) -> int:
        return self.hooks[name].accepted

    def completed(self, name: str) -> frozenset[str]:
        """The provider call ids whose `call.completed` was accepted."""
        return frozenset(self.hooks[name].completed)

    def events(self, name: str) -> list[Json]:
        """The body of each event, parsed, in order of its first arrival."""
        return [orjson.loads(body) for body in self.hooks[name].bodies.values()]

    def reports(self) -> SubscriberReport:
        return SubscriberReport({name: self.report(name) for name in self.hooks})

    def reply_to(self, hook: str) -> Reply:
        script = self._scripts.get(hook)
        if not script:
            return ACCEPT
        reply = script[0]
        if reply.probability < 1 and self._rng.random() >= reply.probability:
            return ACCEPT
        if reply.times is not None:
            script.popleft()
            if reply.times > 1:
                script.appendleft(reply.model_copy(update={"times": reply.times - 1}))
        return reply

    def signature_error(self, secrets: Sequence[str], body: bytes, headers: Mapping[str, str]) -> str:
        signed = {name: headers.get(name, "") for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
        errors = [error for secret in secrets if (error := _verification_error(secret, body, signed))]
        return errors[0] if len(errors) == len(secrets) else ""

    async def deliver(self, request: web.BaseRequest, listener: Listener, hook: HookLog) -> web.StreamResponse:
        self._last_headers[hook.name] = request.headers
        return await super().deliver(request, listener, hook)

    async def control(self, request: web.BaseRequest) -> web.Response:
        if request.method == "POST":
            try:
                self._apply(SubscriberControl.model_validate_json(await request.read()))
            except (ValidationError, ValueError, KeyError) as error:
                return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return await super().control(request)

    def _apply(self, message: SubscriberControl) -> None:
        for name, secrets in message.hooks.items():
            self.add_hook(name, *secrets)
        for name, replies in message.replies.items():
            self.script(name, *replies)
        if message.verify_every is not None:
            self.verify_every = message.verify_every
        if message.forget:
            self.forget()


def _verification_error(secret: str, body: bytes, headers: dict[str, str]) -> str:
    try:
        Webhook(secret).verify(body, headers, json_parse=False)
    except WebhookVerificationError as error:
        return str(error)
    except ValueError:
        return "Malformed signature"
    return ""


async def _drip(listener: Listener, every_s: float) -> AsyncIterator[bytes]:
    while not listener.closing.is_set():
        yield b"."
        await listener.wait(every_s)


async def _endless(listener: Listener) -> AsyncIterator[bytes]:
    while not listener.closing.is_set():
        yield _CHUNK
        await asyncio.sleep(0)


async def _big(size_bytes: int) -> AsyncIterator[bytes]:
    left = size_bytes
    while left > 0:
        yield _CHUNK[:left]
        left -= len(_CHUNK)
        await asyncio.sleep(0)


async def _gzip_bomb(size_bytes: int) -> AsyncIterator[bytes]:
    """A valid gzip stream of that many zeros, rounded up to MiB: one packed MiB, again and again."""
    head, step, tail = _packed_zeros()
    yield head
    count = max(1, -(-size_bytes // _GZIP_STEP_BYTES))
    for _ in range(count):
        yield step
        await asyncio.sleep(0)
    zeros, crc = bytes(_GZIP_STEP_BYTES), 0
    for _ in range(count):
        crc = zlib.crc32(zeros, crc)
        await asyncio.sleep(0)
    yield tail + crc.to_bytes(4, "little") + (count * _GZIP_STEP_BYTES % 2**32).to_bytes(4, "little")


@cache
def _packed_zeros() -> tuple[bytes, bytes, bytes]:
    """The gzip header, a MiB of zeros packed so that it may be repeated, and the end of the packed data."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    step = packer.compress(bytes(_GZIP_STEP_BYTES)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff", step, packer.flush(zlib.Z_FINISH)
