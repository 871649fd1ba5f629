"""The deliver lane: one claim is one attempt to deliver one event to one subscription.

It may run twice, and then delivers the same event under the same id; a subscription with `at_most_once` is protected by
an intent that is written before anything is sent.
"""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol, assert_never

import orjson
import structlog

from relay import metrics
from relay.delivery import filters
from relay.delivery.attempt import Attempts
from relay.delivery.outcomes import AttemptOutcome, Delivered, NotRendered, Postponed
from relay.delivery.retry import Complete, Disable, Fail, RetryAt, decide
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.domain.time import from_iso, from_ms
from relay.events.render import MapTooCostly
from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.runner import Settle
from relay.queue.settlement import Done, Intent, PartitionHealth, Retry
from relay.store.deliveries import ClaimedEvent, DeliveryState, Status, claimed_event
from relay.store.lanes import DeliveryUpdate
from relay.store.subscriptions import SubscriptionHealth
from workers.unknown import unknown_wait_ms

log = structlog.get_logger(__name__)

# A subscription without a successful delivery for so long is disabled.
DISABLE_AFTER = timedelta(days=5)
# From this failed attempt of an event on, `subscription.failing` is published, once a day.
FAILING_FROM_ATTEMPT = 4
_DISABLED_RETRY_MS = 1000
_POSTPONED_MS = (500, 2000)


class DisableSubscription(Protocol):
    """Stops a subscription; `by_subscriber`: its endpoint asked for that."""

    async def __call__(self, sub: str, reason: str, *, by_subscriber: bool = False) -> None: ...


class DeliverWorker:
    """Makes attempts. `health` reads a subscription's health, `disable` and `warn_failing` act on it.

    `may_receive` says whether a tenant's subscription may receive an event, None when that is not known here.
    """

    def __init__(
        self,
        lane: Lane,
        subscriptions: Mapping[str, Subscription],
        attempts: Attempts,
        *,
        health: Callable[[str], Awaitable[SubscriptionHealth]],
        disable: DisableSubscription,
        warn_failing: Callable[[str, str, datetime], Awaitable[None]],
        may_receive: Callable[[str | None, Json], bool | None] = lambda _tenant, _document: True,
    ) -> None:
        self._lane = lane
        self._subscriptions = subscriptions
        self._attempts = attempts
        self._health = health
        self._disable = disable
        self._warn_failing = warn_failing
        self._may_receive = may_receive
        self._rng = random.Random()  # noqa: S311 - spreads retries, nothing secret

    async def work(self, batch: Sequence[Claim], settle: Settle) -> None:
        """Attempt the first of an ordering key's pending events."""
        [claim] = batch
        event = claimed_event(claim)
        state = DeliveryState.read(event.state)
        if event.body is None:
            self._fail(claim, event, state, "expired", settle)
            return
        subscription = self._subscriptions.get(claim.partition)
        if subscription is None:
            settle(claim, self._retry_unknown(orjson.loads(event.body)))
            return
        if state.status == "intent":
            self._fail(claim, event, state, "unknown", settle)
            return
        if subscription.tenant is not None:
            document = orjson.loads(event.body)
            allowed = self._may_receive(subscription.tenant, document)
            if allowed is None:
                settle(claim, self._retry_unknown(document))
                return
            if not allowed:
                log.error("delivery_refused", event_id=event.id, subscription=subscription.id, reason="another tenant")
                self._fail(claim, event, state, "dropped", settle)
                return
        if state.unfiltered and filters.mismatch(
            subscription.options, orjson.loads(event.body), subscription_id=subscription.id
        ):
            settle(claim, Done(DeliveryUpdate(event.id, filtered=True)))
            return
        try:
            body = await self._attempts.body_for(subscription, event)
        except MapTooCostly as error:
            outcome: AttemptOutcome = NotRendered(reason=str(error))
            await self._attempt_failed(claim, event, subscription, state, outcome, settle)
            return
        if subscription.options.delivery == "at_most_once" and not await self._write_intent(claim, event, state):
            # Another worker has it, and this settle is refused; or it was erased, and the events after it go on.
            settle(claim, Retry(detail=DeliveryUpdate(event.id)))
            return
        outcome = await self._attempts.send(subscription, event.id, body, now_ms=self._lane.wall_ms)
        if isinstance(outcome, Postponed):
            log.warning("delivery_postponed", event_id=event.id, subscription=subscription.id, reason=outcome.message)
            settle(claim, Retry(self._rng.randint(*_POSTPONED_MS), DeliveryUpdate(event.id, state)))
            return
        metrics.attempted(outcome, subscription.host)
        if not isinstance(outcome, Delivered):
            await self._attempt_failed(claim, event, subscription, state, outcome, settle)
            return
        now_ms = self._lane.wall_ms
        metrics.delivered(event.body, now_ms=now_ms)
        delivered = state.attempted("delivered", outcome.to_json() if state.log else None, at_ms=now_ms)
        settle(claim, Done(DeliveryUpdate(event.id, delivered), PartitionHealth.HEALTHY))

    def _retry_unknown(self, document: Json) -> Retry:
        """Return an event that concerns a source or subscription which this process does not know (yet)."""
        created_ms = int(from_iso(document["timestamp"]).timestamp() * 1000)
        return Retry(unknown_wait_ms(waiting_since_ms=created_ms, now_ms=self._lane.wall_ms))

    async def _write_intent(self, claim: Claim, event: ClaimedEvent, state: DeliveryState) -> bool:
        """Write down that the event is about to be sent; False when the lease has ended or the event was erased."""
        intent = state.attempted("intent", None, at_ms=self._lane.wall_ms)
        reply = await self._lane.exchange([(claim, Intent(DeliveryUpdate(event.id, intent)))])
        return not reply.refused

    async def _attempt_failed(
        self,
        claim: Claim,
        event: ClaimedEvent,
        subscription: Subscription,
        state: DeliveryState,
        outcome: AttemptOutcome,
        settle: Settle,
    ) -> None:
        assert event.body is not None  # noqa: S101 - an attempt was made
        now_ms = self._lane.wall_ms
        now = from_ms(now_ms)
        health = await self._health(subscription.id)
        begun = max(from_iso(orjson.loads(event.body)["timestamp"]), from_ms(state.restarted_ms))
        opened = max(begun, from_ms(health.circuit_opened_ms))
        decision = decide(
            outcome,
            attempt=state.attempts + 1,
            event_created_at=begun,
            now=now,
            rng=self._rng,
            circuit_open_s=(now - opened).total_seconds() if health.circuit_open else 0,
            at_most_once=subscription.options.delivery == "at_most_once",
        )
        log.info(
            "delivery_attempt_failed",
            event_id=event.id,
            subscription=subscription.id,
            attempt=state.attempts + 1,
            reason=outcome.message,
            decision=decision.message,
        )
        attempt = outcome.to_json()
        match decision:
            case RetryAt(at):
                next_ms = int(at.timestamp() * 1000)
                waiting = state.attempted("waiting", attempt, at_ms=now_ms, next_ms=next_ms)
                shown = PartitionHealth.UNHEALTHY if outcome.trips_circuit else PartitionHealth.FAILING
                settle(claim, Retry(max(next_ms - now_ms, 1), DeliveryUpdate(event.id, waiting), shown))
            case Fail(reason):
                log.warning("delivery_failed", event_id=event.id, subscription=subscription.id, reason=reason)
                self._fail(claim, event, state, reason, settle, outcome)
            case Disable():
                waiting = state.attempted("waiting", attempt, at_ms=now_ms)
                update = DeliveryUpdate(event.id, waiting)
                settle(claim, Retry(_DISABLED_RETRY_MS, update, PartitionHealth.FAILING))
                await self._disable(subscription.id, outcome.message, by_subscriber=True)
                return
            case Complete():
                raise AssertionError("only a delivered outcome is done")
            case _:
                assert_never(decision)
        await self._watch(subscription, state, outcome, health, now)

    async def _watch(
        self,
        subscription: Subscription,
        state: DeliveryState,
        outcome: AttemptOutcome,
        health: SubscriptionHealth,
        now: datetime,
    ) -> None:
        """Warn that a subscription is failing, and disable it when that lasts."""
        if not health.failing_since_ms:
            return
        disables_at = from_ms(health.failing_since_ms) + DISABLE_AFTER
        if now >= disables_at:
            await self._disable(subscription.id, f"no successful delivery for 5 days; last: {outcome.message}")
        elif state.attempts + 1 >= FAILING_FROM_ATTEMPT:
            await self._warn_failing(subscription.id, outcome.message, disables_at)

    def _fail(
        self,
        claim: Claim,
        event: ClaimedEvent,
        state: DeliveryState,
        status: Status,
        settle: Settle,
        outcome: AttemptOutcome | None = None,
    ) -> None:
        """Make no further attempt; the delivery becomes a dead letter."""
        metrics.GIVEN_UP.labels(status).inc()
        now_ms = self._lane.wall_ms
        if outcome is None:
            ended, health = replace(state, status=status, at_ms=now_ms, next_ms=0), None
        else:
            ended, health = state.attempted(status, outcome.to_json(), at_ms=now_ms), PartitionHealth.FAILING
        settle(claim, Done(DeliveryUpdate(event.id, ended, dead_letter=True), health))
