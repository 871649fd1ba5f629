"""What a subscriber costs the others: unresponsive ones, a flood for one, and the guard that checks every address."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from benchmarks import samples
from benchmarks.figures import Figure, median, quantile
from benchmarks.harness import (
    Bench,
    Process,
    Sink,
    embedded,
    role_environ,
    running,
    runtime_on,
    sink,
    subscriptions,
    write_config,
)
from benchmarks.throughput import publish
from relay.runtime import Runtime
from relay.store.lanes import LaneName

HEALTHY = tuple(f"healthy{index:02d}" for index in range(40))
# Their names sort before the healthy ones, and so the first claim takes them first.
UNRESPONSIVE = tuple(f"down{index:02d}" for index in range(10))


@contextlib.asynccontextmanager
async def _open_store(folder: Path, target: Sink) -> AsyncIterator[tuple[Path, str, Runtime]]:
    """A store with forty healthy subscriptions and ten whose endpoint never answers."""
    subs = subscriptions(target.url, HEALTHY) | subscriptions(target.url, UNRESPONSIVE, group="silent")
    config = write_config(folder, subscriptions=subs | subscriptions(target.url, ["idle"], group="idle"))
    async with embedded(folder / "store") as url, runtime_on(config, url) as runtime:
        runtime.wake_ups.send_through(runtime.arq)
        yield config, url, runtime


def _worker(folder: Path, config: Path, redis_url: str) -> contextlib.AbstractAsyncContextManager[Process]:
    return running("relay", "worker", "-c", str(config), log=folder / "worker.log", environ=role_environ(redis_url))


async def _drain(bench: Bench, others: Sequence[str], calls: int, seed: int) -> float:
    """Deliveries per second to the healthy ones while all have a backlog."""
    folder = bench.folder("drain")
    async with sink(folder) as target, _open_store(folder, target) as (config, url, runtime):
        await publish(runtime, samples.drafts(calls, sid=f"o{seed}", seed=seed), [*HEALTHY, *others])
        async with _worker(folder, config, url):
            report = await target.reached(calls * len(HEALTHY))
    span_s: float = report["last_s"] - report["first_s"]
    return float((report["count"] - 1) / span_s)


async def _paced(bench: Bench, others: Sequence[str], seconds: int, seed: int) -> list[float]:
    """Milliseconds from publishing to arrival at the healthy ones, with ten events a second for each."""
    folder = bench.folder("paced")
    events = samples.drafts(10 * seconds, sid=f"p{seed}", seed=seed)
    published_at: dict[str, float] = {}
    async with (
        sink(folder) as target,
        _open_store(folder, target) as (config, url, runtime),
        _worker(folder, config, url),
    ):
        await publish(runtime, samples.drafts(1, sid="warm"), HEALTHY)
        await target.reached(len(HEALTHY))
        await target.reset()
        for event in events:
            published_at[event.id] = time.monotonic()
            await publish(runtime, [event], [*HEALTHY, *others])
            runtime.wake_ups(LaneName.DELIVER)
            await asyncio.sleep(max(0.1 - (time.monotonic() - published_at[event.id]), 0))
        await target.reached(len(events) * len(HEALTHY))
        arrivals = await target.arrivals()
    measured = {event.id for event in events[len(events) // 4 :]}
    waits_ms: list[float] = []
    for key, at in arrivals.items():
        path, eid = key.split()
        if path.startswith("/ok/") and eid in measured:
            waits_ms.append((at - published_at[eid]) * 1000)
    return waits_ms


async def _behind_a_flood(bench: Bench, waiting: int, probes: int) -> tuple[list[float], int, int]:
    """Milliseconds until an event for an idle subscription arrives while a worker drains a flood for others.

    Also: how many deliveries were waiting at the first probe, and at the last.
    """
    folder = bench.folder("flood")
    waits: list[float] = []
    queued: list[int] = []
    async with sink(folder) as target, _open_store(folder, target) as (config, url, runtime):
        await publish(runtime, samples.drafts(waiting // len(HEALTHY), sid="flood"), HEALTHY)
        async with _worker(folder, config, url):
            await target.reached(waiting // 100)
            for event in samples.drafts(probes, sid="probe", seed=9):
                queued.append(waiting - (await target.report())["ok"]["count"])
                published_at = time.monotonic()
                await publish(runtime, [event], ["idle"])
                runtime.wake_ups(LaneName.DELIVER)
                await target.reached(len(waits) + 1, group="idle")
                at = (await target.arrivals("idle"))[f"/idle/idle {event.id}"]
                waits.append((at - published_at) * 1000)
    if queued[-1] <= 0:
        raise RuntimeError("the flood was drained before the last probe")
    return waits, queued[0], queued[-1]


async def run(bench: Bench) -> list[Figure]:
    """Measure with and without the others, in turns."""
    rounds, calls = bench.scaled(3, 1), bench.scaled(400, 20)
    seconds, flood, probes = bench.scaled(12, 4), bench.scaled(140_000, 40_000), bench.scaled(20, 3)
    bench.begin("fairness", 4 * rounds + 1)
    drains: list[tuple[float, float]] = []
    for number in range(rounds):
        bench.step(f"round {number + 1}: the healthy alone")
        alone = await _drain(bench, (), calls, number)
        bench.step(f"round {number + 1}: ten of fifty unresponsive")
        drains.append((alone, await _drain(bench, UNRESPONSIVE, calls, number)))
    p99s: list[tuple[float, float]] = []
    for number in range(rounds):
        bench.step(f"round {number + 1}, at a steady pace: the healthy alone")
        quiet = await _paced(bench, (), seconds, number)
        bench.step(f"round {number + 1}, at a steady pace: ten of fifty unresponsive")
        p99s.append((quantile(quiet, 0.99), quantile(await _paced(bench, UNRESPONSIVE, seconds, number), 0.99)))
    bench.step(f"behind {flood:,} for others")
    waits, most, least = await _behind_a_flood(bench, flood, probes)
    bench.end()
    rates = f"{median([pair[0] for pair in drains]):,.0f}/s alone, {median([pair[1] for pair in drains]):,.0f}/s beside"
    pairs = ", ".join(f"{alone:.0f} → {beside:.0f}" for alone, beside in p99s)
    probed = f"{probes} probes, p50 {median(waits):.0f} ms; {most:,} waiting at the first, {least:,} at the last"
    return [
        Figure(
            "throughput of 40 subscriptions beside 10 unresponsive ones ÷ alone",
            median([beside / alone for alone, beside in drains]),
            "×",
            0.9,
            "at least",
            note=f"{rounds} rounds of {calls * len(HEALTHY):,} deliveries: {rates}",
        ),
        Figure(
            "p99 latency of their deliveries, beside ÷ alone",
            median([beside / alone for alone, beside in p99s]),
            "×",
            2,
            note=f"400 deliveries/s for {seconds} s, alone → beside in ms by round: {pairs}",
        ),
        Figure(
            "an event for an idle subscription behind 100,000 for others, slowest",
            max(waits),
            "ms",
            250,
            note=probed,
        ),
    ]


async def guard(bench: Bench) -> list[Figure]:
    """Send to a busy host with the guard and without it, in turns within one process."""
    turns, posts = bench.scaled(60, 6), bench.scaled(2_000, 1_000)
    bench.begin("guard", 1)
    folder = bench.folder("guard")
    async with sink(folder) as target:
        bench.step(f"{turns} turns each")
        arguments = ["--url", f"{target.url}/ok/one", "--posts", str(posts), "--turns", str(turns)]
        async with running("benchmarks.baselines", "sender", *arguments, log=folder / "sender.log") as sender:
            took_s = await sender.line(within_s=300)
    bench.end()
    costs = [100 * (1 - free / guarded) for guarded, free in zip(took_s["guarded"], took_s["open"], strict=True)]
    rate = posts / median(took_s["guarded"])
    note = f"{turns} turns of {posts:,} posts each, 100 at once, connections kept: {rate:,.0f}/s guarded"
    return [Figure("throughput that the address guard costs on busy hosts", median(costs), "%", 5, note=note)]
