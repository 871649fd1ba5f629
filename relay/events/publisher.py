"""Publish the events that are due for a call: decide, write in one step, and start over when the call has changed.

The enrich and contacts lanes publish, each under its lease of the call, perhaps at the same time. The write is fenced
by the call's version, so that neither publishes what the other has, nor does a worker whose lease has ended.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, assert_never

import structlog

from relay import metrics
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.events.decide import EventDraft, Publish, Wait, decide
from relay.store.calls import StoredCall
from relay.store.events import NewEvent
from relay.store.store import Store

log = structlog.get_logger(__name__)

_MAX_ATTEMPTS = 8
_RETRY_MS = 1000


class Audience(Protocol):
    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]: ...


class Publisher:
    """Publishes the events that are due for a call. Holds end by `now_ms`, the relay's clock; events carry `wall_ms`,
    the time of day. `on_deliveries` runs after each write that created deliveries."""

    def __init__(
        self,
        store: Store,
        audience: Audience,
        *,
        now_ms: Callable[[], int],
        on_deliveries: Callable[[], None],
        elsewhere: Callable[[], Collection[str]] = tuple,
        wall_ms: Callable[[], int] | None = None,
    ) -> None:
        """`elsewhere` names the subscriptions that only processes with a newer configuration know."""
        self._store = store
        self._audience = audience
        self._elsewhere = elsewhere
        self._now_ms = now_ms
        self._wall_ms = wall_ms or now_ms
        self._on_deliveries = on_deliveries

    async def publish(
        self, call: StoredCall, rules: SourceRules, parts: Mapping[str, Any], *, tenant: str | None = None
    ) -> int | None:
        """Store new parts of a call (`contact`, `lookup`; None removes one) and publish what is due.

        Returns the ms after which to decide again, None when nothing is held.
        """
        current: StoredCall | None = call
        for _ in range(_MAX_ATTEMPTS):
            if current is None:
                return None  # erased, or trimmed
            decision = decide(replace(current, **parts), now_ms=self._now_ms(), rules=rules, wall_ms=self._wall_ms())
            match decision:
                case Wait(wait_ms):
                    if not parts or await self._store.events.publish_call(current, parts, ()) is not None:
                        return wait_ms
                case Publish():
                    if await self._write(current, parts, decision, tenant):
                        return None
                case _:
                    assert_never(decision)
            # Another stage has written to the call since it was read, a poll or the recording: decide anew.
            current = await self._store.calls.get(call.id)
        log.warning("call_publish_conflict", call=call.id, attempts=_MAX_ATTEMPTS)
        return _RETRY_MS

    async def restore(self, call: StoredCall, rules: SourceRules, event_id: str, *, tenant: str | None = None) -> bool:
        """Publish an event again whose document was lost, under its id and with what is known of the call now.

        False when the call does not tell that event any more, as for most updates, or has changed meanwhile.
        """
        decision = decide(replace(call, published=None, ready_ms=0), now_ms=self._now_ms(), rules=rules)
        drafts = decision.events if isinstance(decision, Publish) else ()
        events = [self._addressed(draft, tenant) for draft in drafts if draft.id == event_id]
        if not events or (deliveries := await self._store.events.publish_call(call, {}, events)) is None:
            return False
        log.info("event_restored", event_id=event_id, call=call.id)
        if deliveries:
            self._on_deliveries()
        return True

    def _addressed(self, draft: EventDraft, tenant: str | None) -> NewEvent:
        return NewEvent(draft.id, draft.document, self._audience.of(draft.document, tenant=tenant), self._elsewhere())

    async def _write(self, call: StoredCall, parts: Mapping[str, Any], decision: Publish, tenant: str | None) -> bool:
        """Write parts and events in one step; False when the call has changed since it was read."""
        events = [self._addressed(draft, tenant) for draft in decision.events]
        fields = dict(parts)
        if decision.published is not None:
            fields["published"] = decision.published
        if not fields and not events:
            return True
        deliveries = await self._store.events.publish_call(call, fields, events)
        if deliveries is None:
            return False
        for draft in decision.events:
            metrics.EVENTS.labels(draft.type).inc()
            log.info("event_published", type=draft.type, event_id=draft.id, call=call.id)
        if deliveries:
            self._on_deliveries()
        return True
