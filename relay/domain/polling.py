"""What polling remembers of a source from one poll to the next."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from relay.domain.time import iso

# Among so many calls some were unanswered, and so listed at once.
_ENOUGH_CALLS = 20
# Zones differ by multiples of 15 minutes; a shift below half an hour is a slow list rather than a zone.
_STEP_S = 900
_LEAST_OFF_S = 1800


@dataclass(frozen=True, slots=True)
class TierFailure:
    """What a tier owes: calls between `since` and `until` could not be read, for the reason `error`.

    The next attempts look only `depth_s` back, half as far after each failure, and twice as far after each success.
    """

    since: datetime
    until: datetime
    error: str
    failing_since: datetime
    failures: int
    depth_s: int
    next_attempt: datetime

    @property
    def text(self) -> str:
        return f"calls between {iso(self.since)} and {iso(self.until)} could not be read: {self.error}"


@dataclass(frozen=True, slots=True)
class PollState:
    """How far polling has come: aware UTC, None before it happened.

    `reached` is each tier's last complete reading, by its depth in seconds, and `failing` the tiers that owe one.
    `known_since` is how far back the calls of before the relay are recorded: what starts before it and is unknown was
    there before the relay. A cursor without any reading comes from a marker: the store was lost.
    """

    started_at: datetime | None = None
    cursor: datetime | None = None
    known_since: datetime | None = None
    reached: Mapping[int, datetime] = field(default_factory=dict)
    failing: Mapping[int, TierFailure] = field(default_factory=dict)
    heavy: bool = False

    @property
    def gaps(self) -> list[TierFailure]:
        """What could not be read so far, deepest first."""
        failures = sorted(self.failing.items(), reverse=True)
        return [failure for _, failure in failures if failure.error]

    @property
    def polled(self) -> bool:
        """Whether a poll has succeeded, so that known calls can be told from new ones."""
        return self.known_since is not None


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
