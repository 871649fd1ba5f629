"""Publish events about the relay itself, for the subscriptions whose `events` name them."""

from datetime import UTC, datetime
from typing import Any, Protocol

from relay.domain import ids
from relay.domain.json import Json
from relay.domain.time import iso
from relay.events.payload import API_VERSION
from relay.events.publisher import Audience
from relay.store.events import EventStore, NewEvent


class SourceIdentity(Protocol):
    """What an event tells about a source."""

    @property
    def id(self) -> str: ...

    @property
    def kind(self) -> Any: ...

    @property
    def tenant(self) -> str | None: ...


class Operations:
    def __init__(self, events: EventStore, audience: Audience) -> None:
        self._events = events
        self._audience = audience

    async def source_error(self, source: SourceIdentity, error: str, *, since_ms: int) -> None:
        """Publish `source.error`; repeated calls with one `since_ms` are one event."""
        await self._publish_source("source.error", source, since_ms, {"error": error})

    async def source_recovered(self, source: SourceIdentity, *, since_ms: int) -> None:
        """Publish `source.recovered` for the error that began at `since_ms`."""
        await self._publish_source("source.recovered", source, since_ms, {})

    async def _publish_source(self, event_type: str, source: SourceIdentity, since_ms: int, details: Json) -> None:
        since = iso(datetime.fromtimestamp(since_ms // 1000, UTC))
        about = {"id": source.id, "provider": source.kind.name, **details, "since": since}
        await self.publish(
            event_type, {"source": about}, about=source.id, occurrence=str(since_ms), tenant=source.tenant
        )

    async def publish(
        self,
        event_type: str,
        data: Json,
        *,
        about: str,
        occurrence: str,
        to: str | None = None,
        tenant: str | None = None,
    ) -> str:
        """Publish an event without a call and return its id.

        The id derives from the type, what it is `about` and the `occurrence`, so that a repeated call publishes nothing
        new. `to` is the only subscription to receive it; by default all whose filters match do.
        """
        event_id = ids.event_id(about, "", event_type, occurrence)
        document: Json = {
            "id": event_id,
            "type": event_type,
            "timestamp": iso(datetime.now(UTC)),
            "api_version": API_VERSION,
            "data": data,
        }
        audience = [to] if to is not None else self._audience.of(document, tenant=tenant)
        await self._events.publish(NewEvent(event_id, document, audience))
        return event_id
