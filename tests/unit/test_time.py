"""Durations and instants, parsed and formatted."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from relay.domain.time import format_duration, parse_duration_s, parse_instant
from relay.errors import SettingsError

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20s", 20), ("90m", 5400), ("1h30m", 5400), ("3d", 259_200), ("2w", 1_209_600), (" 1.5H ", 5400)],
)
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert parse_duration_s(text, name="--for") == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "0s", "-5m", "5 minutes", "1y", "20s!", "s", "99999d", "１０s", "1e3", "nan"]
)
def test_an_invalid_duration_is_rejected_with_the_name_of_its_option(text: str) -> None:
    with pytest.raises(SettingsError, match="--for"):
        parse_duration_s(text, name="--for")


def test_a_number_without_a_unit_is_rejected_with_units_to_choose_from() -> None:
    with pytest.raises(SettingsError, match="'2' is not a valid duration; use 2s, 2h or 2d"):
        parse_duration_s("2", name="--for")
    with pytest.raises(SettingsError, match="'2' is not a valid duration; use 2s, 2h or 2d"):
        parse_instant("2", name="--since", now=NOW)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2h", NOW - timedelta(hours=2)),
        ("3d", NOW - timedelta(days=3)),
        ("2026-11-20T10:00:00Z", NOW - timedelta(hours=2)),
        ("2026-11-20T11:00:00+01:00", NOW - timedelta(hours=2)),
        ("2026-11-20T10:00", NOW - timedelta(hours=2)),
        ("2026-11-20", NOW - timedelta(hours=12)),
    ],
)
def test_an_instant_is_absolute_or_relative_to_now(text: str, expected: datetime) -> None:
    assert parse_instant(text, name="--since", now=NOW) == expected


def test_a_time_without_a_zone_is_utc_wherever_the_relay_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own zone decides nothing."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        instant = parse_instant("2026-11-20T10:00", name="--since", now=NOW)
    finally:
        monkeypatch.undo()
        time.tzset()

    assert instant == NOW - timedelta(hours=2)


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-11-20T25:00", "0001-01-01T00:00+14:00", ""])
def test_an_invalid_time_is_rejected_with_examples(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--since: .* is not a valid time; use 2h, 3d or 2026-11-20T10:00:00Z"):
        parse_instant(text, name="--since", now=NOW)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "1 minute"),
        (-180, "3 minutes"),
        (3600, "1 hour"),
        (19_800, "5 hours 30 minutes"),
        (86_400, "1 day"),
        (280_800, "3 days 6 hours"),
        (30 * 86_400 + 3600, "30 days"),
    ],
)
def test_durations_are_formatted_in_their_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
