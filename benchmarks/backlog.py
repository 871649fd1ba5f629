"""What a claim costs with very many deliveries waiting: if it grew, a flood for one would slow all."""

import contextlib
import time

from redis.asyncio import Redis

from benchmarks import samples
from benchmarks.figures import Figure, median
from benchmarks.harness import Bench, embedded, runtime_on, subscriptions, write_config
from benchmarks.throughput import publish
from relay.queue import keys
from relay.queue.settlement import Retry
from relay.runtime import Runtime
from relay.store.lanes import LaneName

CLAIM = 50


async def _claim_ms(runtime: Runtime) -> float:
    """Time one claim; everything is released again."""
    lane = runtime.lanes[LaneName.DELIVER]
    started = time.perf_counter()
    reply = await lane.exchange(want=CLAIM)
    took_ms = (time.perf_counter() - started) * 1000
    if len(reply.claims) != CLAIM:
        raise RuntimeError(f"{len(reply.claims)} claims were returned, not {CLAIM}")
    await lane.exchange([(claim, Retry()) for claim in reply.claims])
    return took_ms


async def run(bench: Bench) -> list[Figure]:
    """Claim in turns from a lane with a thousand waiting and from one with a hundred thousand, on one server."""
    few, many, rounds = 1_000, bench.scaled(100_000, 5_000), bench.scaled(400, 50)
    bench.begin("backlog", 3)
    folder = bench.folder("backlog")
    names = [f"s{index:02d}" for index in range(50)]
    config = write_config(folder, subscriptions=subscriptions("http://127.0.0.1:9", names))
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(embedded(folder / "store"))
        short = await stack.enter_async_context(runtime_on(config, url))
        long = await stack.enter_async_context(runtime_on(config, url.replace("db=0", "db=1")))
        bench.step(f"{few:,} and {many:,} deliveries")
        events = samples.drafts(max(few, many // len(names)), sid="main")
        await publish(short, events[: few // len(names)], names)
        await publish(long, events[: many // len(names)], names)
        bench.step(f"{rounds} claims from each")
        pairs = [(await _claim_ms(short), await _claim_ms(long)) for _ in range(rounds)]
        async with Redis.from_url(url.replace("db=0", "db=1")) as redis:
            waiting = sum([await redis.zcard(keys.waiting("deliver", name)) for name in names])
    bench.end()
    few_ms, many_ms = median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs])
    note = f"{CLAIM} per claim: {few_ms:.2f} ms with {few:,} waiting, {many_ms:.2f} ms with {waiting:,}"
    return [
        Figure(
            f"a claim with {many:,} deliveries waiting ÷ with {few:,}",
            median([slow / fast for fast, slow in pairs]),
            "×",
            1.5,
            note=note,
        )
    ]
