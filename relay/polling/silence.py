"""Whether a source is quieter than it should be: polls go well, and yet an account that always has calls now has none.

A number was ported away, a key sees another account, a trunk is down: no request fails, so only the silence tells. A
source is too quiet when more than three calls came in the same stretch of each of the last weeks, by the clock on the
wall: three of its usual gaps have gone by, at a time when it is busy. Nights, weekends and seldom used accounts stay
silent. Pure, and only ever a hint. (Polling facts: silent emptiness.)
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo

WEEKS = 4
"""How far back is looked; as far as calls are kept."""
FEWEST_WEEKS = 2
GAPS = 3

Stretch = tuple[datetime, datetime]


def same_stretches(newest: datetime, now: datetime, *, zone: tzinfo, known_since: datetime) -> list[Stretch]:
    """The time since the newest call, one to four weeks ago, as far as calls of then are known; aware UTC."""
    stretches: list[Stretch] = []
    for weeks in range(1, WEEKS + 1):
        begin, end = ((moment.astimezone(zone) - timedelta(weeks=weeks)).astimezone(UTC) for moment in (newest, now))
        if begin >= known_since:
            stretches.append((begin, end))
    return stretches


def too_quiet(calls: Sequence[int]) -> bool:
    """Judge by how many calls each of the same stretches had."""
    return len(calls) >= FEWEST_WEEKS and min(calls) > GAPS
