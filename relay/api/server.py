"""The two ports: one that people may expose (recording links), one for probes and metrics that they should not."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from redis.exceptions import RedisError

from relay import metrics
from relay.api.recordings import recording_routes
from relay.clock import SystemClock
from relay.ledger import keys
from relay.ledger.lane import LANES
from relay.model import Json
from relay.runtime import Runtime

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serve_api(runtime: Runtime) -> AsyncIterator[int]:
    """Serve the public port; gives the port that was taken."""

    async def find_recording(call_id: str) -> Json | None:
        call = await runtime.ledger.call(call_id)
        return call.recording if call else None

    app = web.Application(client_max_size=1024 * 1024)
    app.add_routes(
        recording_routes(
            runtime.storage, find_recording, runtime.box.signing_keys("recording-links"), SystemClock().now
        )
    )
    app.add_routes(_probes(runtime))
    options = runtime.settings.api
    async with _serving(app, options.host, options.port) as port:
        log.info("api_listening", host=options.host, port=port)
        yield port


@asynccontextmanager
async def serve_internal(runtime: Runtime) -> AsyncIterator[int]:
    """Serve the internal port; gives the port that was taken."""
    app = web.Application()
    app.add_routes(_probes(runtime))

    async def show_metrics(_: web.Request) -> web.Response:
        await _measure(runtime)
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_routes([web.get("/metrics", show_metrics)])
    options = runtime.settings.internal
    async with _serving(app, options.host, options.port) as port:
        yield port


def _probes(runtime: Runtime) -> list[web.RouteDef]:
    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(2):
                await runtime.redis.ping()
        except (RedisError, OSError, TimeoutError):
            return web.Response(status=503, text="the store does not answer\n")
        return web.Response(text="ok\n")

    return [web.get("/livez", livez), web.get("/readyz", readyz)]


async def _measure(runtime: Runtime) -> None:
    """Look at the lanes and the sources: these gauges are read from the store when somebody asks."""
    seconds, micros = await runtime.redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    for lane in LANES:
        due = 0
        oldest_ms = now_ms
        partitions = await runtime.redis.zrangebyscore(keys.lane(lane), "-inf", now_ms, start=0, num=1000)
        async with runtime.redis.pipeline(transaction=False) as pipe:
            for partition in partitions:
                name = keys.waiting(lane, partition.decode())
                pipe.zcount(name, "-inf", now_ms)
                pipe.zrange(name, 0, 0, withscores=True)
            answers = await pipe.execute()
        for count, head in zip(answers[::2], answers[1::2], strict=True):
            due += count
            if head:
                oldest_ms = min(oldest_ms, int(head[0][1]))
        metrics.LANE_DUE.labels(lane).set(due)
        metrics.LANE_OLDEST.labels(lane).set((now_ms - oldest_ms) / 1000)
    for sid in runtime.sources:
        state = await runtime.states.read(sid)
        if state.last_poll is not None:
            metrics.POLL_LAG.labels(sid).set(max(time.time() - state.last_poll.timestamp(), 0))


@asynccontextmanager
async def _serving(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
