"""What a page of a list costs with a million events in the store: nothing that a person would notice."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from redis.asyncio import Redis

from benchmarks import samples
from benchmarks.figures import Figure, median
from benchmarks.harness import Bench, embedded, runtime_on, subscriptions, write_config
from relay.api.server import serve_api
from relay.log import configure
from relay.store.documents import pack

TOKEN = "a-token-for-the-benchmark"
PAGES = {
    "events": "/v1/events?limit=200",
    "events of a source": "/v1/events?source=main&limit=200",
    "deliveries of a subscription": "/v1/deliveries?subscription=crm&limit=200",
    "events that no filter matches": "/v1/events?type=call.updated&limit=200",
}
_FILL = """
for n = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local eid = 'evt_' .. string.gsub(string.format('%026d', n), '%d', function(d) return string.char(97 + d) end)
  redis.call('HSET', 'relay:event:' .. eid, '=', ARGV[3], '#', 1, 'crm', '1795000000000')
  for _, list in ipairs({ 'relay:events', 'relay:events:main', 'relay:deliveries-of:crm' }) do
    redis.call('ZADD', list, 1700000000000 + n, eid)
  end
end
"""


async def _fill(url: str, count: int) -> None:
    """Write events as the store has them after delivery; all share one body."""
    body = pack(samples.drafts(1, sid="main")[0].document)
    async with Redis.from_url(url) as redis:
        for first in range(1, count + 1, 10_000):
            await redis.eval(_FILL, 0, str(first), str(min(first + 9_999, count)), body)


async def _ms(request: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await request()
    return (time.perf_counter() - started) * 1000


async def run(bench: Bench) -> list[Figure]:
    """Request the same pages of a store with a thousand events and of one with a million, in turns."""
    few, many, rounds = 1_000, bench.scaled(1_000_000, 20_000), bench.scaled(40, 5)
    bench.begin("lists", 3)
    folder = bench.folder("lists")
    configure("warning", "console")
    config = write_config(
        folder,
        sources={"main": {"provider": "webfones", "api_key": "unused", "base_url": "http://127.0.0.1:9"}},
        subscriptions=subscriptions("http://127.0.0.1:9", ["crm"]),
        api={"port": 0, "tokens": [TOKEN]},
        log={"level": "warning"},
    )
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(embedded(folder / "store", fsync="no"))
        bases: list[str] = []
        for database, count in ((0, few), (1, many)):
            bench.step(f"{count:,} events")
            store = url.replace("db=0", f"db={database}")
            await _fill(store, count)
            runtime = await stack.enter_async_context(runtime_on(config, store))
            bases.append(f"http://127.0.0.1:{await stack.enter_async_context(serve_api(runtime))}")
        http = await stack.enter_async_context(
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}, raise_for_status=True)
        )

        def request(address: str) -> Callable[[], Awaitable[Any]]:
            async def send() -> Any:
                async with http.get(address) as response:
                    return await response.json()

            return send

        bench.step(f"{rounds} of each page")
        times_ms: dict[str, tuple[float, float]] = {}
        for name, path in PAGES.items():
            short, long = request(bases[0] + path), request(bases[1] + path)
            pairs = [(await _ms(short), await _ms(long)) for _ in range(rounds)]
            times_ms[name] = (median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs]))
    bench.end()
    worst = max(times_ms, key=lambda name: times_ms[name][1] - times_ms[name][0])
    note = "; ".join(f"{name} {less:.1f} → {more:.1f} ms" for name, (less, more) in times_ms.items())
    return [
        Figure(
            f"a page of a list with {many:,} events, extra time over {few:,}",
            times_ms[worst][1] - times_ms[worst][0],
            "ms",
            50,
            note=note,
        )
    ]
