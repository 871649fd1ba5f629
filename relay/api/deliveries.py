"""Deliveries: one event for one subscription each, with its attempts."""

from collections.abc import Sequence
from typing import Annotated, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.context import ApiContext
from relay.api.fields import EVENT_ID, Id, instant
from relay.api.paging import Page, PageQuery, page_of_listing
from relay.api.problems import Problem, invalid, not_found
from relay.api.route import MultiValue
from relay.api.subscriptions import ReplayResult, event_gone, replay_event
from relay.store.deliveries import Delivery, Status
from relay.store.listings import Entry

# Each has an index of its own, and a page reads all of them.
_MAX_SUBSCRIPTIONS: Final = 500
_DEAD_LETTER_STATUSES: Final = frozenset({"exhausted", "unknown", "expired", "poison"})


class AttemptView(BaseModel):
    """One attempt."""

    model_config = ConfigDict(extra="allow")

    at: AwareDatetime
    outcome: str
    words: str = Field(description="the outcome in words")
    status: int | None = Field(None, description="HTTP status, if there was a response")
    duration_ms: int | None = None
    excerpt: str | None = Field(None, description="beginning of the response body")


class DeliveryView(BaseModel):
    """One event for one subscription."""

    id: str = Field(description="event id and subscription id, joined by a dot")
    event_id: str
    subscription_id: str
    status: Status
    attempts: int
    queued_at: AwareDatetime | None
    last_attempt_at: AwareDatetime | None
    next_attempt_at: AwareDatetime | None


class DeliveryDetail(DeliveryView):
    """A delivery with its attempts."""

    log: list[AttemptView] = Field(description="empty when the first attempt succeeded")


class ListDeliveries(PageQuery):
    """Filters of deliveries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subscription: Id | None = None
    event: str | None = Field(None, pattern=EVENT_ID)
    status: Annotated[list[Status] | None, MultiValue] = None


class RetryRequest(BaseModel):
    """Options of a retry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    force: bool = Field(False, description="also if it was delivered already")


def view(delivery: Delivery) -> DeliveryView:
    state = delivery.state
    return DeliveryView(
        id=f"{delivery.event_id}.{delivery.subscription}",
        event_id=delivery.event_id,
        subscription_id=delivery.subscription,
        status=state.status,
        attempts=state.attempts,
        queued_at=instant(delivery.queued_ms),
        last_attempt_at=instant(state.at_ms),
        next_attempt_at=instant(state.next_ms) if state.status == "waiting" else None,
    )


async def deliveries_of_event(context: ApiContext, caller: Caller, event_id: str) -> list[DeliveryView]:
    """List the deliveries of an event that the caller may access."""
    deliveries = await context.store.deliveries.of_event(event_id)
    return [view(delivery) for delivery in deliveries if _accessible(context, caller, delivery)]


def _accessible(context: ApiContext, caller: Caller, delivery: Delivery) -> bool:
    subscription = context.runtime.subscriptions.get(delivery.subscription)
    return subscription is not None and caller.can_access(subscription.tenant)


async def list_deliveries(context: ApiContext, caller: Caller, query: ListDeliveries) -> Page[DeliveryView]:
    """List deliveries, newest first: of a subscription, of an event, by status."""
    if query.subscription is not None:
        await context.subscription(caller, query.subscription)
    if query.event is not None:
        await context.event(caller, query.event)
        views = await deliveries_of_event(context, caller, query.event)
        return Page(
            items=[
                delivery
                for delivery in views
                if query.subscription in (None, delivery.subscription_id) and _matches(query, delivery)
            ]
        )
    # Not for a tenant: the list has those of all tenants, and a cursor in it would name the ids of others.
    dead_letters = bool(query.status) and _DEAD_LETTER_STATUSES.issuperset(query.status or ())
    if dead_letters and query.subscription is None and caller.tenant is None:
        return await _dead_letters(context, caller, query)
    subscription_ids = (
        [query.subscription]
        if query.subscription
        else [subscription.id for subscription in context.subscriptions(caller)]
    )
    if len(subscription_ids) > _MAX_SUBSCRIPTIONS:
        raise invalid("subscription", f"is required: there are more than {_MAX_SUBSCRIPTIONS} subscriptions")
    return await _of_subscriptions(context, query, subscription_ids)


async def _of_subscriptions(
    context: ApiContext, query: ListDeliveries, subscription_ids: Sequence[str]
) -> Page[DeliveryView]:
    async def read(entries: Sequence[Entry]) -> list[list[DeliveryView] | None]:
        groups = await context.store.deliveries.queued_at(entries, subscription_ids)
        views = ([view(delivery) for delivery in group] for group in groups)
        return [[delivery for delivery in group if _matches(query, delivery)] or None for group in views]

    # Deliveries of one event that were queued at once are one entry, so a page may be a little longer than its limit.
    page = await page_of_listing(context.store.deliveries.of_subscriptions(subscription_ids), read, query)
    return Page(items=[delivery for group in page.items for delivery in group], next_cursor=page.next_cursor)


async def _dead_letters(context: ApiContext, caller: Caller, query: ListDeliveries) -> Page[DeliveryView]:
    async def read(entries: Sequence[Entry]) -> list[DeliveryView | None]:
        deliveries = await context.store.deliveries.of_dead_letters(entries)
        views = [
            view(delivery) if delivery is not None and _accessible(context, caller, delivery) else None
            for delivery in deliveries
        ]
        return [delivery if delivery is not None and _matches(query, delivery) else None for delivery in views]

    page = await page_of_listing(context.store.deliveries.dead_letters(), read, query)
    return Page(items=list(page.items), next_cursor=page.next_cursor)


def _matches(query: ListDeliveries, delivery: DeliveryView) -> bool:
    return not query.status or delivery.status in query.status


async def _find(context: ApiContext, caller: Caller, delivery_id: str) -> Delivery:
    event_id, _, subscription_id = delivery_id.partition(".")
    delivery = await context.store.deliveries.get(event_id, subscription_id) if subscription_id else None
    if delivery is None or not _accessible(context, caller, delivery):
        raise not_found("Delivery")
    return delivery


async def read_delivery(context: ApiContext, caller: Caller, delivery_id: str) -> DeliveryDetail:
    """Read a delivery with its attempts."""
    delivery = await _find(context, caller, delivery_id)
    log = [AttemptView.model_validate({**attempt, "at": instant(attempt["at"])}) for attempt in delivery.state.log]
    return DeliveryDetail(**dict(view(delivery)), log=log)


async def retry_delivery(context: ApiContext, caller: Caller, delivery_id: str, body: RetryRequest) -> ReplayResult:
    """Retry a delivery. It keeps its place in the order of the call's events; its retry schedule restarts."""
    delivery = await _find(context, caller, delivery_id)
    document = await context.store.events.get(delivery.event_id)
    if document is None:
        raise event_gone()
    subscription = await context.subscription(caller, delivery.subscription)
    result = await replay_event(context, subscription, document, force=body.force)
    if result.result == "delivered_already":
        raise Problem("already_delivered", "The delivery has succeeded already; use force to send it again.")
    return result
