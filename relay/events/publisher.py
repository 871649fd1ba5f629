"""From what is known to what is said: read the call, build the difference, publish; refused when the call moved on.

Only the enrich lane does this, under the call's lease; the publish is fenced by the call's version all the same, so
even a holder whose lease has ended says nothing twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog

from relay import metrics
from relay.domain.json import Json
from relay.events.decide import SourceRules, Wait, decide
from relay.store.calls import Ledger, NewEvent, StoredCall

log = structlog.get_logger(__name__)

_TRIES = 8


class Audience(Protocol):
    """Knows who wants to hear an event."""

    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
        """Ids of the subscriptions that want it."""
        ...


class Publisher:
    """Publishes what is owed for a call."""

    def __init__(
        self, ledger: Ledger, audience: Audience, *, now_ms: Callable[[], int], published: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._audience = audience
        self._now_ms = now_ms
        self._published = published

    async def __call__(
        self, call: StoredCall, rules: SourceRules, parts: Mapping[str, Any], *, tenant: str | None = None
    ) -> int | None:
        """Write new parts of a call (`contact`, `lookup`) and say what is owed.

        Returns after how many ms the call must be looked at again, None when nothing is pending.
        """
        current: StoredCall | None = call
        for _ in range(_TRIES):
            if current is None:
                return None  # forgotten meanwhile
            known = replace(current, **parts)
            verdict = decide(known, now_ms=self._now_ms(), rules=rules)
            if isinstance(verdict, Wait):
                if not parts or await self._ledger.publish(current, parts, ()) is not None:
                    return verdict.wait_ms
            else:
                events = [
                    NewEvent(draft.id, draft.document, self._audience.of(draft.document, tenant=tenant))
                    for draft in verdict.events
                ]
                fields = dict(parts)
                if verdict.said is not None:
                    fields["said"] = verdict.said
                if not fields and not events:
                    return None
                made = await self._ledger.publish(current, fields, events)
                if made is not None:
                    for draft in verdict.events:
                        metrics.EVENTS.labels(draft.type).inc()
                        log.info("event_published", type=draft.type, event_id=draft.id, call=call.id)
                    if made:
                        self._published()
                    return None
            current = await self._ledger.call(call.id)
        log.warning("call_keeps_changing", call=call.id, tries=_TRIES)
        return 1000
