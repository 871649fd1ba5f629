"""The enrich lane: looks up who was on the call, then publishes what is due.

Running twice does no harm: a publish is refused once the call has another version.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from relay import metrics
from relay.domain.json import Json
from relay.enrichment.contacts import LADDER_S, AddressBook
from relay.errors import OverBudget, ProviderError, RateLimited, Unauthorized
from relay.events.decide import contact_hold_left_ms, contact_settled
from relay.events.payload import NO_CONTACT
from relay.events.publisher import Publisher
from relay.providers.source import Source
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.runner import Settle
from relay.queue.settlement import Done, Retry
from relay.store.calls import StoredCall, claimed_call
from relay.store.sources import SourceStore
from workers import EXTRA_PAUSE_S, unknown_wait_ms

log = structlog.get_logger(__name__)

_LOOKUP_TIMEOUT_S = 10.0

_Calls = list[tuple[Claim, StoredCall]]


class EnrichWorker:
    """Looks up contacts and publishes. One batch is calls of one source."""

    def __init__(
        self,
        lane: Lane,
        sources: Callable[[], Mapping[str, Source]],
        book: AddressBook,
        publisher: Publisher,
        states: SourceStore,
    ) -> None:
        self._lane = lane
        self._sources = sources
        self._book = book
        self._publisher = publisher
        self._states = states
        self._paused_until: dict[str, float] = {}
        self._book_works: set[str] = set()

    async def work(self, batch: Sequence[Claim], settle: Settle) -> None:
        """Publish the calls that need no look-up at once, the others after one look-up for all of them."""
        source = self._sources().get(batch[0].partition)
        now_ms = self._lane.store_now_ms
        if source is None:
            for claim in batch:
                wait_ms = unknown_wait_ms(waiting_since_ms=claimed_call(claim).ready_ms, now_ms=now_ms)
                settle(claim, Retry(wait_ms))
            return
        ready: _Calls = []
        to_look_up: _Calls = []
        for claim in batch:
            call = claimed_call(claim)
            (to_look_up if self._wants_contact(source, call, now_ms) else ready).append((claim, call))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publish_all(source, ready, {}, settle, lookup_failed=False))
            if to_look_up:
                tasks.create_task(self._look_up(source, to_look_up, now_ms, settle))

    def _wants_contact(self, source: Source, call: StoredCall, now_ms: int) -> bool:
        if not source.rules.contacts or not call.finished or contact_settled(call) or number_to_look_up(call) is None:
            return False
        lookup = call.lookup or {"tries": 0, "next_ms": 0}
        if lookup["tries"] >= len(LADDER_S) or lookup["next_ms"] > now_ms:
            return False
        return self._paused_until.get(source.id, 0) <= time.monotonic()

    async def _look_up(self, source: Source, calls: _Calls, now_ms: int, settle: Settle) -> None:
        holds = [contact_hold_left_ms(call, now_ms=now_ms, rules=source.rules) for _, call in calls]
        overdue = [call for (_, call), hold in zip(calls, holds, strict=True) if call.published is None and hold <= 0]
        # No hold is left (or none was set): published now, and again when the contact is there.
        await asyncio.gather(
            *(self._publisher.publish(call, source.rules, {}, tenant=source.tenant) for call in overdue)
        )
        timeout_s = min([hold / 1000 for hold in holds if hold > 0], default=_LOOKUP_TIMEOUT_S)
        numbers = {number for _, call in calls if (number := number_to_look_up(call))}
        contacts: Mapping[str, Json] = {}
        failed = True
        try:
            async with asyncio.timeout(min(max(timeout_s, 0.05), _LOOKUP_TIMEOUT_S)):
                if source.provider.contacts is not None:
                    contacts = await self._book.find(source.id, source.provider.contacts, numbers)
                    failed = False
        except Unauthorized as error:
            await self._pause(source, str(error))
        except (RateLimited, OverBudget, ProviderError, TimeoutError) as error:
            metrics.CONTACTS.labels("unavailable").inc(len(calls))
            write = log.debug if isinstance(error, OverBudget) else log.info  # an exhausted budget is routine
            write("contacts_unavailable", source=source.id, calls=len(calls), error=str(error) or "timed out")
        else:
            await self._resume(source)
            for contact in contacts.values():
                metrics.CONTACTS.labels(contact["lookup_status"]).inc()
        await self._publish_all(source, calls, contacts, settle, lookup_failed=failed)

    async def _resume(self, source: Source) -> None:
        """Clear a pause that this process, or one before it, has noted."""
        if source.id not in self._book_works:
            self._book_works.add(source.id)
            await self._states.note(source.id, contacts_off="")

    async def _pause(self, source: Source, reason: str) -> None:
        self._paused_until[source.id] = time.monotonic() + EXTRA_PAUSE_S
        self._book_works.discard(source.id)
        log.error("source_contacts_paused", source=source.id, reason=reason, retry_in_s=EXTRA_PAUSE_S)
        await self._states.note(source.id, contacts_off=reason)

    async def _publish_all(
        self, source: Source, calls: _Calls, contacts: Mapping[str, Json], settle: Settle, *, lookup_failed: bool
    ) -> None:
        # One after the other would add up the round trips of a batch; the store takes them side by side.
        await asyncio.gather(
            *(self._publish_one(source, claim, call, contacts, settle, lookup_failed) for claim, call in calls)
        )

    async def _publish_one(
        self,
        source: Source,
        claim: Claim,
        call: StoredCall,
        contacts: Mapping[str, Json],
        settle: Settle,
        lookup_failed: bool,
    ) -> None:
        parts: dict[str, Json | None] = {}
        lookup_ms: int | None = None
        number = number_to_look_up(call)
        if source.rules.contacts and call.finished and not contact_settled(call):
            if number is None:
                parts["contact"] = {**NO_CONTACT, "number": None}
            elif number in contacts:
                parts["contact"] = {**contacts[number], "number": number}
                if call.lookup:
                    parts["lookup"] = None
            elif lookup_failed:
                tries = (call.lookup or {"tries": 0})["tries"]
                if tries < len(LADDER_S):
                    lookup_ms = LADDER_S[tries] * 1000
                    parts["lookup"] = {"tries": tries + 1, "next_ms": self._lane.store_now_ms + lookup_ms}
            elif call.lookup and call.lookup["tries"] < len(LADDER_S):
                lookup_ms = max(call.lookup["next_ms"] - self._lane.store_now_ms, 0)
        publish_ms = await self._publisher.publish(call, source.rules, parts, tenant=source.tenant)
        waits = [wait_ms for wait_ms in (publish_ms, lookup_ms) if wait_ms is not None]
        settle(claim, Retry(max(min(waits), 1)) if waits else Done())


def number_to_look_up(call: StoredCall) -> str | None:
    """The other side's number; extensions and hidden numbers are never looked up."""
    number = call.record.get("external_number")
    return number if isinstance(number, str) else None
