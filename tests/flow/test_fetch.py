"""One try at a recording, from the provider's answer to what is kept and what follows."""

import asyncio
import hashlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from relay.errors import OverBudget, RateLimited, StorageFull, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import Audio, NoRecordingYet, NoSuchCall, Purpose
from relay.recordings.fetch import Denied, Fetched, FetchState, GaveUp, Keeper, NoneThere, Result, TryAgain, fetch
from relay.recordings.storage import RecordingStorage, Refused, Stored, open_storage

CALL = "call_" + "a" * 26
NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
STARTED = datetime(2026, 11, 19, 23, 59, 0, tzinfo=UTC)
WAV = (
    b"RIFF"
    + struct.pack("<I", 32_036)
    + b"WAVEfmt "
    + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16_000, 2, 16)
    + b"data"
    + struct.pack("<I", 32_000)
    + bytes(range(250)) * 128
)


async def chunks(data: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    """Send in pieces too small for a WAV header; then fail, when told to."""
    for at in range(0, len(data), 30):
        yield data[at : at + 30]
    if error is not None:
        raise error


def wav(size_bytes: int | None = len(WAV), content_type: str = "audio/wav", data: bytes = WAV) -> Audio:
    return Audio(chunks(data), content_type, size_bytes)


@dataclass
class Phone:
    """A provider that answers as told, and notes what it was asked."""

    answer: Audio | NoRecordingYet | NoSuchCall | Exception
    asked: list[tuple[str, Purpose]] = field(default_factory=list)
    closed: int = 0

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncGenerator[Audio | NoRecordingYet | NoSuchCall, None]:
        self.asked.append((key, purpose))
        if isinstance(self.answer, Exception):
            raise self.answer
        try:
            yield self.answer
        finally:
            self.closed += 1


class FullDisk:
    """Storage without room."""

    async def put(
        self,
        call_id: str,
        chunks: AsyncIterator[bytes],
        *,
        started_on: date,
        content_type: str,
        expected_size_bytes: int | None,
    ) -> Stored | Refused:
        raise StorageFull("cannot keep a recording: no room left in /srv")


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[RecordingStorage]:
    """A directory."""
    storage = open_storage(str(tmp_path))
    yield storage
    await storage.aclose()


async def ask(phone: Phone, storage: Keeper, state: FetchState | None = None, transfer_limit_s: float = 60) -> Result:
    return await fetch(
        phone,
        storage,
        CALL,
        "211159",
        state,
        clock=lambda: NOW,
        started_at=STARTED,
        transfer_limit_s=transfer_limit_s,
    )


async def test_audio_is_kept_and_described(storage: RecordingStorage) -> None:
    """The call's recording part has what subscribers read, and the path beside it; the link is made when sent."""
    phone = Phone(wav())

    fetched = await ask(phone, storage)

    path = f"2026/11/19/{CALL}.wav"
    assert fetched == Fetched(
        {
            "status": "available",
            "url": None,
            "expires_at": None,
            "content_type": "audio/wav",
            "size_bytes": len(WAV),
            "duration_seconds": 2.0,
            "sha256": hashlib.sha256(WAV).hexdigest(),
            "path": path,
        }
    )
    assert b"".join([block async for block in storage.read(path, 0, len(WAV))]) == WAV
    assert phone.asked == [("211159", Purpose.RECORDING)]
    assert phone.closed == 1


async def test_audio_that_is_no_wav_has_no_duration(storage: RecordingStorage) -> None:
    """A length that nobody measured is not invented."""
    fetched = await ask(Phone(wav(4, "audio/mpeg", b"ID3\4")), storage)

    assert isinstance(fetched, Fetched)
    assert fetched.part["duration_seconds"] is None
    assert fetched.part["path"] == f"2026/11/19/{CALL}.mp3"


@pytest.mark.parametrize("answer", [NoRecordingYet(), NoSuchCall()])
async def test_no_recording_is_asked_again_and_then_believed(
    storage: RecordingStorage, answer: NoRecordingYet | NoSuchCall
) -> None:
    """The state of the first try leads through the ladder; later tries count as retries."""
    phone = Phone(answer)
    first = await ask(phone, storage)
    assert isinstance(first, TryAgain)
    assert first.at == NOW + timedelta(seconds=15)

    result: Result = first
    for _ in range(4):
        assert isinstance(result, TryAgain)
        result = await ask(phone, storage, FetchState.from_json(result.state.to_json()))

    assert result == NoneThere()
    assert [purpose for _, purpose in phone.asked] == [Purpose.RECORDING, *[Purpose.RETRY] * 4]


@pytest.mark.parametrize(
    ("error", "wait_s"),
    [
        (Unavailable("answered 502"), 15),
        (RateLimited("too many requests", bucket="key", retry_after_s=90), 90),
        (RateLimited("too many requests", bucket="ip", retry_after_s=None), 15),
        (OverBudget(7), 7),
    ],
)
async def test_a_provider_that_is_down_costs_no_rung(
    storage: RecordingStorage, error: Exception, wait_s: float
) -> None:
    """The try is made again later, as if it had not been made."""
    result = await ask(Phone(error), storage)

    assert isinstance(result, TryAgain)
    assert result.at == NOW + timedelta(seconds=wait_s)
    assert (result.state.step, result.state.troubles, result.state.outages) == (0, 0, 1)


async def test_a_day_without_an_answer_is_given_up(storage: RecordingStorage) -> None:
    """Subscribers are told in the end."""
    state = FetchState(NOW - timedelta(days=1), outages=100, outage_since=NOW - timedelta(days=1))

    assert await ask(Phone(Unavailable("answered 502")), storage, state) == GaveUp("answered 502, for 24 h")


async def test_a_refused_credential_is_its_own_outcome(storage: RecordingStorage) -> None:
    """The caller switches recordings off for the source; the call is not blamed."""
    assert await ask(Phone(Unauthorized("the key may not fetch recordings", status=403)), storage) == Denied(
        "the key may not fetch recordings"
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (wav(len(WAV) + 1), f"the recording ended after {len(WAV)} of {len(WAV) + 1} bytes"),
        (wav(len(WAV) - 1), f"the recording has more than the {len(WAV) - 1} bytes that were announced"),
        (wav(None, data=b""), "the recording has no bytes"),
        (wav(None, "text/html"), "the provider sent something that is no audio"),
        (Audio(chunks(WAV, Unavailable("reset")), "audio/wav", None), "the transfer broke off: reset"),
        (UnexpectedResponse("status 206"), "status 206"),
    ],
)
async def test_audio_that_cannot_be_had_is_tried_again_and_nothing_is_kept(
    storage: RecordingStorage, tmp_path: Path, answer: Audio | Exception, reason: str
) -> None:
    """Cut short, too long, empty, a web page, a broken line: never a recording."""
    phone = Phone(answer)

    result = await ask(phone, storage)

    assert result == TryAgain(NOW + timedelta(seconds=60), FetchState(NOW, troubles=1), reason)
    assert files_below(tmp_path) == []


def files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


async def test_a_full_disk_is_tried_again_and_given_up_at_last() -> None:
    """Room may be made; after five tries over hours the recording is said to have failed."""
    result = await ask(Phone(wav()), FullDisk())
    assert isinstance(result, TryAgain)
    assert result.state.troubles == 1

    last = await ask(Phone(wav()), FullDisk(), FetchState(NOW, troubles=4))

    assert last == GaveUp("cannot keep a recording: no room left in /srv")


async def test_a_transfer_that_never_ends_is_cut_off(storage: RecordingStorage, tmp_path: Path) -> None:
    """A provider that stops in the middle holds neither the relay nor a half file."""

    async def stuck() -> AsyncIterator[bytes]:
        yield WAV
        await asyncio.Event().wait()

    phone = Phone(Audio(stuck(), "audio/wav", None))

    result = await ask(phone, storage, transfer_limit_s=0.05)

    assert isinstance(result, TryAgain)
    assert result.reason == "the transfer took longer than 0.05 s"
    assert phone.closed == 1
    await storage.aclose()
    assert files_below(tmp_path) == []


async def test_the_wait_counts_from_the_end_of_a_long_transfer(storage: RecordingStorage) -> None:
    """A broken transfer of an hour is not repeated at once."""
    times = iter([NOW, NOW + timedelta(hours=1)])

    result = await fetch(Phone(wav(1)), storage, CALL, "211159", None, clock=lambda: next(times), started_at=STARTED)

    assert isinstance(result, TryAgain)
    assert result.state.first_try_at == NOW
    assert result.at == NOW + timedelta(hours=1, seconds=60)
