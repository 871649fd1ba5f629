"""A source that falls silent is noticed in its busy hours, and left alone at night, at weekends and when it is new."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from relay.polling.silence import same_stretches, too_quiet

BERLIN = ZoneInfo("Europe/Berlin")
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
MONDAY = datetime(2026, 11, 16, 9, tzinfo=BERLIN)


def office_calls(until: datetime, *, every_s: int = 600) -> list[datetime]:
    """Seven weeks of an office: a call every ten minutes from 8 to 17 o'clock, Monday to Friday, up to a moment."""
    calls = []
    for day in range(49, -1, -1):
        morning = (until - timedelta(days=day)).replace(hour=8, minute=0, second=0)
        if morning.weekday() < 5:
            calls += [
                at for n in range(9 * 3600 // every_s) if (at := morning + timedelta(seconds=n * every_s)) <= until
            ]
    return calls


def is_quiet(calls: Sequence[datetime], now: datetime, *, known_since: datetime = LONG_AGO) -> bool:
    stretches = same_stretches(calls[-1], now, zone=BERLIN, known_since=known_since)
    return too_quiet([bisect_right(calls, end) - bisect_left(calls, begin) for begin, end in stretches])


def test_a_stretch_is_the_same_hours_of_the_weeks_before() -> None:
    stretches = same_stretches(MONDAY, MONDAY + timedelta(minutes=40), zone=BERLIN, known_since=LONG_AGO)

    assert [begin.astimezone(BERLIN).strftime("%a %d %H:%M") for begin, _ in stretches] == [
        "Mon 09 09:00",
        "Mon 02 09:00",
        "Mon 26 09:00",
        "Mon 19 09:00",
    ]
    assert {end - begin for begin, end in stretches} == {timedelta(minutes=40)}


def test_local_time_counts_through_a_clock_change() -> None:
    """9 o'clock is when the office opens, in summer and in winter."""
    stretches = same_stretches(MONDAY, MONDAY + timedelta(hours=1), zone=BERLIN, known_since=LONG_AGO)

    assert [begin.hour for begin, _ in stretches] == [8, 8, 8, 7]


def test_only_recorded_weeks_are_compared() -> None:
    """A source that is new, or whose calls are kept for a week only, is not judged."""
    since = MONDAY - timedelta(days=15)

    assert len(same_stretches(MONDAY, MONDAY, zone=BERLIN, known_since=since)) == 2
    assert same_stretches(MONDAY, MONDAY, zone=BERLIN, known_since=MONDAY - timedelta(days=6)) == []


@pytest.mark.parametrize(
    ("calls", "quiet"),
    [([], False), ([9], False), ([4, 4], True), ([3, 9, 9, 9], False), ([0, 9], False), ([4, 5, 6, 7], True)],
)
def test_three_usual_gaps_in_every_week_are_too_quiet(calls: list[int], quiet: bool) -> None:
    assert too_quiet(calls) is quiet


@pytest.mark.parametrize(
    ("silent_from", "now", "quiet"),
    [
        ("2026-11-18 10:00", "2026-11-18 10:20", False),  # two gaps
        ("2026-11-18 10:00", "2026-11-18 10:30", True),  # the fourth call is missing
        ("2026-11-18 10:00", "2026-11-18 23:00", True),
        ("2026-11-18 17:00", "2026-11-19 08:10", False),  # the night
        ("2026-11-13 17:00", "2026-11-16 08:10", False),  # the weekend
        ("2026-11-13 17:00", "2026-11-16 08:30", True),  # no call on Monday either
        ("2026-11-02 10:00", "2026-11-18 12:00", True),  # for two weeks
    ],
)
def test_a_source_that_falls_silent_is_detected_when_it_should_be_busy(silent_from: str, now: str, quiet: bool) -> None:
    calls = office_calls(datetime.fromisoformat(silent_from).replace(tzinfo=BERLIN))

    assert is_quiet(calls, datetime.fromisoformat(now).replace(tzinfo=BERLIN)) is quiet


def test_a_source_with_its_usual_calls_is_never_quiet() -> None:
    """Looked at every five minutes for a week, with the clocks having changed in between."""
    end = datetime(2026, 11, 20, 20, tzinfo=BERLIN)
    calls = office_calls(end)
    for minutes in range(0, 7 * 24 * 60, 5):
        now = end - timedelta(minutes=minutes)

        assert not is_quiet(calls[: bisect_right(calls, now)], now), now
