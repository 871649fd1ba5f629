"""Changes to a lane outside of claims, and what change.lua reads of them: the one place that maps the two."""

from dataclasses import dataclass
from typing import Literal, assert_never


@dataclass(frozen=True, slots=True)
class Put:
    """Make an item due in `after_ms`, unless it is due earlier; with `keep_due` only if the lane does not have it."""

    partition: str
    item: str
    after_ms: int = 0
    keep_due: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove an item, leased or not: a settle of its holder will be refused."""

    partition: str
    item: str


@dataclass(frozen=True, slots=True)
class Own:
    """Count a partition against the share of its owner, a tenant; None: the operator, who has no limit."""

    partition: str
    owner: str | None


@dataclass(frozen=True, slots=True)
class LimitInFlight:
    """Lease at most so many items of a partition at once, over all processes."""

    partition: str
    most: int


@dataclass(frozen=True, slots=True)
class LimitRate:
    """Claim from a partition every `interval_ms` at most (None: unlimited), up to `slack_ms` ahead of that."""

    partition: str
    interval_ms: float | None
    slack_ms: float = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Claim nothing from a partition before a moment; None lifts a pause."""

    partition: str
    until_ms: int | Literal["inf"] | None


@dataclass(frozen=True, slots=True)
class DisablePartition:
    """Claim nothing from a partition until it is enabled."""

    partition: str
    reason: str


@dataclass(frozen=True, slots=True)
class EnablePartition:
    """Claim from a partition again, with a clean record of health."""

    partition: str


Change = Put | Drop | Own | LimitInFlight | LimitRate | Pause | DisablePartition | EnablePartition


def encode(change: Change) -> tuple[str, str, str | float, float]:
    """Write a change as the verb, partition, value and milliseconds that change.lua lists."""
    match change:
        case Put(partition, item, after_ms, keep_due):
            return "put_new" if keep_due else "put", partition, item, after_ms
        case Drop(partition, item):
            return "drop", partition, item, 0
        case Own(partition, owner):
            return "own", partition, owner or "", 0
        case LimitInFlight(partition, most):
            return "limit_in_flight", partition, most, 0
        case LimitRate(partition, interval_ms, slack_ms):
            return "limit_rate", partition, "" if interval_ms is None else interval_ms, slack_ms
        case Pause(partition, until_ms):
            return "pause", partition, "" if until_ms is None else until_ms, 0
        case DisablePartition(partition, reason):
            return "disable", partition, reason, 0
        case EnablePartition(partition):
            return "enable", partition, "", 0
        case _:
            assert_never(change)
