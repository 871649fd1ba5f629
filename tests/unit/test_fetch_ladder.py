"""When a recording is requested again, when its retries are exhausted, and how its first bytes are read."""

import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.domain.call import RecordingStatus
from relay.recordings.fetch import (
    ATTEMPT_OFFSETS_S,
    FAILURE_WAITS_S,
    AttemptFailure,
    BudgetExhausted,
    FetchFailed,
    FetchState,
    Missing,
    NoRecording,
    Outage,
    RetriesExhausted,
    RetryLater,
    audio_type,
    next_attempt,
    recording_part,
    wav_duration_s,
)

START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
OUTCOMES: st.SearchStrategy[AttemptFailure] = st.one_of(
    st.just(Missing()),
    st.just(FetchFailed("cut short")),
    st.builds(Outage, st.just("503"), st.none() | st.floats(0, 1e6)),
    st.builds(BudgetExhausted, st.floats(0, 1e6)),
)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def retry_after(state: FetchState, outcome: AttemptFailure, now: datetime) -> RetryLater:
    """Decide, and require another attempt."""
    decision = next_attempt(state, outcome, now)
    assert isinstance(decision, RetryLater)
    return decision


def test_a_missing_recording_is_requested_at_five_offsets_and_then_accepted_as_missing() -> None:
    """A provider that never has the audio is asked at 0, 15 s, 60 s, 5 min and 30 min, and then no more."""
    state, now, offsets_s = FetchState(START), START, [0.0]
    while isinstance(decision := next_attempt(state, Missing(), now), RetryLater):
        state, now = decision.state, decision.at
        offsets_s.append((now - START).total_seconds())

    assert offsets_s == [0, 15, 60, 300, 1800]
    assert decision == NoRecording()


def test_a_late_runner_does_not_shift_the_offsets() -> None:
    """Offsets count from the first attempt, so small delays do not add up."""
    assert retry_after(FetchState(START, step=1), Missing(), after(22)).at == after(60)


def test_an_offset_that_has_passed_keeps_its_distance_to_the_one_before() -> None:
    """After an outage of two hours the provider still gets the time that it needs."""
    assert retry_after(FetchState(START, step=1), Missing(), after(7200)).at == after(7200 + 45)
    assert retry_after(FetchState(START, step=3), Missing(), after(7200)).at == after(7200 + 1500)


def test_a_clock_that_was_set_back_delays_no_attempt() -> None:
    """The first attempt lies in the future: the next one waits for its own offset and no longer."""
    assert retry_after(FetchState(after(3600)), Missing(), START).at == after(15)


def test_an_outage_uses_up_no_offset() -> None:
    """A provider that is down has not answered that there is no recording."""
    state = FetchState(START, step=2)
    for _ in range(20):
        state = retry_after(state, Outage("503"), START).state

    assert state.step == 2
    assert isinstance(next_attempt(state, Missing(), START), RetryLater)


def test_outages_back_off_to_fifteen_minutes() -> None:
    """The wait doubles and stays at 15 minutes."""
    state, waits = FetchState(START), []
    for _ in range(9):
        decision = retry_after(state, Outage("503"), START)
        waits.append((decision.at - START).total_seconds())
        state = decision.state

    assert waits == [15, 30, 60, 120, 240, 480, 900, 900, 900]


@pytest.mark.parametrize(
    ("outcome", "wait_s"),
    [
        (Outage("429", 600), 600),
        (Outage("429", 3), 15),
        (Outage("429", 1e9), 86_400),
        (BudgetExhausted(0.2), 1),
        (BudgetExhausted(40), 40),
    ],
)
def test_a_requested_wait_is_respected(outcome: AttemptFailure, wait_s: float) -> None:
    """Retry-After and our own budget decide; the backoff is the minimum for a failing provider."""
    assert retry_after(FetchState(START), outcome, START).at == after(wait_s)


def test_retries_are_exhausted_after_a_day_of_outage() -> None:
    """The last attempt is made when the day is over, and not before."""
    state, now, attempts = FetchState(START), START, 1
    while isinstance(decision := next_attempt(state, Outage("503"), now), RetryLater):
        state, now, attempts = decision.state, decision.at, attempts + 1

    assert now == after(86_400)
    assert decision == RetriesExhausted("503, for 24 h")
    assert 96 <= attempts <= 110


def test_an_answer_ends_an_outage() -> None:
    """Two short outages are not one long one."""
    down = retry_after(FetchState(START), Outage("503"), START).state
    up = retry_after(down, Missing(), after(15)).state

    assert (down.outages, down.outage_since) == (1, START)
    assert (up.outages, up.outage_since, up.step) == (0, None, 1)


def test_audio_that_cannot_be_fetched_is_tried_five_times_over_hours() -> None:
    """Then the recording has failed, with the last reason."""
    state, now, attempts = FetchState(START), START, 1
    while isinstance(decision := next_attempt(state, FetchFailed(f"attempt {attempts}"), now), RetryLater):
        state, now, attempts = decision.state, decision.at, attempts + 1

    assert attempts == 5
    assert now == after(sum(FAILURE_WAITS_S))
    assert now > after(3 * 3600)
    assert decision == RetriesExhausted("attempt 5")


@given(st.lists(OUTCOMES, min_size=400, max_size=400))
def test_every_sequence_of_outcomes_ends_and_never_goes_back_in_time(outcomes: list[AttemptFailure]) -> None:
    """Whatever a provider answers, the next attempt lies ahead, survives JSON, and there is a last one."""
    state, now = FetchState(START), START
    for outcome in [*outcomes, *[Missing()] * len(ATTEMPT_OFFSETS_S)]:
        decision = next_attempt(state, outcome, now)
        if not isinstance(decision, RetryLater):
            break
        assert decision.at > now
        assert FetchState.from_json(decision.state.to_json()) == _to_milliseconds(decision.state)
        state, now = decision.state, decision.at

    assert isinstance(decision, NoRecording | RetriesExhausted)


def _to_milliseconds(state: FetchState) -> FetchState:
    since = state.outage_since
    if since is None:
        return state
    cut = since.replace(microsecond=since.microsecond // 1000 * 1000)
    return FetchState(state.first_attempt_at, state.step, state.failures, state.outages, cut)


def test_a_part_without_audio_has_every_published_field() -> None:
    """Subscribers read the same fields whatever the status."""
    assert recording_part(RecordingStatus.NONE) == {
        "status": "none",
        "url": None,
        "expires_at": None,
        "content_type": None,
        "size_bytes": None,
        "duration_seconds": None,
        "sha256": None,
    }


def wav(data_bytes: int, *, announced: int | None = None, before: bytes = b"", rate: int = 16_000) -> bytes:
    """Build the head of a WAV file: 8 kHz, 16 bit, one channel."""
    fmt = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, rate, 2, 16)
    data = b"data" + struct.pack("<I", data_bytes if announced is None else announced)
    return b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVE" + fmt + before + data


ODD_CHUNK = b"LIST" + struct.pack("<I", 5) + b"hello\0"


@pytest.mark.parametrize(
    ("head", "size_bytes", "duration_s"),
    [
        (wav(32_000), 32_044, 2.0),
        (wav(24_001), 24_045, 1.5),
        (wav(32_000, announced=0xFFFFFFFF), 32_044, 2.0),
        (wav(32_000, announced=0), 32_044, 2.0),
        (wav(32_000, announced=16_000), 32_044, 1.0),
        (wav(32_000, before=ODD_CHUNK), 32_058, 2.0),
        (wav(0), 44, 0.0),
        (wav(32_000, rate=0), 32_044, None),
        (wav(32_000)[:43], 32_044, None),
        (wav(32_000)[:20], 32_044, None),
        (wav(32_000, before=b"LIST" + struct.pack("<I", 2**31)), 32_044, None),
        (b"RIFF" + b"\xff" * 200, 204, None),
        (b"ID3\x04" + bytes(100), 104, None),
        (b"", 0, None),
    ],
)
def test_the_duration_is_read_from_a_wav_header(head: bytes, size_bytes: int, duration_s: float | None) -> None:
    """Lengths that a streaming writer left open are taken from the file; what is not WAV has no duration."""
    assert wav_duration_s(head, size_bytes) == duration_s


@given(st.binary(max_size=200), st.integers(0, 2**40))
def test_no_bytes_break_the_wav_reader(tail: bytes, size_bytes: int) -> None:
    """Audio comes from outside: any bytes have a duration or none."""
    duration_s = wav_duration_s(b"RIFF\0\0\0\0WAVE" + tail, size_bytes)

    assert duration_s is None or duration_s >= 0


@pytest.mark.parametrize(
    ("content_type", "bare"),
    [
        ("audio/wav", "audio/wav"),
        ("Audio/X-WAV; rate=8000", "audio/x-wav"),
        ("application/octet-stream", "application/octet-stream"),
        ("binary/octet-stream", "application/octet-stream"),
        ("", "application/octet-stream"),
        ("text/html; charset=utf-8", None),
        ("application/json", None),
        ("image/svg+xml", None),
        ("audio/", None),
        ("audio/wav\r\nSet-Cookie: x=1", None),
        ("audio/wäv", None),
    ],
)
def test_only_audio_is_audio(content_type: str, bare: str | None) -> None:
    """An error page with status 200 is not a recording, and no header is smuggled through."""
    assert audio_type(content_type) == bare
