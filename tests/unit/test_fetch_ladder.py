"""When a recording is asked for again, when it is given up, and what its first bytes say: tables."""

import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.recordings.fetch import (
    LADDER_S,
    TROUBLE_WAITS_S,
    Answer,
    FetchState,
    GaveUp,
    Missing,
    NoneThere,
    NoRoom,
    Outage,
    RecordingStatus,
    Trouble,
    TryAgain,
    audio_type,
    next_try,
    recording_part,
    wav_duration_s,
)

START = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
ANSWERS: st.SearchStrategy[Answer] = st.one_of(
    st.just(Missing()),
    st.just(Trouble("cut short")),
    st.builds(Outage, st.just("503"), st.none() | st.floats(0, 1e6)),
    st.builds(NoRoom, st.floats(0, 1e6)),
)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def again(state: FetchState, answer: Answer, now: datetime) -> TryAgain:
    """Decide, and insist on another try."""
    decided = next_try(state, answer, now)
    assert isinstance(decided, TryAgain)
    return decided


def test_no_recording_is_asked_at_the_five_offsets_and_then_believed() -> None:
    """A provider that never has the audio is asked at 0, 15 s, 60 s, 5 min and 30 min, and then no more."""
    state, now, asked = FetchState(START), START, [0.0]
    while isinstance(decided := next_try(state, Missing(), now), TryAgain):
        state, now = decided.state, decided.at
        asked.append((now - START).total_seconds())

    assert asked == [0, 15, 60, 300, 1800]
    assert decided == NoneThere()


def test_a_late_runner_does_not_shift_the_ladder() -> None:
    """Offsets count from the first try, so a little delay does not add up."""
    assert again(FetchState(START, step=1), Missing(), after(22)).at == after(60)


def test_a_rung_that_has_passed_is_asked_at_its_own_distance() -> None:
    """After two hours of outage the provider still gets the time that it needs."""
    assert again(FetchState(START, step=1), Missing(), after(7200)).at == after(7200 + 45)
    assert again(FetchState(START, step=3), Missing(), after(7200)).at == after(7200 + 1500)


def test_an_outage_costs_no_rung() -> None:
    """A provider that is down has not said that there is no recording."""
    state = FetchState(START, step=2)
    for _ in range(20):
        state = again(state, Outage("503"), START).state

    assert state.step == 2
    assert isinstance(next_try(state, Missing(), START), TryAgain)


def test_outages_back_off_to_a_quarter_of_an_hour() -> None:
    """The wait doubles and stays at 15 minutes."""
    state, waits = FetchState(START), []
    for _ in range(9):
        decided = again(state, Outage("503"), START)
        waits.append((decided.at - START).total_seconds())
        state = decided.state

    assert waits == [15, 30, 60, 120, 240, 480, 900, 900, 900]


@pytest.mark.parametrize(
    ("answer", "wait_s"),
    [
        (Outage("429", 600), 600),
        (Outage("429", 3), 15),
        (Outage("429", 1e9), 86_400),
        (NoRoom(0.2), 1),
        (NoRoom(40), 40),
    ],
)
def test_a_named_wait_is_kept(answer: Answer, wait_s: float) -> None:
    """Retry-After and our own budget say when; the backoff is only the least that a failing provider gets."""
    assert again(FetchState(START), answer, START).at == after(wait_s)


def test_a_day_of_outage_is_given_up() -> None:
    """The last try is made when the day is over, and not before."""
    state, now, tries = FetchState(START), START, 1
    while isinstance(decided := next_try(state, Outage("503"), now), TryAgain):
        state, now, tries = decided.state, decided.at, tries + 1

    assert now == after(86_400)
    assert decided == GaveUp("503, for 24 h")
    assert 96 <= tries <= 110


def test_an_answer_ends_an_outage() -> None:
    """Two short outages are not one long one."""
    down = again(FetchState(START), Outage("503"), START).state
    up = again(down, Missing(), after(15)).state

    assert (down.outages, down.outage_since) == (1, START)
    assert (up.outages, up.outage_since, up.step) == (0, None, 1)


def test_audio_that_cannot_be_had_is_tried_five_times_over_hours() -> None:
    """Then it is said to have failed, with the last reason."""
    state, now, tries = FetchState(START), START, 1
    while isinstance(decided := next_try(state, Trouble(f"try {tries}"), now), TryAgain):
        state, now, tries = decided.state, decided.at, tries + 1

    assert tries == 5
    assert now == after(sum(TROUBLE_WAITS_S))
    assert now > after(3 * 3600)
    assert decided == GaveUp("try 5")


@given(st.lists(ANSWERS, min_size=400, max_size=400))
def test_every_story_ends_and_never_goes_back_in_time(answers: list[Answer]) -> None:
    """Whatever a provider answers, the next try lies ahead, survives JSON, and there is a last one."""
    state, now = FetchState(START), START
    for answer in [*answers, *[Missing()] * len(LADDER_S)]:
        decided = next_try(state, answer, now)
        if not isinstance(decided, TryAgain):
            break
        assert decided.at > now
        assert FetchState.from_json(decided.state.to_json()) == _to_milliseconds(decided.state)
        state, now = decided.state, decided.at

    assert isinstance(decided, NoneThere | GaveUp)


def _to_milliseconds(state: FetchState) -> FetchState:
    since = state.outage_since
    if since is None:
        return state
    cut = since.replace(microsecond=since.microsecond // 1000 * 1000)
    return FetchState(state.first_try_at, state.step, state.troubles, state.outages, cut)


def test_a_part_without_audio_has_every_published_key() -> None:
    """Subscribers read the same keys whatever the status."""
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
def test_the_duration_is_read_off_a_wav_header(head: bytes, size_bytes: int, duration_s: float | None) -> None:
    """Lengths that a streaming writer left open are taken from the file; what is no WAV has no duration."""
    assert wav_duration_s(head, size_bytes) == duration_s


@given(st.binary(max_size=200), st.integers(0, 2**40))
def test_no_bytes_upset_the_wav_reader(tail: bytes, size_bytes: int) -> None:
    """Audio comes from outside: any bytes have a duration or none."""
    duration_s = wav_duration_s(b"RIFF\0\0\0\0WAVE" + tail, size_bytes)

    assert duration_s is None or duration_s >= 0


@pytest.mark.parametrize(
    ("given_type", "bare"),
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
def test_only_audio_is_audio(given_type: str, bare: str | None) -> None:
    """An error page with status 200 is not a recording, and no header is smuggled through."""
    assert audio_type(given_type) == bare
