"""Explains why a call was or was not delivered, subscription by subscription.

Rows that did not become a call are explained too: older than the first poll, quarantined, or not seen at all, in which
case the state of each source says whether it could have been seen.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, assert_never

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.calls import ListCalls, list_calls
from relay.api.context import ApiContext
from relay.api.fields import CALL_ID, Id, instant
from relay.delivery import filters
from relay.delivery.subscriptions import Subscription
from relay.domain import ids
from relay.domain.json import Json
from relay.domain.time import format_duration, from_iso, iso
from relay.events.decide import Wait, decide
from relay.providers.source import Source
from relay.store.calls import StoredCall
from relay.store.codes import SeenFlag
from relay.store.deliveries import DeliveryState
from relay.store.sources import SourceState
from relay.store.subscriptions import SubscriptionHealth

MAX_CALLS: Final = 5
MAX_SUBSCRIPTIONS: Final = 200
MAX_SOURCES: Final = 50
# Days of rows that the store may still remember, counted back from the cursor.
_SEEN_DAYS: Final = 10

Verdict = Literal[
    "delivered", "filtered", "waiting", "failed", "switched_off", "nobody", "not_told_yet", "forgotten", "not_a_call"
]
Fate = Literal["delivered", "filtered", "waiting", "failed", "missing", "not_queued"]
_EXPIRED: Final[tuple[Verdict, str]] = (
    "forgotten",
    "Its events were published and have expired (retention.events_days) or were erased.",
)
_CONTACT_WORDS: Final = {
    "matched": "found",
    "none": "no contact has this number",
    "unavailable": "lookup failed",
    "skipped": "not looked up",
}
_RECORDING_WORDS: Final = {
    "pending": "not fetched yet",
    "available": "stored",
    "none": "the call has none",
    "unavailable": "could not be fetched",
    "unsupported": "not fetched from this source",
}


class ExplainQuery(BaseModel):
    """What to explain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = Field(min_length=1, max_length=200, description="id of a call, the provider's id of it, or a number")
    source: Id | None = Field(None, description="only calls of this source")


class SubscriptionFate(BaseModel):
    """What became of one event for one subscription."""

    subscription_id: str
    host: str
    event_id: str
    event_type: str
    fate: Fate
    why: str = Field(description="when it was delivered, why it is filtered, or how the subscriber responded")
    delivery_id: str | None = Field(description="null without a delivery")
    attempts: int
    next_attempt_at: AwareDatetime | None


class Explanation(BaseModel):
    """One row of a provider, and what became of it."""

    source_id: str
    provider_call_id: str
    call_id: str
    verdict: Verdict
    summary: str = Field(description="the explanation in one sentence")
    seen: str = Field(description="when it was first seen, how, and how long after its start")
    started_at: AwareDatetime | None
    first_seen_at: AwareDatetime | None
    observed_via: str | None
    found_within_s: int | None = Field(description="depth of the shallowest polling tier that reaches its start")
    contact: str
    recording: str
    subscriptions: list[SubscriptionFate]
    left_out: int = Field(0, description="number of subscriptions omitted, because there are too many")


class SourceStatus(BaseModel):
    """The state of a source, when nothing was seen."""

    source_id: str
    words: str


class Explanations(BaseModel):
    """What is known about it. Without `items`, `sources` say whether it could have been seen."""

    about: str
    items: list[Explanation]
    sources: list[SourceStatus]


async def explain(context: ApiContext, caller: Caller, query: ExplainQuery) -> Explanations:
    """Explain why a call was or was not delivered, by its id, the provider's id of it, or a number on either side."""
    sources = [await context.source(caller, query.source)] if query.source else context.sources(caller)
    about = query.about.strip()
    items: list[Explanation] = []
    if re.fullmatch(CALL_ID, about):
        call = await context.store.calls.get(about)
        if (
            call is not None
            and context.can_access_calls_of(caller, call.source_id)
            and query.source in (None, call.source_id)
        ):
            items.append(await _of_call(context, caller, call))
    else:
        for source in sources:
            explanation = await _by_key(context, caller, source, about)
            if explanation is not None:
                items.append(explanation)
        if not items and 2 <= len(about) <= 64:
            items = await _by_number(context, caller, query, about)
    statuses: list[SourceStatus] = []
    if not items:
        shown = sources[:MAX_SOURCES]
        states = await context.store.sources.read_many([source.id for source in shown])
        statuses = [
            SourceStatus(source_id=source.id, words=source_status(source, state, now=context.now()))
            for source, state in zip(shown, states, strict=True)
        ]
    return Explanations(about=about, items=items, sources=statuses)


async def _by_key(context: ApiContext, caller: Caller, source: Source, key: str) -> Explanation | None:
    """Explain what has this id at the provider: a call, a row that is only remembered, or a quarantined one."""
    call = await context.store.calls.get(ids.call_id(source.id, key))
    if call is not None:
        return await _of_call(context, caller, call)
    state = await context.store.sources.read(source.id)
    newest = state.poll_state.cursor or context.now()
    # Two days ahead of the cursor: rows are filed under the provider's local date.
    days = [(newest + timedelta(days=2 - age)).date().isoformat() for age in range(_SEEN_DAYS)]
    seen = await context.store.calls.seen(source.id, key, days)
    if seen is not None:
        day, mark = seen
        return _not_a_call(source, key, _remembered_words(source, mark.flag, state), seen=f"in a call list of {day}")
    for row in await context.store.sources.quarantined(source.id):
        if row.key == key:
            return _not_a_call(source, key, f"The row is invalid and was quarantined: {row.reason}.")
    return None


def _remembered_words(source: Source, flag: SeenFlag, state: SourceState) -> str:
    started = iso(state.poll_state.started_at)
    match flag:
        case SeenFlag.SEEDED:
            return (
                f"It is older than the first poll of {source.id} ({started}), so no event was published; "
                f"`relay backfill {source.id}` publishes one."
            )
        case SeenFlag.SEEDED_UNFINISHED:
            return (
                f"It started before the first poll of {source.id} ({started}) and had not ended; "
                "its event is published when it ends."
            )
        case SeenFlag.INGESTED:
            return "It was ingested, and has expired or was erased."
        case SeenFlag.ERASED:
            return "It was ingested, and was erased."
        case _:
            assert_never(flag)


def _not_a_call(source: Source, key: str, summary: str, *, seen: str = "in a call list") -> Explanation:
    return Explanation(
        source_id=source.id,
        provider_call_id=key,
        call_id=ids.call_id(source.id, key),
        verdict="not_a_call",
        summary=summary,
        seen=seen,
        started_at=None,
        first_seen_at=None,
        observed_via=None,
        found_within_s=None,
        contact=_CONTACT_WORDS["skipped"],
        recording=_RECORDING_WORDS["unsupported"],
        subscriptions=[],
    )


async def _by_number(context: ApiContext, caller: Caller, query: ExplainQuery, number: str) -> list[Explanation]:
    page = await list_calls(context, caller, ListCalls(number=number, source=query.source, limit=MAX_CALLS))
    calls = await context.store.calls.get_many([call.id for call in page.items])
    return [await _of_call(context, caller, call) for call in calls if call is not None]


async def _of_call(context: ApiContext, caller: Caller, call: StoredCall) -> Explanation:
    store = context.store
    now = context.now()
    events = [event for event in await store.events.get_many(call.events) if event is not None]
    accessible = sorted(context.subscriptions(caller), key=lambda subscription: subscription.id)
    shown = accessible[:MAX_SUBSCRIPTIONS]
    shown_ids = [subscription.id for subscription in shown]
    healths = await store.subscriptions.healths(shown_ids) if events else []
    fates: list[SubscriptionFate] = []
    for event in events:
        states = await store.deliveries.states(event["id"], shown_ids)
        fates += [
            fate_of(
                subscription,
                event,
                state,
                health,
                of_tenant=subscription.tenant in (None, context.event_tenant(event)),
                created_at=_created_at(context, subscription.id),
                now=now,
            )
            for subscription, state, health in zip(shown, states, healths, strict=True)
        ]
    source = context.runtime.sources.get(call.source_id)
    late_s = (call.first_seen_ms - call.started_ms) / 1000
    depth_s = _depth_s(late_s, [int(tier.depth_s) for tier in context.runtime.settings.poll.tiers])
    if not call.events:
        verdict, summary = "not_told_yet", _unpublished_words(call, source, now=now)
    else:
        verdict, summary = summarize(fates) if events else _EXPIRED
    return Explanation(
        source_id=call.source_id,
        provider_call_id=call.key,
        call_id=call.id,
        verdict=verdict,
        summary=summary,
        seen=_seen_words(call, late_s, depth_s),
        started_at=instant(call.started_ms),
        first_seen_at=instant(call.first_seen_ms),
        observed_via=call.via,
        found_within_s=depth_s,
        contact=_contact_words(call),
        recording=_recording_words(call, source),
        subscriptions=fates,
        left_out=len(accessible) - len(shown),
    )


def _created_at(context: ApiContext, subscription_id: str) -> datetime | None:
    declaration = context.created("subscription", subscription_id)
    return instant(declaration.created_ms) if declaration else None


# --- wording: pure ---------------------------------------------------------------------------------------------------


def _depth_s(late_s: float, depths_s: Sequence[int]) -> int | None:
    return next((depth_s for depth_s in depths_s if late_s <= depth_s), None)


def _seen_words(call: StoredCall, late_s: float, depth_s: int | None) -> str:
    after = f"{format_duration(late_s)} {'after' if late_s >= 0 else 'before'} its start"
    how = {"poll": "by a poll", "backfill": "by a backfill", "stream": "by the provider's stream"}.get(
        call.via, f"by {call.via}"
    )
    if call.via == "poll" and depth_s is not None:
        how += f" that looks {format_duration(depth_s)} back"
    return f"{iso(instant(call.first_seen_ms))}, {after}, {how}"


def _contact_words(call: StoredCall) -> str:
    if call.contact is None:
        return "not looked up yet"
    words = _CONTACT_WORDS[call.contact["lookup_status"]]
    return f"{words}: {call.contact['name']}" if call.contact.get("name") else words


def _recording_words(call: StoredCall, source: Source | None) -> str:
    if call.recording is not None:
        return _RECORDING_WORDS[call.recording["status"]]
    if source is None or not source.rules.recordings:
        return _RECORDING_WORDS["unsupported"]
    return _RECORDING_WORDS["pending" if call.record["outcome"] == "answered" else "none"]


def _unpublished_words(call: StoredCall, source: Source | None, *, now: datetime) -> str:
    if not call.finished:
        return "The call has not ended; its event is published when it ends."
    if source is None:
        return f"The source {call.source_id} was removed, so no event is published."
    match decide(call, now_ms=int(now.timestamp() * 1000), rules=source.rules):
        case Wait(wait_ms=wait_ms):
            return f"Its event waits at most {format_duration(wait_ms / 1000 + 0.5)} for the contact or the recording."
        case _:
            return "Its event is about to be published: no worker has processed it yet. Is one running?"


def fate_of(
    subscription: Subscription,
    event: Json,
    state: DeliveryState | None,
    health: SubscriptionHealth,
    *,
    of_tenant: bool,
    created_at: datetime | None,
    now: datetime,
) -> SubscriptionFate:
    """Explain what became of an event for a subscription; `state` is that of its delivery, None without one."""
    if state is None:
        fate, why = _no_delivery(subscription, event, of_tenant=of_tenant, created_at=created_at)
    else:
        fate, why = _delivery(subscription, event, state, health, now=now)
    return SubscriptionFate(
        subscription_id=subscription.id,
        host=subscription.host,
        event_id=event["id"],
        event_type=event["type"],
        fate=fate,
        why=why,
        delivery_id=f"{event['id']}.{subscription.id}" if state is not None else None,
        attempts=state.attempts if state else 0,
        next_attempt_at=instant(state.next_ms) if state and state.status == "waiting" else None,
    )


def _delivery(
    subscription: Subscription, event: Json, state: DeliveryState, health: SubscriptionHealth, *, now: datetime
) -> tuple[Fate, str]:
    last = f"; last attempt: {state.log[-1]['words']}" if state.log else ""
    attempts = f"{state.attempts} attempt{'' if state.attempts == 1 else 's'}"
    if state.status == "delivered":
        return "delivered", f"delivered at {iso(instant(state.at_ms))}, after {attempts}"
    if state.status in _FAILED_WORDS:
        return "failed", f"{_FAILED_WORDS[state.status]} after {attempts}{last}"
    if state.status in ("missing", "dropped"):
        return "missing", f"the subscription was disabled; {_replay_hint(subscription, event)}"
    if health.disabled_reason:
        return (
            "waiting",
            f"the subscription is disabled ({health.disabled_reason}) and resumes once enabled{last}",
        )
    if health.circuit_open:
        return "waiting", f"the circuit is open, because the subscriber keeps failing{last}"
    due = instant(state.next_ms)
    if due is not None and due > now:
        return "waiting", f"next attempt in {format_duration((due - now).total_seconds())}{last}"
    return "waiting", f"due now, or waiting for an earlier event of the call{last}"


_FAILED_WORDS: Final = {
    "exhausted": "failed, retries exhausted,",
    "unknown": "unknown whether delivered, and not sent twice,",
    "expired": "expired before it was delivered,",
    "poison": "quarantined, because sending it crashed the worker,",
}


def _no_delivery(
    subscription: Subscription, event: Json, *, of_tenant: bool, created_at: datetime | None
) -> tuple[Fate, str]:
    if not of_tenant:
        return "filtered", "filtered because the source belongs to another tenant"
    reason = filters.mismatch(subscription.options, event, subscription_id=subscription.id)
    if reason is not None:
        return "filtered", f"filtered because {reason}"
    hint = _replay_hint(subscription, event)
    if created_at is not None and created_at > from_iso(event["timestamp"]):
        return "not_queued", f"the subscription was created later, at {iso(created_at.astimezone(UTC))}; {hint}"
    return "not_queued", f"the subscription did not exist or did not match when the event was published; {hint}"


def _replay_hint(subscription: Subscription, event: Json) -> str:
    return f"`relay replay {subscription.id} --event {event['id']}` sends it"


def summarize(fates: Sequence[SubscriptionFate]) -> tuple[Verdict, str]:
    """Summarize in one sentence: failed deliveries before pending ones, pending ones before successful ones."""
    if not fates:
        return "nobody", "Its event was published, but there is no subscription."
    by_fate: dict[Fate, dict[str, None]] = {}
    for fate in fates:
        by_fate.setdefault(fate.fate, {})[fate.subscription_id] = None

    def names(fate: Fate) -> str:
        subscriptions = list(by_fate[fate])
        more = f" and {len(subscriptions) - 5} more" if len(subscriptions) > 5 else ""
        return ", ".join(subscriptions[:5]) + more

    if "failed" in by_fate:
        return "failed", f"Delivery to {names('failed')} failed."
    if "missing" in by_fate:
        return "switched_off", f"{names('missing')} was disabled when its event was published."
    if "waiting" in by_fate:
        return "waiting", f"Delivery to {names('waiting')} is pending."
    if "delivered" in by_fate:
        return "delivered", f"Delivered to {names('delivered')}."
    if "filtered" in by_fate:
        return "filtered", f"The filters of {names('filtered')} do not match."
    return "nobody", "No subscription matched when its event was published."


def source_status(source: Source, state: SourceState, *, now: datetime) -> str:
    """Describe whether a source could have seen a call."""
    if source.paused:
        return "paused: not polled"
    if state.error:
        since = format_duration((now - (instant(state.error_since_ms) or now)).total_seconds())
        return f"failing for {since}: {state.error}"
    if state.last_poll is None:
        return "not polled yet"
    polled = f"last polled {format_duration((now - state.last_poll).total_seconds())} ago"
    cursor, started = state.poll_state.cursor, state.poll_state.started_at
    if cursor is None or cursor == started:
        return f"{polled}; no call since the first poll"
    newest = format_duration((now - cursor).total_seconds())
    return f"{polled}; its newest call started {newest} ago. This call has not appeared yet, or has expired"
