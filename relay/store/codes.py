"""Replies of the Lua files and marks they store, as enums. Each member's value is what the Lua writes."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class RowOutcome(StrEnum):
    """What ingest.lua did with one row."""

    NEW = "new"
    CHANGED = "changed"
    KNOWN = "known"
    # Remembered, not published.
    SEEDED = "seeded"
    # Another mapping version writes the same row differently.
    REHASHED = "rehashed"


class ReplayOutcome(StrEnum):
    """What replay.lua did for one subscription."""

    QUEUED = "queued"
    # The delivery is pending already and stays one delivery.
    WAITING = "waiting"
    # It was delivered before, and the replay was not forced.
    DELIVERED = "delivered"
    DISABLED = "disabled"
    # The event's document has expired or was erased.
    GONE = "gone"


class SeenFlag(StrEnum):
    """What `seen` says of a row: one letter, because every row of 96 h has one."""

    INGESTED = "e"
    SEEDED = "s"
    # Seeded while the call was going on: its end makes it a call.
    SEEDED_UNFINISHED = "u"
    # Ingested, and erased since: it must not come back.
    ERASED = "x"


class DeliveryFate(StrEnum):
    """What completeness.lua says of a delivery."""

    DELIVERED = "delivered"
    WAITING = "waiting"
    # Waiting, but the lane does not have it.
    LOST = "lost"
    # Not queued, because the subscription was disabled.
    MISSED = "missed"
    # The event's document was gone before it was delivered.
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SeenMark:
    """One value of `relay:seen:…`: `<mapping version><flag><content hash>`, as in ingest.lua."""

    mapping: int
    flag: SeenFlag
    hash: str

    @classmethod
    def parse(cls, value: bytes) -> "SeenMark":
        match = _MARK.fullmatch(value.decode())
        if match is None:
            raise ValueError(f"not a mark of `seen`: {value!r}")
        mapping, flag, content_hash = match.groups()
        return cls(int(mapping), SeenFlag(flag), content_hash)

    def write(self) -> bytes:
        return f"{self.mapping}{self.flag}{self.hash}".encode()


_MARK: Final = re.compile(r"(\d+)([a-z])(.*)")
