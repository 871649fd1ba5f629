"""Fetches a recording: pure rules for when to try again, and one thin function that does the I/O.

A provider makes the audio some time after the call, so "no recording" is asked again at fixed offsets and accepted
after the last one. A provider outage or an exhausted budget uses up no offset. Audio that exists but cannot be
fetched or stored is retried over hours before the recording counts as failed.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Protocol, assert_never

from relay import descriptors
from relay.domain.call import RecordingStatus
from relay.domain.json import Json
from relay.domain.time import from_iso, iso
from relay.errors import (
    OverBudget,
    ProviderError,
    RateLimited,
    StorageError,
    Unauthorized,
    Unavailable,
    UnexpectedResponse,
)
from relay.events.payload import NO_RECORDING
from relay.providers.base import Audio, NoRecordingYet, NoSuchCall, Purpose, RecordingSource
from relay.recordings.storage import Discarded, Stored

# Providers make the audio after the call; half an hour later none is coming any more.
ATTEMPT_OFFSETS_S = (0, 15, 60, 300, 1_800)
FAILURE_WAITS_S = (60, 600, 3_600, 6 * 3_600)
OUTAGE_FIRST_WAIT_S = 15
OUTAGE_LONGEST_WAIT_S = 900
# Then `call.recording.failed` is published: subscribers must not wait for ever.
OUTAGE_ENDS_AFTER_S = 86_400

_HEAD_BYTES = 4_096
_OUT_OF_DESCRIPTORS = "the relay has no free file descriptor; raise the limit of open files"
_AUDIO_TYPE = re.compile(r"audio/[a-z0-9][a-z0-9.+-]{0,60}", re.ASCII)
_UNSPECIFIC_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream"})


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """When a transfer is aborted, because it would occupy a place for longer than its audio is worth.

    `first_byte_s`: some providers make the audio on request; connecting may take 10 s, a silent connection fails after
    30 s, but headers that drip in would never end. `min_bytes_per_s`, over `slow_s`: a telephone line itself carries
    8 kB a second, so what comes at half of that is not a slow network but a broken one. Time in which our own storage
    takes the bytes does not count. `total_s` ends everything else.
    """

    first_byte_s: float = 45
    min_bytes_per_s: float = 4_000
    slow_s: float = 30
    total_s: float = 3_600


LIMITS = TransferLimits()


@dataclass(frozen=True, slots=True)
class FetchState:
    """Progress of fetching one recording; the caller stores it as JSON between attempts.

    `step` counts the offsets answered with "no recording", `failures` the attempts at which audio existed but could
    not be fetched or stored, `outages` the consecutive attempts without an answer, since `outage_since`.
    """

    first_attempt_at: datetime
    step: int = 0
    failures: int = 0
    outages: int = 0
    outage_since: datetime | None = None

    def to_json(self) -> Json:
        return {
            "first_attempt_at": iso(self.first_attempt_at),
            "step": self.step,
            "failures": self.failures,
            "outages": self.outages,
            "outage_since": iso(self.outage_since),
        }

    @classmethod
    def from_json(cls, data: Json) -> "FetchState":
        since = data["outage_since"]
        return cls(
            first_attempt_at=from_iso(data["first_attempt_at"]),
            step=data["step"],
            failures=data["failures"],
            outages=data["outages"],
            outage_since=from_iso(since) if since else None,
        )

    @property
    def fresh(self) -> bool:
        return self.step == 0 and self.failures == 0


@dataclass(frozen=True, slots=True)
class Missing:
    """The provider has no recording, or none so far."""


@dataclass(frozen=True, slots=True)
class Outage:
    """The provider did not answer; `retry_after_s` is the wait that it asked for."""

    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class BudgetExhausted:
    """Our share of the provider's limit is used up for another `wait_s`."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """There is audio, but it could not be fetched or stored."""

    reason: str


AttemptFailure = Missing | Outage | BudgetExhausted | FetchFailed


@dataclass(frozen=True, slots=True)
class Fetched:
    """The audio is stored; `part` is the call's recording part: the published fields and `path`."""

    part: Json


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Try again at `at` with `state`."""

    at: datetime
    state: FetchState
    reason: str


@dataclass(frozen=True, slots=True)
class NoRecording:
    """The call has no recording; no event is published."""


@dataclass(frozen=True, slots=True)
class RetriesExhausted:
    """The recording is unavailable; `call.recording.failed` is published."""

    reason: str


@dataclass(frozen=True, slots=True)
class AccessDenied:
    """The credential may not fetch recordings: the caller pauses recordings for the source."""

    reason: str


FetchResult = Fetched | RetryLater | NoRecording | RetriesExhausted | AccessDenied


class RecordingWriter(Protocol):
    """Stores audio, whole or not at all."""

    async def put(
        self,
        call_id: str,
        chunks: AsyncIterator[bytes],
        *,
        started_on: date,
        content_type: str,
        expected_size_bytes: int | None,
    ) -> Stored | Discarded: ...


def recording_part(status: RecordingStatus) -> Json:
    """Build the recording part of a call without audio."""
    return NO_RECORDING | {"status": status.value}


def next_attempt(
    state: FetchState, failure: AttemptFailure, now: datetime
) -> RetryLater | NoRecording | RetriesExhausted:
    """Decide what follows an attempt that brought no audio."""
    match failure:
        case Missing():
            step = state.step + 1
            if step >= len(ATTEMPT_OFFSETS_S):
                return NoRecording()
            at = min(state.first_attempt_at, now) + timedelta(seconds=ATTEMPT_OFFSETS_S[step])
            # After an outage the offset may lie in the past: keep the distance instead, so that the provider still
            # gets the time it needs to make the audio.
            if at <= now:
                at = now + timedelta(seconds=ATTEMPT_OFFSETS_S[step] - ATTEMPT_OFFSETS_S[step - 1])
            return RetryLater(at, _answered(state, step=step), "no recording yet")
        case FetchFailed(reason):
            failures = state.failures + 1
            if failures > len(FAILURE_WAITS_S):
                return RetriesExhausted(reason)
            wait_s = FAILURE_WAITS_S[failures - 1]
            return RetryLater(now + timedelta(seconds=wait_s), _answered(state, failures=failures), reason)
        case Outage(reason, retry_after_s):
            backoff_s = min(OUTAGE_FIRST_WAIT_S * 2 ** min(state.outages, 10), OUTAGE_LONGEST_WAIT_S)
            after = replace(state, outages=state.outages + 1)
            return _after_outage(after, max(backoff_s, retry_after_s or 0), reason, now)
        case BudgetExhausted(wait_s):
            # Not an outage: it says nothing about the source, only that the wait counts towards giving up.
            return _after_outage(state, max(1, wait_s), "our share of the provider's request limit is used up", now)
        case _:
            assert_never(failure)


def _answered(state: FetchState, *, step: int | None = None, failures: int | None = None) -> FetchState:
    return replace(
        state,
        step=state.step if step is None else step,
        failures=state.failures if failures is None else failures,
        outages=0,
        outage_since=None,
    )


def _after_outage(state: FetchState, wait_s: float, reason: str, now: datetime) -> RetryLater | RetriesExhausted:
    since = state.outage_since or now
    end = since + timedelta(seconds=OUTAGE_ENDS_AFTER_S)
    if now >= end:
        return RetriesExhausted(f"{reason}, for {OUTAGE_ENDS_AFTER_S // 3600} h")
    at = min(now + timedelta(seconds=min(wait_s, OUTAGE_ENDS_AFTER_S)), end)
    return RetryLater(at, replace(state, outage_since=since), reason)


async def fetch(
    source: RecordingSource,
    storage: RecordingWriter,
    call_id: str,
    record_key: str,
    state: FetchState | None,
    *,
    clock: Callable[[], datetime],
    started_at: datetime,
    limits: TransferLimits = LIMITS,
) -> FetchResult:
    """Request the recording of an answered call once, store it when it comes, and decide what follows.

    `state` is None at the first attempt. The clock is read again after the transfer, which may have taken long.
    """
    state = state or FetchState(clock())
    try:
        outcome = await _request(source, storage, call_id, record_key, state, started_at, limits)
    except Unauthorized as error:
        return AccessDenied(str(error))
    except RateLimited as error:
        outcome = Outage(str(error), error.retry_after_s)
    except OverBudget as error:
        outcome = BudgetExhausted(error.wait_s)
    except (UnexpectedResponse, StorageError) as error:
        outcome = Outage(_OUT_OF_DESCRIPTORS) if descriptors.exhausted(error) else FetchFailed(str(error))
    except ProviderError as error:
        outcome = Outage(str(error))
    return outcome if isinstance(outcome, Fetched) else next_attempt(state, outcome, clock())


async def _request(
    source: RecordingSource,
    storage: RecordingWriter,
    call_id: str,
    record_key: str,
    state: FetchState,
    started_at: datetime,
    limits: TransferLimits,
) -> Fetched | AttemptFailure:
    purpose = Purpose.RECORDING if state.fresh else Purpose.RETRY
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(limits.first_byte_s):
                audio = await stack.enter_async_context(source.recording(record_key, purpose=purpose))
        except TimeoutError:
            return Outage(f"the provider sent no audio within {limits.first_byte_s:g} s")
        match audio:
            case NoRecordingYet() | NoSuchCall():
                return Missing()
            case Audio():
                try:
                    async with asyncio.timeout(limits.total_s):
                        return await _store(storage, call_id, audio, started_at.date(), limits)
                except ProviderError as error:
                    # The audio exists, so the provider's error does not count as an outage.
                    return FetchFailed(f"the transfer broke off: {error}")
                except TimeoutError:
                    return FetchFailed(f"the transfer took longer than {limits.total_s:g} s")
            case _:
                assert_never(audio)


async def _store(
    storage: RecordingWriter, call_id: str, audio: Audio, started_on: date, limits: TransferLimits
) -> Fetched | FetchFailed:
    content_type = audio_type(audio.content_type)
    if content_type is None:
        return FetchFailed("the provider sent something that is not audio")
    chunks = _Transfer(audio.chunks, limits)
    result = await storage.put(
        call_id,
        chunks,
        started_on=started_on,
        content_type=content_type,
        expected_size_bytes=audio.size_bytes,
    )
    match result:
        case Discarded(reason):
            return FetchFailed(reason)
        case Stored():
            return Fetched(
                {
                    **recording_part(RecordingStatus.AVAILABLE),
                    "content_type": content_type,
                    "size_bytes": result.size_bytes,
                    "duration_seconds": wav_duration_s(bytes(chunks.head), result.size_bytes),
                    "sha256": result.sha256,
                    "path": result.path,
                }
            )
        case _:
            assert_never(result)


class _Transfer:
    """Passes chunks on, keeps a copy of the first bytes, and ends a transfer that is too slow."""

    def __init__(self, source: AsyncIterator[bytes], limits: TransferLimits) -> None:
        self._source = source
        self._limits = limits
        self._may_wait_s = limits.slow_s
        self.head = bytearray()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._may_wait_s):
                chunk = await anext(self._source)
        except TimeoutError:
            raise Unavailable(f"it came at less than {self._limits.min_bytes_per_s:g} bytes a second") from None
        # Each byte earns the wait that it is worth at the minimum rate, but a quick start earns no slow rest.
        waited_s = time.monotonic() - began_s
        earned_s = len(chunk) / self._limits.min_bytes_per_s
        self._may_wait_s = min(self._may_wait_s - waited_s + earned_s, self._limits.slow_s)
        if len(self.head) < _HEAD_BYTES:
            self.head += chunk[: _HEAD_BYTES - len(self.head)]
        return chunk


def audio_type(content_type: str) -> str | None:
    """Reduce a Content-Type to `audio/…` or `application/octet-stream`; None for everything that is not audio."""
    bare = content_type.split(";")[0].strip().lower()
    if _AUDIO_TYPE.fullmatch(bare):
        return bare
    return "application/octet-stream" if bare in _UNSPECIFIC_TYPES else None


def wav_duration_s(head: bytes, size_bytes: int) -> float | None:
    """Read the duration from the first bytes of a WAV file; None when they are not WAV or do not say."""
    if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        return None
    bytes_per_s = 0
    at = 12
    while at + 8 <= len(head):
        name, length = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8
        if name == b"fmt " and at + 12 <= len(head):
            bytes_per_s = int.from_bytes(head[at + 8 : at + 12], "little")
        if name == b"data":
            # Streaming writers leave 0 or 0xFFFFFFFF as the length of the data: then the file's size counts.
            available = max(size_bytes - at, 0)
            data_bytes = length if 0 < length <= available else available
            return round(data_bytes / bytes_per_s, 3) if bytes_per_s else None
        at += length + length % 2
    return None
