"""Deliveries over HTTP: one event on its way to one subscription, with its attempts."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.context import EVENT_ID, Api, Id, instant
from relay.api.paging import Page, PageQuery, page_of, read_cursor
from relay.api.problems import Problem, invalid, not_found
from relay.api.route import Listed
from relay.api.subscriptions import ReplayResult, replay_one
from relay.store import keys
from relay.store.deliveries import DeliveryState, Status

_MOST_INDEXES: Final = 500
_GIVEN_UP: Final = frozenset({"exhausted", "unknown", "expired", "poison"})
_SEPARATOR: Final = "\x1f"


class AttemptView(BaseModel):
    """One attempt; those that went well at once are not listed."""

    model_config = ConfigDict(extra="allow")

    at: AwareDatetime
    outcome: str
    words: str
    status: int | None = Field(None, description="the HTTP status, where there was one")
    duration_ms: int | None = None
    excerpt: str | None = Field(None, description="the beginning of the answer")


class DeliveryView(BaseModel):
    """One event on its way to one subscription."""

    id: str = Field(description="event and subscription, with a dot between")
    event_id: str
    subscription_id: str
    status: Status
    attempts: int
    queued_at: AwareDatetime | None
    last_attempt_at: AwareDatetime | None
    next_attempt_at: AwareDatetime | None


class DeliveryDetail(DeliveryView):
    """A delivery with its attempts."""

    log: list[AttemptView]


class ListDeliveries(PageQuery):
    """Which deliveries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subscription: Id | None = None
    event: str | None = Field(None, pattern=EVENT_ID)
    status: Annotated[list[Status] | None, Listed] = None


class RetryRequest(BaseModel):
    """How to try again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    force: bool = Field(False, description="also when it was delivered")


def show(eid: str, sub: str, stored: bytes, queued_ms: float | None) -> DeliveryView:
    """Write a delivery as it is listed."""
    state = DeliveryState.read(stored)
    return DeliveryView(
        id=f"{eid}.{sub}",
        event_id=eid,
        subscription_id=sub,
        status=state.status,
        attempts=state.attempts,
        queued_at=instant(queued_ms or 0),
        last_attempt_at=instant(state.at_ms),
        next_attempt_at=instant(state.next_ms) if state.status == "waiting" else None,
    )


async def of_event(api: Api, caller: Caller, eid: str) -> list[DeliveryView]:
    """List the deliveries of an event that the caller may see."""
    redis = api.runtime.redis
    fields: Mapping[bytes, bytes] = await redis.hgetall(keys.event(eid))  # type: ignore[misc]  # both clients
    states = {name.decode(): state for name, state in fields.items()}
    subs = [sub for sub in states if _visible(api, caller, sub)]
    async with redis.pipeline(transaction=False) as pipe:
        for sub in subs:
            pipe.zscore(keys.deliveries_of(sub), eid)
        queued = await pipe.execute()
    return [show(eid, sub, states[sub], at) for sub, at in zip(subs, queued, strict=True)]


def _visible(api: Api, caller: Caller, sub: str) -> bool:
    subscription = api.runtime.subscriptions.get(sub)
    return subscription is not None and caller.sees(subscription.tenant)


async def list_deliveries(api: Api, caller: Caller, query: ListDeliveries) -> Page[DeliveryView]:
    """List deliveries, newest first: of a subscription, of an event, in a state."""
    if query.subscription is not None:
        await api.subscription(caller, query.subscription)
    if query.event is not None:
        await api.event(caller, query.event)
        found = await of_event(api, caller, query.event)
        wanted = [each for each in found if query.subscription in (None, each.subscription_id) and _in(query, each)]
        return Page(items=wanted)
    if query.status and query.subscription is None and _GIVEN_UP.issuperset(query.status):
        return await _given_up(api, caller, query)
    subs = (
        [query.subscription]
        if query.subscription
        else [sub for sub, each in api.runtime.subscriptions.items() if caller.sees(each.tenant)]
    )
    if len(subs) > _MOST_INDEXES:
        raise invalid("subscription", f"is needed: there are more than {_MOST_INDEXES}")
    return await _by_subscription(api, query, subs)


async def _by_subscription(api: Api, query: ListDeliveries, subs: Sequence[str]) -> Page[DeliveryView]:
    redis = api.runtime.redis

    async def keep(entries: Sequence[tuple[int, str]]) -> list[list[DeliveryView] | None]:
        eids = [eid for _, eid in entries]
        async with redis.pipeline(transaction=False) as pipe:
            for eid in eids:
                pipe.hmget(keys.event(eid), list(subs))
            for sub in subs:
                pipe.zmscore(keys.deliveries_of(sub), eids)
            rows = await pipe.execute()
        states, queued = rows[: len(eids)], rows[len(eids) :]
        kept: list[list[DeliveryView] | None] = []
        for number, (at, eid) in enumerate(entries):
            shown = [
                show(eid, sub, state, at)
                for sub, state, scores in zip(subs, states[number], queued, strict=True)
                if state is not None and scores[number] is not None and int(scores[number]) == at
            ]
            kept.append([each for each in shown if _in(query, each)] or None)
        return kept

    # Deliveries of one event that were queued at once stand together, so a page may be a little longer.
    part = await page_of(
        redis, [keys.deliveries_of(sub) for sub in subs], keep, limit=query.limit, cursor=_cursor(query)
    )
    return Page(items=[each for group in part.found for each in group], next_cursor=part.next_cursor)


async def _given_up(api: Api, caller: Caller, query: ListDeliveries) -> Page[DeliveryView]:
    redis = api.runtime.redis

    async def keep(entries: Sequence[tuple[int, str]]) -> list[DeliveryView | None]:
        pairs = [name.split(_SEPARATOR, 1) for _, name in entries]
        async with redis.pipeline(transaction=False) as pipe:
            for sub, eid in pairs:
                pipe.hget(keys.event(eid), sub)
                pipe.zscore(keys.deliveries_of(sub), eid)
            rows = await pipe.execute()
        kept: list[DeliveryView | None] = []
        for (sub, eid), state, at in zip(pairs, rows[::2], rows[1::2], strict=True):
            shown = show(eid, sub, state, at) if state is not None and _visible(api, caller, sub) else None
            kept.append(shown if shown is not None and _in(query, shown) else None)
        return kept

    part = await page_of(redis, [keys.DEAD], keep, limit=query.limit, cursor=_cursor(query))
    return Page(items=list(part.found), next_cursor=part.next_cursor)


def _in(query: ListDeliveries, each: DeliveryView) -> bool:
    return not query.status or each.status in query.status


def _cursor(query: PageQuery) -> tuple[int, str] | None:
    try:
        return read_cursor(query.cursor)
    except ValueError as error:
        raise invalid("cursor", str(error)) from None


async def _stored(api: Api, caller: Caller, delivery_id: str) -> tuple[str, str, bytes]:
    eid, _, sub = delivery_id.partition(".")
    stored: Any = None
    if sub and _visible(api, caller, sub):
        stored = await api.runtime.redis.hget(keys.event(eid), sub)  # type: ignore[misc]
    if stored is None:
        raise not_found("delivery")
    return eid, sub, stored


async def read_delivery(api: Api, caller: Caller, delivery_id: str) -> DeliveryDetail:
    """Read a delivery with its attempts."""
    eid, sub, stored = await _stored(api, caller, delivery_id)
    queued_ms = await api.runtime.redis.zscore(keys.deliveries_of(sub), eid)
    view = show(eid, sub, stored, queued_ms)
    log = [AttemptView.model_validate({**each, "at": instant(each["at"])}) for each in DeliveryState.read(stored).log]
    return DeliveryDetail(**dict(view), log=log)


async def retry_delivery(api: Api, caller: Caller, delivery_id: str, body: RetryRequest) -> ReplayResult:
    """Try a delivery again, in its old place of the call's order; its schedule begins anew."""
    eid, sub, _ = await _stored(api, caller, delivery_id)
    document = await api.runtime.ledger.event(eid)
    if document is None:
        raise Problem("event_gone", "The event is not kept any more.")
    result = await replay_one(api, await api.subscription(caller, sub), document, force=body.force)
    if result.result == "delivered_already":
        raise Problem("already_delivered", "It was delivered; with force it is sent again.")
    return result
