"""What one poller handles: an unchanged page, and very many accounts. Both with `relay poller` as it is deployed."""

import asyncio
import json
from datetime import UTC, datetime
from itertools import pairwise

import aiohttp

from benchmarks.figures import Figure, quantile
from benchmarks.footprint import control, polled, source
from benchmarks.harness import Bench, cpu_s, embedded, role_environ, running, write_config


async def page(bench: Bench) -> list[Figure]:
    """Poll a list of 2,000 unchanged calls once a second; the processor time of the process per poll."""
    rows, polls = bench.scaled(2000, 200), bench.scaled(20, 3)
    bench.begin("page", 2)
    folder = bench.folder("page")
    async with (
        running("benchmarks.provider", log=folder / "provider.log") as provider,
        embedded(folder / "store") as redis_url,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        now = datetime.now(UTC).isoformat()
        rows_listed = [
            {
                "key": "key-0000",
                "rid": 1000 + index,
                "started_at": now,
                "ended_at": now,
                "visible_at": now,
                "outside_number": f"({200 + index // 100}) 555-{index % 100:04d}",
                "outside_name": f"CALLER {index}",
            }
            for index in range(rows)
        ]
        await control(http, url, calls=rows_listed)
        config = write_config(folder, sources={"main": source(url, "key-0000", poll_interval_s=1)})
        environ = role_environ(redis_url)
        bench.step("first polls")
        async with running("relay", "poller", "-c", str(config), log=folder / "relay.log", environ=environ) as poller:
            await polled(http, url, ["key-0000"], times=4)
            bench.step(f"{polls} polls of {rows} rows")
            began = cpu_s(poller.pid)
            await polled(http, url, ["key-0000"], times=4 + polls)
            used_ms = 1000 * (cpu_s(poller.pid) - began) / polls
    bench.end()
    note = f"`relay poller`, all it does per poll: HTTP, JSON, parsing, hashing, comparing; {polls} polls"
    return [Figure(f"processor time of an unchanged page of {rows:,} rows", used_ms, "ms", 60, note=note)]


async def fleet(bench: Bench) -> list[Figure]:
    """Poll 3,000 accounts every 30 s; a poll's lateness is its distance from the one before, less the interval."""
    accounts, seconds, interval_s = bench.scaled(3000, 100), bench.scaled(95, 12), bench.scaled(30, 5)
    bench.begin("fleet", 2)
    folder = bench.folder("fleet")
    arguments = ("--accounts", str(accounts))
    async with (
        running("benchmarks.provider", *arguments, log=folder / "provider.log") as provider,
        embedded(folder / "store") as redis_url,
        aiohttp.ClientSession() as http,
    ):
        url = (await provider.line())["url"]
        config = write_config(
            folder,
            sources={
                f"a{index:04d}": source(url, f"key-{index:04d}", poll_interval_s=interval_s)
                for index in range(accounts)
            },
        )
        environ = role_environ(redis_url)
        async with running("relay", "poller", "-c", str(config), log=folder / "relay.log", environ=environ) as poller:
            bench.step(f"{accounts:,} accounts for {seconds} s")
            await asyncio.sleep(seconds)
            busy = cpu_s(poller.pid) / seconds
            async with http.get(f"{url}/_observed") as response:
                polls: dict[str, list[float]] = json.loads(await response.read())["polls"]
    bench.end()
    if len(polls) != accounts:
        raise RuntimeError(f"only {len(polls)} of {accounts} accounts were polled")
    late_s = [max(later - earlier - interval_s, 0) for times in polls.values() for earlier, later in pairwise(times)]
    measured = f"{seconds} s, {len(late_s):,} polls, {100 * busy:.0f} % of a core"
    note = f"{accounts:,} accounts every {interval_s} s for {measured}"
    what = f"lateness of a poll, p99, one poller with {accounts:,} accounts"
    return [Figure(what, quantile(late_s, 0.99), "s", 2, note=note)]
