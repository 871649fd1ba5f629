"""Detects a source that is too quiet: its polls succeed, but an account that always has calls now has none.

A number was ported away, a key belongs to another account, a trunk is down: no request fails, so only the silence shows
it. A source is too quiet when the same stretch of each of the last weeks, by local time, had more than three calls:
three of its usual gaps have passed, at a busy time. Nights, weekends and rarely used accounts never count. Pure.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo

# How many weeks are compared; calls are stored for about as long.
WEEKS = 4
FEWEST_WEEKS = 2
GAPS = 3

Stretch = tuple[datetime, datetime]


def same_stretches(newest: datetime, now: datetime, *, zone: tzinfo, known_since: datetime) -> list[Stretch]:
    """Return the stretch since the newest call, shifted back by one to four weeks, where calls are known; aware UTC."""
    stretches: list[Stretch] = []
    for weeks in range(1, WEEKS + 1):
        begin, end = ((moment.astimezone(zone) - timedelta(weeks=weeks)).astimezone(UTC) for moment in (newest, now))
        if begin >= known_since:
            stretches.append((begin, end))
    return stretches


def too_quiet(calls: Sequence[int]) -> bool:
    """Judge by the number of calls in each of the same stretches."""
    return len(calls) >= FEWEST_WEEKS and min(calls) > GAPS
