"""What others do to a subscriber: the dead ones, the flooded ones, and the guard that looks at every address."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from benchmarks import office
from benchmarks.figures import Figure, median, quantile
from benchmarks.house import (
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

HEALTHY = tuple(f"good{index:02d}" for index in range(40))
DEAD = tuple(f"dead{index:02d}" for index in range(10))


@contextlib.asynccontextmanager
async def _place(folder: Path, target: Sink) -> AsyncIterator[tuple[Path, str, Runtime]]:
    """A store with forty healthy subscriptions and ten that are taken and never answered."""
    subs = subscriptions(target.url, HEALTHY) | subscriptions(target.url, DEAD, group="hole")
    config = write_config(folder, subscriptions=subs | subscriptions(target.url, ["idle"], group="idle"))
    async with embedded(folder / "store") as url, runtime_on(config, url) as runtime:
        runtime.wake_ups.send_through(runtime.arq)
        yield config, url, runtime


def _worker(folder: Path, config: Path, redis_url: str) -> contextlib.AbstractAsyncContextManager[Process]:
    return running("relay", "worker", "-c", str(config), log=folder / "worker.log", environ=role_environ(redis_url))


async def _drain(bench: Bench, dead: Sequence[str], calls: int, seed: int) -> float:
    """Deliveries a second that the healthy ones get while everybody has a backlog."""
    folder = bench.room("drain")
    async with sink(folder) as target, _place(folder, target) as (config, url, runtime):
        await publish(runtime, office.drafts(calls, sid=f"o{seed}", seed=seed), [*HEALTHY, *dead])
        async with _worker(folder, config, url):
            report = await target.reached(calls * len(HEALTHY))
    span_s: float = report["last_s"] - report["first_s"]
    return float((report["count"] - 1) / span_s)


async def _paced(bench: Bench, dead: Sequence[str], seconds: int, seed: int) -> list[float]:
    """Milliseconds from publishing to arrival for the healthy ones, ten events a second for everybody."""
    folder = bench.room("paced")
    events = office.drafts(10 * seconds, sid=f"p{seed}", seed=seed)
    made: dict[str, float] = {}
    async with (
        sink(folder) as target,
        _place(folder, target) as (config, url, runtime),
        _worker(folder, config, url),
    ):
        await publish(runtime, office.drafts(1, sid="warm"), HEALTHY)
        await target.reached(len(HEALTHY))
        await target.reset()
        for event in events:
            made[event.id] = time.monotonic()
            await publish(runtime, [event], [*HEALTHY, *dead])
            runtime.wake_ups(LaneName.DELIVER)
            await asyncio.sleep(max(0.1 - (time.monotonic() - made[event.id]), 0))
        await target.reached(len(events) * len(HEALTHY))
        arrivals = await target.arrivals()
    settled = {event.id for event in events[len(events) // 4 :]}
    waits_ms: list[float] = []
    for key, at in arrivals.items():
        path, eid = key.split()
        if path.startswith("/ok/") and eid in settled:
            waits_ms.append((at - made[eid]) * 1000)
    return waits_ms


async def _behind_a_flood(bench: Bench, waiting: int, probes: int) -> tuple[list[float], int, int]:
    """Milliseconds until an event for an idle subscription is there while a worker drains a flood for others.

    With them: how many were waiting at the first probe, and at the last.
    """
    folder = bench.room("flood")
    waits: list[float] = []
    queued: list[int] = []
    async with sink(folder) as target, _place(folder, target) as (config, url, runtime):
        await publish(runtime, office.drafts(waiting // len(HEALTHY), sid="flood"), HEALTHY)
        async with _worker(folder, config, url):
            await target.reached(waiting // 100)
            for event in office.drafts(probes, sid="probe", seed=9):
                queued.append(waiting - (await target.report())["ok"]["count"])
                made = time.monotonic()
                await publish(runtime, [event], ["idle"])
                runtime.wake_ups(LaneName.DELIVER)
                await target.reached(len(waits) + 1, group="idle")
                at = (await target.arrivals("idle"))[f"/idle/idle {event.id}"]
                waits.append((at - made) * 1000)
    if queued[-1] <= 0:
        raise RuntimeError("the flood had run off before the last probe")
    return waits, queued[0], queued[-1]


async def run(bench: Bench) -> list[Figure]:
    """Measure each with and without the others, by turns."""
    rounds, calls = bench.scaled(3, 1), bench.scaled(400, 20)
    seconds, flood, probes = bench.scaled(12, 4), bench.scaled(140_000, 40_000), bench.scaled(20, 3)
    bench.begin("fairness", 4 * rounds + 1)
    drains: list[tuple[float, float]] = []
    for number in range(rounds):
        bench.step(f"round {number + 1}: the healthy alone")
        alone = await _drain(bench, (), calls, number)
        bench.step(f"round {number + 1}: ten of fifty black-holed")
        drains.append((alone, await _drain(bench, DEAD, calls, number)))
    p99s: list[tuple[float, float]] = []
    for number in range(rounds):
        bench.step(f"round {number + 1}, at a steady pace: the healthy alone")
        quiet = await _paced(bench, (), seconds, number)
        bench.step(f"round {number + 1}, at a steady pace: ten of fifty black-holed")
        p99s.append((quantile(quiet, 0.99), quantile(await _paced(bench, DEAD, seconds, number), 0.99)))
    bench.step(f"behind {flood:,} for others")
    waits, most, least = await _behind_a_flood(bench, flood, probes)
    bench.end()
    rates = f"{median([pair[0] for pair in drains]):,.0f}/s alone, {median([pair[1] for pair in drains]):,.0f}/s beside"
    pairs = ", ".join(f"{alone:.0f} → {beside:.0f}" for alone, beside in p99s)
    probed = (
        f"{probes} probes, half within {median(waits):.0f} ms; {most:,} waiting at the first, {least:,} at the last"
    )
    return [
        Figure(
            "throughput of 40 subscriptions beside 10 black-holed ones ÷ alone",
            median([beside / alone for alone, beside in drains]),
            "×",
            0.9,
            "at least",
            note=f"{rounds} rounds of {calls * len(HEALTHY):,} deliveries: {rates}",
        ),
        Figure(
            "99 % of their deliveries, beside ÷ alone",
            median([beside / alone for alone, beside in p99s]),
            "×",
            2,
            note=f"400 deliveries/s for {seconds} s, alone → beside in ms by round: {pairs}",
        ),
        Figure(
            "an event for an idle subscription behind 100,000 for others, the slowest",
            max(waits),
            "ms",
            250,
            note=probed,
        ),
    ]


async def guard(bench: Bench) -> list[Figure]:
    """Send to a hot host with the guard and without it, by turns in one process."""
    turns, posts = bench.scaled(60, 6), bench.scaled(2_000, 1_000)
    bench.begin("guard", 1)
    folder = bench.room("guard")
    async with sink(folder) as target:
        bench.step(f"{turns} turns each")
        arguments = ["--url", f"{target.url}/ok/one", "--posts", str(posts), "--turns", str(turns)]
        async with running("benchmarks.contestants", "sender", *arguments, log=folder / "sender.log") as sender:
            took_s = await sender.line(within_s=300)
    bench.end()
    costs = [100 * (1 - free / guarded) for guarded, free in zip(took_s["guarded"], took_s["open"], strict=True)]
    rate = posts / median(took_s["guarded"])
    note = f"{turns} turns of {posts:,} posts each, 100 at once, connections kept: {rate:,.0f}/s guarded"
    return [Figure("throughput that the address guard costs on hot hosts", median(costs), "%", 5, note=note)]
