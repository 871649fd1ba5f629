"""How the work on a claim ends, and what exchange.lua reads of it: the one place that maps the two."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, assert_never

from relay.queue.claim import Claim


class PartitionHealth(StrEnum):
    """What the work showed about its partition. A healthy result proves it, so that it may use its share of a lane;
    three others in a row end that. Five unhealthy ones in a row open the circuit, a healthy one closes it."""

    HEALTHY = "healthy"
    FAILING = "failing"
    UNHEALTHY = "unhealthy"


class Detail(Protocol):
    """What a lane's own hooks read of a settlement."""

    def fields(self) -> Mapping[str, str | bytes]:
        """Values by the names that the hooks use; a field that does not apply is left out."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """The work is finished; an item that was put during the lease is due again."""

    detail: Detail | None = None
    health: PartitionHealth | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The item is due again in `after_ms`, or earlier when it was put during the lease."""

    after_ms: int = 0
    detail: Detail | None = None
    health: PartitionHealth | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """The work is about to do what must not be done twice. Refused unless the lease still holds."""

    detail: Detail


Settlement = Done | Retry | Intent


def encode(claim: Claim, settlement: Settlement) -> list[str | bytes | int]:
    """Write a settlement as the arguments that exchange.lua lists."""
    match settlement:
        case Done(detail, health):
            verb, after_ms = "done", 0
        case Retry(after_ms, detail, health):
            verb = "retry"
        case Intent(detail):
            verb, after_ms, health = "intent", 0, None
        case _:
            assert_never(settlement)
    fields = detail.fields() if detail is not None else {}
    args: list[str | bytes | int] = [claim.partition, claim.item, claim.token, verb, after_ms, health or ""]
    args.append(len(fields))
    for name, value in fields.items():
        args += (name, value)
    return args
