"""Times as people write and read them."""

from datetime import UTC, datetime, timedelta

import pytest

from relay.domain.time import duration_s, in_words, instant
from relay.errors import SettingsError

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20s", 20), ("90m", 5400), ("1h30m", 5400), ("3d", 259_200), ("2w", 1_209_600), ("45", 45), (" 1.5H ", 5400)],
)
def test_durations_are_understood(text: str, seconds: float) -> None:
    assert duration_s(text, name="--for") == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "0s", "-5m", "5 minutes", "1y", "20s!", "s", "99999d", "１０s", "1e3", "nan"]
)
def test_what_is_no_duration_is_refused_by_the_name_of_its_option(text: str) -> None:
    with pytest.raises(SettingsError, match="--for"):
        duration_s(text, name="--for")


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
def test_an_instant_is_a_time_or_so_long_ago(text: str, expected: datetime) -> None:
    assert instant(text, name="--since", now=NOW) == expected


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-11-20T25:00", "0001-01-01T00:00+14:00", ""])
def test_what_is_no_time_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--since: .* is no time; write 2h, 3d or 2026-11-20T10:00:00Z"):
        instant(text, name="--since", now=NOW)


@pytest.mark.parametrize(
    ("seconds", "words"),
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
def test_lengths_are_said_in_their_largest_unit(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
