"""Simulated recordings: the WAV of a call is a melody of its own, the same bytes each time, of any length."""

import hashlib
import math
import struct
from collections.abc import Iterator
from functools import cache

_SAMPLE_RATE_HZ = 8_000
_WAV_HEADER_BYTES = 44


def audio_chunks(rid: int, size_bytes: int) -> Iterator[bytes]:
    """Yield the WAV of a call in chunks of at most a second."""
    header = _wav_header(size_bytes - _WAV_HEADER_BYTES)
    yield header
    left = size_bytes - len(header)
    second = 0
    while left > 0:
        note = hashlib.sha256(f"{rid}:{second}".encode()).digest()[0] % 8
        chunk = _tone(note)[:left]
        yield chunk
        left -= len(chunk)
        second += 1


@cache
def _tone(note: int) -> bytes:
    pitch_hz = (262, 294, 330, 349, 392, 440, 494, 523)[note]
    turn = 2 * math.pi * pitch_hz / _SAMPLE_RATE_HZ
    samples = (
        int(6_000 * math.sin(turn * index) * math.sin(math.pi * index / _SAMPLE_RATE_HZ))
        for index in range(_SAMPLE_RATE_HZ)
    )
    return struct.pack(f"<{_SAMPLE_RATE_HZ}h", *samples)


def _wav_header(data_bytes: int) -> bytes:
    riff = struct.pack("<4sI4s", b"RIFF", 36 + data_bytes, b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _SAMPLE_RATE_HZ, 2 * _SAMPLE_RATE_HZ, 2, 16)
    return riff + form + struct.pack("<4sI", b"data", data_bytes)
