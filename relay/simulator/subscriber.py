"""A subscriber that verifies every delivery, remembers what was odd about it, and is rude when told to be.

A delivery is *received* when its POST arrived whole and its signature holds. It is *accepted* when the subscriber acted
on it: it answered 2xx, or acted and then kept quiet. A duplicate is an event that was accepted more than once; being
sent again after a refusal is a retry, and no fault.
"""

import asyncio
import base64
import hashlib
import random
import ssl
import time
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from relay.domain.json import Json
from relay.simulator.loopback import Line, hang_up, json_response, listening, write_raw

_CHUNK = b"x" * 65_536
_GZIP_STEP_BYTES = 1 << 20
_LISTED = 200


class Way(StrEnum):
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


_SENDS_ITS_STATUS = {Way.ANSWER, Way.DRIP, Way.ENDLESS, Way.BIG, Way.GZIP_BOMB}


class Behaviour(BaseModel):
    """What to do with the next `times` deliveries (None: with all from now on).

    `delay_s` comes before anything is sent. `probability` below 1 makes it flaky: the other deliveries are accepted.
    `size_bytes` is the body of BIG (sent) and GZIP_BOMB (unpacked), `every_s` the pace of DRIP and DRIP_HEAD. A
    redirect is an ANSWER with a 3xx and a `Location`. `acts` says whether the event counts as accepted: by default
    when a 2xx is sent, and for ACT_THEN_HANG.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    way: Way = Way.ANSWER
    status: int = Field(200, ge=200, le=599)
    times: int | None = Field(None, ge=1)
    headers: dict[str, str] = Field(default_factory=dict)
    body: str = ""
    delay_s: float = Field(0.0, ge=0)
    every_s: float = Field(1.0, gt=0)
    size_bytes: int = Field(1_000_000_000, ge=0)
    probability: float = Field(1.0, ge=0, le=1)
    acts: bool | None = None

    @property
    def accepts(self) -> bool:
        if self.acts is not None:
            return self.acts
        return self.way is Way.ACT_THEN_HANG or (self.way in _SENDS_ITS_STATUS and self.status < 300)


_ACCEPT = Behaviour(status=204)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One received delivery, also a refused one. `monotonic_s` is comparable between processes of one machine."""

    event_id: str
    type: str
    call_id: str | None
    provider_call_id: str | None
    revision: int | None
    accepted: bool
    monotonic_s: float
    at: datetime


@dataclass(frozen=True, slots=True)
class HookReport:
    """What one hook has seen. Of long lists the first 200 are kept; the counts are whole.

    `changed_ids` are (call id, type, revision) for which more than one event id came. `overtaken` are deliveries that
    arrived while an earlier event of their call was still refused: right only when that one's schedule had ended.
    """

    name: str
    received: int
    accepted: int
    events: int
    retries: int
    duplicates: Mapping[str, int]
    types: Mapping[str, int]
    signature_failures: int
    signature_reasons: Mapping[str, int]
    order_violations: tuple[str, ...]
    overtaken: tuple[str, ...]
    changed_ids: tuple[str, ...]
    changed_bodies: tuple[str, ...]
    mismatched_ids: tuple[str, ...]
    unreadable: int
    in_flight_peak: int
    completed: frozenset[str]

    def lost(self, expected: Iterable[str]) -> tuple[str, ...]:
        """Of the expected provider call ids those whose `call.completed` was never accepted, in order."""
        return tuple(sorted(set(expected) - self.completed))

    def problems(self) -> tuple[str, ...]:
        """Everything that must not happen, duplicates excepted (a crash may excuse one), a sentence each."""
        found = {
            f"{self.signature_failures} signatures did not verify": self.signature_failures,
            f"order per call was broken: {'; '.join(self.order_violations[:5])}": self.order_violations,
            f"ids changed: {', '.join(self.changed_ids[:5])}": self.changed_ids,
            f"bodies changed between deliveries: {', '.join(self.changed_bodies[:5])}": self.changed_bodies,
            f"webhook-id and body differ: {', '.join(self.mismatched_ids[:5])}": self.mismatched_ids,
            f"{self.unreadable} bodies were not readable": self.unreadable,
        }
        return tuple(f"{self.name}: {sentence}" for sentence, wrong in found.items() if wrong)


@dataclass(frozen=True, slots=True)
class Report:
    """All hooks by name."""

    hooks: Mapping[str, HookReport]

    def lost(self, expected: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """By hook, what `HookReport.lost` says, where anything was lost."""
        wanted = set(expected)
        return {name: lost for name, hook in self.hooks.items() if (lost := hook.lost(wanted))}

    def problems(self) -> tuple[str, ...]:
        return tuple(sentence for hook in self.hooks.values() for sentence in hook.problems())

    @property
    def duplicates(self) -> int:
        """How often an event was accepted again, over all hooks."""
        return sum(sum(hook.duplicates.values()) for hook in self.hooks.values())


@dataclass(slots=True)
class _Seen:
    """One event id at one hook."""

    digest: bytes
    received: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _CallSeen:
    """One call at one hook: the revision that was accepted, the events that are refused so far or being answered."""

    completed_came: bool = False
    revision: int = 0
    open: set[str] = field(default_factory=set)
    answering: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Hook:
    name: str
    webhooks: tuple[Webhook, ...]
    behaviours: deque[Behaviour] = field(default_factory=deque)
    arrived: int = 0
    received: int = 0
    accepted: int = 0
    in_flight: int = 0
    in_flight_peak: int = 0
    unreadable: int = 0
    seen: dict[str, _Seen] = field(default_factory=dict)
    calls: dict[str, _CallSeen] = field(default_factory=dict)
    ids: dict[tuple[str, str, int | None], str] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    completed: set[str] = field(default_factory=set)
    signature_reasons: Counter[str] = field(default_factory=Counter)
    order_violations: list[str] = field(default_factory=list)
    overtaken: list[str] = field(default_factory=list)
    changed_ids: list[str] = field(default_factory=list)
    changed_bodies: list[str] = field(default_factory=list)
    mismatched_ids: list[str] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    bodies: dict[str, bytes] = field(default_factory=dict)
    last_headers: Mapping[str, str] = field(default_factory=dict)


class VerifyingSubscriber:
    """Any number of hooks at `/hook/{name}`, each with its own secrets and behaviour.

    `verify_every` checks one signature in so many (1: all). `keep_bodies` keeps each event's first body for
    `events`; `keep_arrivals` one `Arrival` for each delivery. Both cost memory: a benchmark turns them off.
    """

    def __init__(
        self,
        *,
        verify_every: int = 1,
        keep_bodies: bool = True,
        keep_arrivals: bool = True,
        seed: int = 0,
    ) -> None:
        self.verify_every = verify_every
        self.keep_bodies = keep_bodies
        self.keep_arrivals = keep_arrivals
        self._rng = random.Random(seed)  # noqa: S311  # flakiness, nothing secret
        self._hooks: dict[str, _Hook] = {}
        self._news = asyncio.Event()

    def add_hook(self, name: str, *secrets: str) -> None:
        """Open `/hook/{name}`, or give it other secrets; a signature by any of them holds. No secret: none is asked.

        Raise ValueError for a secret that is none.
        """
        webhooks = tuple(_webhook(secret) for secret in secrets)
        known = self._hooks.get(name)
        if known is None:
            self._hooks[name] = _Hook(name, webhooks)
        else:
            known.webhooks = webhooks

    def behave(self, name: str, *behaviours: Behaviour) -> None:
        """Answer in these ways, one after the other as their `times` run out, and then kindly."""
        self._hooks[name].behaviours = deque(behaviours)

    def forget(self) -> None:
        """Forget every delivery; hooks, secrets and behaviour stay."""
        for name, hook in self._hooks.items():
            self._hooks[name] = _Hook(name, hook.webhooks, hook.behaviours)

    # What was seen

    def received(self, name: str) -> int:
        return self._hooks[name].received

    def accepted(self, name: str) -> int:
        return self._hooks[name].accepted

    def completed(self, name: str) -> frozenset[str]:
        """The provider call ids whose `call.completed` was accepted."""
        return frozenset(self._hooks[name].completed)

    def arrivals(self, name: str) -> tuple[Arrival, ...]:
        return tuple(self._hooks[name].arrivals)

    def events(self, name: str) -> list[Json]:
        """The body of each event, parsed, in order of its first arrival."""
        return [orjson.loads(body) for body in self._hooks[name].bodies.values()]

    def event(self, name: str, event_id: str) -> Json | None:
        """The body of one event as it first arrived, parsed."""
        body = self._hooks[name].bodies.get(event_id)
        event: Json | None = None if body is None else orjson.loads(body)
        return event

    def last_headers(self, name: str) -> Mapping[str, str]:
        """The headers of the newest POST, names in lower case."""
        return {header.lower(): value for header, value in self._hooks[name].last_headers.items()}

    def report(self) -> Report:
        return Report({name: _hook_report(hook) for name, hook in self._hooks.items()})

    async def until(self, happened: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
        """Wait until `happened` is true, looking again at each delivery; raise TimeoutError when it stays false."""
        async with asyncio.timeout(timeout_s):
            while not happened():
                self._news.clear()
                await self._news.wait()

    # Over HTTP

    def serve(
        self, *, host: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> AbstractAsyncContextManager[str]:
        """Listen until the block ends; yields the base URL, to which `/hook/{name}` is added."""
        return listening(self._handle, host=host, port=port, ssl_context=ssl_context)

    async def _handle(self, request: web.BaseRequest, line: Line) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if path == "/_control":
            return await self._control(request)
        hook = self._hooks.get(path.removeprefix("/hook/"))
        if hook is None or not path.startswith("/hook/"):
            return json_response({"error": "no such hook"}, status=404)
        if request.method != "POST":
            return json_response({"error": "only POST"}, status=405)
        hook.in_flight += 1
        hook.in_flight_peak = max(hook.in_flight_peak, hook.in_flight)
        try:
            return await self._deliver(request, line, hook)
        finally:
            hook.in_flight -= 1
            self._news.set()

    async def _deliver(self, request: web.BaseRequest, line: Line, hook: _Hook) -> web.StreamResponse:
        body = await request.read()
        hook.arrived += 1
        hook.last_headers = request.headers
        if not self._verified(hook, body, request.headers):
            return web.Response(status=401)
        event = _event(body)
        if event is None:
            hook.unreadable += 1
            return web.Response(status=400)
        behaviour = self._next_behaviour(hook)
        event_id = request.headers.get("webhook-id", event.id)
        call = self._note(hook, event, event_id, body, accepts=behaviour.accepts)
        self._news.set()
        if behaviour is _ACCEPT:
            return web.Response(status=204)
        call.answering[event_id] += 1
        try:
            return await _answer(request, line, behaviour)
        finally:
            call.answering[event_id] -= 1

    def _verified(self, hook: _Hook, body: bytes, headers: Mapping[str, str]) -> bool:
        if not hook.webhooks or (hook.arrived - 1) % self.verify_every:
            return True
        reason = ""
        signed = {name: headers.get(name, "") for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
        for webhook in hook.webhooks:
            try:
                webhook.verify(body, signed, json_parse=False)
            except (WebhookVerificationError, ValueError) as error:
                reason = reason or (
                    str(error) if isinstance(error, WebhookVerificationError) else "Malformed signature"
                )
            else:
                return True
        hook.signature_reasons[reason] += 1
        return False

    def _next_behaviour(self, hook: _Hook) -> Behaviour:
        if not hook.behaviours:
            return _ACCEPT
        behaviour = hook.behaviours[0]
        if behaviour.probability < 1 and self._rng.random() >= behaviour.probability:
            return _ACCEPT
        if behaviour.times is not None:
            hook.behaviours.popleft()
            if behaviour.times > 1:
                hook.behaviours.appendleft(behaviour.model_copy(update={"times": behaviour.times - 1}))
        return behaviour

    def _note(self, hook: _Hook, event: "_Event", event_id: str, body: bytes, *, accepts: bool) -> _CallSeen:
        """Write the delivery down and look for what is wrong with it, before it is answered."""
        if event_id != event.id:
            _list(hook.mismatched_ids, f"{event_id} carries {event.id}")
        call = hook.calls.setdefault(event.call_id or event_id, _CallSeen())
        seen = hook.seen.get(event_id)
        if seen is None:
            seen = hook.seen[event_id] = _Seen(event.digest)
            hook.types[event.type] += 1
            _look_at_first_sight(hook, call, event, event_id)
            if self.keep_bodies:
                hook.bodies[event_id] = body
        elif seen.digest != event.digest:
            _list(hook.changed_bodies, event_id)
        if event.type == "call.completed":
            call.completed_came = True
        seen.received += 1
        hook.received += 1
        if accepts:
            seen.accepted += 1
            hook.accepted += 1
            call.open.discard(event_id)
            call.revision = max(call.revision, event.revision or 0)
            if event.type == "call.completed" and event.provider_call_id is not None:
                hook.completed.add(event.provider_call_id)
        elif not seen.accepted:
            call.open.add(event_id)
        if self.keep_arrivals:
            hook.arrivals.append(_arrival(event, event_id, accepted=accepts))
        return call

    async def _control(self, request: web.BaseRequest) -> web.Response:
        if request.method == "POST":
            try:
                self.obey(Control.model_validate_json(await request.read()))
            except (ValidationError, ValueError, KeyError) as error:
                return json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return json_response(self.state(arrivals="arrivals" in request.query))

    def obey(self, wish: "Control") -> None:
        """Do what a control message asks, in the order of its fields."""
        for name, secrets in wish.hooks.items():
            self.add_hook(name, *secrets)
        for name, behaviours in wish.behave.items():
            self.behave(name, *behaviours)
        for name in ("verify_every", "keep_bodies", "keep_arrivals"):
            value = getattr(wish, name)
            if value is not None:
                setattr(self, name, value)
        if wish.forget:
            self.forget()

    def state(self, *, arrivals: bool = False) -> Json:
        """What `/_control` answers: the report, and with `?arrivals` each delivery."""
        hooks: Json = {}
        for name, hook in self.report().hooks.items():
            hooks[name] = {**asdict(hook), "completed": sorted(hook.completed), "problems": hook.problems()}
            hooks[name]["in_flight"] = self._hooks[name].in_flight
            if arrivals:
                hooks[name]["arrivals"] = [asdict(arrival) for arrival in self._hooks[name].arrivals]
        return {"verify_every": self.verify_every, "hooks": hooks}


class Control(BaseModel):
    """What `POST /_control` takes; all may be left out. `hooks` and `behave` are by the hook's name."""

    model_config = ConfigDict(extra="forbid")

    hooks: dict[str, list[str]] = Field(default_factory=dict)
    behave: dict[str, list[Behaviour]] = Field(default_factory=dict)
    verify_every: int | None = Field(None, ge=1)
    keep_bodies: bool | None = None
    keep_arrivals: bool | None = None
    forget: bool = False


@dataclass(frozen=True, slots=True)
class _Event:
    """What the subscriber reads of a body, whatever its shape; `digest` leaves out what may differ between attempts."""

    id: str
    type: str
    call_id: str | None
    provider_call_id: str | None
    revision: int | None
    digest: bytes


def _event(body: bytes) -> _Event | None:
    """Read a full, flat or mapped body; None when it is no JSON object."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    data = document.get("data")
    call = data.get("call") if isinstance(data, dict) else None
    if not isinstance(call, dict):
        flat = {"id": "call_id", "provider_call_id": "provider_call_id", "revision": "revision"}
        call = {name: document.get(other) for name, other in flat.items()}
    recording = call.get("recording")
    if isinstance(recording, dict):
        recording.pop("url", None)
        recording.pop("expires_at", None)
    document.pop("recording_url", None)
    document.pop("recording_expires_at", None)
    revision = call.get("revision")
    return _Event(
        id=str(document.get("id") or document.get("event_id") or ""),
        type=str(document.get("type") or document.get("event_type") or ""),
        call_id=_text(call.get("id")),
        provider_call_id=_text(call.get("provider_call_id")),
        revision=revision if isinstance(revision, int) else None,
        digest=hashlib.blake2b(orjson.dumps(document), digest_size=12).digest(),
    )


def _webhook(secret: str) -> Webhook:
    """A verifier for a secret as the Standard Webhooks specification has it, or ValueError."""
    try:
        size = len(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
    except ValueError:
        size = 0
    if not secret.startswith("whsec_") or not 24 <= size <= 64:
        raise ValueError("a secret is whsec_ and the base64 of 24 to 64 bytes")
    return Webhook(secret)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _look_at_first_sight(hook: _Hook, call: _CallSeen, event: _Event, event_id: str) -> None:
    """Check the promises of order and of one id for ever, when an event id is new to this hook."""
    if event.call_id is None:
        return
    what = f"{event.call_id} {event.type} revision {event.revision}"
    if event.type != "call.completed" and not call.completed_came:
        _list(hook.order_violations, f"{what} came before call.completed")
    if event.revision is not None and event.revision < call.revision:
        _list(hook.order_violations, f"{what} came after revision {call.revision}")
    if event.type == "call.completed" and call.revision and not call.completed_came:
        _list(hook.order_violations, f"{what} came after later events")
    if any(count > 0 for other, count in call.answering.items() if other != event_id):
        _list(hook.order_violations, f"{what} came while another event of the call was being answered")
    if call.open:
        _list(hook.overtaken, f"{what} came while {', '.join(sorted(call.open))} was refused")
    known_id = hook.ids.setdefault((event.call_id, event.type, event.revision), event_id)
    if known_id != event_id:
        _list(hook.changed_ids, f"{what}: {known_id}, then {event_id}")


def _list(items: list[str], item: str) -> None:
    if len(items) < _LISTED:
        items.append(item)


def _arrival(event: _Event, event_id: str, *, accepted: bool) -> Arrival:
    return Arrival(
        event_id=event_id,
        type=event.type,
        call_id=event.call_id,
        provider_call_id=event.provider_call_id,
        revision=event.revision,
        accepted=accepted,
        monotonic_s=time.monotonic(),
        at=datetime.now(UTC),
    )


def _hook_report(hook: _Hook) -> HookReport:
    return HookReport(
        name=hook.name,
        received=hook.received,
        accepted=hook.accepted,
        events=len(hook.seen),
        retries=sum(seen.received - max(1, seen.accepted) for seen in hook.seen.values()),
        duplicates={event_id: seen.accepted - 1 for event_id, seen in hook.seen.items() if seen.accepted > 1},
        types=dict(hook.types),
        signature_failures=hook.signature_reasons.total(),
        signature_reasons=dict(hook.signature_reasons),
        order_violations=tuple(hook.order_violations),
        overtaken=tuple(hook.overtaken),
        changed_ids=tuple(hook.changed_ids),
        changed_bodies=tuple(hook.changed_bodies),
        mismatched_ids=tuple(hook.mismatched_ids),
        unreadable=hook.unreadable,
        in_flight_peak=hook.in_flight_peak,
        completed=frozenset(hook.completed),
    )


async def _answer(request: web.BaseRequest, line: Line, behaviour: Behaviour) -> web.StreamResponse:
    if behaviour.delay_s:
        await line.wait(behaviour.delay_s)
    match behaviour.way:
        case Way.ANSWER:
            return web.Response(status=behaviour.status, headers=behaviour.headers, text=behaviour.body or None)
        case Way.HANG | Way.ACT_THEN_HANG:
            await line.wait(None)
            return await hang_up(request)
        case Way.RESET:
            return await hang_up(request, reset=True)
        case Way.HALF_HEAD:
            write_raw(request, f"HTTP/1.1 {behaviour.status} OK\r\nContent-Type: text/pl".encode())
            return await hang_up(request)
        case Way.DRIP_HEAD:
            return await _drip_head(request, line, behaviour)
        case Way.DRIP:
            return await _stream(request, behaviour, {}, _drip(line, behaviour))
        case Way.ENDLESS:
            return await _stream(request, behaviour, {}, _endless(line))
        case Way.BIG:
            size = {"Content-Length": str(behaviour.size_bytes)}
            return await _stream(request, behaviour, size, _big(behaviour.size_bytes))
        case Way.GZIP_BOMB:
            return await _stream(request, behaviour, {"Content-Encoding": "gzip"}, _gzip_bomb(behaviour.size_bytes))


async def _stream(
    request: web.BaseRequest, behaviour: Behaviour, headers: Mapping[str, str], chunks: AsyncIterator[bytes]
) -> web.StreamResponse:
    response = web.StreamResponse(status=behaviour.status, headers={**behaviour.headers, **headers})
    await response.prepare(request)
    async for chunk in chunks:
        await response.write(chunk)
    return response


async def _drip(line: Line, behaviour: Behaviour) -> AsyncIterator[bytes]:
    while not line.closing.is_set():
        yield b"."
        await line.wait(behaviour.every_s)


async def _drip_head(request: web.BaseRequest, line: Line, behaviour: Behaviour) -> web.Response:
    head = f"HTTP/1.1 {behaviour.status} OK\r\nContent-Length: 0\r\nX-Patience: {'.' * 100_000}\r\n\r\n"
    for char in head:
        if line.closing.is_set() or request.transport is None:
            break
        write_raw(request, char.encode())
        await line.wait(behaviour.every_s)
    return await hang_up(request)


async def _endless(line: Line) -> AsyncIterator[bytes]:
    while not line.closing.is_set():
        yield _CHUNK
        await asyncio.sleep(0)


async def _big(size_bytes: int) -> AsyncIterator[bytes]:
    left = size_bytes
    while left > 0:
        yield _CHUNK[:left]
        left -= len(_CHUNK)
        await asyncio.sleep(0)


async def _gzip_bomb(size_bytes: int) -> AsyncIterator[bytes]:
    """A right gzip stream of that many zeros, rounded up to MiB: one packed MiB, again and again."""
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
    """The header, a MiB of zeros packed so that it may be repeated, and the end of the packed data."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    step = packer.compress(bytes(_GZIP_STEP_BYTES)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff", step, packer.flush(zlib.Z_FINISH)
