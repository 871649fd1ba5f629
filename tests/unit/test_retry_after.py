"""One reader of Retry-After for subscribers' answers, providers' answers and the relay's own."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.domain.retry_after import parse_retry_after

NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
LONGEST_S = 43_200.0


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("120", 120.0),
        (" 120 ", 120.0),
        ("0\x1f", 0.0),
        ("1.5", 1.5),
        ("43200", LONGEST_S),
        ("86400", LONGEST_S),
        ("1" + "0" * 30, LONGEST_S),
        ("9" * 5000, None),
        ("-1", None),
        ("+5", None),
        ("1e3", None),
        ("nan", None),
        ("inf", None),
        ("١٢", None),
        ("soon", None),
        ("120, 120", None),
        ("Tue, 01 Jul 2025 12:02:00 GMT", 120.0),
        ("Tuesday, 01-Jul-25 12:02:00 GMT", 120.0),
        ("Tue, 01 Jul 2025 14:02:00 +0200", 120.0),
        ("Tue Jul  1 12:02:00 2025", 120.0),
        ("Tue, 01 Jul 2025 11:59:59 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_S),
        ("Fri, 31 Dec 9999 23:59:59 -2300", LONGEST_S),
        ("Tue, 99 Jul 2025 12:02:00 GMT", None),
        ("Tue, 01 Jul 2025 12:02:00 GMT" + " " * 200, None),
        ("2025-07-01T12:02:00Z", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_a_malformed_one_is_ignored(
    text: str | None, expected_s: float | None
) -> None:
    assert parse_retry_after(text, NOW, longest_s=LONGEST_S) == expected_s


@given(text=st.text(max_size=120))
def test_no_text_breaks_the_parser(text: str) -> None:
    wait_s = parse_retry_after(text, NOW, longest_s=LONGEST_S)

    assert wait_s is None or 0 <= wait_s <= LONGEST_S
