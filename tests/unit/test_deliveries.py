"""The state of a delivery: a few bytes when all goes well, with every attempt when it does not."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.domain.json import Json
from relay.store.deliveries import DeliveryState, Status

STATUSES: list[Status] = ["waiting", "intent", "delivered", "exhausted", "unknown", "expired", "missing", "poison"]
MOMENTS = st.integers(0, 4_102_444_800_000)
REFUSED: Json = {"kind": "rejected", "status": 500}


@example("delivered", 1, 0, 0, 0, [])
@given(
    st.sampled_from(STATUSES),
    st.integers(0, 50),
    MOMENTS,
    MOMENTS,
    MOMENTS,
    st.lists(st.fixed_dictionaries({"at": MOMENTS, "status": st.integers(100, 599)}), max_size=12),
)
def test_a_state_is_read_as_it_was_written(
    status: Status, attempts: int, at_ms: int, next_ms: int, restarted_ms: int, log: list[Json]
) -> None:
    """The next attempt, in any process, knows everything about the ones before."""
    state = DeliveryState(status, attempts, at_ms, next_ms, restarted_ms, tuple(log))

    assert DeliveryState.read(state.write()) == state


def test_an_empty_state_is_a_delivery_before_its_first_attempt() -> None:
    """Publishing writes no state: most deliveries succeed at once and cost next to nothing."""
    assert DeliveryState.read(b"") == DeliveryState("waiting", 0)


def test_success_at_the_first_attempt_is_stored_as_its_time() -> None:
    """Attempts are logged only where one failed."""
    done = DeliveryState().attempted("delivered", {"kind": "delivered", "status": 200}, at_ms=1_000)

    assert done.write() == b"1000"


def test_a_success_after_failures_is_logged_with_them() -> None:
    """A late delivery shows every attempt, the successful one too."""
    first = DeliveryState().attempted("waiting", REFUSED, at_ms=1_000, next_ms=6_000)
    done = first.attempted("delivered", {"kind": "delivered", "status": 200}, at_ms=6_100)

    assert done.attempts == 2
    assert done.next_ms == 0
    assert [line["at"] for line in done.log] == [1_000, 6_100]
    assert [line["status"] for line in done.log] == [500, 200]


@pytest.mark.parametrize("failures", [11, 12, 13, 40])
def test_the_attempt_log_is_bounded_and_keeps_the_newest(failures: int) -> None:
    """A delivery that is replayed for weeks does not grow without bounds; the count goes on."""
    state = DeliveryState()
    for attempt in range(failures):
        state = state.attempted("waiting", REFUSED, at_ms=attempt)

    assert state.attempts == failures
    assert [line["at"] for line in state.log] == list(range(failures))[-12:]


def test_an_attempt_does_not_change_the_state_it_came_from() -> None:
    """A refused settlement leaves nothing behind."""
    before = DeliveryState().attempted("waiting", REFUSED, at_ms=1)
    before.attempted("exhausted", REFUSED, at_ms=2)

    assert before == DeliveryState("waiting", 1, 1, log=({"at": 1, **REFUSED},))


def test_the_time_of_a_replay_survives_attempts() -> None:
    """The retry schedule of a replayed delivery counts from the replay."""
    state = DeliveryState(restarted_ms=77).attempted("waiting", REFUSED, at_ms=100, next_ms=200)

    assert DeliveryState.read(state.write()).restarted_ms == 77
