"""When to try again, as a pure function.

The waits after the first attempt are `SCHEDULE`, each lengthened by up to a fifth so that a crowd spreads out. An
event is retried until 100 hours after it was created, plus the time that its subscription's circuit was open (at most
5 days). An event that was held up behind its call's earlier events still gets one attempt after that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ClassVar, Final, Literal, Protocol, assert_never

from relay.delivery.outcomes import (
    AddressRefused,
    AttemptOutcome,
    Delivered,
    Gone,
    Interrupted,
    NotRendered,
    Postponed,
    Rejected,
    Throttled,
    TimedOut,
    Unreachable,
)
from relay.domain.time import iso

_HOUR_S: Final = 3600.0
# Seconds to wait after the 1st, 2nd, … failed attempt; after the last of them there is one attempt more.
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

# Events that failed together must not come back together.
JITTER: Final = 0.2
# A subscriber may postpone an event, but not for so long that it is never retried.
MAX_RETRY_AFTER_S: Final = 12 * _HOUR_S
# A little more than the schedule with its jitter takes: the schedule ends first, unless waits were added to it.
LIFETIME_S: Final = 100 * _HOUR_S
MAX_CIRCUIT_OPEN_S: Final = 120 * _HOUR_S


class Rng(Protocol):
    """A source of random numbers from 0 up to, not including, 1."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Complete:
    message: ClassVar[str] = "delivered"


@dataclass(frozen=True, slots=True)
class RetryAt:
    at: datetime

    @property
    def message(self) -> str:
        return f"retry at {iso(self.at)}"


@dataclass(frozen=True, slots=True)
class Fail:
    """Make no further attempt. `unknown`: an at-most-once delivery may already have been received."""

    reason: Literal["exhausted", "unknown"]
    message: ClassVar[str] = "failed"


@dataclass(frozen=True, slots=True)
class Disable:
    """Disable the subscription: the subscriber answered 410."""

    message: ClassVar[str] = "subscription disabled"


Decision = Complete | RetryAt | Fail | Disable


def decide(
    outcome: AttemptOutcome,
    *,
    attempt: int,
    event_created_at: datetime,
    now: datetime,
    rng: Rng,
    circuit_open_s: float = 0.0,
    at_most_once: bool = False,
    schedule: Sequence[float] = SCHEDULE,
) -> Decision:
    """Decide what follows an attempt; `attempt` counts from 1 and is the one that `outcome` came of."""
    match outcome:
        case Delivered():
            return Complete()
        case Gone():
            return Disable()
        case Throttled(retry_after_s=retry_after_s):
            at_least_s = _bounded(retry_after_s)
        case Interrupted() | TimedOut() if at_most_once:
            return Fail("unknown")
        case Rejected() | Interrupted() | TimedOut() | Unreachable() | AddressRefused() | NotRendered() | Postponed():
            at_least_s = 0.0
        case _:
            assert_never(outcome)
    if not 1 <= attempt <= len(schedule):
        return Fail("exhausted")
    left_s = (ends_at(event_created_at, circuit_open_s=circuit_open_s) - now).total_seconds()
    if left_s <= 0 or at_least_s > left_s:
        return Fail("exhausted")
    wait_s = max(schedule[attempt - 1], at_least_s) * (1 + JITTER * rng.random())
    # The last step is cut short so that one attempt is made at the very end.
    return RetryAt(now + timedelta(seconds=min(wait_s, left_s)))


def ends_at(event_created_at: datetime, *, circuit_open_s: float = 0.0) -> datetime:
    """Return when an event's schedule ends; its last attempt is made then at the latest."""
    paused_s = min(max(circuit_open_s, 0.0), MAX_CIRCUIT_OPEN_S)
    return event_created_at + timedelta(seconds=LIFETIME_S + paused_s)


def _bounded(retry_after_s: float | None) -> float:
    if retry_after_s is None or math.isnan(retry_after_s):
        return 0.0
    return min(max(retry_after_s, 0.0), MAX_RETRY_AFTER_S)
