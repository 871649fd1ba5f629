"""The contacts lane: looks up who was on the call, and publishes what is due with it.

Only contacts wait here, so a slow or unresponsive address book delays nothing else: the enrich lane publishes a call at
the end of its hold. Both may publish at once, since a publish is refused once the call has another version.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from relay import metrics
from relay.domain.json import Json
from relay.enrichment.contacts import AddressBook, after_failure
from relay.errors import OverBudget, ProviderError, SettingsError, Unauthorized
from relay.events.decide import number_to_look_up, wants_contact
from relay.events.publisher import Publisher
from relay.providers.source import Source
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.runner import Settle
from relay.queue.settlement import Done, PartitionHealth, Retry
from relay.store.calls import claimed_call
from relay.store.lanes import ContactFound, LookupProgress
from relay.store.sources import SourceStore
from workers import EXTRA_PAUSE_S
from workers.unknown import retry_unknown_calls

log = structlog.get_logger(__name__)

# Longest wait for one look-up. Events do not wait for it: their hold has its own end.
LOOKUP_TIMEOUT_S = 10.0


class ContactWorker:
    """Looks up contacts. One batch is calls of one source and costs at most one request."""

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
        self._states = states
        self._publisher = publisher
        self._paused_until: dict[str, float] = {}
        self._allowed: set[str] = set()  # sources of which this process knows that contacts are not paused

    async def work(self, batch: Sequence[Claim], settle: Settle) -> None:
        """Look up the numbers of all calls that still want a contact at once."""
        source = self._sources().get(batch[0].partition)
        if source is None:
            retry_unknown_calls(batch, settle, now_ms=self._lane.store_now_ms)
            return
        wanted: list[tuple[Claim, str]] = []
        for claim in batch:
            call = claimed_call(claim)
            number = number_to_look_up(call)
            if number is not None and wants_contact(call, source.rules):
                wanted.append((claim, number))
            else:
                settle(claim, Done())
        if not wanted:
            return
        paused_s = self._paused_until.get(source.id, 0) - time.monotonic()
        if paused_s > 0:
            for claim, _ in wanted:
                settle(claim, Retry(int(paused_s * 1000) + 1))
            return
        contacts, health = await self._look_up(source, [number for _, number in wanted])
        results = await asyncio.gather(
            # The batch was one request, so it shows the health of the address book once.
            *(
                self._finish(source, claim, number, contacts, None if n else health, settle)
                for n, (claim, number) in enumerate(wanted)
            ),
            return_exceptions=True,
        )
        for error in results:
            if error is not None:
                raise error

    async def _finish(
        self,
        source: Source,
        claim: Claim,
        number: str,
        contacts: Mapping[str, Json] | None,
        health: PartitionHealth | None,
        settle: Settle,
    ) -> None:
        call = claimed_call(claim)
        if contacts is None:
            wait_s, lookup = after_failure(call.lookup, number)
            progress = LookupProgress(lookup)
            settle(claim, Done(progress, health) if wait_s is None else Retry(wait_s * 1000, progress, health))
            return
        parts: dict[str, Json | None] = {"contact": {**contacts[number], "number": number}}
        if call.lookup:
            parts["lookup"] = None
        await self._publisher.publish(call, source.rules, parts, tenant=source.tenant)
        settle(claim, Done(ContactFound(), health))

    async def _look_up(
        self, source: Source, numbers: Sequence[str]
    ) -> tuple[Mapping[str, Json] | None, PartitionHealth | None]:
        """Return the contact part of each number, None when the address book is unavailable, and what that shows of it:
        nothing, where our own budget is exhausted."""
        assert source.provider.contacts is not None  # noqa: S101 - rules.contacts says so
        health: PartitionHealth | None = PartitionHealth.FAILING
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                contacts = await self._book.find(source.id, source.provider.contacts, numbers)
        except Unauthorized as error:
            await self._pause(source, str(error))
        except OverBudget as error:
            health = None
            log.debug("contacts_postponed", source=source.id, calls=len(numbers), error=str(error))
        except (ProviderError, SettingsError, TimeoutError) as error:
            log.info("contacts_lookup_failed", source=source.id, calls=len(numbers), error=str(error) or "timed out")
        else:
            await self._resume(source)
            for contact in contacts.values():
                metrics.CONTACTS.labels(contact["lookup_status"]).inc()
            return contacts, PartitionHealth.HEALTHY
        metrics.CONTACTS.labels("unavailable").inc(len(numbers))
        return None, health

    async def _resume(self, source: Source) -> None:
        """Clear a pause that this process, or one before it, has noted."""
        if source.id not in self._allowed:
            self._allowed.add(source.id)
            await self._states.note(source.id, contacts_off="")

    async def _pause(self, source: Source, reason: str) -> None:
        self._paused_until[source.id] = time.monotonic() + EXTRA_PAUSE_S
        self._allowed.discard(source.id)
        log.error("source_contacts_paused", source=source.id, reason=reason, retry_in_s=EXTRA_PAUSE_S)
        await self._states.note(source.id, contacts_off=reason)
