"""What a source's rows and answers say of its zone and its clock: pure, and only ever a hint, nothing is switched."""

from datetime import datetime, timedelta

NOTED_S = 60
"""A provider's clock that is further off than this is worth a warning."""


def rows_look_like(configured: timedelta, off_s: int) -> str:
    """Name the zone that the rows seem to be written in: `UTC-05:00`."""
    minutes = round((configured.total_seconds() - off_s) / 60)
    return f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"


def ahead_s(said: datetime, *, asked: datetime, answered: datetime) -> float:
    """Seconds that a provider's clock is ahead of ours: what it says the time is lies between question and answer."""
    if said < asked - timedelta(seconds=1):  # `Date` has whole seconds
        return (said - asked).total_seconds()
    return max((said - answered).total_seconds(), 0.0)
