"""Our share of a provider's limit through the workers that spend it (promise 6): the provider counts the requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.providers import PROVIDERS
from relay.simulator.webfones import WebFonesEndpoint
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.webfones import FaultyWebFones
from tests.flow.harness import eventually, relay_harness
from workers.runners import add_poller_and_workers

WINDOW_S = 5
# What a request may be late between leaving the budget and arriving at the provider.
IN_TRANSIT_S = 0.3
SHARE = 30

KEY = "key"


Start = Callable[..., AbstractAsyncContextManager[FaultyWebFones]]


def ring(provider: FaultyWebFones, calls: int) -> None:
    """Add calls with audio, each from a number that was not looked up before."""
    for _ in range(calls):
        caller = len(provider.accounts[KEY].plans)
        provider.appear(KEY, outside_number=f"(202) 555-{caller:04}", recording_at=provider.clock())


@pytest.fixture
def start(redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    @contextlib.asynccontextmanager
    async def run(**kind: Any) -> AsyncIterator[FaultyWebFones]:
        """A relay whose two sources have one key, once both were polled."""
        monkeypatch.setitem(PROVIDERS, "webfones", replace(PROVIDERS["webfones"], **kind))
        provider = FaultyWebFones(window_s=WINDOW_S - IN_TRANSIT_S)
        provider.add_account(KEY)
        async with provider.serve() as base:
            source = {
                "provider": "webfones",
                "base_url": base,
                "api_key": KEY,
                "poll_interval_s": 1,
                "hold_for_recording_s": 0,
                "hold_for_contact_s": 0,
                "budget_share": 0.5,
            }
            sources = {"one": source, "two": source}
            async with relay_harness(
                redis, valkey_url, tmp_path, sources=sources, add_runners=add_poller_and_workers
            ) as relay:
                for sid in sources:
                    await eventually(
                        lambda sid=sid: relay.runtime.store.sources.read(sid),
                        lambda state: bool(state.poll_state.reached),
                    )
                yield provider

    return run


async def test_polls_contacts_and_recordings_together_keep_within_the_share(start: Start) -> None:
    """Two sources with one key, more calls than the share allows look-ups and recordings for: no window of the provider
    has more requests than the share, polls go on, and the rest uses what they leave."""
    async with start(requests_per_window=2 * SHARE, window_s=WINDOW_S) as provider:
        before = provider.requests.copy()
        for _ in range(12):
            ring(provider, 5)
            await asyncio.sleep(1)

        assert provider.peak(KEY) <= SHARE
        sent = provider.requests - before
        assert sent[KEY, WebFonesEndpoint.RECORDS] >= 18, "of 24: no poll waits for recordings"
        assert sent[KEY, WebFonesEndpoint.RECORDING] >= 5
        assert sent[KEY, WebFonesEndpoint.SEARCH] >= 3


@pytest.mark.parametrize("refused", [WebFonesEndpoint.RECORDING, WebFonesEndpoint.RECORDS])
async def test_a_refusal_of_one_worker_stops_the_requests_of_all(start: Start, refused: WebFonesEndpoint) -> None:
    """A 429 for a recording, or a poll, of one source: nothing more is requested with that key until it ends."""
    async with start() as provider:
        provider.inject(Fault(kind=FaultKind.STATUS, status=429, on=refused, times=None))
        ring(provider, 3)
        await asyncio.sleep(1.5)
        before = provider.requests.copy()
        ring(provider, 3)
        await asyncio.sleep(3)

        assert before[KEY, refused] >= 1
        assert provider.requests == before
