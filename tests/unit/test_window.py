"""How far back a poll looks, as tables; and that no gap opens between two polls, whatever happened, as a property."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.domain.polling import PollState
from relay.polling.window import (
    FLOOR,
    HEAVY_BYTES,
    HEAVY_ROWS,
    SEED_DEPTH,
    Plan,
    Tier,
    days_to_forget,
    effective,
    first_offset_s,
    floor,
    heavy_after,
    next_cursor,
    plan,
)

NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
NEAR, DAY, DEEP = 7_200, 93_600, 280_800
TIERS = (Tier(0, NEAR), Tier(900, DAY), Tier(21_600, DEEP))


def ago(**span: float) -> datetime:
    return NOW - timedelta(**span)


def poll_state(**changes: object) -> PollState:
    """A source whose tiers all succeeded 30 s ago, and whose newest call is a minute old."""
    recent = dict.fromkeys((NEAR, DAY, DEEP), ago(seconds=30))
    return replace(PollState(ago(days=9), ago(seconds=60), recent), **changes)  # type: ignore[arg-type]


def test_the_first_poll_looks_78_hours_behind_the_relays_start() -> None:
    """Also when the first one that succeeds comes late: what started after the relay is then still found."""
    planned = plan(PollState(started_at=ago(hours=5)), TIERS, now=NOW)

    assert planned == Plan(ago(hours=83), (NEAR, DAY, DEEP), first=True)


def test_a_start_in_the_future_counts_as_now() -> None:
    """The store's clock was wrong when the relay began, and has been set back since."""
    assert plan(PollState(started_at=ago(days=-400)), TIERS, now=NOW).since == NOW - SEED_DEPTH


def test_a_cursor_without_a_success_is_a_recovery_from_the_marker() -> None:
    """A recovery that died half way has moved no cursor, so the next poll recovers from the same place."""
    planned = plan(PollState(ago(days=400), ago(hours=3)), TIERS, now=NOW)

    assert planned == Plan(ago(hours=81), (NEAR, DAY, DEEP), recovery=True)


DUE = {
    "only the near one": ({NEAR: 30, DAY: 600, DEEP: 600}, (NEAR,), 60 + NEAR),
    "a quarter of an hour": ({NEAR: 30, DAY: 900, DEEP: 3000}, (NEAR, DAY), 900 + DAY),
    "six hours": ({NEAR: 30, DAY: 30, DEEP: 21_600}, (NEAR, DEEP), 21_600 + DEEP),
    "all of them": ({NEAR: 30, DAY: 1000, DEEP: 22_000}, (NEAR, DAY, DEEP), 22_000 + DEEP),
    "after a gap the deepest goes first": ({NEAR: 7_201, DAY: 7_201, DEEP: 7_201}, (NEAR, DAY, DEEP), 7_201 + DEEP),
    "a deeper look counts for the others": ({NEAR: 30, DAY: 5000, DEEP: 30}, (NEAR,), 60 + NEAR),
}


@pytest.mark.parametrize(("seconds_ago", "depths", "since_s"), DUE.values(), ids=DUE)
def test_each_tier_looks_back_from_its_own_last_success(
    seconds_ago: dict[int, int], depths: tuple[int, ...], since_s: int
) -> None:
    """A tier that is due asks for what may have appeared since it last looked, and its depth more."""
    reached = {depth: ago(seconds=seconds) for depth, seconds in seconds_ago.items()}

    planned = plan(poll_state(reached=reached), TIERS, now=NOW)

    assert planned == Plan(ago(seconds=since_s), depths)


def test_a_quiet_source_is_read_from_its_newest_call() -> None:
    """Over a quiet weekend the cursor stays behind, and each poll reaches back from there."""
    assert plan(poll_state(cursor=ago(days=2)), TIERS, now=NOW).since == ago(days=2, seconds=NEAR)


def test_successes_in_the_future_make_every_tier_due() -> None:
    """The store's clock was a day ahead for a while: when the tiers were last read is unknown."""
    ahead = dict.fromkeys((NEAR, DAY, DEEP), ago(days=-1))

    planned = plan(poll_state(reached=ahead, cursor=ago(days=-1)), TIERS, now=NOW)

    assert planned == Plan(NOW - timedelta(seconds=DEEP), (NEAR, DAY, DEEP))


def test_a_depth_that_is_new_never_reaches_to_the_beginning_of_time() -> None:
    """The tiers were changed in the configuration: the new one begins where the others stood."""
    deeper = (*TIERS, Tier(43_200, 345_600))

    assert plan(poll_state(), deeper, now=NOW).since == ago(seconds=60) - timedelta(seconds=NEAR)
    assert plan(poll_state(reached={NEAR: ago(days=1)}), deeper, now=NOW).since == ago(days=1, seconds=345_600)


def test_a_short_step_that_was_not_taken_for_weeks_does_not_reach_back_for_weeks() -> None:
    """Heavy again after a quiet month: the step of ten minutes begins at the last look that was deeper."""
    reached = {600: ago(days=30), NEAR: ago(seconds=30), DAY: ago(seconds=30), DEEP: ago(seconds=30)}

    planned = plan(poll_state(heavy=True, reached=reached), TIERS, now=NOW)

    assert planned == Plan(ago(seconds=660), (600,))


def test_heavy_polls_look_ten_minutes_back_and_two_hours_every_two_minutes() -> None:
    """Where each look brings thousands of rows, most looks are short; the deeper tiers stay as they are."""
    assert effective(TIERS, heavy=True) == [Tier(0, 600), Tier(120, NEAR), Tier(900, DAY), Tier(21_600, DEEP)]
    assert effective(TIERS, heavy=False) == list(TIERS)
    assert effective((Tier(0, 300), Tier(600, NEAR)), heavy=True) == [Tier(0, 300), Tier(600, NEAR)]


HEAVY = {
    "very many rows": (False, (NEAR,), HEAVY_ROWS + 1, 0, True),
    "as many as may be": (False, (NEAR,), HEAVY_ROWS, HEAVY_BYTES, False),
    "very long rows": (False, (NEAR,), 10, HEAVY_BYTES + 1, True),
    "a deeper look does not count": (False, (NEAR, DAY), 50_000, 9_000_000, False),
    "nor while it is heavy": (True, (600, NEAR, DAY), 10, 10, True),
    "a short look neither": (True, (600,), 10, 10, True),
    "still more than half": (True, (600, NEAR), HEAVY_ROWS // 2 + 1, 0, True),
    "less than half": (True, (600, NEAR), HEAVY_ROWS // 2, HEAVY_BYTES // 2, False),
}


@pytest.mark.parametrize(("heavy", "depths", "rows", "size_bytes", "then"), HEAVY.values(), ids=HEAVY)
def test_heavy_is_judged_by_polls_of_the_near_tier(
    heavy: bool, depths: tuple[int, ...], rows: int, size_bytes: int, then: bool
) -> None:
    """It does not switch to and fro: not by looks of another depth, and back only at half."""
    judged = heavy_after(poll_state(heavy=heavy), Plan(NOW, depths), TIERS, rows=rows, size_bytes=size_bytes)

    assert judged is then


def test_the_first_poll_does_not_make_a_source_heavy() -> None:
    """78 hours of calls are many for anybody."""
    first = Plan(NOW, (NEAR, DAY, DEEP), first=True)

    assert not heavy_after(PollState(), first, TIERS, rows=90_000, size_bytes=0)


CURSOR = {
    "forward": (ago(hours=1), ago(minutes=1), ago(minutes=1)),
    "never backwards": (ago(hours=1), ago(hours=2), ago(hours=1)),
    "capped at the poll's start": (ago(hours=1), ago(hours=-5), NOW),
    "nothing came": (ago(hours=1), None, ago(hours=1)),
    "nothing ever came": (None, None, ago(days=9)),
    "one of the future is cut": (ago(days=-1), None, NOW),
}


@pytest.mark.parametrize(("before", "newest", "after"), CURSOR.values(), ids=CURSOR)
def test_the_cursor_is_the_newest_start_up_to_the_polls_own(
    before: datetime | None, newest: datetime | None, after: datetime
) -> None:
    """A call that seems to start in the future, or an old one that comes late, does not lead the cursor astray."""
    assert next_cursor(poll_state(cursor=before), newest, poll_started=NOW) == after


def test_the_floor_is_96_hours_below_the_cursor() -> None:
    """After an outage of weeks it is still there, so everything since then is new."""
    assert floor(poll_state(cursor=ago(days=20)), now=NOW) == ago(days=24)
    assert floor(poll_state(cursor=ago(days=-9)), now=NOW) == NOW - FLOOR
    assert floor(PollState(started_at=NOW), now=NOW) is None


def test_days_are_dropped_one_by_one_and_after_a_long_pause_all_at_once() -> None:
    """Each move of the cursor names the days it left behind; naming the one at the edge again costs nothing."""
    assert days_to_forget(None, NOW) == []
    assert days_to_forget(NOW, NOW) == ["2025-06-24"]
    assert days_to_forget(ago(days=2), NOW) == ["2025-06-22", "2025-06-23", "2025-06-24"]
    assert len(days_to_forget(ago(days=9000), NOW)) == 401


instants = st.timedeltas(timedelta(days=-700), timedelta(days=700)).map(lambda span: NOW + span)
steps = st.timedeltas(timedelta(0), timedelta(days=40))
hours = st.floats(-14, 14).map(lambda value: timedelta(hours=value))


@given(old=instants, step=steps, late=st.timedeltas(timedelta(0), timedelta(days=2)), zone=hours)
def test_no_forgotten_day_has_a_row_that_could_be_new(
    old: datetime, step: timedelta, late: timedelta, zone: timedelta
) -> None:
    """A row at or above the floor lies on a day that `seen` still has, in whatever zone its date is written."""
    new = old + step
    bottom = floor(PollState(cursor=new), now=new)
    assert bottom is not None
    day = (bottom + late + zone).date().isoformat()

    assert day not in days_to_forget(old, new)


@given(first=instants, moves=st.lists(steps, min_size=1, max_size=8))
def test_every_day_is_forgotten_in_the_end(first: datetime, moves: list[timedelta]) -> None:
    """However the cursor gets there, no day between its old floor and its new one stays behind."""
    forgotten: set[str] = set()
    cursor = first
    for move in moves:
        forgotten.update(days_to_forget(cursor, cursor + move))
        cursor += move

    assert forgotten == set(days_to_forget(first, cursor))


@st.composite
def polls(draw: st.DrawFn) -> list[tuple[datetime, bool, int]]:
    """Times of polls, whether each succeeds, and how many rows it brings."""
    at = NOW
    made: list[tuple[datetime, bool, int]] = []
    for _ in range(draw(st.integers(2, 40))):
        gaps = st.one_of(st.floats(1, 300), st.floats(300, 30_000), st.floats(30_000, 900_000))
        at += timedelta(seconds=draw(gaps))
        made.append((at, draw(st.booleans()), draw(st.sampled_from([0, 10, 3000]))))
    return made


@given(schedule=polls(), newest_ago_s=st.integers(0, 90_000), late_h=st.floats(0, 72))
def test_a_call_that_appears_within_72_hours_is_requested(
    schedule: list[tuple[datetime, bool, int]], newest_ago_s: int, late_h: float
) -> None:
    """After its appearance a call is in the window of the deepest look that follows, which follows within 6 hours of
    polling: whatever polls failed, however long the relay was away, heavy or not."""
    stands = PollState(started_at=NOW)
    looked: list[tuple[datetime, datetime]] = []
    for at, succeeds, rows in schedule:
        planned = plan(stands, TIERS, now=at)
        if not succeeds:
            continue
        looked.append((at, planned.since))
        cursor = next_cursor(stands, at - timedelta(seconds=newest_ago_s), poll_started=at)
        heavy = heavy_after(stands, planned, TIERS, rows=rows, size_bytes=0)
        stands = PollState(NOW, cursor, {**(stands.reached or {}), **dict.fromkeys(planned.depths, at)}, heavy)

    late = timedelta(hours=late_h)
    for before, after in pairwise(looked):
        appears = before[0] + timedelta(microseconds=1)
        started = appears - late
        found = [at for at, since in looked if at >= after[0] and since <= started]
        still_due = stands.reached is not None and looked[-1][0] - before[0] < timedelta(seconds=21_600)
        assert found or still_due


@given(interval_s=st.floats(1, 86_400), number=st.integers(0, 2**64))
def test_the_first_poll_is_due_within_the_interval(interval_s: float, number: int) -> None:
    """Sources are spread over it, each always in the same place."""
    assert 0 <= first_offset_s(number, interval_s) < interval_s
