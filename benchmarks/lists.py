"""What a million events do to a page of a list: nothing that a person would notice."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from redis.asyncio import Redis

from benchmarks import office
from benchmarks.figures import Figure, median
from benchmarks.house import Bench, embedded, runtime_on, subscriptions, write_config
from relay.api.server import serve_api
from relay.log import configure
from relay.store.documents import pack

TOKEN = "a-token-for-the-benchmark"
PAGES = {
    "events": "/v1/events?limit=200",
    "events of a source": "/v1/events?source=office&limit=200",
    "deliveries of a subscription": "/v1/deliveries?subscription=crm&limit=200",
    "events that no filter finds": "/v1/events?type=call.updated&limit=200",
}
_FILL = """
for n = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local eid = 'evt_' .. string.gsub(string.format('%026d', n), '%d', function(d) return string.char(97 + d) end)
  redis.call('HSET', 'relay:event:' .. eid, '=', ARGV[3], '#', 1, 'crm', '1795000000000')
  for _, list in ipairs({ 'relay:events', 'relay:events:office', 'relay:deliveries-of:crm' }) do
    redis.call('ZADD', list, 1700000000000 + n, eid)
  end
end
"""


async def _fill(url: str, count: int) -> None:
    """Write events as the store has them after they were delivered; one body serves all of them."""
    body = pack(office.drafts(1, sid="office")[0].document)
    async with Redis.from_url(url) as redis:
        for first in range(1, count + 1, 10_000):
            await redis.eval(_FILL, 0, str(first), str(min(first + 9_999, count)), body)


async def _ms(ask: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await ask()
    return (time.perf_counter() - began) * 1000


async def run(bench: Bench) -> list[Figure]:
    """Ask the API for the same pages of a store with a thousand events and of one with a million, by turns."""
    few, many, rounds = 1_000, bench.scaled(1_000_000, 20_000), bench.scaled(40, 5)
    bench.begin("lists", 3)
    folder = bench.room("lists")
    configure("warning", "console")
    config = write_config(
        folder,
        sources={"office": {"provider": "webfones", "api_key": "unused", "base_url": "http://127.0.0.1:9"}},
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

        def asking(address: str) -> Callable[[], Awaitable[Any]]:
            async def ask() -> Any:
                async with http.get(address) as answer:
                    return await answer.json()

            return ask

        bench.step(f"{rounds} of each page")
        taken: dict[str, tuple[float, float]] = {}
        for name, path in PAGES.items():
            short, long = asking(bases[0] + path), asking(bases[1] + path)
            pairs = [(await _ms(short), await _ms(long)) for _ in range(rounds)]
            taken[name] = (median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs]))
    bench.end()
    worst = max(taken, key=lambda name: taken[name][1] - taken[name][0])
    note = "; ".join(f"{name} {less:.1f} → {more:.1f} ms" for name, (less, more) in taken.items())
    return [
        Figure(
            f"a page of a list with {many:,} events, longer than with {few:,}",
            taken[worst][1] - taken[worst][0],
            "ms",
            50,
            note=note,
        )
    ]
