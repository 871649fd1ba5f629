"""The two HTTP ports: a public one (API, recording links), and an internal one (probes, metrics)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from relay import descriptors, gauges
from relay.api.app import management
from relay.api.connections import ConnectionLimits, listening
from relay.api.recordings import recording_routes
from relay.domain.clock import SystemClock
from relay.domain.json import Json
from relay.errors import SettingsError
from relay.runtime import Runtime
from relay.store.connection import STORE_ERRORS

_INTERNAL_LIMITS: Final = ConnectionLimits(total=64, per_address=32)

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serve_api(runtime: Runtime) -> AsyncIterator[int]:
    """Serve the public port; yields its number."""

    async def find_recording(call_id: str) -> Json | None:
        call = await runtime.store.calls.get(call_id)
        return call.recording if call else None

    app = management(runtime)
    app.add_routes(
        recording_routes(
            runtime.storage, find_recording, runtime.box.signing_keys("recording-links"), SystemClock().now
        )
    )
    app.add_routes(_probes(runtime))
    options = runtime.settings.api
    limits = ConnectionLimits(
        min(options.max_connections, descriptors.for_clients()), options.max_connections_per_address
    )
    async with _serving(app, options.host, options.port, what="api", limits=limits) as port:
        log.info("api_started", host=options.host, port=port, max_connections=limits.total)
        yield port


@asynccontextmanager
async def serve_internal(runtime: Runtime) -> AsyncIterator[int]:
    """Serve the internal port; yields its number."""
    app = web.Application()
    app.add_routes(_probes(runtime))

    async def show_metrics(_: web.Request) -> web.Response:
        await gauges.measure(runtime)
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_routes([web.get("/metrics", show_metrics)])
    options = runtime.settings.internal
    async with _serving(app, options.host, options.port, what="internal", limits=_INTERNAL_LIMITS) as port:
        log.info("internal_started", host=options.host, port=port)
        yield port


def _probes(runtime: Runtime) -> list[web.RouteDef]:
    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(2):
                await runtime.store.ping()
        except STORE_ERRORS:
            return web.Response(status=503, text="the store is unavailable\n")
        return web.Response(text="ok\n")

    return [web.get("/livez", livez), web.get("/readyz", readyz)]


@asynccontextmanager
async def _serving(
    app: web.Application, host: str, port: int, *, what: str, limits: ConnectionLimits
) -> AsyncIterator[int]:
    async with AsyncExitStack() as stack:
        try:
            bound_port = await stack.enter_async_context(listening(app, host, port, limits))
        except OSError as error:
            raise SettingsError(
                f"{what}: cannot listen on {host}:{port}: {error.strerror or error}. "
                f"Is another relay running? Set {what}.port to a free port."
            ) from None
        yield bound_port
