"""Replaying many events: those of a subscription since a time, each in its old place of its call's order."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal, Protocol, assert_never

from relay.delivery import filters
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.store.codes import ReplayOutcome
from relay.store.deliveries import Status
from relay.store.store import Store

# Which deliveries: failed for good, never queued because the subscription was disabled, or all that match it now.
ReplayStatus = Literal["exhausted", "missing", "any"]

_STATUSES: Final[dict[ReplayStatus, frozenset[Status]]] = {
    "exhausted": frozenset({"exhausted", "poison"}),
    "missing": frozenset({"missing", "dropped"}),
    "any": frozenset(),
}
_BATCH: Final = 200


class OwnerOf(Protocol):
    """Knows the tenant that an event belongs to; None is the operator."""

    def __call__(self, document: Json) -> str | None: ...


@dataclass(slots=True)
class ReplayProgress:
    """How far a replay has come. `at_ms` is the time up to which the list was read."""

    at_ms: int
    looked_at: int = 0
    queued: int = 0
    waiting: int = 0
    delivered: int = 0
    gone: int = 0

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "at_ms"}


class SubscriptionDisabled(Exception):
    """The subscription was disabled meanwhile: nothing can be queued for it."""


async def replay_since(
    store: Store,
    subscription: Subscription,
    *,
    progress: ReplayProgress,
    until_ms: int,
    status: ReplayStatus,
    force: bool,
    owner_of: OwnerOf,
    step: Callable[[ReplayProgress], Awaitable[None]],
) -> None:
    """Go on from `progress`, oldest first, up to `until_ms`. Raises SubscriptionDisabled; `step` may raise to end it.

    What is queued already, and what was delivered (unless forced), is left alone, so running it twice does no harm.
    """
    listing = store.events.all() if status == "any" else store.deliveries.of_subscriptions([subscription.id])
    read_before: set[str] = set()
    while True:
        # A batch may end between events of one millisecond, so that is read again without those read before.
        _, entries = await listing.oldest_first(progress.at_ms, until_ms=until_ms, limit=_BATCH + len(read_before))
        entries = [entry for entry in entries if entry[1] not in read_before][:_BATCH]
        if not entries:
            await step(progress)
            return
        event_ids = [event_id for _, event_id in entries]
        for event_id, ordering_key in await _selected(store, subscription, event_ids, status, owner_of):
            [outcome] = await store.deliveries.replay(
                event_id, ordering_key, [subscription.id], at_ms=until_ms, force=force
            )
            match outcome:
                case ReplayOutcome.QUEUED:
                    progress.queued += 1
                case ReplayOutcome.WAITING:
                    progress.waiting += 1
                case ReplayOutcome.DELIVERED:
                    progress.delivered += 1
                case ReplayOutcome.DISABLED:
                    raise SubscriptionDisabled
                case ReplayOutcome.GONE:
                    progress.gone += 1
                case _:
                    assert_never(outcome)
        newest_ms = entries[-1][0]
        same_ms = {event_id for at_ms, event_id in entries if at_ms == newest_ms}
        read_before = same_ms | (read_before if newest_ms == progress.at_ms else set())
        progress.at_ms = newest_ms
        progress.looked_at += len(entries)
        await step(progress)


async def _selected(
    store: Store, subscription: Subscription, event_ids: Sequence[str], status: ReplayStatus, owner_of: OwnerOf
) -> list[tuple[str, str]]:
    """Choose the events to replay, each with its ordering key."""
    selected: list[tuple[str, str]] = []
    rows = await store.deliveries.with_documents(event_ids, subscription.id)
    for event_id, (document, state) in zip(event_ids, rows, strict=True):
        if document is None:
            continue
        if status != "any" and (state is None or state.status not in _STATUSES[status]):
            continue
        if subscription.tenant not in (None, owner_of(document)):
            continue
        if status == "any" and filters.mismatch(subscription.options, document, subscription_id=subscription.id):
            continue
        selected.append((event_id, ordering_key(document)))
    return selected


def ordering_key(document: Json) -> str:
    """The key under which an event is delivered in order: its call, else itself."""
    call = document["data"].get("call")
    return str(call["id"]) if call else str(document["id"])
