"""The judgement of a source's time zone and clock: a hint after enough calls, none where all is right."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.domain.polling import Delays
from relay.polling.clock_skew import ahead_s, apparent_zone

ASKED = datetime(2025, 7, 1, 12, tzinfo=UTC)
ANSWERED = ASKED + timedelta(seconds=40)


def test_the_zone_is_not_judged_before_twenty_calls() -> None:
    """One late call does not mean a wrong time zone."""
    few = Delays().plus([18_000.0] * 19)

    assert few.off_s() is None
    assert few.plus([18_000.0]).off_s() == 18_000


OFF = {
    "right": ([40.0, 9000.0], 0),
    "five hours west": ([18_020.0, 30_000.0], 18_000),
    "ten hours east": ([-35_900.0, -30_000.0], -36_000),
    "three quarters of an hour": ([2_760.0], 2_700),
    "calls that are all a quarter of an hour long": ([1_000.0], 0),
}


@pytest.mark.parametrize(("delays_s", "off_s"), OFF.values(), ids=OFF)
def test_the_zone_is_judged_by_the_quickest_of_many_calls(delays_s: list[float], off_s: int) -> None:
    """Long calls come late in any zone; unanswered ones come at once."""
    assert Delays().plus(delays_s * 20).off_s() == off_s


@given(off_h=st.integers(-14 * 4, 14 * 4).filter(lambda quarters: abs(quarters) >= 2), quick_s=st.floats(0, 400))
def test_any_real_zone_is_named(off_h: int, quick_s: float) -> None:
    """Zones lie in steps of a quarter of an hour."""
    assert Delays().plus([off_h * 900 + quick_s] * 20).off_s() == off_h * 900


def test_the_apparent_zone_is_named() -> None:
    """Rows of New York that are read as UTC look five hours too old."""
    assert apparent_zone(timedelta(0), 18_000) == "UTC-05:00"
    assert apparent_zone(timedelta(hours=-5), -37_800) == "UTC+05:30"


AHEAD = {
    "between question and answer": (20, 0),
    "whole seconds, cut off": (-0.9, 0),
    "behind": (-90, -90),
    "ahead of the answer": (100, 60),
}


@pytest.mark.parametrize(("said_s", "ahead"), AHEAD.values(), ids=AHEAD)
def test_a_slow_response_is_not_clock_skew(said_s: float, ahead: float) -> None:
    """The provider's time lies somewhere between the request and the end of the response."""
    assert ahead_s(ASKED + timedelta(seconds=said_s), asked_at=ASKED, answered_at=ANSWERED) == ahead
