"""The API as an aiohttp application: the routes, their OpenAPI document and page, and problems for everything else."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import orjson
import structlog
from aiohttp import web

from relay import secrets
from relay.api import openapi
from relay.api.auth import Authenticator
from relay.api.context import ApiContext
from relay.api.problems import Problem
from relay.api.route import MAX_BODY_BYTES, handler_of
from relay.api.routes import TABLE
from relay.domain.clock import SystemClock
from relay.privacy.erase import Eraser
from relay.runtime import Runtime
from relay.settings import Settings

# How often a quiet stream sends a comment, and verifies its token again.
HEARTBEAT_S: Final = 15.0
# A stream whose client reads nothing for so long is closed.
WRITE_TIMEOUT_S: Final = 30.0

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def configured_tokens(settings: Settings) -> Sequence[str]:
    """Return the operator's tokens: the configured ones, else, with an embedded store, the one in `data_dir`."""
    tokens = [token.get_secret_value() for token in settings.api.tokens]
    if not tokens and settings.redis_url is None:
        tokens = [secrets.load_or_create(settings.data_dir).token]
    return tokens


def management(runtime: Runtime) -> web.Application:
    configured = configured_tokens(runtime.settings)
    if not configured:
        log.warning("api_tokens_missing", action="set api.tokens: without one no other token can be issued")
    context = ApiContext(
        runtime=runtime,
        authenticator=Authenticator(runtime.registry.declarations, configured),
        eraser=Eraser(runtime.store, runtime.storage),
        now=SystemClock().now,
        closing=asyncio.Event(),
        streams={},
        heartbeat_s=HEARTBEAT_S,
        write_timeout_s=WRITE_TIMEOUT_S,
    )
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_problems])
    for route in TABLE:
        app.router.add_route(route.method, route.path, handler_of(route, context))
    document = openapi.document(TABLE, server_url=runtime.settings.public_url)
    _add_documents(app, orjson.dumps(document), openapi.page(document).encode())

    async def close(_: web.Application) -> None:
        context.closing.set()

    app.on_shutdown.append(close)
    return app


def _add_documents(app: web.Application, document: bytes, page: bytes) -> None:
    common = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    async def show_document(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json", headers=common)

    async def show_page(_: web.Request) -> web.Response:
        headers = common | {"Content-Security-Policy": openapi.PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return web.Response(body=page, content_type="text/html", charset="utf-8", headers=headers)

    app.router.add_get("/openapi.json", show_document)
    app.router.add_get("/docs", show_page)


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error below /v1 into a problem document."""
    if not request.path.startswith("/v1"):
        return await handler(request)
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allow = {"Allow": ", ".join(sorted(error.allowed_methods))}
        return Problem("method_not_allowed", f"This path allows {allow['Allow']}.", headers=allow).response()
    except web.HTTPNotFound:
        return Problem("not_found", "Path not found; /docs lists all paths.").response()
    except web.HTTPException:
        raise
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("api_request_failed", method=request.method, path=_pattern(request))
        return Problem("internal_error", "Internal error; see the log of the relay.").response()


def _pattern(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""
