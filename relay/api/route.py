"""A route as data, and the handler built from it: authorization, validation, serialization.

Routing, validation, the OpenAPI document and its HTML page are all derived from the same `Route`s.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, get_origin

import orjson
import structlog
from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError
from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from relay.api.auth import Caller
from relay.api.problems import Code, FieldError, Problem
from relay.errors import StorageError, StoreError
from relay.settings.messages import dotted, located_errors
from relay.store.connection import STORE_ERRORS

log = structlog.get_logger(__name__)

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
# What a token must allow; `operator` is an admin without a tenant.
Scope = Literal["viewer", "admin", "operator"]

MAX_BODY_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 32
BODY_TIMEOUT_S: Final = 30.0
_JSON_TYPES: Final = frozenset({"application/json", "application/merge-patch+json"})
_MAX_FIELD_ERRORS: Final = 50


def split_values(value: Any) -> Any:
    """Accept `a,b` and repeated parameters alike."""
    texts = [value] if isinstance(value, str) else value
    return [part for text in texts for part in text.split(",") if part]


# Marks a query parameter that may have several values.
MultiValue = BeforeValidator(split_values)


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """A response value with a status other than the route's first, or with headers."""

    value: Any
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """One operation of the API.

    `handler` gets the context, the caller, the path parameters by name, and `query` and `body` if there are models for
    them. `responses` are its statuses, each with the type of its body (None: no body). `problems` are those that do
    not follow from the other fields.
    """

    method: Method
    path: str
    handler: Callable[..., Awaitable[Any]]
    summary: str
    tag: str
    responses: Mapping[HTTPStatus, Any]
    scope: Scope = "viewer"
    query: type[BaseModel] | None = None
    body: Any = None
    body_optional: bool = False
    problems: Sequence[Code] = ()
    media_type: str = "application/json"
    takes_request: bool = False

    @cached_property
    def all_problems(self) -> tuple[Code, ...]:
        codes: list[Code] = [*self.problems, "unauthorized", "store_unavailable"]
        if self.scope != "viewer":
            codes.append("forbidden")
        if self.query is not None or self.body is not None:
            codes.append("invalid")
        if self.body is not None:
            codes += ["not_json", "request_timeout", "too_large", "unsupported_media_type"]
        return tuple(dict.fromkeys(codes))

    @cached_property
    def body_type(self) -> "TypeAdapter[Any] | None":
        return None if self.body is None else TypeAdapter(self.body)

    @cached_property
    def response_types(self) -> "Mapping[int, TypeAdapter[Any]]":
        return {status.value: TypeAdapter(model) for status, model in self.responses.items() if model is not None}

    @property
    def operation_id(self) -> str:
        """The operation's name in the OpenAPI document, where it is unique."""
        return self.handler.__name__


def handler_of(route: Route, context: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            # Percent-encoded path parameters may hold lone surrogates, which the store's client cannot encode.
            arguments: dict[str, Any] = {
                name: value.encode("utf-8", "replace").decode() for name, value in request.match_info.items()
            }
            arguments["caller"] = await _authorize(route.scope, context, request)
            if route.query is not None:
                arguments["query"] = _query(route.query, request)
            if route.body is not None:
                arguments["body"] = await _body(route, request)
            if route.takes_request:
                arguments["request"] = request
            result = await route.handler(context, **arguments)
        except Problem as problem:
            return problem.response()
        except (*STORE_ERRORS, StoreError) as error:
            log.warning("api_store_unavailable", path=route.path, error=type(error).__name__)
            return Problem("store_unavailable", "The store is temporarily unavailable; retry soon.").response()
        except StorageError as error:
            return Problem("storage_unavailable", f"{error}; retry later.").response()
        if isinstance(result, web.StreamResponse):
            return result
        return _serialized(route, result)

    return handle


async def _authorize(scope: Scope, context: Any, request: web.Request) -> Caller:
    caller: Caller | None = await context.authenticator.authenticate(request.headers.get("Authorization"))
    if caller is None:
        raise Problem(
            "unauthorized",
            "Send a token of this relay: Authorization: Bearer …",
            headers={"WWW-Authenticate": 'Bearer realm="relay"'},
        )
    if scope != "viewer" and caller.role != "admin":
        raise Problem("forbidden", "This token is read-only; use a token with the role admin.")
    if scope == "operator" and caller.tenant is not None:
        raise Problem("forbidden", "This requires the operator: a token without a tenant.")
    return caller


def _query(model: type[BaseModel], request: web.Request) -> BaseModel:
    multi_value = {
        info.alias or name
        for name, info in model.model_fields.items()
        if any(marker is MultiValue for marker in info.metadata)
    }
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name in request.query:
        if name in multi_value:
            values[name] = request.query.getall(name)
        else:
            values[name] = request.query[name]
            if len(request.query.getall(name)) > 1:
                errors.append(FieldError(field=name[:64], message="must not be repeated"))
    if errors:
        raise _invalid(errors)
    query: BaseModel = validated(TypeAdapter(model), model, values)
    return query


async def _body(route: Route, request: web.Request) -> Any:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Problem("too_large", f"The body has more than {MAX_BODY_BYTES} bytes.") from None
    except TimeoutError:
        raise Problem("request_timeout", f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    except (web.RequestPayloadError, PayloadEncodingError):
        raise Problem("not_json", "The body is incomplete, or not encoded as its headers say.") from None
    if not raw and route.body_optional:
        raw = b"{}"
    elif request.content_type not in _JSON_TYPES:
        raise Problem("unsupported_media_type", "Send a JSON body with Content-Type: application/json.")
    try:
        document = orjson.loads(raw)
    except ValueError:
        raise Problem("not_json", "The body is not valid JSON in UTF-8.") from None
    if _depth(document) > MAX_DEPTH:
        raise _invalid([FieldError(field="", message=f"is nested more than {MAX_DEPTH} levels deep")])
    assert route.body_type is not None  # noqa: S101 - the route has a body
    return validated(route.body_type, route.body, document)


def _depth(document: Any) -> int:
    """Count the levels of a JSON document, without recursion: validation recurses, and has a limit."""
    depth, level = 0, [document]
    while level:
        depth += 1
        nested = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in nested for child in children]
    return depth


def validated(adapter: "TypeAdapter[Any]", model: Any, value: Any) -> Any:
    """Validate input; a Problem names what is wrong, field by field, without repeating a value."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise invalid_input(error, model) from None


def invalid_input(error: ValidationError, model: Any) -> Problem:
    is_model = isinstance(model, type) and issubclass(model, BaseModel) and get_origin(model) is not Annotated
    located = located_errors(error, model if is_model else _AnyModel)
    errors = [FieldError(field=dotted(place), message=message) for place, message in located]
    return _invalid(errors or [FieldError(field="", message="is not valid")])


class _AnyModel(BaseModel):
    """Stands for types whose fields are not known by name."""


def _invalid(errors: Sequence[FieldError]) -> Problem:
    first = errors[0]
    detail = f"{first.field}: {first.message}" if first.field else first.message
    if len(errors) > 1:
        detail += f" (and {len(errors) - 1} more)"
    return Problem("invalid", detail, tuple(errors[:_MAX_FIELD_ERRORS]))


def _serialized(route: Route, result: Any) -> web.Response:
    response = result if isinstance(result, ApiResponse) else ApiResponse(result, next(iter(route.responses)))
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **response.headers}
    response_type = route.response_types.get(response.status.value)
    if response_type is None:
        return web.Response(status=response.status, headers=headers)
    body = response_type.dump_json(response.value, by_alias=True)
    return web.Response(status=response.status, body=body, content_type=route.media_type, headers=headers)
