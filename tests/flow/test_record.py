"""The record lane through a real worker: slow providers delay no other source's recordings (promise 5)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from relay.domain.call import Outcome
from tests.fakes.ports import DrippingAudio, PromptAudio
from tests.flow.harness import RelayHarness, relay_harness


@pytest.mark.parametrize(("sources", "recordings"), [(2, 4), (50, 3)])
async def test_recordings_that_drip_delay_no_other_source(
    redis: Redis, valkey_url: str, tmp_path: Path, sources: int, recordings: int
) -> None:
    """Right after a restart, with every dripping source busy, a healthy recording is stored within 8 s."""
    options = {"provider": "webfones", "base_url": "http://127.0.0.1:9", "api_key": "k", "contacts": False}
    options |= {"hold_for_recording_s": 0}
    dripping = {f"drip{n}": DrippingAudio() for n in range(sources)}

    @contextlib.asynccontextmanager
    async def restarted() -> AsyncIterator[RelayHarness]:
        configured = {"healthy": options, **dict.fromkeys(dripping, options)}
        async with relay_harness(redis, valkey_url, tmp_path, sources=configured) as relay:
            relay.runtime.sources["healthy"].provider.recordings = PromptAudio()
            for source, provider in dripping.items():
                relay.runtime.sources[source].provider.recordings = provider
            yield relay

    async def store(relay: RelayHarness, key: str) -> float:
        began_s = time.monotonic()
        cid = await relay.call(key, source="healthy", outcome=Outcome.ANSWERED, audio=True)
        return await relay.delivered_after_s(cid, began_s, event_type="call.recording.completed")

    async with restarted() as relay:
        await store(relay, "before")
        for source in dripping:
            for n in range(recordings):
                await relay.call(str(n), source=source, outcome=Outcome.ANSWERED, audio=True)
    async with restarted() as relay:
        await asyncio.sleep(2)
        waits_s = [await store(relay, f"healthy{n}") for n in range(5)]

    assert all(provider.transfers for provider in dripping.values())
    assert max(waits_s) < 8
