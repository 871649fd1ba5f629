"""Latency from the provider's write to its stream to the delivery.

The clock of a call starts when the fake NFON has it, which wakes the stream that writes it; everything after that is in
the figure: reading the stream, ingesting, publishing, signing, the post. Polls are 300 s apart and holds are 0. A run
in which the list was polled meanwhile fails, so every call came by the stream.
"""

import asyncio
import random
import time

from benchmarks.figures import Figure, median, quantile
from benchmarks.harness import Bench, running, sink, subscription, write_config
from relay.domain import ids
from relay.simulator.nfon import NfonEndpoint
from tests.fakes.nfon import FaultyNfon

CALLS_PER_S = 20
TOKEN = "nfon-token"
_SETTLED_S = 1.5


async def run(bench: Bench) -> list[Figure]:
    """Measure one account whose calls appear at random instants."""
    seconds = bench.scaled(12, 3)
    bench.begin("stream", 1)
    bench.step(f"{CALLS_PER_S} calls/s for {seconds} s, polled every 300 s")
    waits_ms = await _waits_ms(bench, calls=CALLS_PER_S * seconds)
    bench.end()
    note = (
        f"{len(waits_ms):,} calls at {CALLS_PER_S}/s, polls 300 s apart, `relay up` in one process; "
        f"p99 {quantile(waits_ms, 0.99):.0f} ms"
    )
    return [Figure("NFON stream → delivered, holds 0, p50", median(waits_ms), "ms", 60, note=note)]


async def _waits_ms(bench: Bench, *, calls: int) -> list[float]:
    """Run `relay up` against an NFON that streams so many calls."""
    folder = bench.folder("stream")
    gaps = random.Random(1)
    provider = FaultyNfon()
    provider.add_account(TOKEN)
    written_s: dict[str, float] = {}
    async with sink(folder) as target, provider.serve() as url:
        config = write_config(
            folder,
            sources={
                "main": {
                    "provider": "nfon",
                    "base_url": url,
                    "token": TOKEN,
                    "poll_interval_s": 300,
                    "hold_for_contact_s": 0,
                    "hold_for_recording_s": 0,
                }
            },
            subscriptions={"crm": subscription(f"{target.url}/ok/crm")},
        )
        async with running("relay", "up", "-c", str(config), log=folder / "relay.log"):
            polls = await _polls_once_listening(provider)
            for _ in range(calls):
                began_s = time.monotonic()
                plan = provider.appear(TOKEN)
                written_s[provider.uuid_of(TOKEN, plan.rid)] = began_s
                await asyncio.sleep(gaps.expovariate(CALLS_PER_S))
            await asyncio.sleep(_SETTLED_S)
            arrivals = await target.arrivals()
            polls_meanwhile = provider.requests[TOKEN, NfonEndpoint.RECORDS] - polls
    if polls_meanwhile:
        raise RuntimeError(f"the list was polled {polls_meanwhile} times: not every call came by the stream")
    waits_ms: list[float] = []
    for name, began_s in written_s.items():
        at_s = arrivals.get(f"/ok/crm {ids.event_id('main', name, 'call.completed')}")
        if at_s is not None:
            waits_ms.append((at_s - began_s) * 1000)
    if len(waits_ms) < calls:
        raise RuntimeError(f"{calls - len(waits_ms)} of {calls} streamed calls were not delivered")
    return waits_ms


async def _polls_once_listening(provider: FaultyNfon) -> int:
    """Wait for the stream and for the poll that follows its connect; gives how many lists were requested until then."""
    before = (0, 0)
    async with asyncio.timeout(30):
        while True:
            now = provider.streams_open, provider.requests[TOKEN, NfonEndpoint.RECORDS]
            if now == before and now[0] == 1:
                return now[1]
            before = now
            await asyncio.sleep(_SETTLED_S)
