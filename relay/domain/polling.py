"""What polling remembers of a source from one poll to the next."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

_ENOUGH_CALLS = 20
_STEP_S = 900
_LEAST_OFF_S = 1800


@dataclass(frozen=True, slots=True)
class PollState:
    """How far polling has come: aware UTC, None before it happened. `reached` is each tier's last success, by its depth
    in seconds. A cursor without any success was read from a marker: the store was lost.
    """

    started_at: datetime | None = None
    cursor: datetime | None = None
    reached: Mapping[int, datetime] | None = None
    heavy: bool = False


@dataclass(frozen=True, slots=True)
class Delays:
    """How long after their start calls were first seen: the number of calls, and the shortest delay.

    An unanswered call is listed within a minute or two of its start, so the shortest of many delays is near zero. Where
    it is near some hours instead, the rows are read in the wrong time zone.
    """

    calls: int = 0
    least_s: float = math.inf

    def plus(self, delays_s: Iterable[float]) -> "Delays":
        more = list(delays_s)
        return Delays(self.calls + len(more), min([self.least_s, *more]))

    def off_s(self) -> int | None:
        """Seconds that the rows look too old by (negative: too young), in steps of 15 min; None before enough calls."""
        if self.calls < _ENOUGH_CALLS:
            return None
        off_s = math.floor(self.least_s / _STEP_S + 0.5) * _STEP_S
        return off_s if abs(off_s) >= _LEAST_OFF_S else 0
