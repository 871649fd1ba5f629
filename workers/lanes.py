"""The work of the enrich, record and deliver lanes: each a shell that reads its claim, calls the relay, and settles.

Every one of them may run twice without harm: what must happen once is fenced in the store.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import assert_never

import orjson
import structlog

from relay import metrics
from relay.delivery.attempt import Attempts
from relay.delivery.outcomes import Delivered, Outcome
from relay.delivery.retry import Disable, Done, GiveUp, RetryAt, decide
from relay.delivery.subscriptions import Subscription
from relay.enrich.contacts import LADDER_S, AddressBook
from relay.errors import OverBudget, ProviderError, RateLimited, Unauthorized
from relay.events.advance import Advance
from relay.events.say import NO_CONTACT, SETTLED_CONTACT, contact_hold_left_ms
from relay.ledger.calls import ClaimedEvent, StoredCall, claimed_call, claimed_event
from relay.ledger.deliveries import DeliveryState, Status
from relay.ledger.lane import Claim
from relay.ledger.pack import pack
from relay.ledger.runner import Runner
from relay.ledger.sources import SourceStates
from relay.model import Json, from_iso
from relay.recordings import fetch
from relay.recordings.fetch import Denied, Fetched, FetchState, GaveUp, NoneThere, RecordingStatus, TryAgain
from relay.recordings.storage import RecordingStorage
from relay.sources import Source

log = structlog.get_logger(__name__)

EXTRA_OFF_S = 900
"""An extra (contacts, recordings) that the provider refuses is left alone for this long; calls go on without it."""
_CONTACT_PATIENCE_S = 10.0


class Enrich:
    """Finds out who was on the calls, then says what is owed. One batch is calls of one source."""

    runner: Runner

    def __init__(
        self,
        sources: Callable[[], Mapping[str, Source]],
        book: AddressBook,
        advance: Advance,
        states: SourceStates,
    ) -> None:
        self._sources = sources
        self._book = book
        self._advance = advance
        self._states = states
        self._off_until: dict[str, float] = {}

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
        if not source.rules.contacts or not call.finished or _settled(call) or number_to_look_up(call) is None:
            return False
        lookup = call.lookup or {"tries": 0, "next_ms": 0}
        if lookup["tries"] >= len(LADDER_S) or lookup["next_ms"] > now_ms:
            return False
        return self._off_until.get(source.id, 0) <= time.monotonic()

    async def _look_up(self, source: Source, calls: list[tuple[Claim, StoredCall]], now_ms: int) -> None:
        holds = [contact_hold_left_ms(call, now_ms=now_ms, rules=source.rules) for _, call in calls]
        patience_s = min([hold / 1000 for hold in holds if hold > 0], default=_CONTACT_PATIENCE_S)
        numbers = {number for _, call in calls if (number := number_to_look_up(call))}
        found: Mapping[str, Json] = {}
        failed = True
        try:
            async with asyncio.timeout(min(max(patience_s, 0.05), _CONTACT_PATIENCE_S)), source.asking() as provider:
                if provider.contacts is not None:
                    found = await self._book.find(source.id, provider.contacts, numbers)
                    failed = False
        except Unauthorized as error:
            await self._switch_off(source, str(error))
        except (RateLimited, OverBudget, ProviderError, TimeoutError) as error:
            metrics.CONTACTS.labels("unavailable").inc(len(calls))
            log.info("contacts_unavailable", source=source.id, calls=len(calls), error=str(error) or "took too long")
        else:
            for part in found.values():
                metrics.CONTACTS.labels(part["lookup_status"]).inc()
        await self._say(source, calls, found, failed=failed)

    async def _switch_off(self, source: Source, why: str) -> None:
        self._off_until[source.id] = time.monotonic() + EXTRA_OFF_S
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
        if source.rules.contacts and call.finished and not _settled(call):
            if number is None:
                parts["contact"] = NO_CONTACT
            elif number in found:
                parts["contact"] = found[number]
                if call.lookup:
                    parts["lookup"] = None
            elif failed:
                tries = (call.lookup or {"tries": 0})["tries"]
                if tries < len(LADDER_S):
                    retry_ms = LADDER_S[tries] * 1000
                    parts["lookup"] = {"tries": tries + 1, "next_ms": self.runner.lane.store_now_ms + retry_ms}
            elif call.lookup and call.lookup["tries"] < len(LADDER_S):
                retry_ms = max(call.lookup["next_ms"] - self.runner.lane.store_now_ms, 0)
        wait_ms = await self._advance(call, source.rules, parts)
        waits = [wait for wait in (wait_ms, retry_ms) if wait is not None]
        if waits:
            self.runner.settle(claim, "again", wait_ms=max(min(waits), 1))
        else:
            self.runner.settle(claim, "done")


def number_to_look_up(call: StoredCall) -> str | None:
    """The other side's number; extensions and hidden numbers are never looked up."""
    number = call.record.get("external_number")
    return number if isinstance(number, str) else None


def _settled(call: StoredCall) -> bool:
    return call.contact is not None and call.contact["lookup_status"] in SETTLED_CONTACT


class Record:
    """Fetches the audio of answered calls."""

    runner: Runner

    def __init__(
        self,
        sources: Callable[[], Mapping[str, Source]],
        storage: RecordingStorage,
        states: SourceStates,
        *,
        wake_enrich: Callable[[], None],
    ) -> None:
        self._sources = sources
        self._storage = storage
        self._states = states
        self._wake_enrich = wake_enrich

    async def work(self, claims: Sequence[Claim]) -> None:
        """Fetch one recording and keep it."""
        claim = claims[0]
        call = claimed_call(claim)
        source = self._sources().get(claim.partition)
        if source is None or not source.rules.recordings or call.record["outcome"] != "answered":
            self.runner.settle(claim, "done")
            return
        state = FetchState.from_json(call.fetch) if call.fetch else None
        async with self._lease_renewed(claim), source.asking() as provider:
            assert provider.recordings is not None  # noqa: S101 - rules.recordings says so
            result = await fetch.fetch(
                provider.recordings,
                self._storage,
                call.id,
                call.key,
                state,
                clock=self._store_now,
                started_at=datetime.fromtimestamp(call.started_ms / 1000, UTC),
            )
        await self._settle(claim, call, source, state, result)

    async def _settle(
        self, claim: Claim, call: StoredCall, source: Source, state: FetchState | None, result: fetch.Result
    ) -> None:
        match result:
            case Fetched(part):
                log.info("recording_stored", call=call.id, source=source.id, size_bytes=part["size_bytes"])
                self._keep(claim, part)
            case NoneThere():
                self._keep(claim, fetch.recording_part(RecordingStatus.NONE))
            case GaveUp(reason):
                log.warning("recording_failed", call=call.id, source=source.id, why=reason)
                self._keep(claim, fetch.recording_part(RecordingStatus.UNAVAILABLE))
            case TryAgain(at, kept, _):
                wait_ms = max(int((at - self._store_now()).total_seconds() * 1000), 1)
                self.runner.settle(claim, "again", wait_ms=wait_ms, b=pack(kept.to_json()))
            case Denied(reason):
                first = state.first_try_at if state else self._store_now()
                if self._store_now() - first > timedelta(hours=24):
                    self._keep(claim, fetch.recording_part(RecordingStatus.UNAVAILABLE))
                    return
                log.error("recordings_off", source=source.id, why=reason, retry_s=EXTRA_OFF_S)
                await self._states.note(source.id, recordings_off=reason)
                kept = state or FetchState(first)
                self.runner.settle(claim, "again", wait_ms=EXTRA_OFF_S * 1000, b=pack(kept.to_json()))
            case _:
                assert_never(result)

    def _keep(self, claim: Claim, part: Json) -> None:
        metrics.RECORDINGS.labels(part["status"]).inc()
        self.runner.settle(claim, "part", b=pack(part))
        self._wake_enrich()

    def _store_now(self) -> datetime:
        return datetime.fromtimestamp(self.runner.lane.store_now_ms / 1000, UTC)

    @contextlib.asynccontextmanager
    async def _lease_renewed(self, claim: Claim) -> AsyncIterator[None]:
        """Keep the lease while the audio flows, however long it is."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self.runner.lane.lease_s / 4)
                self.runner.settle(claim, "renew")

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing


class Deliver:
    """Makes one attempt to tell one event to one subscription."""

    runner: Runner

    def __init__(
        self,
        subscriptions: Mapping[str, Subscription],
        attempts: Attempts,
        *,
        switch_off: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._subscriptions = subscriptions
        self._attempts = attempts
        self._switch_off = switch_off
        self._rng = random.Random()  # noqa: S311 - spreads retries, nothing secret

    async def work(self, claims: Sequence[Claim]) -> None:
        """Attempt the head of a subject's pending events and settle what came of it."""
        claim = claims[0]
        event = claimed_event(claim)
        subscription = self._subscriptions.get(claim.partition)
        state = DeliveryState.read(event.state)
        if subscription is None or event.body is None:
            status: Status = "expired" if subscription is not None else "dropped"
            metrics.GIVEN_UP.labels(status).inc()
            self._finish(claim, event, state.attempted(status, None, at_ms=self.runner.lane.store_now_ms))
            return
        outcome = await self._attempts(subscription, event, now_ms=self.runner.lane.store_now_ms)
        metrics.attempted(outcome, subscription.host)
        if isinstance(outcome, Delivered):
            metrics.delivered(event.body, now_ms=self.runner.lane.store_now_ms)
            self._finish(
                claim,
                event,
                state.attempted(
                    "delivered", None if not state.log else outcome.to_json(), at_ms=self.runner.lane.store_now_ms
                ),
            )
            return
        await self._not_heard(claim, event, subscription, state, outcome)

    async def _not_heard(
        self, claim: Claim, event: ClaimedEvent, subscription: Subscription, state: DeliveryState, outcome: Outcome
    ) -> None:
        assert event.body is not None  # noqa: S101 - an attempt was made
        now_ms = self.runner.lane.store_now_ms
        decision = decide(
            outcome,
            attempt=state.attempts + 1,
            event_created_at=from_iso(orjson.loads(event.body)["timestamp"]),
            now=datetime.fromtimestamp(now_ms / 1000, UTC),
            rng=self._rng,
            at_most_once=subscription.options.delivery == "at_most_once",
        )
        log.info(
            "attempt_failed",
            event_id=event.id,
            subscription=subscription.id,
            attempt=state.attempts + 1,
            why=outcome.words,
            then=type(decision).__name__,
        )
        match decision:
            case RetryAt(at):
                next_ms = int(at.timestamp() * 1000)
                kept = state.attempted("waiting", outcome.to_json(), at_ms=now_ms, next_ms=next_ms)
                self.runner.settle(claim, "again", wait_ms=max(next_ms - now_ms, 1), a=event.id, b=kept.write())
            case GiveUp(reason):
                metrics.GIVEN_UP.labels(reason).inc()
                log.warning("delivery_given_up", event_id=event.id, subscription=subscription.id, why=reason)
                self._finish(claim, event, state.attempted(reason, outcome.to_json(), at_ms=now_ms))
            case Disable():
                await self._switch_off(subscription.id, outcome.words)
                kept = state.attempted("waiting", outcome.to_json(), at_ms=now_ms)
                self.runner.settle(claim, "again", a=event.id, b=kept.write())
            case Done():
                self._finish(claim, event, state.attempted("delivered", None, at_ms=now_ms))
            case _:
                assert_never(decision)

    def _finish(self, claim: Claim, event: ClaimedEvent, state: DeliveryState) -> None:
        self.runner.settle(claim, "done", a=event.id, b=state.write())
