"""The enrich lane: decides what is due for a call and publishes it. Nothing here waits on a network.

Running twice does no harm: a publish is refused once the call has another version.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from relay.domain.json import Json
from relay.events.decide import contact_settled, number_to_look_up, wants_contact
from relay.events.payload import NO_CONTACT
from relay.events.publisher import Publisher
from relay.providers.source import Source
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.runner import Settle
from relay.queue.settlement import Done, PartitionHealth, Retry, Settlement
from relay.store.calls import StoredCall, claimed_call
from relay.store.lanes import ContactWanted
from workers.unknown import retry_unknown_calls


class EnrichWorker:
    """Publishes what is due for calls, and has contacts looked up. One batch is calls of one source."""

    def __init__(
        self,
        lane: Lane,
        sources: Callable[[], Mapping[str, Source]],
        publisher: Publisher,
        *,
        wake_contacts: Callable[[], None],
    ) -> None:
        self._lane = lane
        self._sources = sources
        self._publisher = publisher
        self._wake_contacts = wake_contacts

    async def work(self, batch: Sequence[Claim], settle: Settle) -> None:
        """Publish side by side; a call that cannot be published does not take the others with it."""
        source = self._sources().get(batch[0].partition)
        if source is None:
            retry_unknown_calls(batch, settle, now_ms=self._lane.store_now_ms)
            return
        # No TaskGroup: it would wrap a lost connection in a group, and cancel publishes that are half way.
        results = await asyncio.gather(
            *(self._publish(source, claim, settle) for claim in batch), return_exceptions=True
        )
        for error in results:
            if error is not None:
                raise error

    async def _publish(self, source: Source, claim: Claim, settle: Settle) -> None:
        call = claimed_call(claim)
        hold_ms = await self._publisher.publish(call, source.rules, _parts(call, source), tenant=source.tenant)
        wanted = ContactWanted() if wants_contact(call, source.rules) else None
        health = PartitionHealth.HEALTHY
        settle(claim, Done(wanted, health) if hold_ms is None else Retry(max(hold_ms, 1), wanted, health))

    def on_settled(self, claim: Claim, settlement: Settlement) -> None:
        """Wake the contacts lane once the store has put the call there."""
        if isinstance(settlement, Done | Retry) and settlement.detail is not None:
            self._wake_contacts()


def _parts(call: StoredCall, source: Source) -> dict[str, Json]:
    nobody_to_look_up = source.rules.contacts and call.finished and number_to_look_up(call) is None
    if nobody_to_look_up and not contact_settled(call):
        return {"contact": {**NO_CONTACT, "number": None}}
    return {}
