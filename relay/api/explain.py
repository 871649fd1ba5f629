"""Why did this call not arrive: everything that the relay knows of it, subscription by subscription, in sentences.

Asked for by our id of the call, the provider's own, or a number. What was never a call is explained too: known from
before the relay began, put aside as unreadable, or not seen at all, and then by how each source is.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.calls import ListCalls, list_calls
from relay.api.context import CALL_ID, Api, Id, instant
from relay.delivery import filters
from relay.delivery.subscriptions import Subscription
from relay.domain import ids
from relay.domain.json import Json
from relay.domain.time import format_duration, from_iso, iso
from relay.events.decide import Wait, decide
from relay.providers.source import Source
from relay.store import keys
from relay.store.calls import StoredCall
from relay.store.deliveries import DeliveryState
from relay.store.health import Health, read_health
from relay.store.sources import SourceState

CALLS_MOST: Final = 5
SUBSCRIPTIONS_MOST: Final = 200
SOURCES_MOST: Final = 50
_SEEN_DAYS: Final = 10
"""Days of `seen` that may still be there, counted back from the cursor."""

Verdict = Literal[
    "delivered", "filtered", "waiting", "failed", "switched_off", "nobody", "not_told_yet", "forgotten", "not_a_call"
]
Fate = Literal["delivered", "filtered", "waiting", "failed", "missing", "not_queued"]
_FORGOTTEN: Final[tuple[Verdict, str]] = (
    "forgotten",
    "It was told, longer ago than events are kept (retention.events_days), or they were erased.",
)
_FAILED: Final = frozenset({"exhausted", "unknown", "expired", "poison"})
_CONTACT_WORDS: Final = {
    "matched": "found",
    "none": "nobody has this number",
    "unavailable": "could not be looked up",
    "skipped": "not looked up",
}
_RECORDING_WORDS: Final = {
    "pending": "not fetched so far",
    "available": "stored",
    "none": "there is none",
    "unavailable": "there is one, but it cannot be had",
    "unsupported": "none are fetched from this source",
}


class ExplainQuery(BaseModel):
    """What is to be explained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = Field(
        min_length=1, max_length=200, description="id of a call, the provider's own id of it, or a number"
    )
    source: Id | None = Field(None, description="only of this source")


class SubscriptionFate(BaseModel):
    """What became of one event for one subscription."""

    subscription_id: str
    host: str
    event_id: str
    event_type: str
    fate: Fate
    why: str = Field(description="a sentence: when it was heard, why it is filtered, what the subscriber answered")
    delivery_id: str | None = Field(description="null where there is no delivery")
    attempts: int
    next_attempt_at: AwareDatetime | None


class Explanation(BaseModel):
    """One row of a provider, and how far it came."""

    source_id: str
    provider_call_id: str
    call_id: str
    verdict: Verdict
    summary: str = Field(description="the answer in a sentence")
    seen: str = Field(description="when it was seen first, how, and how long after its start")
    started_at: AwareDatetime | None
    first_seen_at: AwareDatetime | None
    observed_via: str | None
    found_within_s: int | None = Field(description="the depth of the shallowest look that reaches its start")
    contact: str
    recording: str
    subscriptions: list[SubscriptionFate]
    left_out: int = Field(0, description="subscriptions that are not listed, because there are too many")


class SourceStatus(BaseModel):
    """How a source is, where nothing was seen."""

    source_id: str
    words: str


class Explanations(BaseModel):
    """What is known of that. Without `items`, `sources` say whether it could have been seen."""

    about: str
    items: list[Explanation]
    sources: list[SourceStatus]


async def explain(api: Api, caller: Caller, query: ExplainQuery) -> Explanations:
    """Say why a call did or did not arrive: by its id, the provider's own, or a number on either side."""
    sources = await _sources(api, caller, query)
    about = query.about.strip()
    items: list[Explanation] = []
    if re.fullmatch(CALL_ID, about):
        call = await api.runtime.ledger.call(about)
        own = api.source_ids(caller)
        if call is not None and (own is None or call.source_id in own) and query.source in (None, call.source_id):
            items.append(await _of_call(api, caller, call))
    else:
        for source in sources:
            found = await _by_key(api, caller, source, about)
            if found is not None:
                items.append(found)
        if not items and 2 <= len(about) <= 64:
            items = await _by_number(api, caller, query, about)
    standings: list[SourceStatus] = []
    if not items:
        now = api.now()
        for source in sources[:SOURCES_MOST]:
            state = await api.runtime.states.read(source.id)
            standings.append(SourceStatus(source_id=source.id, words=standing_words(source, state, now=now)))
    return Explanations(about=about, items=items, sources=standings)


async def _sources(api: Api, caller: Caller, query: ExplainQuery) -> Sequence[Source]:
    if query.source is not None:
        return [await api.source(caller, query.source)]
    return [each for each in api.runtime.sources.values() if caller.sees(each.tenant)]


async def _by_key(api: Api, caller: Caller, source: Source, key: str) -> Explanation | None:
    """Find what has this id at the provider: a call, a row that was only remembered, or one that was put aside."""
    call = await api.runtime.ledger.call(ids.call_id(source.id, key))
    if call is not None:
        return await _of_call(api, caller, call)
    state = await api.runtime.states.read(source.id)
    newest = state.poll_state.cursor or api.now()
    days = [(newest + timedelta(days=2 - each)).date().isoformat() for each in range(_SEEN_DAYS)]
    async with api.runtime.redis.pipeline(transaction=False) as pipe:
        for day in days:
            pipe.hget(keys.seen(source.id, day), key)
        marks = await pipe.execute()
    for day, mark in zip(days, marks, strict=True):
        if mark is not None:
            return _never_told(source, key, day, mark.decode().lstrip("0123456789")[:1], state)
    for row in await api.runtime.states.quarantined(source.id):
        if row["key"] == key:
            return _no_call(source, key, f"It was put aside, because it cannot be believed: {row['reason']}.")
    return None


def _never_told(source: Source, key: str, day: str, flag: str, state: SourceState) -> Explanation:
    began = iso(state.poll_state.started_at)
    summary = {
        "s": f"It was there before the relay began with {source.id} ({began}), so it is known and was never told; "
        f"`relay backfill {source.id}` tells it.",
        "u": f"It was there before the relay began with {source.id} ({began}) and had not ended; "
        "it is told when it has.",
    }.get(flag, "It was a call, and is not kept any more.")
    return _no_call(source, key, summary, seen=f"in a list of calls, under {day}")


def _no_call(source: Source, key: str, summary: str, *, seen: str = "in a list of calls") -> Explanation:
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


async def _by_number(api: Api, caller: Caller, query: ExplainQuery, number: str) -> list[Explanation]:
    wanted = ListCalls(number=number, source=query.source, limit=CALLS_MOST)
    page = await list_calls(api, caller, wanted)
    calls = [await api.runtime.ledger.call(each.id) for each in page.items]
    return [await _of_call(api, caller, call) for call in calls if call is not None]


async def _of_call(api: Api, caller: Caller, call: StoredCall) -> Explanation:
    runtime = api.runtime
    now = api.now()
    events = [event for event in await runtime.ledger.events(call.events) if event is not None]
    visible = sorted(
        (each for each in runtime.subscriptions.values() if caller.sees(each.tenant)), key=lambda each: each.id
    )
    shown = visible[:SUBSCRIPTIONS_MOST]
    healths = [await read_health(runtime.redis, each.id) for each in shown] if events else []
    fates: list[SubscriptionFate] = []
    for event in events:
        stored = await runtime.redis.hmget(keys.event(event["id"]), [each.id for each in shown]) if shown else []  # type: ignore[misc]
        fates += [
            fate_of(
                subscription,
                event,
                DeliveryState.read(state) if state is not None else None,
                health,
                of_tenant=subscription.tenant in (None, api.event_tenant(event)),
                made_at=_made_at(api, subscription.id),
                now=now,
            )
            for subscription, state, health in zip(shown, stored, healths, strict=True)
        ]
    source = runtime.sources.get(call.source_id)
    started_at, first_seen_at = instant(call.started_ms), instant(call.first_seen_ms)
    late_s = (call.first_seen_ms - call.started_ms) / 1000
    depth_s = _depth_s(late_s, [int(tier.depth_s) for tier in runtime.settings.poll.tiers])
    if not call.events:
        verdict, summary = _untold(call, source, now=now)
    else:
        verdict, summary = judge(fates) if events else _FORGOTTEN
    return Explanation(
        source_id=call.source_id,
        provider_call_id=call.key,
        call_id=call.id,
        verdict=verdict,
        summary=summary,
        seen=_seen_words(call, late_s, depth_s),
        started_at=started_at,
        first_seen_at=first_seen_at,
        observed_via=call.via,
        found_within_s=depth_s,
        contact=_contact_words(call),
        recording=_recording_words(call, source),
        subscriptions=fates,
        left_out=len(visible) - len(shown),
    )


def _made_at(api: Api, sub: str) -> datetime | None:
    if api.runtime.registry.configured("subscription", sub):
        return None
    made = api.runtime.registry.made["subscription"].get(sub)
    return instant(made.created_ms) if made else None


# --- words, all pure -------------------------------------------------------------------------------------------------


def _depth_s(late_s: float, depths_s: Sequence[int]) -> int | None:
    return next((depth_s for depth_s in depths_s if late_s <= depth_s), None)


def _seen_words(call: StoredCall, late_s: float, depth_s: int | None) -> str:
    after = (
        f"{format_duration(late_s)} after its start" if late_s >= 0 else f"{format_duration(late_s)} before its start"
    )
    how = {"poll": "by a poll", "backfill": "by a backfill", "stream": "by the provider's stream"}.get(
        call.via, f"by {call.via}"
    )
    if call.via == "poll" and depth_s is not None:
        how += f" that looks {format_duration(depth_s)} back"
    return f"{iso(instant(call.first_seen_ms))}, {after}, {how}"


def _contact_words(call: StoredCall) -> str:
    if call.contact is None:
        return "not looked up so far"
    words = _CONTACT_WORDS[call.contact["lookup_status"]]
    return f"{words}: {call.contact['name']}" if call.contact.get("name") else words


def _recording_words(call: StoredCall, source: Source | None) -> str:
    if call.recording is not None:
        return _RECORDING_WORDS[call.recording["status"]]
    if source is None or not source.rules.recordings:
        return _RECORDING_WORDS["unsupported"]
    return _RECORDING_WORDS["pending" if call.record["outcome"] == "answered" else "none"]


def _untold(call: StoredCall, source: Source | None, *, now: datetime) -> tuple[Verdict, str]:
    """Say why nothing was told of a call."""
    if not call.finished:
        return "not_told_yet", "The call has not ended; it is told when it has."
    if source is None:
        return "not_told_yet", f"There is no source {call.source_id} any more, so nothing is told of it."
    match decide(call, now_ms=int(now.timestamp() * 1000), rules=source.rules):
        case Wait(wait_ms=wait_ms):
            return "not_told_yet", (
                f"It waits for its contact or its audio, for another {format_duration(wait_ms / 1000 + 0.5)} at most."
            )
        case _:
            return "not_told_yet", "It is about to be told: a worker has yet to take it up. Is one running?"


def fate_of(
    subscription: Subscription,
    event: Json,
    state: DeliveryState | None,
    health: Health,
    *,
    of_tenant: bool,
    made_at: datetime | None,
    now: datetime,
) -> SubscriptionFate:
    """Say what became of an event for a subscription; `state` is its delivery, None where there is none."""
    fate, why = _fate(subscription, event, state, health, of_tenant=of_tenant, made_at=made_at, now=now)
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


def _fate(
    subscription: Subscription,
    event: Json,
    state: DeliveryState | None,
    health: Health,
    *,
    of_tenant: bool,
    made_at: datetime | None,
    now: datetime,
) -> tuple[Fate, str]:
    if state is None:
        return _no_delivery(subscription, event, of_tenant=of_tenant, made_at=made_at)
    last = f"; the last attempt {state.log[-1]['words']}" if state.log else ""
    tries = f"{state.attempts} attempt{'' if state.attempts == 1 else 's'}"
    if state.status == "delivered":
        return "delivered", f"heard at {iso(instant(state.at_ms))}, after {tries}"
    if state.status in _FAILED:
        return "failed", f"{_FAILED_WORDS[state.status]} after {tries}{last}"
    if state.status in ("missing", "dropped"):
        return "missing", f"it was switched off then; relay replay {subscription.id} --event {event['id']} sends it"
    if health.off:
        return "waiting", f"the subscription is switched off ({health.off}); it goes on when that is enabled{last}"
    if health.breaker_open:
        return "waiting", f"attempts are held back for some minutes, because the subscriber looks unwell{last}"
    due = instant(state.next_ms)
    if due is not None and due > now:
        return "waiting", f"the next attempt is in {format_duration((due - now).total_seconds())}{last}"
    return "waiting", f"an attempt is due now, or waits for an earlier event of the call{last}"


_FAILED_WORDS: Final = {
    "exhausted": "given up",
    "unknown": "it may or may not have been heard, and is not sent twice,",
    "expired": "its content is not kept any more,",
    "poison": "put aside, because sending it broke the worker,",
}


def _no_delivery(
    subscription: Subscription, event: Json, *, of_tenant: bool, made_at: datetime | None
) -> tuple[Fate, str]:
    if not of_tenant:
        return "filtered", "filtered because the source belongs to another tenant"
    reason = filters.mismatch(subscription.options, event, subscription_id=subscription.id)
    if reason is not None:
        return "filtered", f"filtered because {reason}"
    again = f"relay replay {subscription.id} --event {event['id']} sends it"
    if made_at is not None and made_at > from_iso(event["timestamp"]):
        return "not_queued", f"the subscription was made later, at {iso(made_at.astimezone(UTC))}; {again}"
    return "not_queued", f"the subscription did not want it, or was not there, when it was made; {again}"


def judge(fates: Sequence[SubscriptionFate]) -> tuple[Verdict, str]:
    """Answer in one sentence: what went wrong counts before what waits, what waits before what went well."""
    if not fates:
        return "nobody", "It was told, but there is no subscription to hear it."
    names: dict[Fate, list[str]] = {}
    for each in fates:
        names.setdefault(each.fate, []).append(each.subscription_id)

    def among(fate: Fate) -> str:
        found = list(dict.fromkeys(names[fate]))
        return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")

    if "failed" in names:
        return "failed", f"It could not be delivered to {among('failed')}."
    if "missing" in names:
        return "switched_off", f"It was told while {among('missing')} was switched off."
    if "waiting" in names:
        return "waiting", f"It is on its way to {among('waiting')}."
    if "delivered" in names:
        return "delivered", f"It was delivered to {among('delivered')}."
    if "filtered" in names:
        return "filtered", f"It was told, and {among('filtered')} did not want it."
    return "nobody", "It was told before any of the subscriptions wanted it."


def standing_words(source: Source, state: SourceState, *, now: datetime) -> str:
    """Say whether a source could have seen it."""
    if source.paused:
        return "paused: the provider is not asked"
    if state.error:
        since = format_duration((now - (instant(state.error_since_ms) or now)).total_seconds())
        return f"failing for {since}: {state.error}"
    if state.last_poll is None:
        return "not polled so far"
    asked = f"last asked {format_duration((now - state.last_poll).total_seconds())} ago"
    cursor, began = state.poll_state.cursor, state.poll_state.started_at
    if cursor is None or cursor == began:
        return f"{asked}; it has listed no call since the relay began with it"
    newest = format_duration((now - cursor).total_seconds())
    return f"{asked}; its newest call started {newest} ago. It has not listed this one so far, or long before that"
