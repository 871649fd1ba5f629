"""What counts as missing, and which days a reading covers: the rules alone."""

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.domain import ids
from relay.domain.call import InvalidRow, Record
from relay.polling.completeness import (
    DayReport,
    DeliveryCount,
    Gap,
    GapKind,
    ReadingLog,
    Recipient,
    compare,
    oldest_day,
    starts_between,
    today,
    usual_days,
)
from relay.polling.window import days_to_forget
from relay.store.codes import DeliveryFate, SeenFlag
from relay.store.completeness import CallFacts, EventFacts, ShownRows

DAY = "2026-11-20"
NOW = datetime(2026, 11, 20, 15, tzinfo=UTC)
CALL = ids.call_id("main", "1")


def report(*calls: CallFacts, recipient: Recipient | None = None, **shown: Any) -> DayReport:
    recipients = [] if recipient is None else [recipient]
    return compare(DAY, ShownRows(**shown), calls, recipients, source_id="main")


def fact(flag: SeenFlag | None, **fields: Any) -> CallFacts:
    return CallFacts("1", CALL, flag, **fields)


def published(document: bool = True, **fates: DeliveryFate) -> CallFacts:
    event = EventFacts("evt_1", document, fates)
    return fact(SeenFlag.INGESTED, stored=True, finished=True, events=[event])


@pytest.mark.parametrize(
    ("facts", "shown", "kind"),
    [
        (fact(None), {"keys": {"1"}}, GapKind.NOT_INGESTED),
        (fact(None), {"too_old": {"1"}}, GapKind.TOO_OLD),
        (fact(SeenFlag.INGESTED), {}, GapKind.CALL_LOST),
        (fact(SeenFlag.INGESTED), {"too_old": {"1"}}, GapKind.CALL_LOST),
        (fact(SeenFlag.INGESTED, stored=True, finished=True), {}, GapKind.NOT_PUBLISHED),
        (fact(None, stored=True, finished=True), {"keys": {"1"}}, GapKind.NOT_PUBLISHED),
        (fact(SeenFlag.INGESTED, stored=True, finished=True, held=True), {}, None),
        (fact(SeenFlag.INGESTED, stored=True), {}, None),
        (fact(SeenFlag.SEEDED), {"keys": {"1"}}, None),
        (fact(SeenFlag.SEEDED_UNFINISHED), {"keys": {"1"}}, None),
        (fact(SeenFlag.ERASED), {"keys": {"1"}}, None),
        (fact(SeenFlag.SEEDED), {"too_old": {"1"}}, None),
        (fact(SeenFlag.INGESTED, other_day=True), {"keys": {"1"}}, None),
    ],
)
def test_a_row_is_missing_unless_something_accounts_for_it(
    facts: CallFacts, shown: dict[str, Any], kind: GapKind | None
) -> None:
    """Seeded, erased, held by a lane, in progress, or filed under another day: none of these is missing."""
    gaps = report(facts, **shown).gaps

    assert gaps == (() if kind is None else (Gap(kind, DAY, "1", CALL),))


@pytest.mark.parametrize(
    ("call", "enabled", "selected", "count", "kind"),
    [
        (published(a=DeliveryFate.DELIVERED), True, None, "delivered", None),
        (published(a=DeliveryFate.FAILED), True, None, "failed", None),
        (published(a=DeliveryFate.WAITING), True, None, "waiting", None),
        (published(a=DeliveryFate.WAITING), False, None, "waiting", None),
        (published(a=DeliveryFate.LOST), True, None, "missing", GapKind.DELIVERY_LOST),
        (published(a=DeliveryFate.MISSED), True, None, "missing", GapKind.MISSED),
        (published(a=DeliveryFate.MISSED), False, None, "disabled", None),
        (published(a=DeliveryFate.EXPIRED), True, None, "missing", GapKind.EVENT_LOST),
        (published(document=False, a=DeliveryFate.WAITING), True, None, "missing", GapKind.EVENT_LOST),
        (published(document=False, a=DeliveryFate.DELIVERED), True, None, "delivered", None),
        (published(), True, True, "missing", GapKind.NOT_QUEUED),
        (published(), True, False, "filtered", None),
        (published(), True, None, "earlier", None),
    ],
)
def test_each_delivery_is_counted_once(
    call: CallFacts, enabled: bool, selected: bool | None, count: str, kind: GapKind | None
) -> None:
    """And reported when it will not come by itself."""
    recipient = Recipient("a", enabled, {"evt_1": selected})

    day = report(call, recipient=recipient)

    assert day.subscriptions == {"a": Counter({DeliveryCount(count): 1})}
    assert day.gaps == (() if kind is None else (Gap(kind, DAY, "1", CALL, "evt_1", "a"),))


def test_an_event_without_any_trace_is_reported_once() -> None:
    """Nobody can tell who has received it."""
    gaps = report(published(document=False), recipient=Recipient("a", True, {})).gaps

    assert gaps == (Gap(GapKind.EVENT_LOST, DAY, "1", CALL, "evt_1"),)


def test_an_invalid_row_counts_until_its_call_exists() -> None:
    """A row that was corrected, or a second row of one call, is not missing; one without an id always counts."""
    entries = {("1", "no start", "x"), ("2", "no start", "x"), (None, "no id", "x")}

    day = report(fact(SeenFlag.INGESTED, stored=True), keys={"1"}, invalid=entries)

    assert {(gap.kind, gap.key, gap.detail) for gap in day.gaps} == {
        (GapKind.QUARANTINED, "2", "no start"),
        (GapKind.QUARANTINED, None, "no id"),
    }
    assert (day.shown, day.ingested, day.quarantined) == (3, 1, 2)
    assert all("no " in gap.what and "report the row" in gap.action for gap in day.gaps)


def test_every_kind_says_what_and_what_to_do() -> None:
    """In words of its own."""
    gaps = [Gap(kind, DAY, "1") for kind in GapKind]

    assert len({gap.what for gap in gaps}) == len(GapKind)
    assert all("relay completeness --heal" in gap.action for gap in gaps)


def test_every_kind_is_documented() -> None:
    """With what healing does about it."""
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()

    assert {f"| `{kind.value}` |" for kind in GapKind if f"| `{kind.value}` |" not in page} == set()


@pytest.mark.parametrize(
    ("since", "zone", "covered"),
    [
        (datetime(2026, 11, 19, 13, tzinfo=UTC), "UTC", ["2026-11-20"]),
        (datetime(2026, 11, 17, 9, tzinfo=UTC), "UTC", ["2026-11-18", "2026-11-19", "2026-11-20"]),
        (datetime(2026, 11, 20, 13, tzinfo=UTC), "UTC", []),
        (datetime(2026, 11, 19, 15, tzinfo=UTC), "Pacific/Kiritimati", ["2026-11-21"]),
        (datetime(2026, 11, 19, 9, tzinfo=UTC), "Pacific/Kiritimati", ["2026-11-20", "2026-11-21"]),
        (datetime(2026, 11, 19, 23, tzinfo=UTC), "America/New_York", ["2026-11-20"]),
        (datetime(2026, 11, 20, 1, tzinfo=UTC), "America/New_York", []),
        (datetime(2026, 10, 1, tzinfo=UTC), "UTC", [f"2026-11-{day}" for day in range(14, 21)]),
    ],
)
def test_a_reading_covers_the_days_that_it_reads_from_their_start(
    since: datetime, zone: str, covered: list[str]
) -> None:
    """Whether rows are dated in the account's zone or in UTC, and no further back than rows are remembered."""
    log = ReadingLog.begin(None, now=NOW)

    assert log.covered_days(since, zone=zone) == covered


def test_rows_are_filed_by_the_date_of_their_start() -> None:
    """An invalid row without a date under the day of the reading; what `seen` has forgotten not at all."""
    log = ReadingLog.begin(NOW - timedelta(days=4), now=NOW)
    for key, day in (("1", "2026-11-19"), ("2", "2026-11-20"), ("3", "2026-11-10")):
        log.add_valid(Record(key=key, started_at=NOW, local_date=day))
    log.add_valid(Record(key="4", started_at=NOW, local_date="2026-11-15"), too_old=True)
    log.add_invalid(InvalidRow("no start", "5"))
    log.add_invalid(InvalidRow("no start", "6", local_date="2026-11-19"))

    assert log.days == {
        "2026-11-15": ShownRows(too_old={"4"}),
        "2026-11-19": ShownRows(keys={"1"}, invalid={("6", "no start", "")}),
        "2026-11-20": ShownRows(keys={"2"}, invalid={("5", "no start", "")}),
    }


@pytest.mark.parametrize("hour", range(0, 48, 5))
def test_no_day_is_judged_whose_rows_are_forgotten(hour: int) -> None:
    """What a poll drops of `seen` is older than the oldest day that can be examined after it."""
    before = datetime(2026, 11, 14, tzinfo=UTC) + timedelta(hours=hour)
    floor = before + timedelta(hours=7)

    forgotten = days_to_forget(before, floor)

    assert max(forgotten) < oldest_day(floor, now=NOW)


def test_the_usual_days_are_those_of_the_provider() -> None:
    """Today there, or by UTC where that is later, and the three days before."""
    assert today(NOW, zone="Pacific/Kiritimati") == date(2026, 11, 21)
    assert today(NOW, zone="America/New_York") == date(2026, 11, 20)
    assert usual_days(NOW, zone="UTC") == (date(2026, 11, 17), date(2026, 11, 20))


def test_a_day_is_read_again_with_a_margin_for_any_zone() -> None:
    """From the first place where it begins to the last where it ends, but not beyond now."""
    assert starts_between({"2026-11-18"}, now=NOW) == (
        datetime(2026, 11, 17, 10, tzinfo=UTC),
        datetime(2026, 11, 19, 12, tzinfo=UTC),
    )
    assert starts_between({"2026-11-18", DAY}, now=NOW) == (datetime(2026, 11, 17, 10, tzinfo=UTC), NOW)
