"""A claim: one item that is this process's for the length of a lease."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Claim:
    """One item under lease. `payload` is what the lane's hooks loaded with it; `until` is the end of the lease on our
    monotonic clock, counted from before the claim was requested, so never too late."""

    partition: str
    item: str
    token: bytes
    expiries: int
    until: float
    payload: Sequence[Any] = ()

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()
