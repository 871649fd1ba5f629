"""An NFON that behaves as its Call History document says, and misbehaves when told to.

One list, an event stream of what appears and what changes, and a login that renews tokens. Where the document is
silent, the choice is an attribute of `NfonSimulator`.
"""

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, Literal
from urllib.parse import parse_qs

import orjson

from relay.domain.json import Json
from relay.simulator.loopback import Line
from relay.simulator.switchboard import (
    Account,
    Answer,
    Asked,
    CutShort,
    Faults,
    Mischief,
    Switchboard,
    as_it_looks,
    bearer,
)
from relay.simulator.timeline import CallPlan, Scalar

_TICK_S = 0.02
_STATUSES = {"ANSWERED": "answered", "NO ANSWER": "missed", "BUSY": "busy", "FAILED": "unknown"}
_TRANSCRIBED = "transcribed_at"


class Kind(StrEnum):
    """What a request is for."""

    RECORDS = "records"
    DETAILS = "details"
    STREAM = "stream"
    DELETE = "delete"
    TOKEN = "token"  # noqa: S105 - a kind of request


@dataclass(slots=True)
class User(Account):
    """One user's call history; `key` is the access token that reads it, until the login gives others."""

    customer: str = "K9999"
    extension: str = "1001"


@dataclass(slots=True)
class Login:
    """A login's refresh token, the only one that is good; each use gives another."""

    account: str
    refresh_token: str
    retired: set[str] = field(default_factory=set)
    dead: bool = False


class NfonSimulator(Switchboard[User]):
    """Users by access token.

    The attributes may be changed at any time: `from_unit`, `default_limit` (where none, or 0, is asked for),
    `most_rows` (of one answer, whatever is asked for), `version` of the document, `replay` (how many calls a stream
    sends at its begin), `heartbeat_s` (a comment while there is nothing to say; None: none), `access_ttl_s` of tokens
    from the login, `rotate` (whether a refresh token is good once only).
    """

    account_type = User

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        from_unit: Literal["seconds", "milliseconds"] = "seconds",
        default_limit: int = 25,
        most_rows: int = 1000,
        version: Literal[1, 2] = 2,
        replay: int = 0,
        heartbeat_s: float | None = None,
        access_ttl_s: float = 300.0,
        rotate: bool = True,
    ) -> None:
        super().__init__(clock=clock)
        self.from_unit = from_unit
        self.default_limit = default_limit
        self.most_rows = most_rows
        self.version = version
        self.replay = replay
        self.heartbeat_s = heartbeat_s
        self.access_ttl_s = access_ttl_s
        self.rotate = rotate
        self.streams_open = 0
        self.streams_most = 0
        self.streams_expired = 0
        self.events_sent = 0
        self.reused_refresh_tokens = 0
        self._access: dict[str, tuple[str, datetime]] = {}
        self._logins: list[Login] = []
        self._stirred: set[asyncio.Event] = set()
        self._drops: set[asyncio.Event] = set()

    def add_login(self, key: str, refresh_token: str) -> None:
        """Let a refresh token give access tokens for an account."""
        self._logins.append(Login(key, refresh_token))

    def expire_tokens(self) -> None:
        """Refuse all access tokens that the login has given so far."""
        self._access.clear()

    def add_calls(self, key: str, plans: Iterable[CallPlan]) -> None:
        super().add_calls(key, plans)
        self._stir()

    def change(self, key: str, rid: int, fields: Mapping[str, Scalar], *, at: datetime | None = None) -> CallPlan:
        plan = super().change(key, rid, fields, at=at)
        self._stir()
        return plan

    def transcribe(self, key: str, rid: int, *, summary: str = "They agreed.", words: str = "Hello. Yes.") -> None:
        """Let the transcript of a call be ready now; its row is streamed again."""
        self.change(key, rid, {_TRANSCRIBED: _text(self.clock()), "summary": summary, "words": words})

    def uuid_of(self, key: str, rid: int) -> str:
        """Name a call as its row does."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"nfon/{key}/{rid}"))

    def drop_streams(self) -> None:
        """Cut every open stream."""
        for drop in self._drops:
            drop.set()

    def kind_of(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        if path == "/token":
            return Kind.TOKEN if method == "POST" else None
        if path != "/records" and not path.startswith("/records/"):
            return None
        if method != "GET":
            return Kind.DELETE if method == "DELETE" else None
        if path != "/records":
            return Kind.DETAILS
        return Kind.STREAM if "text/event-stream" in headers.get("Accept", "") else Kind.RECORDS

    def token_of(self, headers: Mapping[str, str]) -> str:
        token = bearer(headers, "Bearer")
        if token in self._access:
            key, until = self._access[token]
            return key if self.clock() < until else ""
        # An account with a login is only read with what the login gives.
        return token if token in self.accounts and token not in {login.account for login in self._logins} else ""

    def refused(self, asked: Asked) -> Answer | None:
        if asked.kind == Kind.TOKEN or (asked.key and not self.accounts[asked.key].revoked):
            return None
        return Answer(401, {"error": "invalid token"})

    def answer(self, asked: Asked, now: datetime) -> Answer:
        """Answer as documented; of a stream this is the begin."""
        match asked.kind:
            case Kind.TOKEN:
                return self._grant(asked.body)
            case Kind.STREAM:
                headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
                return Answer(200, headers=headers, pieces=partial(self._events, asked, {}))
            case Kind.DETAILS:
                return self._details(asked, now)
            case Kind.DELETE:
                for rid in list(self.accounts[asked.key].plans):
                    self.remove(asked.key, rid)
                return Answer(204)
            case _:
                try:
                    return Answer(200, {"records": self.records(asked.key, asked.query, now)}, rows="records")
                except ValueError:
                    return Answer(400, {"error": "invalid parameter"})

    def spoilt(self, answer: Answer, asked: Asked, faults: Faults, now: datetime) -> Answer:
        if answer.pieces is not None:
            stream = replace(answer, pieces=partial(self._events, asked, faults))
            return Answer(200, []) if Mischief.NO_STREAM in faults else stream
        spoilt = super().spoilt(answer, asked, faults, now)
        if spoilt.rows is None or not isinstance(spoilt.body, dict) or Mischief.NOT_A_LIST in faults:
            return spoilt
        return replace(spoilt, body=spoilt.body["records"])

    def garbage_rows(self, asked: Asked, at: datetime) -> list[Any]:
        good = {"uuid": "garbage-1", "created": _text(at), "status": "missed", "direction": "inbound"}
        return [
            {name: value for name, value in good.items() if name != "uuid"},
            {**good, "uuid": None},
            {**good, "uuid": "x" * 1000},
            {**good, "created": "2025-02-30T25:61:00Z"},
            {**good, "created": None},
            {**good, "created": 1748945554},
            "a row that is text",
            None,
            ["a", "list"],
        ]

    def records(self, key: str, query: Mapping[str, str], now: datetime) -> list[Any]:
        """List as `GET /records` does; raises ValueError for parameters that make no sense."""
        account = self.accounts[key]
        own = account.customer, account.extension
        if (query.get("customer", own[0]), query.get("extension", own[1])) != own:
            return []
        unit = 1000 if self.from_unit == "milliseconds" else 1
        since = float(query["from"]) / unit if "from" in query else float("-inf")
        until = float(query["to"]) / unit if "to" in query else float("inf")
        limit, offset = int(query.get("limit", "0")), int(query.get("offset", "0"))
        sort = query.get("sort", "desc")
        if limit < 0 or offset < 0 or sort not in ("asc", "desc"):
            raise ValueError("bad parameter")
        plans = [p for p in self.visible(key, now) if since < p.started_at.timestamp() < until]
        plans.sort(key=lambda plan: (plan.started_at, plan.rid), reverse=sort == "desc")
        most = min(limit or self.default_limit, self.most_rows)
        return [self.row(account, plan, now) for plan in plans[offset : offset + most]]

    def row(self, account: User, plan: CallPlan, now: datetime, *, complete: bool = False) -> Json:
        """Write a call as a record of the chosen version of the document."""
        shown, columns = as_it_looks(plan, now)
        outbound = shown.direction == "OUTGOING"
        ours = {
            "name": "Alice",
            "number": str(columns.pop("extension", account.extension)),
            "context": account.customer,
        }
        theirs: Json = {
            "name": shown.outside_name,
            "number": "1" + "".join(char for char in plan.outside_number if char.isdigit()),
            "context": "global",
        }
        status = _STATUSES.get(shown.disposition, "unknown")
        if outbound and status == "missed":
            status = "cancelled"
        row: Json = {
            "uuid": self.uuid_of(account.key, plan.rid),
            "duration": int((plan.ended_at - plan.started_at).total_seconds()) if plan.answered else 0,
            "direction": "outbound" if outbound else "inbound",
            "caller": ours if outbound else theirs,
            "callee": theirs if outbound else ours,
            "status": status,
            "created": _text(plan.started_at),
        }
        transcribed = columns.pop(_TRANSCRIBED, None)
        summary, words = columns.pop("summary", ""), columns.pop("words", "")
        transcribable = columns.pop("transcription", None)
        if transcribed or transcribable:
            row["transcription"] = {"available": transcribed is not None}
            if complete and transcribed:
                entries = [{"speaker": "Alice", "text": words}]
                row["transcription"] |= {"summary": summary, "transcript": entries}
        changed = [change.at for change in plan.changes if change.at <= now]
        if changed:
            row["updated"] = _text(changed[-1])
        crm = columns.pop("crm", None)
        if crm is not None:
            row |= {"crm": crm} if self.version == 2 else {"custom_data": {"crm": crm}}
        transferred = columns.pop("transferred_from", None)
        if transferred is not None:
            word = "destination_type" if self.version == 2 else "service"
            callee = {"name": "Test Group", "number": str(transferred), "context": account.customer, word: "group"}
            row["history"] = [{"callee": callee, "updated": _text(plan.started_at)}]
        if self.version == 2:
            row |= {
                "call_id": f"call-{plan.rid}",
                "customer": account.customer,
                "extension": account.extension,
                "user_uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, account.key)),
            }
        return {**row, **columns}

    def _details(self, asked: Asked, now: datetime) -> Answer:
        wanted = asked.path.removeprefix("/records/")
        plan = next((p for p in self.visible(asked.key, now) if self.uuid_of(asked.key, p.rid) == wanted), None)
        if plan is None:
            return Answer(404, {"error": "record not found"})
        return Answer(200, self.row(self.accounts[asked.key], plan, now, complete=True))

    def _grant(self, body: bytes) -> Answer:
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        sent = form.get("refresh_token", "")
        login = next((one for one in self._logins if sent == one.refresh_token or sent in one.retired), None)
        if form.get("grant_type") != "refresh_token" or login is None or login.dead:
            return Answer(400, {"error": "invalid_grant"})
        if sent != login.refresh_token:
            # RFC 9700, section 4.14.2: a retired token that comes back ends the login.
            login.dead = True
            self.reused_refresh_tokens += 1
            return Answer(400, {"error": "invalid_grant"})
        access = secrets.token_urlsafe(16)
        self._access[access] = (login.account, self.clock() + timedelta(seconds=self.access_ttl_s))
        granted = {"access_token": access, "token_type": "Bearer", "expires_in": self.access_ttl_s}
        if self.rotate:
            login.retired.add(sent)
            login.refresh_token = secrets.token_urlsafe(16)
            granted["refresh_token"] = login.refresh_token
        return Answer(200, granted)

    async def _events(self, asked: Asked, faults: Faults, line: Line) -> AsyncGenerator[bytes, None]:
        """What a stream sends until its line closes, its token is too old, or it is dropped."""
        stirred, drop = asyncio.Event(), asyncio.Event()
        self._stirred.add(stirred)
        self._drops.add(drop)
        self.streams_open += 1
        self.streams_most = max(self.streams_most, self.streams_open)
        _, until = self._access.get(bearer(asked.headers, "Bearer"), ("", datetime.max.replace(tzinfo=UTC)))
        number, quiet_s = 0, 0.0
        try:
            looked_at = self.clock()
            due = self._replayed(asked.key, looked_at)
            while not (line.closing.is_set() or drop.is_set()) and self.clock() < until:
                for row in due:
                    for piece in _event(row, number, faults):
                        yield piece
                        await asyncio.sleep(0)
                    self.events_sent += 1
                    number += 1
                    if Mischief.CUT in faults:
                        raise CutShort
                if self.heartbeat_s is not None and quiet_s >= self.heartbeat_s:
                    yield b": still here\n\n"
                    quiet_s = 0.0
                try:
                    async with asyncio.timeout(_TICK_S):
                        await stirred.wait()
                except TimeoutError:
                    quiet_s += _TICK_S
                stirred.clear()
                now = self.clock()
                due, looked_at = self._moved(asked.key, looked_at, now), now
            if drop.is_set():
                raise CutShort
            self.streams_expired += int(self.clock() >= until)
        finally:
            self.streams_open -= 1
            self._stirred.discard(stirred)
            self._drops.discard(drop)

    def _replayed(self, key: str, now: datetime) -> list[Json]:
        """The newest calls, which a stream begins with; oldest first."""
        plans = sorted(self.visible(key, now), key=lambda plan: plan.started_at) if self.replay else []
        return [self.row(self.accounts[key], plan, now) for plan in plans[-self.replay :]]

    def _moved(self, key: str, after: datetime, until: datetime) -> list[Json]:
        """The calls about which something came to light after one instant, and not after the other."""
        plans = [
            plan
            for plan in self.visible(key, until)
            if any(after < at <= until for at in (plan.visible_at, *(change.at for change in plan.changes)))
        ]
        return [self.row(self.accounts[key], plan, until) for plan in plans]

    def _stir(self) -> None:
        for stirred in self._stirred:
            stirred.set()


def _event(row: Json, number: int, faults: Faults) -> list[bytes]:
    """A row as the stream sends it, in the pieces in which it is sent."""
    event = b"id: %d\ndata: %s\n\n" % (number, orjson.dumps(row))
    if Mischief.BAD_EVENTS in faults:
        event = b'data: {"uuid": \n\n: a comment\nevent: odd\ndata: [1]\n\n' + event
    if Mischief.HUGE_EVENT in faults:
        event = b"data: " + b"x" * (1100 * 1024) + b"\n\n" + event
    if Mischief.DUPLICATE in faults:
        event += event
    return [event[start : start + 7] for start in range(0, len(event), 7)] if Mischief.SPLIT in faults else [event]


def _text(instant: datetime) -> str:
    utc = instant.astimezone(UTC)
    return utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds").replace("+00:00", "Z")
