"""Fetching a recording: pure rules for when to ask again, and one thin act.

A provider makes the audio some time after the call, so "no recording" is asked again on a ladder of fixed offsets and
believed at its end. A provider that is down, or a budget that is used up, costs no rung. Audio that exists but cannot
be had is tried a few more times over hours; only then is it said to have failed.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Protocol, assert_never

from relay.domain.json import Json
from relay.domain.time import from_iso, iso
from relay.errors import OverBudget, ProviderError, RateLimited, StorageError, Unauthorized, UnexpectedResponse
from relay.providers.base import Audio, NoRecordingYet, NoSuchCall, Purpose, RecordingSource
from relay.recordings.storage import Refused, Stored

LADDER_S = (0, 15, 60, 300, 1_800)
TROUBLE_WAITS_S = (60, 600, 3_600, 6 * 3_600)
OUTAGE_FIRST_WAIT_S = 15
OUTAGE_LONGEST_WAIT_S = 900
OUTAGE_ENDS_AFTER_S = 86_400
TRANSFER_LIMIT_S = 3_600

_HEAD_BYTES = 4_096
_AUDIO_TYPE = re.compile(r"audio/[a-z0-9][a-z0-9.+-]{0,60}", re.ASCII)
_UNSPECIFIC_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream"})


class RecordingStatus(StrEnum):
    """What a call's recording part says."""

    PENDING = "pending"
    AVAILABLE = "available"
    NONE = "none"
    UNAVAILABLE = "unavailable"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class FetchState:
    """How far the fetching of one recording has come; the caller keeps it as JSON between tries.

    `step` counts the rungs that were answered "none", `troubles` the times when audio existed and could not be had,
    `outages` the tries in a row that the provider did not answer, the first of them at `outage_since`.
    """

    first_try_at: datetime
    step: int = 0
    troubles: int = 0
    outages: int = 0
    outage_since: datetime | None = None

    def to_json(self) -> Json:
        return {
            "first_try_at": iso(self.first_try_at),
            "step": self.step,
            "troubles": self.troubles,
            "outages": self.outages,
            "outage_since": iso(self.outage_since),
        }

    @classmethod
    def from_json(cls, data: Json) -> "FetchState":
        since = data["outage_since"]
        return cls(
            first_try_at=from_iso(data["first_try_at"]),
            step=data["step"],
            troubles=data["troubles"],
            outages=data["outages"],
            outage_since=from_iso(since) if since else None,
        )

    @property
    def fresh(self) -> bool:
        """Nothing was answered yet: this is the first real look."""
        return self.step == 0 and self.troubles == 0


@dataclass(frozen=True, slots=True)
class Missing:
    """The provider has no recording, or none so far."""


@dataclass(frozen=True, slots=True)
class Outage:
    """The provider did not answer; `hint_s` is the wait that it asked for."""

    reason: str
    hint_s: float | None = None


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Our own budget let no request go; it has room again in `wait_s`."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """There is audio, and it could not be had or kept."""

    reason: str


Answer = Missing | Outage | NoRoom | Trouble


@dataclass(frozen=True, slots=True)
class Fetched:
    """The audio is kept; `part` is the call's recording part, with `path` beside the published keys."""

    part: Json


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Ask again at `at` with `state`."""

    at: datetime
    state: FetchState
    reason: str


@dataclass(frozen=True, slots=True)
class NoneThere:
    """The call has no recording. Nobody needs to be told."""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The recording cannot be had; subscribers are told."""

    reason: str


@dataclass(frozen=True, slots=True)
class Denied:
    """The credential may not fetch recordings: the caller switches this extra off for the source."""

    reason: str


Result = Fetched | TryAgain | NoneThere | GaveUp | Denied


class Keeper(Protocol):
    """Keeps audio, whole or not at all."""

    async def put(
        self,
        call_id: str,
        chunks: AsyncIterator[bytes],
        *,
        started_on: date,
        content_type: str,
        expected_size_bytes: int | None,
    ) -> Stored | Refused: ...


def recording_part(status: RecordingStatus) -> Json:
    """Build the recording part of a call without audio, keys in their published order."""
    return {
        "status": status.value,
        "url": None,
        "expires_at": None,
        "content_type": None,
        "size_bytes": None,
        "duration_seconds": None,
        "sha256": None,
    }


def next_try(state: FetchState, answer: Answer, now: datetime) -> TryAgain | NoneThere | GaveUp:
    """Decide what follows an answer that brought no audio.

    A rung is due at its offset from the first try. One whose time has passed already, because the provider was down
    in between, is due at its distance from the rung before it, counted from now: the ladder moves, no rung is lost.
    """
    match answer:
        case Missing():
            step = state.step + 1
            if step >= len(LADDER_S):
                return NoneThere()
            at = state.first_try_at + timedelta(seconds=LADDER_S[step])
            if at <= now:
                at = now + timedelta(seconds=LADDER_S[step] - LADDER_S[step - 1])
            return TryAgain(at, _answered(state, step=step), "no recording so far")
        case Trouble(reason):
            troubles = state.troubles + 1
            if troubles > len(TROUBLE_WAITS_S):
                return GaveUp(reason)
            wait_s = TROUBLE_WAITS_S[troubles - 1]
            return TryAgain(now + timedelta(seconds=wait_s), _answered(state, troubles=troubles), reason)
        case Outage(reason, hint_s):
            backoff_s = min(OUTAGE_FIRST_WAIT_S * 2 ** min(state.outages, 10), OUTAGE_LONGEST_WAIT_S)
            return _wait_out(state, max(backoff_s, hint_s or 0), reason, now)
        case NoRoom(wait_s):
            return _wait_out(state, max(1, wait_s), "our share of the provider's request limit is used up", now)
        case _:
            assert_never(answer)


def _answered(state: FetchState, *, step: int | None = None, troubles: int | None = None) -> FetchState:
    return replace(
        state,
        step=state.step if step is None else step,
        troubles=state.troubles if troubles is None else troubles,
        outages=0,
        outage_since=None,
    )


def _wait_out(state: FetchState, wait_s: float, reason: str, now: datetime) -> TryAgain | GaveUp:
    since = state.outage_since or now
    end = since + timedelta(seconds=OUTAGE_ENDS_AFTER_S)
    if now >= end:
        return GaveUp(f"{reason}, for {OUTAGE_ENDS_AFTER_S // 3600} h")
    at = min(now + timedelta(seconds=min(wait_s, OUTAGE_ENDS_AFTER_S)), end)
    return TryAgain(at, replace(state, outages=state.outages + 1, outage_since=since), reason)


async def fetch(
    source: RecordingSource,
    storage: Keeper,
    call_id: str,
    record_key: str,
    state: FetchState | None,
    *,
    clock: Callable[[], datetime],
    started_at: datetime,
    transfer_limit_s: float = TRANSFER_LIMIT_S,
) -> Result:
    """Ask for the recording of an answered call once, keep it when it comes, and say what follows.

    `state` is None at the first try. The clock is read again after the transfer, which may have taken long.
    """
    state = state or FetchState(clock())
    try:
        answer = await _ask(source, storage, call_id, record_key, state, started_at, transfer_limit_s)
    except Unauthorized as error:
        return Denied(str(error))
    except RateLimited as error:
        answer = Outage(str(error), error.retry_after_s)
    except OverBudget as error:
        answer = NoRoom(error.wait_s)
    except (UnexpectedResponse, StorageError) as error:
        answer = Trouble(str(error))
    except ProviderError as error:
        answer = Outage(str(error))
    return answer if isinstance(answer, Fetched) else next_try(state, answer, clock())


async def _ask(
    source: RecordingSource,
    storage: Keeper,
    call_id: str,
    record_key: str,
    state: FetchState,
    started_at: datetime,
    transfer_limit_s: float,
) -> Fetched | Answer:
    purpose = Purpose.RECORDING if state.fresh else Purpose.RETRY
    async with source.recording(record_key, purpose=purpose) as audio:
        match audio:
            case NoRecordingYet() | NoSuchCall():
                return Missing()
            case Audio():
                try:
                    async with asyncio.timeout(transfer_limit_s):
                        return await _keep(storage, call_id, audio, started_at.date())
                except ProviderError as error:
                    return Trouble(f"the transfer broke off: {error}")
                except TimeoutError:
                    return Trouble(f"the transfer took longer than {transfer_limit_s:g} s")
            case _:
                assert_never(audio)


async def _keep(storage: Keeper, call_id: str, audio: Audio, started_on: date) -> Fetched | Trouble:
    content_type = audio_type(audio.content_type)
    if content_type is None:
        return Trouble("the provider sent something that is no audio")
    passing = _Head(audio.chunks)
    kept = await storage.put(
        call_id,
        passing,
        started_on=started_on,
        content_type=content_type,
        expected_size_bytes=audio.size_bytes,
    )
    match kept:
        case Refused(reason):
            return Trouble(reason)
        case Stored():
            return Fetched(
                {
                    **recording_part(RecordingStatus.AVAILABLE),
                    "content_type": content_type,
                    "size_bytes": kept.size_bytes,
                    "duration_seconds": wav_duration_s(bytes(passing.head), kept.size_bytes),
                    "sha256": kept.sha256,
                    "path": kept.path,
                }
            )
        case _:
            assert_never(kept)


class _Head:
    """Remembers the first bytes of what passes through."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self.head = bytearray()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk = await anext(self._source)
        if len(self.head) < _HEAD_BYTES:
            self.head += chunk[: _HEAD_BYTES - len(self.head)]
        return chunk


def audio_type(content_type: str) -> str | None:
    """Reduce a Content-Type to `audio/…` or `application/octet-stream`; None for everything that is no audio."""
    bare = content_type.split(";")[0].strip().lower()
    if _AUDIO_TYPE.fullmatch(bare):
        return bare
    return "application/octet-stream" if bare in _UNSPECIFIC_TYPES else None


def wav_duration_s(head: bytes, size_bytes: int) -> float | None:
    """Read the duration off the first bytes of a WAV file; None when they are not, or do not say.

    Writers that stream leave 0 or a huge number as the length of the data: then the size of the file counts.
    """
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
            there = max(size_bytes - at, 0)
            data_bytes = length if 0 < length <= there else there
            return round(data_bytes / bytes_per_s, 3) if bytes_per_s else None
        at += length + length % 2
    return None
