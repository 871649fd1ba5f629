"""The schedule as tables: what follows each outcome, when, and when it ends."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.outcomes import (
    AddressRefused,
    AttemptOutcome,
    Interrupted,
    Throttled,
    TimedOut,
    Unreachable,
    answered,
)
from relay.delivery.retry import (
    LIFETIME_S,
    MAX_RETRY_AFTER_S,
    SCHEDULE,
    Complete,
    Decision,
    Disable,
    Fail,
    RetryAt,
    decide,
    ends_at,
)

CREATED_AT = datetime(2025, 7, 1, 12, tzinfo=UTC)
HOUR_S = 3600.0
FAILURES: list[AttemptOutcome] = [
    *(answered(status, duration_ms=1) for status in (300, 301, 304, 307, 308, 400, 401, 403, 404, 408, 413, 422, 451)),
    *(answered(status, duration_ms=1) for status in (429, 500, 502, 503, 504, 599, 600, 101)),
    TimedOut(timeout_s=15.0),
    Interrupted(reason="reset"),
    Unreachable(stage="dns", reason="no address"),
    Unreachable(stage="connect", reason="refused"),
    Unreachable(stage="tls", reason="expired"),
    AddressRefused(reason="private"),
]


@dataclass
class Dice:
    """An rng that always rolls the same."""

    roll: float = 0.0

    def random(self) -> float:
        return self.roll


def after(
    outcome: AttemptOutcome,
    *,
    attempt: int = 1,
    age_s: float = 0.0,
    roll: float = 0.0,
    circuit_open_s: float = 0.0,
    at_most_once: bool = False,
) -> Decision:
    return decide(
        outcome,
        attempt=attempt,
        event_created_at=CREATED_AT,
        now=CREATED_AT + timedelta(seconds=age_s),
        rng=Dice(roll),
        circuit_open_s=circuit_open_s,
        at_most_once=at_most_once,
    )


def wait_s(decision: Decision, *, age_s: float = 0.0) -> float:
    assert isinstance(decision, RetryAt)
    return (decision.at - CREATED_AT).total_seconds() - age_s


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_complete(status: int) -> None:
    assert after(answered(status, duration_ms=1)) == Complete()


@pytest.mark.parametrize("attempt", [1, 5, 10, 11])
def test_410_disables_whenever_it_comes(attempt: int) -> None:
    assert after(answered(410, duration_ms=1), attempt=attempt, age_s=500 * HOUR_S) == Disable()


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure.kind}-{failure.message[:14]}")
@pytest.mark.parametrize(("attempt", "step_s"), [*enumerate(SCHEDULE, start=1)])
def test_any_other_outcome_is_retried_on_schedule(failure: AttemptOutcome, attempt: int, step_s: float) -> None:
    assert wait_s(after(failure, attempt=attempt)) == step_s
    assert wait_s(after(failure, attempt=attempt, roll=0.999999)) == pytest.approx(1.2 * step_s, rel=1e-5)


def test_the_schedule_is_the_published_one() -> None:
    minutes = [step_s / 60 for step_s in SCHEDULE]

    assert minutes == [5 / 60, 5, 30, 120, 300, 600, 840, 1200, 1440]
    assert sum(SCHEDULE) * 1.2 < LIFETIME_S


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure.kind}-{failure.message[:14]}")
def test_after_the_tenth_attempt_the_event_is_exhausted(failure: AttemptOutcome) -> None:
    assert after(failure, attempt=10) == Fail("exhausted")


@pytest.mark.parametrize("roll", [0.0, 0.5, 0.999999])
def test_a_whole_run_of_failures_makes_ten_attempts_within_100_hours(roll: float) -> None:
    attempt, age_s = 1, 0.0
    while isinstance(decision := after(answered(500, duration_ms=1), attempt=attempt, age_s=age_s, roll=roll), RetryAt):
        age_s += wait_s(decision, age_s=age_s)
        attempt += 1

    assert decision == Fail("exhausted")
    assert attempt == 10
    assert 75 * HOUR_S < age_s < 100 * HOUR_S


@pytest.mark.parametrize(
    ("attempt", "hint_s", "expected_s"),
    [
        (1, None, 5),
        (1, 0.0, 5),
        (1, 4.0, 5),
        (1, 60.0, 60),
        (1, MAX_RETRY_AFTER_S, MAX_RETRY_AFTER_S),
        (1, MAX_RETRY_AFTER_S + 1, MAX_RETRY_AFTER_S),
        (1, 1e30, MAX_RETRY_AFTER_S),
        (1, math.inf, MAX_RETRY_AFTER_S),
        (1, -60.0, 5),
        (1, -math.inf, 5),
        (1, math.nan, 5),
        (4, 60.0, 2 * HOUR_S),
        (9, MAX_RETRY_AFTER_S, 24 * HOUR_S),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_that_was_asked_for_only_lengthens_the_step(
    status: int, attempt: int, hint_s: float | None, expected_s: float
) -> None:
    outcome = Throttled(status=status, retry_after_s=hint_s)

    assert wait_s(after(outcome, attempt=attempt)) == expected_s


def test_the_last_step_is_cut_so_that_one_attempt_is_made_at_the_end() -> None:
    """Held up behind its call's earlier events for 97 hours, the next step of 10 hours would miss the end."""
    failed = answered(500, duration_ms=1)

    assert wait_s(after(failed, attempt=6, age_s=97 * HOUR_S), age_s=97 * HOUR_S) == 3 * HOUR_S
    assert after(failed, attempt=7, age_s=100 * HOUR_S) == Fail("exhausted")


def test_an_attempt_is_never_made_before_the_asked_time_even_at_the_end() -> None:
    assert after(Throttled(status=429, retry_after_s=4 * HOUR_S), age_s=97 * HOUR_S) == Fail("exhausted")
    within = after(Throttled(status=429, retry_after_s=2 * HOUR_S), age_s=97 * HOUR_S, roll=0.9)
    assert 2 * HOUR_S <= wait_s(within, age_s=97 * HOUR_S) <= 3 * HOUR_S


def test_an_event_that_comes_first_in_its_call_after_its_end_had_its_one_attempt() -> None:
    assert after(answered(500, duration_ms=1), attempt=1, age_s=101 * HOUR_S) == Fail("exhausted")
    assert after(answered(200, duration_ms=1), attempt=1, age_s=101 * HOUR_S) == Complete()


@pytest.mark.parametrize(
    ("open_h", "lifetime_h"), [(0, 100), (30, 130), (120, 220), (1000, 220), (-5, 100)], ids=lambda hours: f"{hours}h"
)
def test_time_with_an_open_circuit_is_given_back_up_to_five_days(open_h: float, lifetime_h: float) -> None:
    end = ends_at(CREATED_AT, circuit_open_s=open_h * HOUR_S)

    assert end - CREATED_AT == timedelta(hours=lifetime_h)
    failed = answered(500, duration_ms=1)
    just_before_s, just_after_s = lifetime_h * HOUR_S - 1, lifetime_h * HOUR_S + 1
    assert isinstance(after(failed, age_s=just_before_s, circuit_open_s=open_h * HOUR_S), RetryAt)
    assert after(failed, age_s=just_after_s, circuit_open_s=open_h * HOUR_S) == Fail("exhausted")


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure.kind}-{failure.message[:14]}")
def test_at_most_once_ends_what_may_have_been_received_and_retries_what_was_not(failure: AttemptOutcome) -> None:
    """A reset or a time-out after connecting may have been acted on; a refused connection was not."""
    decision = after(failure, at_most_once=True)

    if isinstance(failure, Interrupted | TimedOut):
        assert decision == Fail("unknown")
    else:
        assert isinstance(decision, RetryAt)


@given(
    attempt=st.integers(min_value=1, max_value=12),
    age_s=st.floats(min_value=-3600, max_value=250 * HOUR_S),
    roll=st.floats(min_value=0, max_value=1, exclude_max=True),
    hint_s=st.none() | st.floats(),
    open_s=st.floats(min_value=0, max_value=1e7),
)
def test_a_retry_is_always_later_than_now_and_never_after_the_end(
    attempt: int, age_s: float, roll: float, hint_s: float | None, open_s: float
) -> None:
    outcome = Throttled(status=429, retry_after_s=hint_s)

    decision = after(outcome, attempt=attempt, age_s=age_s, roll=roll, circuit_open_s=open_s)

    if isinstance(decision, RetryAt):
        assert decision.at >= CREATED_AT + timedelta(seconds=age_s)
        assert decision.at <= ends_at(CREATED_AT, circuit_open_s=open_s) + timedelta(microseconds=1)
    else:
        assert decision == Fail("exhausted")
