"""Latency from the response that first lists a call to its delivery.

The clock of a call starts when the provider begins the first response that lists it, so the wait for the next poll is
not in the figure; everything after it is: parsing, ingesting, looking up the contact (5 ms at the provider, every
number a new one), publishing, signing, the post. Recordings are off. With holds of 0 the event does not wait for the
contact, which follows as an update; with the default hold of 5 s the event waits and includes it.
"""

import asyncio
import json

import aiohttp

from benchmarks.figures import Figure, quantile
from benchmarks.harness import Bench, running, sink, subscription, write_config
from relay.domain import ids

ACCOUNTS = 21
CALLS_PER_S = 100


async def run(bench: Bench) -> list[Figure]:
    """Measure without holds, and with the contact included."""
    bench.begin("latency", 2)
    bare_ms = await _waits_ms(bench, hold_for_contact_s=0)
    held_ms = await _waits_ms(bench, hold_for_contact_s=5)
    bench.end()
    figures: list[Figure] = []
    for waits_ms, how in ((bare_ms, "holds 0"), (held_ms, "with its contact")):
        note = f"{len(waits_ms):,} calls at {CALLS_PER_S}/s in {ACCOUNTS} accounts, `relay up` in one process"
        figures += [
            Figure(f"listed by the provider → delivered, {how}, p50", quantile(waits_ms, 0.5), "ms", 60, note=note),
            Figure(f"listed by the provider → delivered, {how}, p99", quantile(waits_ms, 0.99), "ms", 250, note=note),
        ]
    return figures


async def _waits_ms(bench: Bench, *, hold_for_contact_s: int) -> list[float]:
    """Run `relay up` against a provider with 100 calls a second in 21 accounts, each polled every second."""
    seconds = bench.scaled(22, 6)
    folder = bench.folder("latency")
    arguments = ["--accounts", str(ACCOUNTS), "--calls-per-second", str(CALLS_PER_S), "--contacts-delay-s", "0.005"]
    async with (
        sink(folder) as target,
        running("benchmarks.provider", *arguments, log=folder / "provider.log") as provider,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        config = write_config(
            folder,
            sources={
                f"a{index}": {
                    "provider": "webfones",
                    "base_url": url,
                    "api_key": f"key-{index:04d}",
                    "poll_interval_s": 1,
                    "hold_for_contact_s": hold_for_contact_s,
                    "hold_for_recording_s": 0,
                    "recordings": False,
                    "budget_share": 1.0,
                }
                for index in range(ACCOUNTS)
            },
            subscriptions={"crm": subscription(f"{target.url}/ok/crm", max_in_flight=100)},
        )
        bench.step(f"{CALLS_PER_S} calls/s for {seconds} s, contact held for {hold_for_contact_s} s")
        async with running("relay", "up", "-c", str(config), log=folder / "relay.log"):
            await asyncio.sleep(seconds)
            async with http.get(f"{url}/_observed") as response:
                observed = json.loads(await response.read())
            await asyncio.sleep(1.5)
            arrivals = await target.arrivals()
    first_poll_s = min(polls[0] for polls in observed["polls"].values())
    waits_ms: list[float] = []
    lost = 0
    for entry, shown_s in observed["shown"].items():
        key, rid = entry.split()
        if shown_s < first_poll_s + 2:
            continue  # the first polls only register the calls that were there before
        at = arrivals.get(f"/ok/crm {ids.event_id(f'a{int(key[4:])}', rid, 'call.completed')}")
        if at is None:
            lost += 1
        else:
            waits_ms.append((at - shown_s) * 1000)
    if lost or not waits_ms:
        raise RuntimeError(f"{lost} listed calls were not delivered, {len(waits_ms)} were")
    return waits_ms
