"""Memory of the processes, memory of the store, requests to the provider, and what an idle relay costs."""

import asyncio
import random
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from redis.asyncio import Redis

from benchmarks.figures import Figure
from benchmarks.harness import (
    Bench,
    Sink,
    children,
    cpu_s,
    rss_bytes,
    running,
    sink,
    subscription,
    subscriptions,
    write_config,
)
from relay.queue import keys
from relay.simulator.timeline import Habits, calls, people
from relay.store.embedded import EmbeddedStore

MB = 1_000_000
_LANES = ("enrich", "contacts", "record", "deliver")


def source(url: str, key: str, **options: Any) -> dict[str, Any]:
    """A source that reads an account of the fake provider."""
    return {"provider": "webfones", "base_url": url, "api_key": key, **options}


async def control(http: aiohttp.ClientSession, url: str, **message: Any) -> dict[str, Any]:
    """Send the fake provider a control message, if there is one; gives its state."""
    async with http.request("POST" if message else "GET", f"{url}/_control", json=message or None) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        state: dict[str, Any] = await response.json()
        return state


async def polled(http: aiohttp.ClientSession, url: str, keys: list[str], *, times: int = 1) -> None:
    """Wait until each account has been polled that many times."""
    async with asyncio.timeout(60):
        while True:
            async with http.get(f"{url}/_observed") as response:
                polls = (await response.json())["polls"]
            if all(len(polls.get(key, ())) >= times for key in keys):
                return
            await asyncio.sleep(0.1)


def store_of(folder: Path) -> Redis:
    """Connect to the embedded store of the `relay up` in a folder."""
    client: Redis = Redis.from_url(EmbeddedStore(folder / "data").url)
    return client


async def idle_lanes(redis: Redis, *, within_s: float = 300) -> None:
    """Wait until nothing is queued."""
    async with asyncio.timeout(within_s):
        while sum([await redis.zcard(keys.index(lane, standing)) for lane in _LANES for standing in keys.STANDINGS]):  # noqa: ASYNC110 - the store sends no event
            await asyncio.sleep(0.2)


async def recording(bench: Bench) -> list[Figure]:
    """Fetch one long recording, and sample the memory of the process every 10 ms."""
    size_bytes = bench.scaled(300, 20) * MB
    bench.begin("recording", 2)
    folder = bench.folder("recording")
    async with (
        sink(folder) as target,
        running("benchmarks.provider", log=folder / "provider.log") as provider,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        config = write_config(
            folder,
            sources={"main": source(url, "key-0000", poll_interval_s=1, hold_for_recording_s=0)},
            subscriptions={"crm": subscription(f"{target.url}/ok/crm")},
        )
        async with running("relay", "up", "-c", str(config), log=folder / "relay.log") as relay:
            await polled(http, url, ["key-0000"])
            bench.step("a short recording, to warm up")
            await _call_with_audio(http, url, 1, 1 * MB)
            await target.reached(2)
            await asyncio.sleep(1)
            before = rss_bytes(relay.pid)
            bench.step(f"a recording of {size_bytes // MB} MB")
            await _call_with_audio(http, url, 2, size_bytes)
            peak = before
            watch = asyncio.create_task(target.reached(4, within_s=300))
            while not watch.done():
                peak = max(peak, rss_bytes(relay.pid))
                await asyncio.sleep(0.01)
            await watch
    stored = sum(path.stat().st_size for path in (folder / "recordings").rglob("*.wav"))
    if stored != size_bytes + MB:
        raise RuntimeError(f"{stored} bytes of audio were stored, not {size_bytes + MB}")
    bench.end()
    note = f"`relay up`: {before / MB:.0f} MB before, {peak / MB:.0f} MB at most"
    return [Figure(f"memory that a recording of {size_bytes // MB} MB adds", (peak - before) / MB, "MB", 30, note=note)]


async def _call_with_audio(http: aiohttp.ClientSession, url: str, rid: int, size_bytes: int) -> None:
    now = datetime.now(UTC).isoformat()
    call = {"key": "key-0000", "rid": rid, "talk_s": 0, "recording_at": now, "recording_bytes": size_bytes}
    await control(http, url, calls=[call])


async def memory(bench: Bench) -> list[Figure]:
    """Take 10,000 calls through the whole relay and measure how the store has grown."""
    count, accounts = bench.scaled(10_000, 300), bench.scaled(30, 3)
    bench.begin("memory", 4)
    folder = bench.folder("memory")
    arguments = ("--accounts", str(accounts))
    async with (
        sink(folder) as target,
        running("benchmarks.provider", *arguments, log=folder / "provider.log") as provider,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        keys = [f"key-{index:04d}" for index in range(accounts)]
        config = write_config(
            folder,
            sources={
                f"a{index}": source(url, key, poll_interval_s=3, budget_share=1.0) for index, key in enumerate(keys)
            },
            subscriptions=subscriptions(target.url, ["one", "two"], max_in_flight=100),
        )
        async with running("relay", "up", "-c", str(config), log=folder / "relay.log"):
            bench.step("first polls")
            await polled(http, url, keys)
            async with store_of(folder) as redis:
                await idle_lanes(redis)
                before = int((await redis.info("memory"))["used_memory"])
                bench.step(f"{count:,} calls, contacts, recordings, deliveries")
                recorded = await _busy_day(http, url, keys, count)
                deliveries = await _all_delivered(target, redis, 2 * (count + recorded))
                bench.step("what is in the store")
                after = int((await redis.info("memory"))["used_memory"])
                size_by_family = await _size_by_family(redis)
    bench.end()
    biggest = sorted(size_by_family.items(), key=lambda pair: -pair[1])[:5]
    shares = ", ".join(f"{name} {size / MB:.1f}" for name, size in biggest)
    note = f"{count:,} calls, {recorded:,} with audio, {deliveries:,} deliveries; MB by key: {shares}"
    return [
        Figure("store per 10,000 calls × 2 subscriptions", (after - before) / MB * 10_000 / count, "MB", 25, note=note)
    ]


async def _busy_day(http: aiohttp.ClientSession, url: str, keys: list[str], count: int) -> int:
    """Let all calls end now; gives how many have a recording. 30 % are unanswered, 40 % from strangers."""
    habits = Habits(unanswered=0.3, recorded=1.0)
    now = datetime.now(UTC)
    recorded = 0
    for index, key in enumerate(keys):
        cards = [
            {
                "key": key,
                "fields": {
                    "firstname": person.firstname,
                    "lastname": person.lastname,
                    "organization": person.organization,
                    "mobile_phone": person.number,
                    "email": person.email,
                    "external_id": f"CRM-{person.number[-6:]}",
                },
            }
            for person in people(index, habits=habits)
            if not person.stranger
        ]
        plans = calls(now, seed=index, habits=habits)
        share = count // len(keys) + (index < count % len(keys))
        listed = []
        for plan in (next(plans) for _ in range(share)):
            recorded += plan.answered
            listed.append(
                {
                    "key": key,
                    "rid": plan.rid + 100_000 * index,
                    "started_at": now.isoformat(),
                    "ended_at": now.isoformat(),
                    "visible_at": now.isoformat(),
                    "recording_at": now.isoformat() if plan.answered else None,
                    "recording_bytes": 16_044,
                    "direction": plan.direction,
                    "disposition": plan.disposition,
                    "outside_number": plan.outside_number,
                    "outside_name": plan.outside_name,
                    "inside_number": plan.inside_number,
                    "extension": plan.extension,
                }
            )
        await control(http, url, contacts=cards, calls=listed)
    return recorded


async def _all_delivered(target: Sink, redis: Redis, least: int) -> int:
    """Wait until nothing is left to do; gives how many deliveries there were (a late contact adds one for its call)."""
    await target.reached(least, within_s=400)
    await idle_lanes(redis)
    delivered = int((await target.report())["ok"]["distinct"])
    if delivered < least:
        raise RuntimeError(f"at least {least} deliveries were expected, there were {delivered}")
    return delivered


async def _size_by_family(redis: Redis) -> dict[str, int]:
    """Memory by the second part of the key."""
    sizes_bytes: dict[str, int] = defaultdict(int)
    names = [name async for name in redis.scan_iter(count=5000)]
    for at in range(0, len(names), 5000):
        part = names[at : at + 5000]
        async with redis.pipeline(transaction=False) as pipe:
            for name in part:
                pipe.memory_usage(name, samples=0)
            sizes = await pipe.execute()
        for name, size in zip(part, sizes, strict=True):
            sizes_bytes[name.split(b":")[1].decode()] += size or 0
    return sizes_bytes


async def idle(bench: Bench) -> list[Figure]:
    """Observe a `relay up` that has one account, one subscription and nothing to do."""
    seconds = bench.scaled(40, 5)
    bench.begin("idle", 1)
    folder = bench.folder("idle")
    async with (
        sink(folder) as target,
        running("benchmarks.provider", log=folder / "provider.log") as provider,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        config = write_config(
            folder,
            sources={"main": source(url, "key-0000")},
            subscriptions={"crm": subscription(f"{target.url}/ok/crm")},
        )
        async with running("relay", "up", "-c", str(config), log=folder / "relay.log") as relay:
            await polled(http, url, ["key-0000"])
            await asyncio.sleep(3)
            pids = [relay.pid, *children(relay.pid)]
            bench.step(f"idle for {seconds} s")
            began = asyncio.get_running_loop().time()
            used = {pid: cpu_s(pid) for pid in pids}
            await asyncio.sleep(seconds)
            elapsed_s = asyncio.get_running_loop().time() - began
            shares = [100 * (cpu_s(pid) - used[pid]) / elapsed_s for pid in pids]
            sizes = [rss_bytes(pid) / MB for pid in pids]
    bench.end()
    note = f"{seconds} s from /proc, one account polled every 30 s; relay"
    return [
        Figure(
            "processor time of an idle `relay up` and its store",
            sum(shares),
            "% of a core",
            3,
            note=f"{note} {shares[0]:.2f}, store {sum(shares[1:]):.2f}",
        ),
        Figure(
            "resident memory of an idle `relay up` and its store",
            sum(sizes),
            "MB",
            150,
            note=f"{note} {sizes[0]:.0f}, store {sum(sizes[1:]):.0f}",
        ),
    ]


async def requests(bench: Bench) -> list[Figure]:
    """Play 15 minutes in steps of 30 s: after each, everything that is due later moves 30 s nearer.

    Calls and their recordings appear step by step. Nothing else is sped up.
    """
    steps, count, answered = bench.scaled(30, 6), bench.scaled(500, 100), bench.scaled(200, 40)
    bench.begin("requests", steps)
    folder = bench.folder("requests")
    rng = random.Random(5)
    async with (
        sink(folder) as target,
        running("benchmarks.provider", log=folder / "provider.log") as provider,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        config = write_config(
            folder,
            sources={"main": source(url, "key-0000")},
            subscriptions={"crm": subscription(f"{target.url}/ok/crm")},
        )
        async with running("relay", "up", "-c", str(config), log=folder / "relay.log"), store_of(folder) as redis:
            await polled(http, url, ["key-0000"])
            first = (await control(http, url))["accounts"]["key-0000"]["requests"]
            start = datetime.now(UTC)
            plans = _quarter_of_an_hour(rng, start, count, answered, steps)
            waiting: list[dict[str, Any]] = []
            for step in range(steps):
                bench.step(f"minute {step / 2:g}")
                now = datetime.now(UTC).isoformat()
                late = [call | {"recording_at": now} for call in waiting]
                fresh = [call | {"visible_at": now} for call in plans[step]]
                waiting = [call for call in fresh if call["recording_at"] and _audio_is_late(rng)]
                pending = {call["rid"] for call in waiting}
                fresh = [call | {"recording_at": None} if call["rid"] in pending else call for call in fresh]
                await control(http, url, calls=[*late, *fresh])
                await _thirty_seconds_pass(redis)
                await polled(http, url, ["key-0000"], times=step + 2)
                await _lanes_idle(redis)
            await control(http, url, calls=[call | {"recording_at": now} for call in waiting])
            for _ in range(3):
                await _thirty_seconds_pass(redis, poll=False)
                await _lanes_idle(redis)
            await target.reached(count + answered, within_s=60)
            last = (await control(http, url))["accounts"]["key-0000"]["requests"]
    bench.end()
    sent = Counter(last) - Counter(first)
    contacts = sent["search"] + sent["changes"]
    note = f"{count} new calls, {answered} answered, in 15 minutes played at 30 s a step; all delivered"
    return [
        Figure("requests for the call list", sent["records"], "", steps, note=note),
        Figure("requests for contacts", contacts, "", steps, note=note),
        Figure("requests for recordings", sent["recording"], "", 1.1 * answered, note=note),
    ]


def _quarter_of_an_hour(
    rng: random.Random, start: datetime, count: int, answered: int, steps: int
) -> list[list[dict[str, Any]]]:
    """The calls that appear in each step."""
    plans: list[list[dict[str, Any]]] = [[] for _ in range(steps)]
    answered_indexes = set(rng.sample(range(count), answered))
    for index in range(count):
        step = index * steps // count
        at = (start + timedelta(seconds=1 + step * 30 + rng.random() * 28)).isoformat()
        plans[step].append(
            {
                "key": "key-0000",
                "rid": 1000 + index,
                "started_at": at,
                "ended_at": at,
                "outside_number": f"(212) {200 + index:03d}-{rng.randrange(10_000):04d}",
                "disposition": "ANSWERED" if index in answered_indexes else "NO ANSWER",
                "recording_at": start.isoformat() if index in answered_indexes else None,
            }
        )
    return plans


def _audio_is_late(rng: random.Random) -> bool:
    """Whether a row is read before its recording is ready: up to 45 s after the end, the row 15 to 60 s and a poll."""
    return rng.uniform(0, 45) > rng.uniform(15, 60) + rng.uniform(0, 30)


_SCHEDULES = ("relay:lane:{}:*", "relay:group:{}:*", "relay:index:{}:*")


async def _thirty_seconds_pass(redis: Redis, *, poll: bool = True) -> None:
    """Move all that is due later 30 s nearer, and the times that contacts and the budget keep 30 s back."""
    lanes = ("poll", "enrich", "contacts", "record") if poll else ("enrich", "contacts", "record")
    for pattern in (pattern.format(lane) for lane in lanes for pattern in _SCHEDULES):
        for name in [key.decode() async for key in redis.scan_iter(pattern)]:
            for member in await redis.zrange(name, 0, -1):
                await redis.zincrby(name, -30_000, member)
    async for name in redis.scan_iter("relay:contacts:main"):
        if await redis.hexists(name, "checked_at"):  # type: ignore[misc]  # typed for both clients
            await redis.hincrby(name, "checked_at", -30)  # type: ignore[misc]
    async for name in redis.scan_iter("relay:budget:*"):
        if await redis.hexists(name, "tat"):  # type: ignore[misc]
            await redis.hincrbyfloat(name, "tat", -30_000)  # type: ignore[misc]


async def _lanes_idle(redis: Redis) -> None:
    """Wait until nothing is leased and nothing is due."""
    async with asyncio.timeout(60):
        while True:
            seconds, micros = await redis.time()
            now_ms = seconds * 1000 + micros // 1000
            lanes = [(lane, standing) for lane in ("enrich", "contacts", "record") for standing in keys.STANDINGS]
            busy = [await redis.zcount(keys.index(*lane), "-inf", now_ms) for lane in lanes]
            held = [await redis.zcard(key) async for key in redis.scan_iter("relay:leased:*") if b":poll:" not in key]
            if not any(busy) and not any(held):
                return
            await asyncio.sleep(0.05)
