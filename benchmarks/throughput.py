"""One worker process draining deliveries, compared with a bare loop and a plain relay; the sink times all of them.

Each round runs every side once, so that other load on the machine affects all of them; ratios are taken within a round.
The rate is (posts - 1) / (last arrival - first arrival).
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from redis.asyncio import Redis

from benchmarks import samples
from benchmarks.baselines import plain_redis
from benchmarks.figures import Figure, median
from benchmarks.harness import (
    Bench,
    Sink,
    embedded,
    role_environ,
    running,
    runtime_on,
    sink,
    subscriptions,
    write_config,
)
from relay.events.decide import EventDraft
from relay.queue import keys
from relay.runtime import Runtime
from relay.store.events import NewEvent
from workers.runners import DELIVER_CONCURRENCY

# Fifty with the default ten posts in flight each: more than the 200 that one worker has in flight.
SUBSCRIBERS = tuple(f"s{index:02d}" for index in range(50))


async def publish(runtime: Runtime, events: Sequence[EventDraft], subs: Sequence[str], *, at_once: int = 16) -> None:
    """Publish events as the relay does, each to the same subscriptions."""
    pending = iter(events)

    async def publish_pending() -> None:
        for event in pending:
            ordering_key = event.document["data"]["call"]["id"]
            await runtime.store.events.publish(NewEvent(event.id, event.document, subs), ordering_key=ordering_key)

    await asyncio.gather(*(publish_pending() for _ in range(at_once)))


async def _rate(target: Sink, posts: int) -> float:
    report = await target.reached(posts)
    if report["distinct"] != posts:
        raise RuntimeError(f"{posts} events were expected, {report['distinct']} were delivered")
    span_s: float = report["last_s"] - report["first_s"]
    return (posts - 1) / span_s


class Drain:
    """Each side draining the same load, on one store."""

    def __init__(self, folder: Path, target: Sink, redis_url: str) -> None:
        self._folder = folder
        self._target = target
        self._redis_url = redis_url
        self._config = write_config(folder, subscriptions=subscriptions(target.url, SUBSCRIBERS))
        self._seed = 0

    def _events(self, count: int) -> Sequence[EventDraft]:
        self._seed += 1
        return samples.drafts(count, sid=f"source{self._seed}", seed=self._seed)

    async def relay(self, calls: int, *, fsync: str = "always") -> float:
        """`relay worker`, as it is deployed, on a store with this `appendfsync`."""
        events = self._events(calls)
        async with Redis.from_url(self._redis_url) as redis:
            await redis.config_set("appendfsync", fsync)
        async with runtime_on(self._config, self._redis_url) as runtime:
            await publish(runtime, events, SUBSCRIBERS)
        await self._target.reset()
        async with running(
            "relay",
            "worker",
            "-c",
            str(self._config),
            log=self._folder / "worker.log",
            environ=role_environ(self._redis_url),
        ):
            rate = await _rate(self._target, calls * len(SUBSCRIBERS))
        async with Redis.from_url(self._redis_url) as redis:
            left = sum([await redis.zcard(keys.index("deliver", standing)) for standing in keys.STANDINGS])
            if left:
                raise RuntimeError(f"{left} subscriptions still have deliveries waiting")
        return rate

    async def bare(self, calls: int) -> float:
        """The bare loop, without a store."""
        events = self._events(calls)
        bodies = self._folder / "bodies.jsonl"
        bodies.write_text("".join(json.dumps(event.document, separators=(",", ":")) + "\n" for event in events))
        await self._target.reset()
        urls = ",".join(f"{self._target.url}/ok/{name}" for name in SUBSCRIBERS)
        async with running(
            "benchmarks.baselines",
            "bare",
            "--bodies",
            str(bodies),
            "--urls",
            urls,
            "--at-once",
            str(DELIVER_CONCURRENCY),
            log=self._folder / "bare.log",
        ):
            return await _rate(self._target, calls * len(SUBSCRIBERS))

    async def plain(self, calls: int) -> float:
        """The plain relay, with one arq job per delivery."""
        redis = plain_redis(self._redis_url)
        await redis.config_set("appendfsync", "always")
        for event in self._events(calls):
            body = json.dumps(event.document, separators=(",", ":"))
            jobs = (
                redis.enqueue_job("deliver", f"{self._target.url}/ok/{name}", event.id, body) for name in SUBSCRIBERS
            )
            await asyncio.gather(*jobs)
        await redis.aclose(close_connection_pool=True)
        await self._target.reset()
        async with running("benchmarks.baselines", "arq", "--redis", self._redis_url, log=self._folder / "arq.log"):
            return await _rate(self._target, calls * len(SUBSCRIBERS))


async def run(bench: Bench) -> list[Figure]:
    """Compare all sides."""
    rounds, calls, plain_calls = bench.scaled(5, 1), bench.scaled(600, 40), bench.scaled(120, 12)
    bench.begin("throughput", 5 * rounds)
    folder = bench.folder("throughput")
    rates: dict[str, list[float]] = {name: [] for name in ("relay", "bare", "plain", "everysec", "no")}
    async with sink(folder) as target, embedded(folder / "store") as url:
        drain = Drain(folder, target, url)
        for number in range(rounds):
            bench.step(f"round {number + 1}: relay")
            rates["relay"].append(await drain.relay(calls))
            bench.step(f"round {number + 1}: bare loop")
            rates["bare"].append(await drain.bare(calls))
            bench.step(f"round {number + 1}: plain relay on arq")
            rates["plain"].append(await drain.plain(plain_calls))
            for fsync in ("everysec", "no"):
                bench.step(f"round {number + 1}: relay with appendfsync {fsync}")
                rates[fsync].append(await drain.relay(calls, fsync=fsync))
    bench.end()
    posts = calls * len(SUBSCRIBERS)
    shown_rates = " · ".join(f"{name} {median(rates[name]):,.0f}/s" for name in ("relay", "bare", "plain"))
    return [
        Figure(
            "one worker draining deliveries ÷ a bare loop that signs and posts",
            median([ours / theirs for ours, theirs in zip(rates["relay"], rates["bare"], strict=True)]),
            "×",
            0.55,
            "at least",
            f"{rounds} rounds of {posts:,} posts, 200 at once: {shown_rates}",
        ),
        Figure(
            "one worker draining deliveries ÷ a plain relay with one arq job each",
            median([ours / theirs for ours, theirs in zip(rates["relay"], rates["plain"], strict=True)]),
            "×",
            4,
            "at least",
            "the same rounds; both on a store with appendfsync always",
        ),
        *(
            Figure(
                f"the same drain with appendfsync {fsync} ÷ always",
                median([faster / ours for faster, ours in zip(rates[fsync], rates["relay"], strict=True)]),
                "×",
                note=f"{median(rates[fsync]):,.0f}/s",
            )
            for fsync in ("everysec", "no")
        ),
    ]
