"""What a source's rows and answers say of its zone and its clock: pure, and only ever a hint, nothing is switched."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

NOTED_S = 60
"""A provider's clock that is further off than this is worth a warning."""
_ENOUGH_CALLS = 20
_STEP_S = 900
_LEAST_OFF_S = 1800


@dataclass(frozen=True, slots=True)
class Delays:
    """How long after their start calls were first seen: of so many, the shortest.

    An unanswered call is listed within a minute or two of its start, so the shortest of many delays is near zero. Where
    it is near some hours instead, the rows are read in the wrong zone.
    """

    calls: int = 0
    least_s: float = math.inf

    def and_(self, delays_s: Iterable[float]) -> "Delays":
        """Take more calls in."""
        more = list(delays_s)
        return Delays(self.calls + len(more), min([self.least_s, *more]))

    def off_s(self) -> int | None:
        """Seconds that the rows look too old by (negative: too young), in steps of 15 min; None before enough calls."""
        if self.calls < _ENOUGH_CALLS:
            return None
        off_s = math.floor(self.least_s / _STEP_S + 0.5) * _STEP_S
        return off_s if abs(off_s) >= _LEAST_OFF_S else 0


def rows_look_like(configured: timedelta, off_s: int) -> str:
    """Name the zone that the rows seem to be written in: `UTC-05:00`."""
    minutes = round((configured.total_seconds() - off_s) / 60)
    return f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"


def ahead_s(said: datetime, *, asked: datetime, answered: datetime) -> float:
    """Seconds that a provider's clock is ahead of ours: what it says the time is lies between question and answer."""
    if said < asked - timedelta(seconds=1):  # `Date` has whole seconds
        return (said - asked).total_seconds()
    return max((said - answered).total_seconds(), 0.0)
