"""One attempt at a recording, from the provider's response to what is stored and what follows."""

import asyncio
import hashlib
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from relay.errors import OverBudget, RateLimited, StorageFull, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import Audio, NoRecordingYet, NoSuchCall, Purpose
from relay.recordings.fetch import (
    LIMITS,
    AccessDenied,
    Fetched,
    FetchResult,
    FetchState,
    NoRecording,
    RecordingWriter,
    RetriesExhausted,
    RetryLater,
    TransferLimits,
    fetch,
)
from relay.recordings.storage import Discarded, RecordingStorage, Stored, open_storage

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
    """Send in pieces too small for a WAV header; then fail, if there is an error."""
    for at in range(0, len(data), 30):
        yield data[at : at + 30]
    if error is not None:
        raise error


def wav(size_bytes: int | None = len(WAV), content_type: str = "audio/wav", data: bytes = WAV) -> Audio:
    return Audio(chunks(data), content_type, size_bytes)


@dataclass
class FakeProvider:
    """Answers as the test sets it, and records its requests."""

    response: Audio | NoRecordingYet | NoSuchCall | Exception
    requests: list[tuple[str, Purpose]] = field(default_factory=list)
    closed: int = 0

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncGenerator[Audio | NoRecordingYet | NoSuchCall, None]:
        self.requests.append((key, purpose))
        if isinstance(self.response, Exception):
            raise self.response
        try:
            yield self.response
        finally:
            self.closed += 1


class FullStorage:
    """Storage with no space left."""

    async def put(
        self,
        call_id: str,
        chunks: AsyncIterator[bytes],
        *,
        started_on: date,
        content_type: str,
        expected_size_bytes: int | None,
    ) -> Stored | Discarded:
        raise StorageFull("cannot store a recording: no space left in /srv")


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[RecordingStorage]:
    """A directory."""
    storage = open_storage(str(tmp_path))
    yield storage
    await storage.aclose()


async def attempt(
    provider: FakeProvider, storage: RecordingWriter, state: FetchState | None = None, limits: TransferLimits = LIMITS
) -> FetchResult:
    return await fetch(
        provider,
        storage,
        CALL,
        "211159",
        state,
        clock=lambda: NOW,
        started_at=STARTED,
        limits=limits,
    )


async def test_audio_is_stored_and_described(storage: RecordingStorage) -> None:
    """The call's recording part has what subscribers read, and the path; the link is made when an event is sent."""
    provider = FakeProvider(wav())

    fetched = await attempt(provider, storage)

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
    assert provider.requests == [("211159", Purpose.RECORDING)]
    assert provider.closed == 1


async def test_audio_that_is_not_wav_has_no_duration(storage: RecordingStorage) -> None:
    """A duration that was not measured is not invented."""
    fetched = await attempt(FakeProvider(wav(4, "audio/mpeg", b"ID3\4")), storage)

    assert isinstance(fetched, Fetched)
    assert fetched.part["duration_seconds"] is None
    assert fetched.part["path"] == f"2026/11/19/{CALL}.mp3"


@pytest.mark.parametrize("response", [NoRecordingYet(), NoSuchCall()])
async def test_a_missing_recording_is_requested_again_and_then_accepted_as_missing(
    storage: RecordingStorage, response: NoRecordingYet | NoSuchCall
) -> None:
    """The state of the first attempt leads through the offsets; later attempts count as retries."""
    provider = FakeProvider(response)
    first = await attempt(provider, storage)
    assert isinstance(first, RetryLater)
    assert first.at == NOW + timedelta(seconds=15)

    result: FetchResult = first
    for _ in range(4):
        assert isinstance(result, RetryLater)
        result = await attempt(provider, storage, FetchState.from_json(result.state.to_json()))

    assert result == NoRecording()
    assert [purpose for _, purpose in provider.requests] == [Purpose.RECORDING, *[Purpose.RETRY] * 4]


@pytest.mark.parametrize(
    ("error", "wait_s", "outages"),
    [
        (Unavailable("answered 502"), 15, 1),
        (RateLimited("too many requests", bucket="key", retry_after_s=90), 90, 1),
        (RateLimited("too many requests", bucket="ip", retry_after_s=None), 15, 1),
        (OverBudget(7), 7, 0),
    ],
)
async def test_a_provider_that_is_down_uses_up_no_offset(
    storage: RecordingStorage, error: Exception, wait_s: float, outages: int
) -> None:
    """The attempt is repeated later, as if it had not been made. Our own budget is no outage of the provider."""
    result = await attempt(FakeProvider(error), storage)

    assert isinstance(result, RetryLater)
    assert result.at == NOW + timedelta(seconds=wait_s)
    assert (result.state.step, result.state.failures, result.state.outages) == (0, 0, outages)


async def test_retries_are_exhausted_after_a_day_without_a_response(storage: RecordingStorage) -> None:
    """Then a failed recording is published."""
    state = FetchState(NOW - timedelta(days=1), outages=100, outage_since=NOW - timedelta(days=1))

    assert await attempt(FakeProvider(Unavailable("answered 502")), storage, state) == RetriesExhausted(
        "answered 502, for 24 h"
    )


async def test_a_refused_credential_is_its_own_outcome(storage: RecordingStorage) -> None:
    """The caller pauses recordings for the source; the call itself has not failed."""
    assert await attempt(
        FakeProvider(Unauthorized("the key may not fetch recordings", status=403)), storage
    ) == AccessDenied("the key may not fetch recordings")


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (wav(len(WAV) + 1), f"the recording ended after {len(WAV)} of {len(WAV) + 1} bytes"),
        (wav(len(WAV) - 1), f"the recording has more than the {len(WAV) - 1} bytes that were announced"),
        (wav(None, data=b""), "the recording has no bytes"),
        (wav(None, "text/html"), "the provider sent something that is not audio"),
        (Audio(chunks(WAV, Unavailable("reset")), "audio/wav", None), "the transfer broke off: reset"),
        (UnexpectedResponse("status 206"), "status 206"),
    ],
)
async def test_audio_that_cannot_be_fetched_is_retried_and_nothing_is_stored(
    storage: RecordingStorage, tmp_path: Path, response: Audio | Exception, reason: str
) -> None:
    """Cut short, too long, empty, a web page, a lost connection: never a recording."""
    provider = FakeProvider(response)

    result = await attempt(provider, storage)

    assert result == RetryLater(NOW + timedelta(seconds=60), FetchState(NOW, failures=1), reason)
    assert files_below(tmp_path) == []


def files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


async def test_a_full_disk_is_retried_until_retries_are_exhausted() -> None:
    """Space may be freed; after five attempts over hours the recording has failed."""
    result = await attempt(FakeProvider(wav()), FullStorage())
    assert isinstance(result, RetryLater)
    assert result.state.failures == 1

    last = await attempt(FakeProvider(wav()), FullStorage(), FetchState(NOW, failures=4))

    assert last == RetriesExhausted("cannot store a recording: no space left in /srv")


async def test_a_transfer_that_never_ends_is_cut_off(storage: RecordingStorage, tmp_path: Path) -> None:
    """A provider that stops in the middle blocks nothing and leaves no partial file."""

    async def stuck() -> AsyncIterator[bytes]:
        yield WAV
        await asyncio.Event().wait()

    provider = FakeProvider(Audio(stuck(), "audio/wav", None))

    result = await attempt(provider, storage, limits=TransferLimits(total_s=0.05))

    assert isinstance(result, RetryLater)
    assert result.reason == "the transfer took longer than 0.05 s"
    assert provider.closed == 1
    await storage.aclose()
    assert files_below(tmp_path) == []


async def drip(piece: bytes, *, every_s: float, times: int, first: bytes = WAV[:44]) -> AsyncIterator[bytes]:
    yield first
    for _ in range(times):
        await asyncio.sleep(every_s)
        yield piece


@pytest.mark.parametrize("first", [WAV[:44], bytes(2_000_000)])
async def test_a_transfer_that_drips_is_aborted_as_a_failed_attempt(
    storage: RecordingStorage, tmp_path: Path, first: bytes
) -> None:
    """Bytes keep coming, too slowly: it does not hold its place for an hour, not even after a quick start."""
    provider = FakeProvider(Audio(drip(b"x", every_s=0.01, times=6000, first=first), "audio/wav", None))
    began_s = time.monotonic()

    result = await attempt(provider, storage, limits=TransferLimits(slow_s=0.3))

    assert time.monotonic() - began_s < 2
    assert result == RetryLater(
        NOW + timedelta(seconds=60),
        FetchState(NOW, failures=1),
        "the transfer broke off: it came at less than 4000 bytes a second",
    )
    assert provider.closed == 1
    await storage.aclose()
    assert files_below(tmp_path) == []


async def test_a_steady_transfer_above_the_minimum_rate_is_stored(storage: RecordingStorage) -> None:
    """However long it takes in all; and a pause is allowed that the rate over the whole of `slow_s` makes up for."""
    provider = FakeProvider(Audio(drip(bytes(400), every_s=0.05, times=30), "audio/wav", 44 + 30 * 400))

    assert isinstance(await attempt(provider, storage, limits=TransferLimits(slow_s=0.4)), Fetched)


async def test_a_slow_storage_does_not_abort_a_transfer() -> None:
    """Only the time in which the provider is waited for counts."""

    class SlowStorage:
        async def put(self, call_id: str, chunks: AsyncIterator[bytes], **_: object) -> Stored:
            size_bytes = 0
            async for chunk in chunks:
                await asyncio.sleep(0.1)
                size_bytes += len(chunk)
            return Stored(size_bytes, "", "path")

    provider = FakeProvider(Audio(drip(b"x", every_s=0, times=8), "audio/wav", None))

    assert isinstance(await attempt(provider, SlowStorage(), limits=TransferLimits(slow_s=0.3)), Fetched)


async def test_a_provider_that_never_begins_to_send_is_an_outage(storage: RecordingStorage) -> None:
    """Headers that drip in reset the connection's own timeout each time."""

    class Silent(FakeProvider):
        @asynccontextmanager
        async def recording(
            self, key: str, *, purpose: Purpose = Purpose.RECORDING
        ) -> AsyncGenerator[Audio | NoRecordingYet | NoSuchCall, None]:
            await asyncio.Event().wait()
            yield NoRecordingYet()

    result = await attempt(Silent(NoRecordingYet()), storage, limits=TransferLimits(first_byte_s=0.05))

    assert isinstance(result, RetryLater)
    assert (result.at, result.state.outages) == (NOW + timedelta(seconds=15), 1)
    assert result.reason == "the provider sent no audio within 0.05 s"


async def test_uploads_that_drip_do_not_delay_another(storage: RecordingStorage) -> None:
    """Each upload waits for its provider in a thread: there is one for every recording that is fetched at a time."""
    dripping = [
        asyncio.create_task(
            storage.put(
                f"call_{n:a>26}".replace("0", "z").replace("1", "y").replace("8", "x").replace("9", "w"),
                drip(b"x", every_s=0.05, times=6000),
                started_on=STARTED.date(),
                expected_size_bytes=None,
            )
        )
        for n in range(40)
    ]
    await asyncio.sleep(0.2)

    async with asyncio.timeout(2):
        fetched = await attempt(FakeProvider(wav()), storage)

    assert isinstance(fetched, Fetched)
    for task in dripping:
        task.cancel()
    await asyncio.gather(*dripping, return_exceptions=True)


async def test_the_wait_counts_from_the_end_of_a_long_transfer(storage: RecordingStorage) -> None:
    """A broken transfer of an hour is not repeated at once."""
    times = iter([NOW, NOW + timedelta(hours=1)])

    result = await fetch(
        FakeProvider(wav(1)), storage, CALL, "211159", None, clock=lambda: next(times), started_at=STARTED
    )

    assert isinstance(result, RetryLater)
    assert result.state.first_attempt_at == NOW
    assert result.at == NOW + timedelta(hours=1, seconds=60)
