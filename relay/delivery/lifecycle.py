"""Disables and enables subscriptions: for a person, for its endpoint, or because deliveries keep failing."""

import asyncio
from collections.abc import Mapping
from datetime import datetime

import structlog

from relay.delivery.egress import Egress
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.domain.time import iso
from relay.events.operations import Operations
from relay.queue.changes import DisablePartition, EnablePartition
from relay.queue.lane import Lane
from relay.store.subscriptions import SubscriptionStore

log = structlog.get_logger(__name__)

DISABLED_BY_CONFIGURATION = "enabled: false in the configuration"


class Lifecycle:
    def __init__(
        self,
        lane: Lane,
        store: SubscriptionStore,
        subscriptions: Mapping[str, Subscription],
        operations: Operations,
        egress: Egress,
    ) -> None:
        self._lane = lane
        self._store = store
        self._subscriptions = subscriptions
        self._operations = operations
        self._egress = egress
        self._unsubscribing: set[asyncio.Task[None]] = set()

    async def disable(self, sub: str, reason: str) -> None:
        """Disable a subscription: nothing new is queued for it, and what is queued waits until it is enabled."""
        await self._lane.apply(DisablePartition(sub, reason))
        if subscription := self._subscriptions.get(sub):
            await self.unsubscribe_hook(subscription)

    async def enable(self, sub: str) -> None:
        await self._lane.apply(EnablePartition(sub))
        await self._store.reset_notices(sub)

    async def disable_unhealthy(self, sub: str, reason: str, *, by_subscriber: bool = False) -> None:
        """Disable a subscription without a person's doing, and publish `subscription.disabled`.

        `by_subscriber`: its endpoint asked for that, so it gets no notice.
        """
        if by_subscriber:
            await self._lane.apply(DisablePartition(sub, reason))
        else:
            await self.disable(sub, reason)
        log.error("subscription_disabled", subscription=sub, reason=reason)
        await self._publish("subscription.disabled", {"id": sub, "reason": reason})

    async def warn_failing(self, sub: str, reason: str, disables_at: datetime) -> None:
        """Publish `subscription.failing`, once a day for each subscription."""
        if await self._store.claim_failing_notice(sub):
            log.warning("subscription_failing", subscription=sub, reason=reason, disables_at=iso(disables_at))
            about = {"id": sub, "reason": reason, "disables_at": iso(disables_at)}
            await self._publish("subscription.failing", about)

    async def follow_configuration(self, subscription: Subscription, disabled_reason: str) -> None:
        """Disable what the configuration disables; enabling it there lifts only that."""
        if not subscription.options.enabled and not disabled_reason:
            await self._lane.apply(DisablePartition(subscription.id, DISABLED_BY_CONFIGURATION))
        elif subscription.options.enabled and disabled_reason == DISABLED_BY_CONFIGURATION:
            await self._lane.apply(EnablePartition(subscription.id))

    async def unsubscribe_hook(self, subscription: Subscription) -> None:
        """Notify a Zapier hook, once, that it gets nothing more: DELETE to its URL, so that the Zap shows it."""
        if subscription.unsubscribes and await self._store.claim_unsubscribe_notice(subscription.id):
            task = asyncio.create_task(self._unsubscribe(subscription))
            self._unsubscribing.add(task)
            task.add_done_callback(self._unsubscribing.discard)

    async def aclose(self) -> None:
        await asyncio.gather(*self._unsubscribing, return_exceptions=True)

    async def _unsubscribe(self, subscription: Subscription) -> None:
        outcome = await self._egress.sender(subscription.tenant).unsubscribe(subscription.url)
        log.info("hook_unsubscribed", subscription=subscription.id, host=subscription.host, outcome=outcome.message)

    async def _publish(self, event_type: str, about: Json) -> None:
        subscription = self._subscriptions.get(about["id"])
        await self._operations.publish(
            event_type,
            {"subscription": about},
            about=about["id"],
            occurrence=str(self._lane.store_now_ms),
            tenant=subscription.tenant if subscription else None,
        )
