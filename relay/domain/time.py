"""Times as people write and read them: pure. `2h` and `2026-11-20T10:00Z` go in, `3 minutes` comes out."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from relay.errors import SettingsError

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(s|m|h|d|w)", re.ASCII)
_LONGEST_S: Final = 3_650 * 86_400


def duration_s(text: str, *, name: str) -> float:
    """Read `20s`, `90m`, `1h30m`, `3d` or plain seconds; a SettingsError names the option."""
    wanted = f"{name}: {text[:40]!r} is no duration; write 20s, 90m, 1h30m, 3d or 2w"
    lowered = text.strip().lower()
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", lowered, re.ASCII):
        seconds = float(lowered)
    elif lowered and not _PART.sub("", lowered):
        seconds = sum(float(number) * _UNITS_S[unit] for number, unit in _PART.findall(lowered))
    else:
        raise SettingsError(wanted)
    if not 0 < seconds <= _LONGEST_S:
        raise SettingsError(f"{name}: {text[:40]!r} must be more than nothing and at most ten years")
    return seconds


def instant(text: str, *, name: str, now: datetime) -> datetime:
    """Read an instant: ISO 8601 (UTC where it names no zone), or a duration, which is that long before `now`."""
    given = text.strip()
    if re.match(r"\d{4}-", given, re.ASCII):
        try:
            moment = datetime.fromisoformat(given.replace("Z", "+00:00").replace("z", "+00:00"))
            return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).astimezone(UTC)
        except (ValueError, OverflowError):
            raise SettingsError(f"{name}: {text[:40]!r} is no time; write 2h, 3d or 2026-11-20T10:00:00Z") from None
    try:
        return now - timedelta(seconds=duration_s(given, name=name))
    except SettingsError:
        raise SettingsError(f"{name}: {text[:40]!r} is no time; write 2h, 3d or 2026-11-20T10:00:00Z") from None


def iso(instant: datetime | None) -> str | None:
    """Write an instant as the payload has it: `2025-07-01T20:54:53Z`, milliseconds only where there are any."""
    if instant is None:
        return None
    utc = instant.astimezone(UTC)
    text = utc.isoformat(timespec="milliseconds" if utc.microsecond else "seconds")
    return text.replace("+00:00", "Z")


def from_ms(ms: float) -> datetime:
    """Read an instant as the store has it: ms since 1970."""
    return datetime.fromtimestamp(ms / 1000, UTC)


def from_iso(text: str) -> datetime:
    """Read what `iso` wrote."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def in_words(seconds: float) -> str:
    """Say a length in its largest unit: `3 minutes`, `1 day`, `5 hours 30 minutes`."""
    whole = round(abs(seconds))
    for size, smaller, unit, part in ((86_400, 3600, "day", "hour"), (3600, 60, "hour", "minute")):
        if whole >= size:
            count, rest = divmod(whole, size)
            rest = rest // smaller if count < 10 else 0
            return _counted(count, unit) + (f" {_counted(rest, part)}" if rest else "")
    return _counted(whole // 60, "minute") if whole >= 60 else _counted(whole, "second")


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
