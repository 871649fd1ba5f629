"""Examines how complete a source is: reads what the store has of each day; polling/completeness.py judges it."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from typing import Final

from relay.delivery import filters
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.domain.time import from_iso
from relay.polling.completeness import DayReport, Recipient, compare
from relay.providers.source import Source
from relay.store.completeness import CallFacts, ShownRows
from relay.store.store import Store

# A change of filters reaches every process well within this; what is published meanwhile is not judged.
_PROPAGATION_MS: Final = 60_000
_BATCH: Final = 200


async def examine(
    store: Store, source: Source, subscriptions: Iterable[Subscription], *, first: date, last: date
) -> list[DayReport]:
    """Judge each day of a source from `first` to `last`, dates of its provider's calendar.

    Of the subscriptions, those that may receive the source's events are judged.
    """
    eligible = [each for each in subscriptions if each.tenant in (None, source.tenant)]
    names = [each.id for each in eligible]
    healths = await store.subscriptions.healths(names)
    in_force_ms = await store.subscriptions.filters_since(names)
    shown = await store.completeness.shown(source.id)
    reports: list[DayReport] = []
    for day in (str(first + timedelta(days=step)) for step in range((last - first).days + 1)):
        rows = shown.get(day, ShownRows())
        calls = await store.completeness.examine(source.id, day, rows, names)
        selected = await _selected(store, calls, eligible, in_force_ms)
        recipients = [
            Recipient(
                each.id,
                enabled=each.options.enabled and not health.disabled_reason,
                selected=selected[each.id],
            )
            for each, health in zip(eligible, healths, strict=True)
        ]
        reports.append(compare(day, rows, calls, recipients, source_id=source.id))
    return reports


async def _selected(
    store: Store, calls: Iterable[CallFacts], subscriptions: Sequence[Subscription], in_force_ms: Mapping[str, int]
) -> dict[str, dict[str, bool | None]]:
    """Apply the filters of each subscription to the events that it has no delivery of."""
    undelivered = {
        event.id: [each for each in subscriptions if each.id not in event.deliveries]
        for call in calls
        for event in call.events
        if event.document and len(event.deliveries) < len(subscriptions)
    }
    event_ids = list(undelivered)
    selected: dict[str, dict[str, bool | None]] = {each.id: {} for each in subscriptions}
    for start in range(0, len(event_ids), _BATCH):
        batch = event_ids[start : start + _BATCH]
        for event_id, document in zip(batch, await store.events.get_many(batch), strict=True):
            for each in undelivered[event_id]:
                selected[each.id][event_id] = _selects(each, document, in_force_ms.get(each.id))
    return selected


def _selects(subscription: Subscription, document: Json | None, in_force_ms: int | None) -> bool | None:
    if document is None:
        return None  # it was erased a moment ago
    if filters.mismatch(subscription.options, document, subscription_id=subscription.id) is not None:
        return False
    published_ms = from_iso(document["timestamp"]).timestamp() * 1000
    return True if in_force_ms is not None and published_ms > in_force_ms + _PROPAGATION_MS else None
