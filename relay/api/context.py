"""What the handlers share: the runtime, who may see what, and how things are named."""

import asyncio
import base64
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

from pydantic import AfterValidator, AwareDatetime, Field

from relay.api.auth import Caller, Tokens
from relay.api.problems import Problem, configured, invalid, not_found, taken
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.domain.time import from_ms
from relay.privacy.erase import Eraser
from relay.providers.source import Source
from relay.runtime import Runtime
from relay.settings import ID_PATTERN
from relay.store.declarations import Declaration
from relay.store.sources import Progress

_JOB_KEPT_S: Final = 7 * 86_400


def _in_range(instant: datetime) -> datetime:
    if not 2000 <= instant.astimezone(UTC).year < 2200:
        raise ValueError("must be a time from 2000 to 2199")
    return instant.astimezone(UTC)


def _sane(instant: Any) -> Any:
    if isinstance(instant, datetime) and not 1999 <= instant.year <= 2200:
        raise ValueError("must be a time from 2000 to 2199")
    return _in_range(instant)


Instant = Annotated[AwareDatetime, AfterValidator(_sane)]
"""A time with its zone, in the centuries that have calls."""
Id = Annotated[str, Field(pattern=ID_PATTERN, description="lower-case letters, digits, - and _; at most 63")]
EVENT_ID: Final = r"^evt_[a-z2-7]{26}$"
CALL_ID: Final = r"^call_[a-z2-7]{26}$"


@dataclass(frozen=True)
class Api:
    """What every handler gets first."""

    runtime: Runtime
    tokens: Tokens
    eraser: Eraser
    now: Callable[[], datetime]
    closing: asyncio.Event
    streams: set[Any]
    heartbeat_s: float
    write_timeout_s: float

    # --- whose is it -------------------------------------------------------------------------------------------------

    async def source(self, caller: Caller, sid: str) -> Source:
        """Find a source; a Problem for one that the caller may not see."""
        if sid not in self.runtime.sources:
            await self.runtime.registry.load()  # it may have been made in another process just now
        source = self.runtime.sources.get(sid)
        if source is None or not caller.sees(source.tenant):
            raise not_found("source")
        return source

    async def subscription(self, caller: Caller, sub: str) -> Subscription:
        """Find a subscription; a Problem for one that the caller may not see."""
        if sub not in self.runtime.subscriptions:
            await self.runtime.registry.load()
        subscription = self.runtime.subscriptions.get(sub)
        if subscription is None or not caller.sees(subscription.tenant):
            raise not_found("subscription")
        return subscription

    def source_ids(self, caller: Caller) -> list[str] | None:
        """List the sources that a tenant has; None for the operator, who sees all, also what has no source any more."""
        if caller.tenant is None:
            return None
        return [sid for sid, source in self.runtime.sources.items() if source.tenant == caller.tenant]

    def sees_event(self, caller: Caller, document: Json) -> bool:
        """Whether an event is the caller's business."""
        return caller.tenant is None or self.event_tenant(document) == caller.tenant

    def event_tenant(self, document: Json) -> str | None:
        """Whose an event is, by the source or the subscription that it tells of."""
        data = document["data"]
        sid = data["call"]["source_id"] if "call" in data else data.get("source", {}).get("id")
        if sid is not None:
            source = self.runtime.sources.get(sid)
            return source.tenant if source else None
        subscription = self.runtime.subscriptions.get(data.get("subscription", {}).get("id"))
        return subscription.tenant if subscription else None

    async def event(self, caller: Caller, eid: str) -> Json:
        """Read an event; a Problem for one that the caller may not see."""
        document = await self.runtime.ledger.event(eid)
        if document is None or not self.sees_event(caller, document):
            raise not_found("event")
        return document

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def start(self, kind: str, *args: Any, caller: Caller, after: Sequence[Any] = (), **about: str) -> str:
        """Queue long work for a worker; gives the name under which its progress is read, which it gets after `args`."""
        job = f"{kind}-{uuid4().hex[:12]}"
        progress = Progress(self.runtime.redis, job)
        await progress.write(state="queued", kind=kind, tenant=caller.tenant or "", **about)
        await self.runtime.arq.enqueue_job(kind, *args, job, *after, _job_id=job, _expires=_JOB_KEPT_S)
        return job


def check_id(name: str) -> None:
    """Refuse an id that is none; a Problem says what one is."""
    if not re.fullmatch(ID_PATTERN, name):
        raise invalid("id", "has 1 to 63 lower-case letters, digits, - and _, and starts with a letter or a digit")


def fresh_id(prefix: str) -> str:
    """Make an id that nobody has."""
    return f"{prefix}_{base64.b32encode(secrets.token_bytes(10)).decode().lower()}"


def instant(ms: int | float) -> datetime | None:
    """Read a time of the store; 0 is never."""
    return from_ms(ms) if ms else None


def to_ms(at: datetime | None) -> int | None:
    """Write a time as the store has it."""
    return None if at is None else int(at.timestamp() * 1000)


def own_tenant(caller: Caller, wanted: str | None) -> str | None:
    """Say whose a new thing is: a tenant's token makes only that tenant's."""
    if caller.tenant is None:
        return wanted
    if wanted not in (None, caller.tenant):
        raise Problem("invalid", "tenant: leave it out, a tenant's token makes only that tenant's own.")
    return caller.tenant


def subject_of(document: Json) -> str:
    """Name what an event is delivered in order with: its call, else itself."""
    call = document["data"].get("call")
    return str(call["id"]) if call else str(document["id"])


async def own(
    api: Api, caller: Caller, kind: Literal["source", "subscription"], name: str, *, missing_ok: bool = False
) -> Declaration | None:
    """Read what was made at run time and may be changed by this caller; None only with `missing_ok`.

    What is somebody else's looks as if it were not there, or, for who would make it, as an id that cannot be had.
    """
    directory = api.runtime.registry
    if directory.configured(kind, name):
        if caller.tenant is None:
            raise configured(name)
        raise taken() if missing_ok else not_found(kind)
    stands = await directory.declarations.get(kind, name)
    if stands is not None and caller.sees(stands.tenant):
        return stands
    if not missing_ok:
        raise not_found(kind)
    if stands is not None:
        raise taken()
    return None
