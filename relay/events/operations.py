"""Events about the relay itself, for subscriptions that name them."""

from datetime import UTC, datetime
from typing import Any, Protocol

from relay.domain import ids
from relay.domain.json import Json
from relay.domain.time import iso
from relay.events.payload import API_VERSION
from relay.events.publisher import Audience
from relay.store.calls import Ledger, NewEvent


class AboutSource(Protocol):
    """What an operational event says of a source."""

    @property
    def id(self) -> str: ...

    @property
    def kind(self) -> Any: ...

    @property
    def tenant(self) -> str | None: ...


class Operations:
    """Says that something needs a person, and that it does not any more."""

    def __init__(self, ledger: Ledger, audience: Audience) -> None:
        self._ledger = ledger
        self._audience = audience

    async def source_error(self, source: AboutSource, error: str, *, since_ms: int) -> None:
        """Say `source.error`: once for each stretch of trouble."""
        about = {"id": source.id, "provider": source.kind.name, "error": error, "since": _instant(since_ms)}
        await self.say("source.error", {"source": about}, of=source.id, which=str(since_ms), tenant=source.tenant)

    async def source_recovered(self, source: AboutSource, *, since_ms: int) -> None:
        """Say `source.recovered`."""
        about = {"id": source.id, "provider": source.kind.name, "since": _instant(since_ms)}
        await self.say("source.recovered", {"source": about}, of=source.id, which=str(since_ms), tenant=source.tenant)

    async def say(
        self, event_type: str, data: Json, *, of: str, which: str, to: str | None = None, tenant: str | None = None
    ) -> str:
        """Publish an event without a call; `which` tells this one from others of its type. Gives its id."""
        eid = ids.event_id(of, "", event_type, which)
        document: Json = {
            "id": eid,
            "type": event_type,
            "timestamp": iso(datetime.now(UTC)),
            "api_version": API_VERSION,
            "data": data,
        }
        audience = [to] if to is not None else self._audience.of(document, tenant=tenant)
        await self._ledger.publish(None, {}, [NewEvent(eid, document, audience)], subject=eid)
        return eid


def _instant(ms: int) -> str | None:
    return iso(datetime.fromtimestamp(ms // 1000, UTC))
