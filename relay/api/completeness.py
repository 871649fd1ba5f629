"""Completeness of a source: what the provider showed of each day, and what became of it. Reading asks no provider."""

from datetime import date

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from relay.api.auth import Caller
from relay.api.context import ApiContext
from relay.api.jobs import JobView
from relay.api.jobs import view as view_job
from relay.api.problems import Problem, invalid
from relay.completeness import examine
from relay.domain.polling import PollState
from relay.polling.completeness import DayReport, DeliveryCount, Gap, GapKind, oldest_day, today, usual_days
from relay.polling.window import floor
from relay.providers.source import Source

MAX_GAPS = 1000


class DayRange(BaseModel):
    """Days by the provider's calendar; by default today and the three days before."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: date | None = Field(None, alias="from", description="first day, such as 2026-11-20")
    to: date | None = Field(None, description="last day; today if omitted")


class CompletenessQuery(DayRange):
    """Which days to examine."""


class HealRequest(DayRange):
    """Which days to heal."""


class SubscriptionCompleteness(BaseModel):
    """Events of a day's calls, by what became of each for one subscription."""

    subscription_id: str
    delivered: int
    filtered: int
    failed: int = Field(description="retries exhausted, or ended otherwise")
    waiting: int
    disabled: int = Field(description="published while the subscription was disabled, which it still is")
    earlier: int = Field(description="published before the subscription existed or had its present filters")
    missing: int


class DayCompleteness(BaseModel):
    """One day. Rows are those of the provider's calendar day."""

    day: date
    read_at: AwareDatetime | None = Field(description="newest deep look that covered the day; null before the first")
    shown: int = Field(description="distinct rows in the provider's list, as of that look")
    ingested: int = Field(description="calls; may exceed `shown` by those that were ingested since")
    in_progress: int = Field(description="calls that have not ended")
    before_start: int = Field(description="calls from before the relay, which were not published")
    erased: int
    quarantined: int = Field(description="invalid rows that did not become a call")
    too_old: int = Field(description="rows that were listed too late for a poll to ingest them")
    missing: int = Field(description="number of gaps")
    subscriptions: list[SubscriptionCompleteness]


class GapView(BaseModel):
    """Something that is missing."""

    day: date
    kind: GapKind
    provider_call_id: str | None
    call_id: str | None
    event_id: str | None
    subscription_id: str | None
    what: str = Field(description="what is missing, in a sentence")
    action: str = Field(description="what to do")


class Completeness(BaseModel):
    """The completeness of a source, day by day; `missing` is 0 when nothing is missing."""

    source_id: str
    from_: date = Field(alias="from")
    to: date
    missing: int
    days: list[DayCompleteness]
    gaps: list[GapView]
    gaps_left_out: int = Field(description="number of gaps omitted, because there are too many")
    unread: list[str] = Field(
        description="ranges of time that the provider could not list; what is missing there shows later"
    )

    model_config = ConfigDict(populate_by_name=True)


async def read_completeness(
    context: ApiContext, caller: Caller, source_id: str, query: CompletenessQuery
) -> Completeness:
    """Compare what a provider showed of each day with what was ingested, published and delivered."""
    source = await context.source(caller, source_id)
    poll_state = (await context.store.sources.read(source_id)).poll_state
    first, last = _days(context, source, poll_state, query)
    reports = await examine(context.store, source, context.subscriptions(caller), first=first, last=last)
    gaps = [gap for report in reports for gap in report.gaps]
    return Completeness(
        source_id=source_id,
        from_=first,
        to=last,
        missing=len(gaps),
        days=[_day(report) for report in reports],
        gaps=[_gap(gap) for gap in gaps[:MAX_GAPS]],
        gaps_left_out=max(len(gaps) - MAX_GAPS, 0),
        unread=[failure.text for failure in poll_state.gaps],
    )


async def heal_source(context: ApiContext, caller: Caller, source_id: str, body: HealRequest) -> JobView:
    """Repair what is missing: read lost rows again, publish and deliver again, all under the same ids."""
    source = await context.source(caller, source_id)
    if source.paused:
        raise Problem("source_paused", "The source is paused; resume it first.")
    poll_state = (await context.store.sources.read(source_id)).poll_state
    first, last = _days(context, source, poll_state, body)
    job = await context.start_job(
        "heal", source_id, first.isoformat(), last.isoformat(), caller=caller, source=source_id
    )
    return view_job(job)


def _days(context: ApiContext, source: Source, poll_state: PollState, days: DayRange) -> tuple[date, date]:
    now = context.now()
    oldest = date.fromisoformat(oldest_day(floor(poll_state, now=now), now=now))
    usual_first, usual_last = usual_days(now, zone=source.options.timezone)
    last = min(days.to or usual_last, today(now, zone=source.options.timezone))
    first = days.from_ or max(min(usual_first, last), oldest)
    if first < oldest:
        raise invalid("from", f"is before {oldest}, the first day whose rows are remembered")
    if first > last:
        raise invalid("from", "must not be after `to`, and not in the future")
    return first, last


def _day(report: DayReport) -> DayCompleteness:
    return DayCompleteness(
        day=date.fromisoformat(report.day),
        read_at=report.read_at,
        shown=report.shown,
        ingested=report.ingested,
        in_progress=report.in_progress,
        before_start=report.before_start,
        erased=report.erased,
        quarantined=report.quarantined,
        too_old=report.too_old,
        missing=len(report.gaps),
        subscriptions=_subscriptions(report),
    )


def _subscriptions(report: DayReport) -> list[SubscriptionCompleteness]:
    return [
        SubscriptionCompleteness(
            subscription_id=subscription,
            **{count.value: counts[count] for count in DeliveryCount},
        )
        for subscription, counts in sorted(report.subscriptions.items())
    ]


def _gap(gap: Gap) -> GapView:
    return GapView(
        day=date.fromisoformat(gap.day),
        kind=gap.kind,
        provider_call_id=gap.key,
        call_id=gap.call_id,
        event_id=gap.event_id,
        subscription_id=gap.subscription,
        what=gap.what,
        action=gap.action,
    )
