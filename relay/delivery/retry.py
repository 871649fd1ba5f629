"""When to try again: pure, so every schedule question is a table in a test.

The waits after the first attempt are `SCHEDULE`, each lengthened by up to a fifth so that a crowd spreads out. An
event is tried until 100 hours after it was made, plus the time that its subscription's breaker was open (at most 5
days). What was held up behind its call's earlier events has at least the one attempt that this decision follows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ClassVar, Final, Literal, Protocol, assert_never

from relay.delivery.outcomes import (
    Delivered,
    Gone,
    Interrupted,
    Outcome,
    Refused,
    Rejected,
    Throttled,
    TimedOut,
    Unreachable,
)
from relay.domain.time import iso

_HOUR_S: Final = 3600.0
SCHEDULE: Final[tuple[float, ...]] = (
    5.0,
    300.0,
    1800.0,
    2 * _HOUR_S,
    5 * _HOUR_S,
    10 * _HOUR_S,
    14 * _HOUR_S,
    20 * _HOUR_S,
    24 * _HOUR_S,
)
"""Seconds to wait after the 1st, 2nd, … failed attempt; after the last of them there is one attempt more."""

JITTER: Final = 0.2
MAX_RETRY_AFTER_S: Final = 12 * _HOUR_S
LIFETIME_S: Final = 100 * _HOUR_S
MAX_BREAKER_OPEN_S: Final = 120 * _HOUR_S


class Chance(Protocol):
    """What is asked of an rng: a number from 0 up to, not including, 1."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Done:
    """It was heard."""

    words: ClassVar[str] = "done"


@dataclass(frozen=True, slots=True)
class RetryAt:
    """Try again then."""

    at: datetime

    @property
    def words(self) -> str:
        return f"tried again at {iso(self.at)}"


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Make no further attempt. `unknown`: it may have been heard, and this delivery may not be made twice."""

    reason: Literal["exhausted", "unknown"]
    words: ClassVar[str] = "given up"


@dataclass(frozen=True, slots=True)
class Disable:
    """The subscriber asked for no more: stop the whole subscription."""

    words: ClassVar[str] = "switched off"


Decision = Done | RetryAt | GiveUp | Disable


def decide(
    outcome: Outcome,
    *,
    attempt: int,
    event_created_at: datetime,
    now: datetime,
    rng: Chance,
    breaker_open_s: float = 0.0,
    at_most_once: bool = False,
    schedule: Sequence[float] = SCHEDULE,
) -> Decision:
    """Decide what follows an attempt. `attempt` counts from 1 and is the one that `outcome` came of."""
    match outcome:
        case Delivered():
            return Done()
        case Gone():
            return Disable()
        case Throttled(retry_after_s=hint):
            asked_s = _bounded(hint)
        case Interrupted() | TimedOut() if at_most_once:
            return GiveUp("unknown")
        case Rejected() | Interrupted() | TimedOut() | Unreachable() | Refused():
            asked_s = 0.0
        case _:
            assert_never(outcome)
    if not 1 <= attempt <= len(schedule):
        return GiveUp("exhausted")
    left_s = (ends_at(event_created_at, breaker_open_s=breaker_open_s) - now).total_seconds()
    if left_s <= 0 or asked_s > left_s:
        return GiveUp("exhausted")
    wait_s = max(schedule[attempt - 1], asked_s) * (1 + JITTER * rng.random())
    return RetryAt(now + timedelta(seconds=min(wait_s, left_s)))


def ends_at(event_created_at: datetime, *, breaker_open_s: float = 0.0) -> datetime:
    """Say when an event's schedule ends; the last attempt is made then at the latest."""
    paused_s = min(max(breaker_open_s, 0.0), MAX_BREAKER_OPEN_S)
    return event_created_at + timedelta(seconds=LIFETIME_S + paused_s)


def _bounded(hint_s: float | None) -> float:
    if hint_s is None or math.isnan(hint_s):
        return 0.0
    return min(max(hint_s, 0.0), MAX_RETRY_AFTER_S)
