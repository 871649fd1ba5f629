"""Makes the lanes match the sources and subscriptions in force: what is polled, what limits hold, what is disabled."""

from collections.abc import Callable, Sequence

from relay.delivery import filters
from relay.delivery.lifecycle import Lifecycle
from relay.delivery.subscriptions import Subscription
from relay.polling.window import first_offset_s
from relay.providers.source import Source
from relay.queue.changes import Change, Drop, LimitInFlight, Own, Put
from relay.registry import Registry
from relay.store.lanes import LaneName, Lanes
from relay.store.subscriptions import SubscriptionStore

_BATCH = 500
_IN_FLIGHT = {LaneName.ENRICH: 500, LaneName.CONTACTS: 100, LaneName.RECORD: 4}
_FEW_SOURCES = 20


class Reconciler:
    """Writes into the lanes what follows from the configuration. Doing it twice, or in two processes, does no harm."""

    def __init__(
        self,
        lanes: Lanes,
        registry: Registry,
        store: SubscriptionStore,
        lifecycle: Lifecycle,
        *,
        wake_poll: Callable[[], None],
    ) -> None:
        self._lanes = lanes
        self._registry = registry
        self._store = store
        self._lifecycle = lifecycle
        self._wake_poll = wake_poll

    async def everything(self) -> None:
        """Reconcile all sources and subscriptions, but those for which a newer configuration decides."""
        registry = self._registry
        await registry.announce()
        sources = {sid: source for sid, source in registry.sources.items() if registry.decides("source", sid)}
        await self._lanes[LaneName.POLL].apply(
            *(
                Put(sid, sid, self._first_poll_ms(source), keep_due=True)
                for sid, source in sources.items()
                if not source.paused
            )
        )
        await self._limit(*sources)
        subscriptions = [
            subscription
            for subscription in registry.subscriptions.values()
            if registry.decides("subscription", subscription.id)
        ]
        await self._store.note_filters(
            {subscription.id: filters.text(subscription.options) for subscription in subscriptions}
        )
        for at in range(0, len(subscriptions), _BATCH):
            batch = subscriptions[at : at + _BATCH]
            changes = [change for subscription in batch for change in _limits(subscription)]
            await self._lanes[LaneName.DELIVER].apply(*changes)
            healths = await self._store.healths([subscription.id for subscription in batch])
            for subscription, health in zip(batch, healths, strict=True):
                await self._lifecycle.follow_configuration(subscription, health.disabled_reason)

    async def source(self, sid: str) -> None:
        """Reconcile one source, and poll it at once unless it is paused."""
        paused = self._registry.sources[sid].paused
        await self._lanes[LaneName.POLL].apply(Drop(sid, sid) if paused else Put(sid, sid, keep_due=True))
        await self._limit(sid)
        self._wake_poll()

    async def subscription(self, sub: str) -> None:
        """Reconcile one subscription."""
        subscription = self._registry.subscriptions[sub]
        await self._store.note_filters({sub: filters.text(subscription.options)})
        await self._lanes[LaneName.DELIVER].apply(*_limits(subscription))
        await self._lifecycle.follow_configuration(subscription, (await self._store.health(sub)).disabled_reason)

    async def _limit(self, *sids: str) -> None:
        owners = [Own(sid, self._registry.sources[sid].tenant) for sid in sids]
        await self._lanes[LaneName.POLL].apply(*owners)
        for lane, most in _IN_FLIGHT.items():
            await self._lanes[lane].apply(*owners, *(LimitInFlight(sid, most) for sid in sids))

    def _first_poll_ms(self, source: Source) -> int:
        """Spread the first polls of many sources over their interval."""
        if len(self._registry.sources) <= _FEW_SOURCES:
            return 0
        spread = int.from_bytes(source.id.encode()[-6:], "big") * 2654435761 % 10_000
        return int(first_offset_s(spread, source.options.poll_interval_s) * 1000)


def _limits(subscription: Subscription) -> Sequence[Change]:
    return (Own(subscription.id, subscription.tenant), *subscription.limits())
