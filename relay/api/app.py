"""The API as an aiohttp application: the route table, its document, the page, and problems for everything else."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import orjson
import structlog
from aiohttp import web

from relay import secrets
from relay.api import openapi
from relay.api.auth import Tokens
from relay.api.context import Api
from relay.api.problems import Problem
from relay.api.route import BODY_MOST_BYTES, handler_of
from relay.api.routes import TABLE
from relay.domain.clock import SystemClock
from relay.privacy.erase import Eraser
from relay.runtime import Runtime
from relay.settings import Settings

HEARTBEAT_S: Final = 15.0
"""How often a quiet stream says that it is still there, and looks whether its token still is."""
WRITE_TIMEOUT_S: Final = 30.0
"""A listener that takes nothing for so long is let go."""

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def configured_tokens(settings: Settings) -> Sequence[str]:
    """Give the operator's tokens: the configured ones, else, with an embedded store, the one in `data_dir`."""
    tokens = [token.get_secret_value() for token in settings.api.tokens]
    if not tokens and settings.redis_url is None:
        tokens = [secrets.load_or_create(settings.data_dir).token]
    return tokens


def management(runtime: Runtime) -> web.Application:
    """Build the application."""
    configured = configured_tokens(runtime.settings)
    if not configured:
        log.warning("api_has_no_tokens", hint="set api.tokens: without one nobody can make the first")
    api = Api(
        runtime=runtime,
        tokens=Tokens(runtime.registry.declarations, configured),
        eraser=Eraser(runtime.ledger, runtime.storage),
        now=SystemClock().now,
        closing=asyncio.Event(),
        streams=set(),
        heartbeat_s=HEARTBEAT_S,
        write_timeout_s=WRITE_TIMEOUT_S,
    )
    app = web.Application(client_max_size=BODY_MOST_BYTES, middlewares=[_problems])
    for route in TABLE:
        app.router.add_route(route.method, route.path, handler_of(route, api))
    described = openapi.document(TABLE, server_url=runtime.settings.public_url)
    _add_documents(app, orjson.dumps(described), openapi.page(described).encode())

    async def close(_: web.Application) -> None:
        api.closing.set()

    app.on_shutdown.append(close)
    return app


def _add_documents(app: web.Application, document: bytes, page: bytes) -> None:
    safe = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    async def show_document(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json", headers=safe)

    async def show_page(_: web.Request) -> web.Response:
        headers = safe | {"Content-Security-Policy": openapi.PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return web.Response(body=page, content_type="text/html", charset="utf-8", headers=headers)

    app.router.add_get("/openapi.json", show_document)
    app.router.add_get("/docs", show_page)


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a problem document where nothing else does; what is not the API's keeps its own answers."""
    if not request.path.startswith("/v1"):
        return await handler(request)
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allow = {"Allow": ", ".join(sorted(error.allowed_methods))}
        return Problem("method_not_allowed", f"This address takes {allow['Allow']}.", headers=allow).response()
    except web.HTTPNotFound:
        return Problem("not_found", "There is nothing at this address; /docs lists what there is.").response()
    except web.HTTPException:
        raise
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("api_failed", method=request.method, path=_pattern(request))
        return Problem("internal_error", "Something went wrong here; the log says what.").response()


def _pattern(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""
