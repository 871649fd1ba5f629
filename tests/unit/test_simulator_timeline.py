"""The simulated office: the same for the same seed, and in the stated proportions."""

import itertools
import statistics
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from relay.simulator.timeline import CallPlan, Change, Habits, calls, formatted, people
from tests.fakes.timeline import calls_between

START = datetime(2025, 7, 1, 8, tzinfo=UTC)


def _first(count: int, *, seed: int = 7, habits: Habits | None = None) -> list[CallPlan]:
    return list(itertools.islice(calls(START, seed=seed, habits=habits), count))


def test_a_seed_always_gives_the_same_calls() -> None:
    assert _first(300, seed=1) == _first(300, seed=1)
    assert _first(300, seed=1) != _first(300, seed=2)
    assert people(1) == people(1) != people(2)


def test_the_calls_have_the_stated_proportions() -> None:
    """30 % unanswered, talk time of 134 s in the middle and 6 h at most, 60 an hour, a few late by up to 20 h."""
    plans = _first(40_000)

    answered = [plan for plan in plans if plan.answered]
    talk_s = [(plan.ended_at - plan.started_at).total_seconds() for plan in answered]
    after_s = [(plan.visible_at - plan.ended_at).total_seconds() for plan in plans]
    late_s = [seconds for seconds in after_s if seconds > 60]
    same_second = sum(1 for a, b in itertools.pairwise(plans) if a.started_at == b.started_at)
    hours = (plans[-1].started_at - START) / timedelta(hours=1)
    assert len(answered) / len(plans) == pytest.approx(0.70, abs=0.01)
    assert statistics.median(talk_s) == pytest.approx(134, rel=0.03)
    assert 7_200 < max(talk_s) <= 21_600
    assert min(after_s) >= 15
    assert len(late_s) / len(plans) == pytest.approx(0.0005, abs=0.0003)
    assert 3_600 < max(late_s) <= 72_060
    assert same_second / len(plans) == pytest.approx(0.05 + 0.95 / 60 / 2, abs=0.01)
    assert sum(1 for plan in plans if plan.changes) / len(plans) == pytest.approx(0.03, abs=0.005)
    assert len(plans) / hours == pytest.approx(60, rel=0.03)


def test_only_answered_calls_are_recorded_and_the_size_follows_the_talk_time() -> None:
    plans = _first(5_000)

    recorded = [plan for plan in plans if plan.recording_at]
    assert all(plan.answered for plan in recorded)
    assert len(recorded) / sum(plan.answered for plan in plans) == pytest.approx(0.95, abs=0.02)
    for plan in recorded:
        talk_s = (plan.ended_at - plan.started_at).total_seconds()
        assert plan.recording_bytes - 44 == pytest.approx(talk_s * 16_000, abs=3)
        assert plan.recording_at is not None
        assert plan.recording_at >= plan.ended_at


def test_starts_are_whole_seconds_in_order_and_rids_are_unique() -> None:
    plans = _first(5_000)

    assert [plan.started_at for plan in plans] == sorted(plan.started_at for plan in plans)
    assert all(plan.started_at.microsecond == 0 and plan.started_at >= START for plan in plans)
    assert len({plan.rid for plan in plans}) == len(plans)
    assert plans[0].rid == 211_159


def test_rows_appear_in_another_order_than_the_calls_began() -> None:
    """A long call surfaces after many that began later: the reason why a cursor alone loses calls."""
    plans = _first(500)

    by_visibility = sorted(plans, key=lambda plan: plan.visible_at)
    assert [plan.rid for plan in by_visibility] != [plan.rid for plan in plans]


def test_a_change_comes_after_the_row_was_seen_and_alters_it() -> None:
    changed = [plan for plan in _first(5_000) if plan.changes]

    assert changed
    for plan in changed:
        assert plan.changes[0].at > plan.visible_at
        assert plan.changes[0].fields["cidname_outside"] != plan.outside_name


def test_dispositions_and_directions_are_the_providers_words() -> None:
    plans = _first(5_000)

    assert set(Counter(plan.disposition for plan in plans)) == {"ANSWERED", "NO ANSWER", "BUSY", "FAILED"}
    assert set(Counter(plan.direction for plan in plans)) == {"INCOMING", "OUTGOING"}


def test_hurried_habits_have_short_calls_but_as_many() -> None:
    slow, quick = Habits(), Habits().hurried(60)

    plans = _first(4_000, habits=quick)

    talk_s = [(plan.ended_at - plan.started_at).total_seconds() for plan in plans if plan.answered]
    assert statistics.median(talk_s) == pytest.approx(134 / 60, rel=0.06)
    assert quick.visible_after_s == (0.25, 1.0)
    assert quick.late_max_s == 1_200
    assert (quick.calls_per_hour, quick.recording_bytes_per_s) == (slow.calls_per_hour, slow.recording_bytes_per_s)


def test_habits_can_be_pushed_to_the_extreme() -> None:
    """A test asks for nothing but late rows, or for a burst in one second."""
    late = _first(200, habits=replace(Habits(), late=1.0))
    burst = _first(200, habits=replace(Habits(), same_second=0.99, unanswered=1.0))

    assert statistics.fmean((plan.visible_at - plan.ended_at).total_seconds() for plan in late) > 20_000
    assert max(Counter(plan.started_at for plan in burst).values()) >= 50
    assert not any(plan.answered for plan in burst)


def test_calls_between_ends_before_its_end() -> None:
    end = START + timedelta(hours=3)

    plans = calls_between(START, end, seed=3)

    assert all(START <= plan.started_at < end for plan in plans)
    assert plans == _first(len(plans), seed=3)
    assert calls(START, seed=3) is not None
    assert _first(len(plans) + 1, seed=3)[-1].started_at >= end


def test_the_people_called_are_fictional_and_partly_strangers() -> None:
    everyone = people(5)

    assert all(person.number[3:8] == "55501" and len(person.number) == 10 for person in everyone)
    assert len({person.number for person in everyone}) == len(everyone) == 60
    assert 0 < sum(person.stranger for person in everyone) < len(everyone)
    outside = {plan.outside_number for plan in _first(500, seed=5)}
    assert outside <= {formatted(person.number) for person in everyone}


@pytest.mark.parametrize(
    "wrong", [{"unanswered": 1.2}, {"late": -0.1}, {"calls_per_hour": 0}, {"talk_median_s": -1}, {"people": 0}]
)
def test_impossible_habits_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(Habits(), **wrong)  # type: ignore[arg-type]


def test_a_plan_without_zones_or_with_less_than_a_header_is_refused() -> None:
    plan = CallPlan(rid=1, started_at=START, ended_at=START, visible_at=START)

    with pytest.raises(ValueError, match="zone"):
        replace(plan, visible_at=START.replace(tzinfo=None))
    with pytest.raises(ValueError, match="zone"):
        replace(plan, changes=(Change(START.replace(tzinfo=None), {}),))
    with pytest.raises(ValueError, match="recording_bytes"):
        replace(plan, recording_bytes=10)


def test_a_start_with_another_zone_and_a_fraction_still_gives_whole_utc_seconds() -> None:
    start = datetime(2025, 7, 1, 8, 0, 0, 900_000, tzinfo=ZoneInfo("America/New_York"))

    first = next(calls(start, seed=1))

    assert first.started_at.tzinfo is UTC
    assert first.started_at.microsecond == 0
    assert first.started_at >= start
