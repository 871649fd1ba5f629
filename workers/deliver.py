"""The deliver lane: one claim is one attempt to tell one event to one subscription. A shell: read, attempt, settle.

It may run twice, and then tells the same event under the same id; for those who may not be told twice an intent is
written before dialling.
"""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol, assert_never

import orjson
import structlog

from relay import metrics
from relay.delivery.attempt import Attempts
from relay.delivery.outcomes import AttemptOutcome, Delivered
from relay.delivery.retry import Complete, Disable, Fail, RetryAt, decide
from relay.delivery.subscriptions import Subscription
from relay.domain.time import from_iso, from_ms
from relay.queue.lane import Claim, Settlement
from relay.queue.runner import Runner
from relay.store.calls import ClaimedEvent, claimed_event
from relay.store.deliveries import DeliveryState, Status
from relay.store.health import Health

log = structlog.get_logger(__name__)

DISABLE_AFTER = timedelta(days=5)
"""A subscription that was not heard once for so long is switched off."""
FAILING_FROM_ATTEMPT = 4
"""From this failed attempt of an event on, `subscription.failing` is said, once a day."""
SLOW_MS = 2000
_UNKNOWN_HERE_MS = 30_000


class DisableSubscription(Protocol):
    """Stops a subscription and says why; `gone`: the subscriber asked for it."""

    async def __call__(self, sub: str, why: str, *, gone: bool = False) -> None: ...


class Deliver:
    """Makes attempts. `health` reads a subscription's health, `disable` and `failing` act on it."""

    runner: Runner

    def __init__(
        self,
        subscriptions: Mapping[str, Subscription],
        attempts: Attempts,
        *,
        health: Callable[[str], Awaitable[Health]],
        disable: DisableSubscription,
        failing: Callable[[str, str, datetime], Awaitable[None]],
    ) -> None:
        self._subscriptions = subscriptions
        self._attempts = attempts
        self._health = health
        self._switch_off = disable
        self._failing = failing
        self._rng = random.Random()  # noqa: S311 - spreads retries, nothing secret
        self._prompt: set[str] = set()

    def doubtful(self, sub: str) -> bool:
        """Whether a subscription has yet to show, here, that it answers promptly."""
        return sub not in self._prompt

    async def work(self, claims: Sequence[Claim]) -> None:
        """Attempt the head of a subject's pending events and settle what came of it."""
        claim = claims[0]
        event = claimed_event(claim)
        state = DeliveryState.read(event.state)
        if event.body is None:
            self._give_up(claim, event, state, "expired", None)
            return
        subscription = self._subscriptions.get(claim.partition)
        if subscription is None:
            # Another process may know it already, or this one may have to read its configuration again.
            self.runner.settle(claim, "again", wait_ms=_UNKNOWN_HERE_MS)
            return
        if state.status == "intent":
            self._give_up(claim, event, state, "unknown", None)
            return
        body = await self._attempts.body_for(subscription, event)
        if subscription.options.delivery == "at_most_once" and not await self._intend(claim, event, state):
            # Another worker has it, and this settle is refused; or it was erased, and what follows it goes on.
            self.runner.settle(claim, "again", a=event.id)
            return
        outcome = await self._attempts.send(subscription, event.id, body, now_ms=self.runner.lane.store_now_ms)
        metrics.attempted(outcome, subscription.host)
        if not isinstance(outcome, Delivered):
            self._prompt.discard(subscription.id)
            await self._not_heard(claim, event, subscription, state, outcome)
            return
        now_ms = self.runner.lane.store_now_ms
        if outcome.duration_ms < SLOW_MS:
            self._prompt.add(subscription.id)
        else:
            self._prompt.discard(subscription.id)
        metrics.delivered(event.body, now_ms=now_ms)
        attempt = outcome.to_json() if state.log else None
        self.runner.settle(
            claim, "done", a=event.id, b=state.attempted("delivered", attempt, at_ms=now_ms).write(), c="s"
        )

    async def _intend(self, claim: Claim, event: ClaimedEvent, state: DeliveryState) -> bool:
        """Write down that the event is about to be told; without that, and without our lease, it is not."""
        intent = state.attempted("intent", None, at_ms=self.runner.lane.store_now_ms)
        written = await self.runner.lane.exchange([Settlement(claim, "intent", a=event.id, b=intent.write())])
        return not written.refused

    async def _not_heard(
        self,
        claim: Claim,
        event: ClaimedEvent,
        subscription: Subscription,
        state: DeliveryState,
        outcome: AttemptOutcome,
    ) -> None:
        assert event.body is not None  # noqa: S101 - an attempt was made
        now_ms = self.runner.lane.store_now_ms
        now = from_ms(now_ms)
        health = await self._health(subscription.id)
        begun = max(from_iso(orjson.loads(event.body)["timestamp"]), from_ms(state.restarted_ms))
        decision = decide(
            outcome,
            attempt=state.attempts + 1,
            event_created_at=begun,
            now=now,
            rng=self._rng,
            circuit_open_s=(now - max(begun, from_ms(health.opened_ms))).total_seconds() if health.breaker_open else 0,
            at_most_once=subscription.options.delivery == "at_most_once",
        )
        log.info(
            "attempt_failed",
            event_id=event.id,
            subscription=subscription.id,
            attempt=state.attempts + 1,
            why=outcome.message,
            then=decision.message,
        )
        attempt = outcome.to_json()
        unwell = "f" if outcome.trips_circuit else "n"
        match decision:
            case RetryAt(at):
                next_ms = int(at.timestamp() * 1000)
                kept = state.attempted("waiting", attempt, at_ms=now_ms, next_ms=next_ms)
                self.runner.settle(
                    claim, "again", wait_ms=max(next_ms - now_ms, 1), a=event.id, b=kept.write(), c=unwell
                )
            case Fail(reason):
                log.warning("delivery_given_up", event_id=event.id, subscription=subscription.id, why=reason)
                self._give_up(claim, event, state, reason, outcome)
            case Disable():
                kept = state.attempted("waiting", attempt, at_ms=now_ms)
                self.runner.settle(claim, "again", wait_ms=1000, a=event.id, b=kept.write(), c="n")
                await self._switch_off(subscription.id, outcome.message, gone=True)
                return
            case Complete():
                raise AssertionError("only an outcome that was heard is done")
            case _:
                assert_never(decision)
        await self._look_after(subscription, state, outcome, health, now)

    async def _look_after(
        self, subscription: Subscription, state: DeliveryState, outcome: AttemptOutcome, health: Health, now: datetime
    ) -> None:
        """Say that a subscription is failing, well before it is switched off."""
        if not health.failing_since_ms:
            return
        disables_at = from_ms(health.failing_since_ms) + DISABLE_AFTER
        if now >= disables_at:
            await self._switch_off(subscription.id, f"not heard once for 5 days; last: {outcome.message}")
        elif state.attempts + 1 >= FAILING_FROM_ATTEMPT:
            await self._failing(subscription.id, outcome.message, disables_at)

    def _give_up(
        self, claim: Claim, event: ClaimedEvent, state: DeliveryState, status: Status, outcome: AttemptOutcome | None
    ) -> None:
        metrics.GIVEN_UP.labels(status).inc()
        now_ms = self.runner.lane.store_now_ms
        if outcome is None:
            ended = replace(state, status=status, at_ms=now_ms, next_ms=0)
        else:
            ended = state.attempted(status, outcome.to_json(), at_ms=now_ms)
        self.runner.settle(claim, "done", a=event.id, b=ended.write(), c="x")
