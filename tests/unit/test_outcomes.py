"""Every outcome has a message, and knows whether the subscriber can have received the request."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.outcomes import (
    EXCERPT_CHARS,
    AddressRefused,
    AttemptOutcome,
    Delivered,
    Gone,
    Interrupted,
    Rejected,
    Throttled,
    TimedOut,
    Unreachable,
    answered,
    excerpt,
)


@pytest.mark.parametrize(
    ("outcome", "kind", "message", "never_sent", "trips_circuit"),
    [
        (answered(200, duration_ms=1), "delivered", "answered 200", False, False),
        (answered(204, duration_ms=1), "delivered", "answered 204", False, False),
        (answered(299, duration_ms=1), "delivered", "answered 299", False, False),
        (
            answered(302, duration_ms=1),
            "rejected",
            "answered 302, a redirect; redirects are not followed",
            False,
            False,
        ),
        (answered(404, duration_ms=1), "rejected", "answered 404", False, False),
        (answered(408, duration_ms=1), "rejected", "answered 408", False, False),
        (answered(410, duration_ms=1), "gone", "answered 410 Gone", False, False),
        (answered(429, duration_ms=1), "throttled", "answered 429", False, False),
        (
            answered(429, duration_ms=1, retry_after_s=30.0),
            "throttled",
            "answered 429 with Retry-After: 30 s",
            False,
            False,
        ),
        (answered(500, duration_ms=1), "rejected", "answered 500", False, True),
        (answered(503, duration_ms=1), "throttled", "answered 503", False, True),
        (TimedOut(timeout_s=15.0), "timed_out", "did not answer within 15 s", False, True),
        (Interrupted(reason="reset"), "interrupted", "reset", False, True),
        (Unreachable(stage="dns", reason="no address"), "unreachable", "no address", True, True),
        (AddressRefused(reason="private"), "refused", "private", True, False),
    ],
)
def test_an_outcome_has_a_message(
    outcome: AttemptOutcome, kind: str, message: str, never_sent: bool, trips_circuit: bool
) -> None:
    assert (outcome.kind, outcome.message) == (kind, message)
    assert outcome.never_sent is never_sent
    assert outcome.trips_circuit is trips_circuit
    assert outcome.to_json()["words"] == message


def test_the_list_of_attempts_keeps_what_there_is_and_no_more() -> None:
    assert answered(429, duration_ms=12, excerpt="slow down", retry_after_s=30.0).to_json() == {
        "outcome": "throttled",
        "status": 429,
        "duration_ms": 12,
        "words": "answered 429 with Retry-After: 30 s",
        "excerpt": "slow down",
        "retry_after_s": 30.0,
    }
    assert answered(200, duration_ms=3).to_json() == {
        "outcome": "delivered",
        "status": 200,
        "duration_ms": 3,
        "words": "answered 200",
    }
    assert Unreachable(stage="tls", reason="no TLS", duration_ms=4).to_json() == {
        "outcome": "unreachable",
        "duration_ms": 4,
        "words": "no TLS",
        "stage": "tls",
    }


@given(status=st.integers(min_value=100, max_value=999))
def test_only_2xx_is_delivered_and_only_410_is_gone(status: int) -> None:
    outcome = answered(status, duration_ms=0)

    assert isinstance(outcome, Delivered) == (status // 100 == 2)
    assert isinstance(outcome, Gone) == (status == 410)
    assert isinstance(outcome, Throttled) == (status in (429, 503))
    assert isinstance(outcome, Rejected) == (status // 100 != 2 and status not in (410, 429, 503))


@given(body=st.binary(max_size=40_000))
def test_an_excerpt_is_one_short_line_of_any_bytes(body: bytes) -> None:
    text = excerpt(body)

    assert len(text) <= EXCERPT_CHARS
    assert "\n" not in text
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in text)
    assert orjson.loads(orjson.dumps(text)) == text


def test_an_excerpt_reads_well() -> None:
    assert excerpt(b"") == ""
    assert excerpt(b"<h1>\r\n\tnot\x1b[31m found</h1>\x00") == "<h1> not [31m found</h1>"
    assert excerpt("abc\u202edef".encode()) == "abc def"
    assert excerpt(b"x" * 301) == "x" * 299 + "…"
