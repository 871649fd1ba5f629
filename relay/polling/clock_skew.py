"""Estimates a provider's clock skew and time zone: pure, and only reported, never acted upon."""

from datetime import datetime, timedelta

# A provider's clock that is wrong by more than this is worth a warning.
NOTABLE_SKEW_S = 60


def apparent_zone(configured: timedelta, off_s: int) -> str:
    """Name the offset that rows seem to be written in, such as `UTC-05:00`."""
    minutes = round((configured.total_seconds() - off_s) / 60)
    return f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"


def ahead_s(server_time: datetime, *, asked_at: datetime, answered_at: datetime) -> float:
    """Seconds that a provider's clock is ahead of ours: a correct one lies between request and response."""
    if server_time < asked_at - timedelta(seconds=1):  # `Date` has whole seconds
        return (server_time - asked_at).total_seconds()
    return max((server_time - answered_at).total_seconds(), 0.0)
