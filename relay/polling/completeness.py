"""Compares what a provider showed of a day with what became of it, call by call. Pure: the caller reads the facts.

Nothing is counted while it happens. A day is judged from what the store has anyway: the rows that the last deep look
showed, `seen`, the calls, their events and the states of the deliveries. So a count cannot drift from the truth.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo

from relay.domain import ids
from relay.domain.call import InvalidRow, Record
from relay.polling.window import FLOOR, FORGET_DAYS
from relay.store.codes import DeliveryFate, SeenFlag
from relay.store.completeness import CallFacts, EventFacts, ShownRows

USUAL_DAYS: Final = 4
_FURTHEST_EAST: Final = timedelta(hours=14)
_FURTHEST_WEST: Final = timedelta(hours=12)


class GapKind(StrEnum):
    """What is missing; the values are part of the API."""

    NOT_INGESTED = "not_ingested"
    CALL_LOST = "call_lost"
    TOO_OLD = "too_old"
    QUARANTINED = "quarantined"
    NOT_PUBLISHED = "not_published"
    EVENT_LOST = "event_lost"
    DELIVERY_LOST = "delivery_lost"
    NOT_QUEUED = "not_queued"
    MISSED = "missed_while_disabled"

    @property
    def is_row(self) -> bool:
        """Whether reading the provider's row again repairs it."""
        return self in (GapKind.NOT_INGESTED, GapKind.CALL_LOST, GapKind.TOO_OLD, GapKind.QUARANTINED)


_WHAT: Final[Mapping[GapKind, str]] = {
    GapKind.NOT_INGESTED: "the provider lists the call, and it was never ingested",
    GapKind.CALL_LOST: "the call was ingested, and the store has lost it",
    GapKind.TOO_OLD: "the provider listed the call more than 96 h after its start, too late for a poll to ingest it",
    GapKind.QUARANTINED: "the row is invalid and was quarantined",
    GapKind.NOT_PUBLISHED: "the call has ended, nothing was published, and no lane holds it",
    GapKind.EVENT_LOST: "the document of the event was lost before it was delivered",
    GapKind.DELIVERY_LOST: "the delivery is waiting, and the lane has lost it",
    GapKind.NOT_QUEUED: "the event matches the subscription, and was never queued for it",
    GapKind.MISSED: "the event was published while the subscription was disabled",
}
_HEAL: Final = "run `relay completeness --heal`"
_ACTIONS: Final[Mapping[GapKind, str]] = {
    GapKind.QUARANTINED: "correct the row at the provider, or report the row; then `relay completeness --heal`",
}


@dataclass(frozen=True, slots=True)
class Gap:
    """One thing that is missing. `key` is the provider's id of the call, None for an invalid row without one."""

    kind: GapKind
    day: str
    key: str | None
    call_id: str | None = None
    event_id: str | None = None
    subscription: str | None = None
    detail: str = ""

    @property
    def what(self) -> str:
        return f"{_WHAT[self.kind]}: {self.detail}" if self.detail else _WHAT[self.kind]

    @property
    def action(self) -> str:
        return _ACTIONS.get(self.kind, _HEAL)


class DeliveryCount(StrEnum):
    """How a subscription stands with an event."""

    DELIVERED = "delivered"
    FILTERED = "filtered"
    FAILED = "failed"
    WAITING = "waiting"
    # Published while the subscription was disabled, which it still is.
    DISABLED = "disabled"
    # Published before the subscription existed, or had the filters that it has now.
    EARLIER = "earlier"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Recipient:
    """A subscription that may receive the events. `selected` says of each event without a delivery whether it should
    have one: None when it was published before the subscription was in force."""

    id: str
    enabled: bool
    selected: Mapping[str, bool | None]


@dataclass(frozen=True, slots=True)
class DayReport:
    """One day of a source. `read_at` is the last deep look that covered the day, None when none did so far."""

    day: str
    read_at: datetime | None = None
    shown: int = 0
    ingested: int = 0
    in_progress: int = 0
    before_start: int = 0
    erased: int = 0
    quarantined: int = 0
    too_old: int = 0
    gaps: tuple[Gap, ...] = ()
    subscriptions: Mapping[str, Counter[DeliveryCount]] = field(default_factory=dict)


def compare(
    day: str, shown: ShownRows, calls: Sequence[CallFacts], recipients: Sequence[Recipient], *, source_id: str
) -> DayReport:
    """Compare the rows of a day with what became of each."""
    counts: Counter[str] = Counter()
    gaps: list[Gap] = []
    deliveries: dict[str, Counter[DeliveryCount]] = {recipient.id: Counter() for recipient in recipients}
    for call in calls:
        if call.other_day:
            continue  # the provider has corrected its start; it counts where it is now
        if call.stored:
            counts["ingested"] += 1
            counts["in_progress"] += not call.finished
            gaps += _gaps_of_call(call, day, recipients, deliveries)
        elif call.flag is SeenFlag.INGESTED:
            gaps.append(Gap(GapKind.CALL_LOST, day, call.key, call.id))
        elif call.flag is SeenFlag.ERASED:
            counts["erased"] += 1
        elif call.flag is not None:
            counts["before_start"] += 1
            counts["in_progress"] += call.flag is SeenFlag.SEEDED_UNFINISHED
        else:
            kind = GapKind.TOO_OLD if call.key in shown.too_old else GapKind.NOT_INGESTED
            gaps.append(Gap(kind, day, call.key, call.id))
    # A row may have been corrected meanwhile, or be a second row of a call that was ingested.
    resolved = {call.key for call in calls if call.flag is not None}
    invalid = sorted((row for row in shown.invalid if row[0] not in resolved), key=str)
    for key, reason, _ in invalid:
        call_id = ids.call_id(source_id, key) if key is not None else None
        gaps.append(Gap(GapKind.QUARANTINED, day, key, call_id, detail=reason))
    return DayReport(
        day=day,
        read_at=shown.read_at,
        shown=len(shown.keys | shown.too_old) + len(invalid),
        ingested=counts["ingested"],
        in_progress=counts["in_progress"],
        before_start=counts["before_start"],
        erased=counts["erased"],
        quarantined=len(invalid),
        too_old=sum(gap.kind is GapKind.TOO_OLD for gap in gaps),
        gaps=tuple(gaps),
        subscriptions=deliveries,
    )


def _gaps_of_call(
    call: CallFacts,
    day: str,
    recipients: Sequence[Recipient],
    deliveries: Mapping[str, Counter[DeliveryCount]],
) -> Iterator[Gap]:
    if call.finished and not call.events and not call.held:
        yield Gap(GapKind.NOT_PUBLISHED, day, call.key, call.id)
    for event in call.events:
        for recipient in recipients:
            count, kind = _judge(event, recipient)
            deliveries[recipient.id][count] += 1
            if kind is not None:
                yield Gap(kind, day, call.key, call.id, event.id, recipient.id)
        if not event.document and not event.deliveries:
            yield Gap(GapKind.EVENT_LOST, day, call.key, call.id, event.id)


def _judge(event: EventFacts, recipient: Recipient) -> tuple[DeliveryCount, GapKind | None]:
    match event.deliveries.get(recipient.id):
        case None if not event.document:
            return DeliveryCount.EARLIER, None  # reported once, as a lost event
        case None:
            selected = recipient.selected.get(event.id)
            if selected is None:
                return DeliveryCount.EARLIER, None
            return (DeliveryCount.MISSING, GapKind.NOT_QUEUED) if selected else (DeliveryCount.FILTERED, None)
        case DeliveryFate.DELIVERED:
            return DeliveryCount.DELIVERED, None
        case DeliveryFate.FAILED:
            return DeliveryCount.FAILED, None
        case DeliveryFate.EXPIRED:
            return DeliveryCount.MISSING, GapKind.EVENT_LOST
        case DeliveryFate.MISSED if recipient.enabled:
            return DeliveryCount.MISSING, GapKind.MISSED
        case DeliveryFate.MISSED:
            return DeliveryCount.DISABLED, None
        case DeliveryFate.WAITING | DeliveryFate.LOST if not event.document:
            return DeliveryCount.MISSING, GapKind.EVENT_LOST
        case DeliveryFate.LOST:
            return DeliveryCount.MISSING, GapKind.DELIVERY_LOST
        case _:
            return DeliveryCount.WAITING, None


# --- what a reading shows ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ReadingLog:
    """Collects the rows that one reading of the provider's list shows, by day, from the day `oldest` on."""

    oldest: str
    read_at: datetime
    days: dict[str, ShownRows] = field(default_factory=dict)

    @classmethod
    def begin(cls, floor: datetime | None, *, now: datetime) -> "ReadingLog":
        """Start one; `floor` is that of the reading."""
        return cls(oldest_day(floor, now=now), now)

    def add_valid(self, record: Record, *, too_old: bool = False) -> None:
        if record.local_date >= self.oldest:
            rows = self._of(record.local_date)
            (rows.too_old if too_old else rows.keys).add(record.key)

    def add_invalid(self, row: InvalidRow) -> None:
        """Add an invalid row; one whose date is unreadable is filed under the day of the reading."""
        day = row.local_date or self.read_at.date().isoformat()
        if day >= self.oldest:
            self._of(day).invalid.add((row.key, row.reason, row.excerpt))

    def covered_days(self, since: datetime, *, zone: str) -> list[str]:
        """List the days that a reading of what started after `since` covers from their start on."""
        covered: list[str] = []
        day = since.date()
        while (begins := _day_begins(day, zone)) <= self.read_at:
            if begins >= since and day.isoformat() >= self.oldest:
                covered.append(day.isoformat())
            day += timedelta(days=1)
        return covered

    def _of(self, day: str) -> ShownRows:
        return self.days.setdefault(day, ShownRows())


def _day_begins(day: date, zone: str) -> datetime:
    # Some providers date their rows in the zone of the account, others in UTC: the earlier one is right for both.
    return min(datetime.combine(day, time(), ZoneInfo(name)).astimezone(UTC) for name in ("UTC", zone))


def oldest_day(floor: datetime | None, *, now: datetime) -> str:
    """The first day of which `seen` remembers every row; `floor` is that of the poll."""
    oldest = (floor or now - FLOOR) - timedelta(days=FORGET_DAYS)
    return (oldest.date() + timedelta(days=1)).isoformat()


def today(now: datetime, *, zone: str) -> date:
    """The newest day that rows may be filed under: some providers date them in UTC."""
    return max(now.astimezone(UTC).date(), now.astimezone(ZoneInfo(zone)).date())


def usual_days(now: datetime, *, zone: str) -> tuple[date, date]:
    """The days that are judged unless others are asked for: what the deepest tier reads."""
    last = today(now, zone=zone)
    return last - timedelta(days=USUAL_DAYS - 1), last


def starts_between(days: Collection[str], *, now: datetime) -> tuple[datetime, datetime]:
    """The instants between which calls of these days start, whatever the provider's time zone."""
    first = datetime.combine(date.fromisoformat(min(days)), time(), UTC) - _FURTHEST_EAST
    last = datetime.combine(date.fromisoformat(max(days)), time(), UTC) + timedelta(days=1) + _FURTHEST_WEST
    return first, min(last, now)
