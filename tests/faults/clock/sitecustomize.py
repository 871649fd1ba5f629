"""A wall clock that is wrong: Python reads this at its start when the folder is on PYTHONPATH.

The file that FAULT_CLOCK names holds the offset in seconds as a double, and may change at any time. Only the wall
clock is off; `time.monotonic` is what it was.
"""

import datetime
import mmap
import os
import struct
import time
from typing import Any


def _install(path: str) -> None:
    with open(path, "rb") as source:
        offset = mmap.mmap(source.fileno(), 8, access=mmap.ACCESS_READ)
    right_time, right_time_ns, right = time.time, time.time_ns, datetime.datetime

    def offset_s() -> float:
        return float(struct.unpack("d", offset[:8])[0])

    def wrong_time() -> float:
        return right_time() + offset_s()

    def wrong_time_ns() -> int:
        return right_time_ns() + int(offset_s() * 1e9)

    class _Looks(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, right)

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, right)

        def __getattr__(cls, name: str) -> Any:
            return getattr(right, name)

    class WrongDatetime(metaclass=_Looks):
        """`datetime.datetime`, but for what it says of now."""

        def __new__(cls, *args: Any, **fields: Any) -> Any:
            return right(*args, **fields)

        @staticmethod
        def now(tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return right.now(tz) + datetime.timedelta(seconds=offset_s())

        @staticmethod
        def utcnow() -> datetime.datetime:
            return right.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(seconds=offset_s())

    WrongDatetime.__name__ = WrongDatetime.__qualname__ = "datetime"
    time.time, time.time_ns = wrong_time, wrong_time_ns
    datetime.datetime = WrongDatetime  # type: ignore[misc]  # the point of it


if "FAULT_CLOCK" in os.environ:
    _install(os.environ["FAULT_CLOCK"])
