"""A claim: one item that is this process's for as long as it lives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Claim:
    """One item under lease. `deaths` is how many processes in a row died with it, `proven` and `owner` are those of its
    partition, `payload` is what the lane's hooks loaded with it."""

    partition: str
    item: str
    token: bytes
    deaths: int = 0
    proven: bool = True
    owner: str = ""
    payload: Sequence[Any] = ()
