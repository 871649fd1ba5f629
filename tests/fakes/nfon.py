"""An NFON that can fail, with a login, deletion, and undocumented behaviour that can be chosen."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal
from urllib.parse import parse_qs

from relay.domain.json import Json
from relay.simulator.nfon import FakeNfon, NfonAccount
from relay.simulator.provider import FakeRequest, FakeResponse, authorization, instant_text
from relay.simulator.server import Listener
from tests.fakes.faults import FaultInjection, FaultKind, Faults
from tests.fakes.wire import CutShort

TOKEN_ENDPOINT = "token"
DELETE_ENDPOINT = "delete"
_FOR_EVER = datetime.max.replace(tzinfo=UTC)


@dataclass(slots=True)
class Login:
    """A login's refresh token, the only valid one; each use replaces it."""

    account: str
    refresh_token: str
    retired: set[str] = field(default_factory=set)
    dead: bool = False


class FaultyNfon(FaultInjection[NfonAccount], FakeNfon):
    """`from_unit`: the unit of `from` and `to`. `replay`: how many records a stream starts with. `access_ttl_s`: of
    tokens from the login. `rotate`: whether a refresh token is valid once only.
    """

    def __init__(self, *, replay: int = 0, access_ttl_s: float = 300.0, **options: Any) -> None:
        super().__init__(**options)
        self.from_unit: Literal["seconds", "milliseconds"] = "seconds"
        self.replay = replay
        self.access_ttl_s = access_ttl_s
        self.rotate = True
        self.streams_peak = 0
        self.streams_expired = 0
        self.events_sent = 0
        self.reused_refresh_tokens = 0
        self._access: dict[str, tuple[str, datetime]] = {}
        self._logins: list[Login] = []
        self._streams: dict[int, datetime] = {}
        self._dropped: set[int] = set()

    @property
    def streams_open(self) -> int:
        return len(self._streams)

    def add_login(self, key: str, refresh_token: str) -> None:
        """Let a refresh token give access tokens for an account, which from now on only these can read."""
        self._logins.append(Login(key, refresh_token))

    def expire_tokens(self) -> None:
        """Refuse all access tokens that the login has given so far."""
        self._access.clear()

    def drop_streams(self) -> None:
        """Cut every open stream."""
        self._dropped |= self._streams.keys()
        self.wake_streams()

    # Login and deletion

    def endpoint_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        if path == "/token":
            return TOKEN_ENDPOINT if method == "POST" else None
        if method == "DELETE" and path.startswith("/records"):
            return DELETE_ENDPOINT
        return super().endpoint_of(method, path, headers)

    def token_of(self, headers: Mapping[str, str]) -> str:
        token = authorization(headers, "Bearer")
        if token in self._access:
            key, expires_at = self._access[token]
            return key if self.clock() < expires_at else ""
        return "" if token in {login.account for login in self._logins} else super().token_of(headers)

    def refuse(self, request: FakeRequest) -> FakeResponse | None:
        return None if request.endpoint == TOKEN_ENDPOINT else super().refuse(request)

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        if request.endpoint == TOKEN_ENDPOINT:
            return self._grant(request.body)
        if request.endpoint == DELETE_ENDPOINT:
            for rid in list(self.accounts[request.key].plans):
                self.remove(request.key, rid)
            return FakeResponse(204)
        return super().answer(request, now)

    def _grant(self, body: bytes) -> FakeResponse:
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        sent = form.get("refresh_token", "")
        login = next((login for login in self._logins if sent == login.refresh_token or sent in login.retired), None)
        if form.get("grant_type") != "refresh_token" or login is None or login.dead:
            return FakeResponse(400, {"error": "invalid_grant"})
        if sent != login.refresh_token:
            # RFC 9700, section 4.14.2: a retired token that comes back ends the login.
            login.dead = True
            self.reused_refresh_tokens += 1
            return FakeResponse(400, {"error": "invalid_grant"})
        access = secrets.token_urlsafe(16)
        self._access[access] = (login.account, self.clock() + timedelta(seconds=self.access_ttl_s))
        grant = {"access_token": access, "token_type": "Bearer", "expires_in": self.access_ttl_s}
        if self.rotate:
            login.retired.add(sent)
            login.refresh_token = secrets.token_urlsafe(16)
            grant["refresh_token"] = login.refresh_token
        return FakeResponse(200, grant)

    # The list

    def records(self, key: str, query: Mapping[str, str], now: datetime) -> list[Json]:
        if self.from_unit == "milliseconds":
            seconds = {name: str(float(query[name]) / 1000) for name in ("from", "to") if name in query}
            query = {**query, **seconds}
        return super().records(key, query, now)

    def garbage_rows(self, request: FakeRequest, at: datetime) -> list[Any]:
        valid = {"uuid": "garbage-1", "created": instant_text(at), "status": "missed", "direction": "inbound"}
        return [
            {name: value for name, value in valid.items() if name != "uuid"},
            {**valid, "uuid": None},
            {**valid, "uuid": "x" * 1000},
            {**valid, "created": "2025-02-30T25:61:00Z"},
            {**valid, "created": None},
            {**valid, "created": 1748945554},
            "a row that is text",
            None,
            ["a", "list"],
        ]

    def spoil(self, response: FakeResponse, request: FakeRequest, faults: Faults, now: datetime) -> FakeResponse:
        if response.stream is not None:
            if FaultKind.NO_STREAM in faults:
                return FakeResponse(200, [])
            return replace(response, stream=partial(self._spoiled_events, request, faults))
        spoiled = super().spoil(response, request, faults, now)
        return replace(spoiled, body={"records": spoiled.body}) if FaultKind.NOT_A_LIST in faults else spoiled

    # The stream

    def replayed(self, key: str, now: datetime) -> list[Json]:
        plans = sorted(self.visible(key, now), key=lambda plan: plan.started_at) if self.replay else []
        return [self.row(self.accounts[key], plan, now) for plan in plans[-self.replay :]]

    def may_stream(self, request: FakeRequest) -> bool:
        if id(request) in self._dropped:
            raise CutShort
        return self.clock() < self._streams[id(request)]

    async def _spoiled_events(
        self, request: FakeRequest, faults: Faults, listener: Listener
    ) -> AsyncGenerator[bytes, None]:
        token = authorization(request.headers, "Bearer")
        _, expires_at = self._access.get(token, ("", _FOR_EVER))
        self._streams[id(request)] = expires_at
        self.streams_peak = max(self.streams_peak, len(self._streams))
        try:
            async with aclosing(self.events(request, listener)) as events:
                async for event in events:
                    for piece in _spoiled(event, faults):
                        yield piece
                        await asyncio.sleep(0)
                    self.events_sent += event.startswith(b"id:")
                    if FaultKind.CUT in faults:
                        raise CutShort
            self.streams_expired += self.clock() >= expires_at
        finally:
            del self._streams[id(request)]
            self._dropped.discard(id(request))


def _spoiled(event: bytes, faults: Faults) -> list[bytes]:
    """An event in the pieces in which it is sent."""
    if FaultKind.BAD_EVENTS in faults:
        event = b'data: {"uuid": \n\n: a comment\nevent: odd\ndata: [1]\n\n' + event
    if FaultKind.HUGE_EVENT in faults:
        event = b"data: " + b"x" * (1100 * 1024) + b"\n\n" + event
    if FaultKind.DUPLICATE in faults:
        event += event
    return [event[start : start + 7] for start in range(0, len(event), 7)] if FaultKind.SPLIT in faults else [event]
