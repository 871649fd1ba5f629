"""The state of one delivery as the store has it: short while all goes well, with its attempts when it does not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import orjson

from relay.domain.json import Json

Status = Literal["waiting", "intent", "delivered", "exhausted", "unknown", "expired", "missing", "poison", "dropped"]

_KEPT_ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class DeliveryState:
    """One event on its way to one subscription. `at_ms` is the last attempt's time, `next_ms` the next one's;
    `restarted_ms` is when a person asked for it again, from where its schedule then counts."""

    status: Status = "waiting"
    attempts: int = 0
    at_ms: int = 0
    next_ms: int = 0
    restarted_ms: int = 0
    log: Sequence[Json] = ()

    @classmethod
    def read(cls, stored: bytes) -> "DeliveryState":
        """Read what `write` wrote; nothing stored is a delivery that waits for its first attempt."""
        if not stored:
            return cls()
        if stored.isdigit():
            return cls("delivered", 1, int(stored))
        fields = orjson.loads(stored)
        return cls(
            fields["s"],
            fields.get("n", 0),
            fields.get("t", 0),
            fields.get("next", 0),
            fields.get("r", 0),
            tuple(fields.get("a", ())),
        )

    def write(self) -> bytes:
        """Write it, leaving out what is empty; heard at the first attempt, as nearly all are, is just its time."""
        if self == DeliveryState("delivered", 1, self.at_ms) and self.at_ms > 0:
            return b"%d" % self.at_ms
        fields: Json = {"s": self.status}
        if self.attempts:
            fields["n"] = self.attempts
        if self.at_ms:
            fields["t"] = self.at_ms
        if self.next_ms:
            fields["next"] = self.next_ms
        if self.restarted_ms:
            fields["r"] = self.restarted_ms
        if self.log:
            fields["a"] = self.log
        return orjson.dumps(fields)

    def attempted(self, status: Status, attempt: Json | None, *, at_ms: int, next_ms: int = 0) -> "DeliveryState":
        """Add an attempt. One that went well leaves a line only where others went wrong before."""
        log = tuple(self.log)
        if attempt is not None and (status != "delivered" or log):
            log = (*log, {"at": at_ms, **attempt})[-_KEPT_ATTEMPTS:]
        return replace(self, status=status, attempts=self.attempts + 1, at_ms=at_ms, next_ms=next_ms, log=log)
