"""How far back a poll looks, as tables; and that no gap opens between two polls, whatever happened, as a property."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.domain.polling import PollState
from relay.polling.window import (
    FLOOR,
    HEAVY_BYTES,
    HEAVY_ROWS,
    LONGEST_OWED,
    Look,
    Tier,
    TierUpdate,
    after_failure,
    after_success,
    covers,
    days_to_forget,
    effective,
    first_offset_s,
    floor,
    heavy_after,
    next_cursor,
    not_read_yet,
    plan,
    shortened,
)

NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
NEAR, DAY, DEEP = 7_200, 93_600, 280_800
TIERS = (Tier(0, NEAR), Tier(900, DAY), Tier(21_600, DEEP))


def ago(**span: float) -> datetime:
    return NOW - timedelta(**span)


def poll_state(**changes: object) -> PollState:
    """A source whose tiers all succeeded 30 s ago, and whose newest call is a minute old."""
    recent = dict.fromkeys((NEAR, DAY, DEEP), ago(seconds=30))
    return replace(PollState(ago(days=9), ago(seconds=60), ago(days=12), recent), **changes)  # type: ignore[arg-type]


def planned(state: PollState, tiers: Sequence[Tier] = TIERS) -> list[tuple[int, datetime]]:
    """The looks of a poll at NOW, all of them complete."""
    looks = plan(state, tiers, now=NOW)
    assert all(look.complete for look in looks)
    return [(look.depth_s, look.since) for look in looks]


def test_the_first_poll_looks_as_far_behind_the_relays_start_as_each_tier_does() -> None:
    """The near tier first. Also when the first poll that succeeds comes late: what started after the relay is found."""
    assert planned(PollState(started_at=ago(hours=5))) == [
        (NEAR, ago(hours=7)),
        (DEEP, ago(hours=83)),
        (DAY, ago(hours=31)),
    ]


def test_a_start_in_the_future_counts_as_now() -> None:
    """The store's clock was wrong when the relay began, and has been set back since."""
    assert planned(PollState(started_at=ago(days=-400)))[0] == (NEAR, ago(hours=2))


def test_a_cursor_without_a_success_is_a_recovery_from_the_marker() -> None:
    """A recovery that died half way has moved nothing, so the next poll goes on recovering from the same place."""
    assert planned(PollState(ago(days=400), ago(hours=3))) == [
        (NEAR, ago(hours=5)),
        (DEEP, ago(hours=81)),
        (DAY, ago(hours=29)),
    ]


DUE = {
    "only the near one": ({NEAR: 30, DAY: 600, DEEP: 600}, [(NEAR, 60)]),
    "a quarter of an hour": ({NEAR: 30, DAY: 900, DEEP: 3000}, [(NEAR, 60), (DAY, 900)]),
    "six hours": ({NEAR: 30, DAY: 30, DEEP: 21_600}, [(NEAR, 60), (DEEP, 21_600)]),
    "all of them": ({NEAR: 30, DAY: 1000, DEEP: 22_000}, [(NEAR, 60), (DEEP, 22_000), (DAY, 1000)]),
    "after a gap": ({NEAR: 7_201, DAY: 7_201, DEEP: 7_201}, [(NEAR, 7201), (DEEP, 7201), (DAY, 7201)]),
    "a deeper look counts for the others": ({NEAR: 30, DAY: 5000, DEEP: 30}, [(NEAR, 60)]),
}


@pytest.mark.parametrize(("seconds_ago", "looks"), DUE.values(), ids=DUE)
def test_each_tier_looks_back_from_its_own_last_success(
    seconds_ago: dict[int, int], looks: list[tuple[int, int]]
) -> None:
    """A tier that is due requests what may have appeared since its last look, and its depth more."""
    reached = {depth: ago(seconds=seconds) for depth, seconds in seconds_ago.items()}

    assert planned(poll_state(reached=reached)) == [(depth, ago(seconds=back + depth)) for depth, back in looks]


def test_a_quiet_source_is_read_from_its_newest_call() -> None:
    """Over a quiet weekend the cursor stays behind, and each poll reaches back from there."""
    assert planned(poll_state(cursor=ago(days=2))) == [(NEAR, ago(days=2, seconds=NEAR))]


def test_successes_in_the_future_make_every_tier_due() -> None:
    """The store's clock was a day ahead for a while: the age of the last looks is unknown."""
    ahead = dict.fromkeys((NEAR, DAY, DEEP), ago(days=-1))

    looks = planned(poll_state(reached=ahead, cursor=ago(days=-1)))

    assert looks == [(depth, ago(seconds=depth)) for depth in (NEAR, DEEP, DAY)]


def test_a_depth_that_is_new_never_reaches_to_the_beginning_of_time() -> None:
    """The tiers were changed in the configuration: the new one begins where the others stood."""
    deeper = (*TIERS, Tier(43_200, 345_600))

    assert planned(poll_state(), deeper) == [(NEAR, ago(seconds=60 + NEAR)), (345_600, ago(seconds=60 + 345_600))]


def test_a_short_step_that_was_not_taken_for_weeks_does_not_reach_back_for_weeks() -> None:
    """Heavy again after a quiet month: the step of ten minutes begins at the last look that was deeper."""
    reached = {600: ago(days=30), NEAR: ago(seconds=30), DAY: ago(seconds=30), DEEP: ago(seconds=30)}

    assert planned(poll_state(heavy=True, reached=reached)) == [(600, ago(seconds=660))]


def fails(state: PollState, look: Look, *, now: datetime) -> PollState:
    failure = after_failure(state, look, TIERS, "504", now=now)
    return TierUpdate({}, {look.depth_s: failure}).apply(state)


def test_a_tier_that_fails_looks_half_as_far_and_owes_the_rest() -> None:
    """Down to the depth of the next tier; soon, then later and later; the near tier goes on as if nothing had been."""
    state = poll_state(reached={NEAR: ago(seconds=30), DAY: ago(seconds=30), DEEP: ago(hours=6)})
    hours: list[float] = []
    now = NOW
    for _ in range(4):
        near, look = plan(state, TIERS, now=now)
        assert near.complete
        hours.append(round((now - look.since).total_seconds() / 3600, 1))
        state = fails(state, look, now=now)
        wait = state.failing[DEEP].next_attempt - now
        assert len(plan(state, TIERS, now=now + wait / 2)) == 1, "only the near look until then"
        now += wait
        state = replace(state, reached={**state.reached, NEAR: now, DAY: now}, cursor=now)

    failure = state.failing[DEEP]
    assert hours == [84, 42, 26, 26]
    assert (failure.since, failure.failing_since, failure.failures) == (ago(hours=84), NOW, 4)
    assert now - NOW == timedelta(seconds=60 + 120 + 240 + 480)


def test_what_a_tier_could_not_read_for_two_weeks_is_not_asked_for_any_more() -> None:
    """`seen` remembers no longer: what started before that could not be told from a known call."""
    state = poll_state(reached={NEAR: NOW, DAY: NOW, DEEP: ago(hours=6)})
    state = fails(state, Look(DEEP, ago(days=10), ago(days=10)), now=NOW)
    later = NOW + timedelta(days=30)

    [deep] = [look for look in plan(state, TIERS, now=later) if look.depth_s == DEEP]

    assert deep.owed == later - LONGEST_OWED


def test_an_attempt_that_a_wrong_clock_put_far_ahead_is_made_now() -> None:
    """No backoff is longer than an hour: it was written before the store's clock was set back."""
    state = poll_state(reached={NEAR: NOW, DAY: NOW, DEEP: ago(hours=6)})
    state = fails(state, plan(state, TIERS, now=NOW)[1], now=NOW)
    ahead = replace(state.failing[DEEP], next_attempt=NOW + timedelta(hours=3))

    looks = plan(replace(state, failing={DEEP: ahead}), TIERS, now=NOW)

    assert [look.depth_s for look in looks] == [NEAR, DEEP]


def test_a_tier_that_succeeds_again_looks_twice_as_far_until_nothing_is_owed() -> None:
    """A shortened look is a success of its own, and the next one is longer."""
    state = poll_state(reached={NEAR: NOW, DAY: NOW, DEEP: ago(hours=6)})
    look = plan(state, TIERS, now=NOW)[1]
    state, now = fails(fails(state, look, now=NOW), replace(look, since=ago(hours=42)), now=NOW), NOW
    hours: list[float] = []
    while state.failing:
        now = state.failing[DEEP].next_attempt
        state = replace(state, reached={**state.reached, NEAR: now, DAY: now}, cursor=now)
        look = plan(state, TIERS, now=now)[1]
        hours.append(round((now - look.since).total_seconds() / 3600))
        state = after_success(state, look, TIERS, now=now).apply(state)

    assert hours == [26, 52, 86]
    assert state.reached[DEEP] == now


def test_a_near_look_that_is_too_long_has_a_short_one_in_its_place() -> None:
    """After an outage it would reach far back. Until the next attempt the near tier looks as far as it usually does."""
    state = poll_state(reached=dict.fromkeys((NEAR, DAY, DEEP), ago(days=10)), cursor=ago(days=10))
    near = plan(state, TIERS, now=NOW)[0]

    short = shortened(near, now=NOW)
    after = fails(state, near, now=NOW)

    assert short == Look(NEAR, ago(seconds=NEAR), near.owed)
    assert shortened(short, now=NOW) is None
    assert plan(after, TIERS, now=NOW + timedelta(seconds=59))[0].since == NOW + timedelta(seconds=59 - NEAR)
    assert plan(after, TIERS, now=NOW + timedelta(seconds=60))[0].since < ago(days=5)


def test_a_complete_deep_look_pays_what_shallower_tiers_owe() -> None:
    """It read their rows too."""
    state = poll_state(reached=dict.fromkeys((NEAR, DAY, DEEP), ago(days=1)), cursor=ago(days=1))
    near, deep, day = plan(state, TIERS, now=NOW)
    state = fails(fails(state, near, now=NOW), day, now=NOW)

    after = after_success(state, deep, TIERS, now=NOW).apply(state)

    assert covers(deep, day)
    assert not covers(replace(deep, since=ago(hours=30)), day)
    assert not after.failing


@pytest.mark.parametrize(
    ("deep", "covered"),
    [
        (Look(DEEP, ago(hours=84), ago(hours=84)), True),
        (Look(DEEP, ago(hours=84), ago(hours=90)), False),
        (Look(DEEP, ago(hours=40), ago(hours=40)), False),
    ],
    ids=["as far", "shortened", "not as far"],
)
def test_a_deeper_look_covers_another_only_when_it_read_as_far_and_all_it_owes(deep: Look, covered: bool) -> None:
    assert covers(deep, Look(DAY, ago(hours=50), ago(hours=50))) is covered


def test_a_look_pays_no_more_than_it_has_read() -> None:
    """A tier that owes older calls than a deeper look read, or is deeper itself, goes on owing them."""
    state = poll_state(reached={NEAR: NOW, DAY: NOW, DEEP: ago(hours=6)})
    owing = Look(DAY, ago(hours=26), ago(hours=200))
    state = fails(state, owing, now=NOW)

    deep = after_success(state, Look(DEEP, ago(hours=84), ago(hours=84)), TIERS, now=NOW).apply(state)
    near = after_success(state, Look(NEAR, ago(hours=300), ago(hours=300)), TIERS, now=NOW).apply(state)

    assert deep.failing[DAY].since == ago(hours=200)
    assert near.failing[DAY].since == ago(hours=200)


def test_heavy_polls_look_ten_minutes_back_and_two_hours_every_two_minutes() -> None:
    """Where each look brings thousands of rows, most looks are short; the deeper tiers stay as they are."""
    assert effective(TIERS, heavy=True) == [Tier(0, 600), Tier(120, NEAR), Tier(900, DAY), Tier(21_600, DEEP)]
    assert effective(TIERS, heavy=False) == list(TIERS)
    assert effective((Tier(0, 300), Tier(600, NEAR)), heavy=True) == [Tier(0, 300), Tier(600, NEAR)]


HEAVY = {
    "very many rows": (False, NEAR, 0, HEAVY_ROWS + 1, 0, True),
    "as many as may be": (False, NEAR, 0, HEAVY_ROWS, HEAVY_BYTES, False),
    "very long rows": (False, NEAR, 0, 10, HEAVY_BYTES + 1, True),
    "a deeper look does not count": (False, DAY, 0, 50_000, 9_000_000, False),
    "nor does one after an outage": (False, NEAR, 7200, 50_000, 9_000_000, False),
    "nor a short one": (True, 600, 0, 10, 10, True),
    "still more than half": (True, NEAR, 0, HEAVY_ROWS // 2 + 1, 0, True),
    "less than half": (True, NEAR, 0, HEAVY_ROWS // 2, HEAVY_BYTES // 2, False),
}


@pytest.mark.parametrize(("heavy", "depth_s", "more_s", "rows", "size_bytes", "then"), HEAVY.values(), ids=HEAVY)
def test_heavy_is_judged_by_looks_of_the_near_tier(
    heavy: bool, depth_s: int, more_s: int, rows: int, size_bytes: int, then: bool
) -> None:
    """It does not switch to and fro: not by looks of another depth, and back only at half."""
    since = ago(seconds=depth_s + more_s)
    look = Look(depth_s, since, since)

    judged = heavy_after(poll_state(heavy=heavy), look, TIERS, rows=rows, size_bytes=size_bytes, now=NOW)

    assert judged is then


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
    assert floor(PollState(started_at=NOW, cursor=ago(days=-9)), now=NOW) == NOW - FLOOR
    assert floor(PollState(started_at=NOW), now=NOW) is None


def test_the_floor_waits_for_what_is_owed() -> None:
    """What a tier could not read for days is still new when it is read; for two weeks at most."""
    look = Look(DEEP, ago(days=6), ago(days=6))

    assert floor(fails(poll_state(), look, now=NOW), now=NOW) == ago(days=6)
    later = ago(days=-30)
    assert floor(replace(fails(poll_state(), look, now=NOW), cursor=later), now=later) == later - timedelta(days=14)
    assert floor(poll_state(reached={NEAR: NOW, DEEP: ago(days=3)}), now=NOW) == ago(days=7)


def test_days_are_dropped_one_by_one_and_after_a_long_pause_all_at_once() -> None:
    """Each move of the floor names the days it left behind; naming the one at the edge again costs nothing."""
    assert days_to_forget(None, NOW) == []
    assert days_to_forget(NOW, NOW) == ["2025-06-28"]
    assert days_to_forget(ago(days=2), NOW) == ["2025-06-26", "2025-06-27", "2025-06-28"]
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

    assert day not in days_to_forget(old - FLOOR, bottom)


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
    """After its appearance a call is in the window of a look that follows, within 6 hours of polling, unless a tier
    still owes it or has for two weeks: whatever failed, however deep looks are answered, however long the outage."""
    state = PollState(started_at=NOW)
    successes: list[tuple[datetime, datetime]] = []
    for at, succeeds, rows in schedule:
        looks = plan(state, TIERS, now=at)
        for look in looks:
            # A provider that answers for a day at most, every other time.
            answered = succeeds or (rows != 3000 and at - look.since <= timedelta(hours=24))
            if not answered and look is looks[0]:
                break
            if not answered:
                state = fails(state, look, now=at)
                continue
            successes.append((at, look.since))
            update = after_success(state, look, TIERS, now=at)
            if look is looks[0]:
                cursor = next_cursor(state, at - timedelta(seconds=newest_ago_s), poll_started=at)
                heavy = heavy_after(state, look, TIERS, rows=rows, size_bytes=0, now=at)
                owed = {} if state.polled else {other.depth_s: not_read_yet(other, now=at) for other in looks[1:]}
                state = replace(state, cursor=cursor, heavy=heavy, known_since=state.known_since or look.since)
                update = TierUpdate(update.reached, {**update.failing, **owed})
            state = update.apply(state)

    late = timedelta(hours=late_h)
    for before, _ in successes:
        appears = before + timedelta(microseconds=1)
        started = appears - late
        read = [at for at, since in successes if at > before and since <= started]
        owed = any(failure.since <= started for failure in state.failing.values())
        still_due = bool(state.reached) and successes[-1][0] - before < timedelta(seconds=21_600)
        assert read or owed or still_due or successes[-1][0] - started > LONGEST_OWED


@given(interval_s=st.floats(1, 86_400), number=st.integers(0, 2**64))
def test_the_first_poll_is_due_within_the_interval(interval_s: float, number: int) -> None:
    """Sources are spread over it, each always in the same place."""
    assert 0 <= first_offset_s(number, interval_s) < interval_s


def test_the_first_polls_of_many_sources_are_spread_over_the_interval() -> None:
    """A relay that starts with a thousand sources does not poll them all in its first second."""
    assert [first_offset_s(number, 30) for number in (0, 2_500, 5_000, 7_500)] == [0, 7.5, 15, 22.5]
