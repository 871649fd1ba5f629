"""The enrich lane: who was on the call, and then what is owed is said. A shell: read the claim, call the relay, settle.

It may run twice without harm: what is said is fenced by the call's version.
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
from relay.providers.base import Purpose
from relay.providers.source import Source
from relay.queue.lane import Claim
from relay.queue.runner import Runner
from relay.store.calls import StoredCall, claimed_call
from relay.store.sources import SourceStore
from workers import EXTRA_OFF_S

log = structlog.get_logger(__name__)

_CONTACT_PATIENCE_S = 10.0


class Enrich:
    """Finds out who was on the calls, then says what is owed. One batch is calls of one source."""

    runner: Runner

    def __init__(
        self,
        sources: Callable[[], Mapping[str, Source]],
        book: AddressBook,
        publisher: Publisher,
        states: SourceStore,
    ) -> None:
        self._sources = sources
        self._book = book
        self._publisher = publisher
        self._states = states
        self._off_until: dict[str, float] = {}
        self._seen_well: set[str] = set()

    async def work(self, claims: Sequence[Claim]) -> None:
        """Do a batch: calls that need nobody looked up are said at once, the others after one look-up for all."""
        source = self._sources().get(claims[0].partition)
        if source is None:
            for claim in claims:
                self.runner.settle(claim, "done")
            return
        now_ms = self.runner.lane.store_now_ms
        at_once: list[tuple[Claim, StoredCall]] = []
        to_look_up: list[tuple[Claim, StoredCall]] = []
        for claim in claims:
            call = claimed_call(claim)
            (to_look_up if self._wants_contact(source, call, now_ms) else at_once).append((claim, call))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._say(source, at_once, {}, failed=False))
            if to_look_up:
                tasks.create_task(self._look_up(source, to_look_up, now_ms))

    def _wants_contact(self, source: Source, call: StoredCall, now_ms: int) -> bool:
        if not source.rules.contacts or not call.finished or contact_settled(call) or number_to_look_up(call) is None:
            return False
        lookup = call.lookup or {"tries": 0, "next_ms": 0}
        if lookup["tries"] >= len(LADDER_S) or lookup["next_ms"] > now_ms:
            return False
        return self._off_until.get(source.id, 0) <= time.monotonic()

    async def _look_up(self, source: Source, calls: list[tuple[Claim, StoredCall]], now_ms: int) -> None:
        late = [call for _, call in calls if call.said is None and not self._may_wait(source, call, now_ms)]
        # Their hold is over (or there is none): they are told now, and of the contact when it comes.
        await asyncio.gather(*(self._publisher.publish(call, source.rules, {}, tenant=source.tenant) for call in late))
        holds = [contact_hold_left_ms(call, now_ms=now_ms, rules=source.rules) for _, call in calls]
        patience_s = min([hold / 1000 for hold in holds if hold > 0], default=_CONTACT_PATIENCE_S)
        numbers = {number for _, call in calls if (number := number_to_look_up(call))}
        found: Mapping[str, Json] = {}
        failed = True
        try:
            async with (
                asyncio.timeout(min(max(patience_s, 0.05), _CONTACT_PATIENCE_S)),
                source.asking(Purpose.CONTACTS) as provider,
            ):
                if provider.contacts is not None:
                    found = await self._book.find(source.id, provider.contacts, numbers)
                    failed = False
        except Unauthorized as error:
            await self._switch_off(source, str(error))
        except (RateLimited, OverBudget, ProviderError, TimeoutError) as error:
            metrics.CONTACTS.labels("unavailable").inc(len(calls))
            say = log.debug if isinstance(error, OverBudget) else log.info  # that our share is used up is no news
            say("contacts_unavailable", source=source.id, calls=len(calls), error=str(error) or "took too long")
        else:
            await self._is_well(source)
            for part in found.values():
                metrics.CONTACTS.labels(part["lookup_status"]).inc()
        await self._say(source, calls, found, failed=failed)

    def _may_wait(self, source: Source, call: StoredCall, now_ms: int) -> bool:
        return contact_hold_left_ms(call, now_ms=now_ms, rules=source.rules) > 0

    async def _is_well(self, source: Source) -> None:
        """The address book answered: whatever was wrong with it, before this process too, is over."""
        if source.id not in self._seen_well:
            self._seen_well.add(source.id)
            await self._states.note(source.id, contacts_off="")

    async def _switch_off(self, source: Source, why: str) -> None:
        self._off_until[source.id] = time.monotonic() + EXTRA_OFF_S
        self._seen_well.discard(source.id)
        log.error("contacts_off", source=source.id, why=why, retry_s=EXTRA_OFF_S)
        await self._states.note(source.id, contacts_off=why)

    async def _say(
        self, source: Source, calls: list[tuple[Claim, StoredCall]], found: Mapping[str, Json], *, failed: bool
    ) -> None:
        # One at a time would add up the round trips of a batch; the store takes them side by side.
        await asyncio.gather(*(self._say_one(source, claim, call, found, failed) for claim, call in calls))

    async def _say_one(
        self, source: Source, claim: Claim, call: StoredCall, found: Mapping[str, Json], failed: bool
    ) -> None:
        parts: dict[str, Json | None] = {}
        retry_ms: int | None = None
        number = number_to_look_up(call)
        if source.rules.contacts and call.finished and not contact_settled(call):
            if number is None:
                parts["contact"] = {**NO_CONTACT, "number": None}
            elif number in found:
                parts["contact"] = {**found[number], "number": number}
                if call.lookup:
                    parts["lookup"] = None
            elif failed:
                tries = (call.lookup or {"tries": 0})["tries"]
                if tries < len(LADDER_S):
                    retry_ms = LADDER_S[tries] * 1000
                    parts["lookup"] = {"tries": tries + 1, "next_ms": self.runner.lane.store_now_ms + retry_ms}
            elif call.lookup and call.lookup["tries"] < len(LADDER_S):
                retry_ms = max(call.lookup["next_ms"] - self.runner.lane.store_now_ms, 0)
        wait_ms = await self._publisher.publish(call, source.rules, parts, tenant=source.tenant)
        waits = [wait for wait in (wait_ms, retry_ms) if wait is not None]
        if waits:
            self.runner.settle(claim, "again", wait_ms=max(min(waits), 1))
        else:
            self.runner.settle(claim, "done")


def number_to_look_up(call: StoredCall) -> str | None:
    """The other side's number; extensions and hidden numbers are never looked up."""
    number = call.record.get("external_number")
    return number if isinstance(number, str) else None
