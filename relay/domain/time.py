"""Parse and format durations and instants: `2h` and `2026-11-20T10:00Z` in, `3 minutes` out."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from relay.errors import SettingsError

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(s|m|h|d|w)", re.ASCII)
_MAX_DURATION_S: Final = 3_650 * 86_400


def parse_duration_s(text: str, *, name: str) -> float:
    """Parse `20s`, `90m`, `1h30m` or `3d`. `name` is the option that a SettingsError names."""
    lowered = text.strip().lower()
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", lowered, re.ASCII):
        units = f"{lowered}s, {lowered}h or {lowered}d"
        raise SettingsError(f"{name}: {text[:40]!r} is not a valid duration; use {units}")
    if not lowered or _PART.sub("", lowered):
        raise SettingsError(f"{name}: {text[:40]!r} is not a valid duration; use 30s, 2h or 3d")
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in _PART.findall(lowered))
    if not 0 < seconds <= _MAX_DURATION_S:
        raise SettingsError(f"{name}: {text[:40]!r} is not a valid duration; use more than 0 and at most ten years")
    return seconds


def parse_instant(text: str, *, name: str, now: datetime) -> datetime:
    """Parse an ISO 8601 instant (UTC unless it has a zone), or a duration, which means that long before `now`."""
    stripped = text.strip()
    if re.match(r"\d{4}-", stripped, re.ASCII):
        try:
            instant = datetime.fromisoformat(stripped.replace("Z", "+00:00").replace("z", "+00:00"))
            return (instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant).astimezone(UTC)
        except (ValueError, OverflowError):
            raise SettingsError(
                f"{name}: {text[:40]!r} is not a valid time; use 2h, 3d or 2026-11-20T10:00:00Z"
            ) from None
    if not stripped[:1].isdigit():
        raise SettingsError(f"{name}: {text[:40]!r} is not a valid time; use 2h, 3d or 2026-11-20T10:00:00Z")
    return now - timedelta(seconds=parse_duration_s(stripped, name=name))


def iso(instant: datetime | None) -> str | None:
    """Format an instant as in the payload: `2025-07-01T20:54:53Z`, with milliseconds unless they are zero."""
    if instant is None:
        return None
    utc = instant.astimezone(UTC)
    text = utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds")
    return text.replace("+00:00", "Z")


def from_ms(ms: float) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def from_iso(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def format_duration(seconds: float) -> str:
    """Format a duration in its largest units: `3 minutes`, `1 day`, `5 hours 30 minutes`."""
    whole = round(abs(seconds))
    for size, smaller_size, unit, smaller_unit in ((86_400, 3600, "day", "hour"), (3600, 60, "hour", "minute")):
        if whole >= size:
            count, rest = divmod(whole, size)
            rest = rest // smaller_size if count < 10 else 0
            return _counted(count, unit) + (f" {_counted(rest, smaller_unit)}" if rest else "")
    return _counted(whole // 60, "minute") if whole >= 60 else _counted(whole, "second")


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
