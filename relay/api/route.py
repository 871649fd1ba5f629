"""One route as data, and the glue that makes it a handler: who may, what comes in, what goes out.

Routing, checking, the OpenAPI document and the page for people are all made of the same `Route`s.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, get_origin

import orjson
import structlog
from aiohttp import web
from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError
from redis.exceptions import RedisError

from relay.api.auth import Caller, Role
from relay.api.problems import Code, FieldError, Problem
from relay.errors import StorageError, StoreError
from relay.settings.messages import dotted, located_errors

log = structlog.get_logger(__name__)

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Needs = Literal["nobody", "viewer", "admin", "operator"]
"""`operator` is an admin without a tenant; `nobody` needs no token."""

BODY_MOST_BYTES: Final = 1024 * 1024
_JSON: Final = frozenset({"application/json", "application/merge-patch+json"})
_SHOWN_ERRORS: Final = 50


def as_list(value: Any) -> Any:
    """Take `a,b` and repeated parameters alike."""
    texts = [value] if isinstance(value, str) else value
    return [part for text in texts for part in text.split(",") if part]


Listed = BeforeValidator(as_list)
"""Marks a query parameter that may have several values."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with a status or headers of its own."""

    value: Any
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """One thing that can be asked for.

    `handler` gets the API, the caller, the parts of the path by name, and `query` and `body` where there are models for
    them. `answers` are its statuses with the type of each body (None: no body). `problems` are those beside what
    follows from the rest.
    """

    method: Method
    path: str
    handler: Callable[..., Awaitable[Any]]
    summary: str
    tag: str
    answers: Mapping[HTTPStatus, Any]
    needs: Needs = "viewer"
    query: type[BaseModel] | None = None
    body: Any = None
    body_optional: bool = False
    problems: Sequence[Code] = ()
    media_type: str = "application/json"
    takes_request: bool = False

    @cached_property
    def all_problems(self) -> tuple[Code, ...]:
        """Every problem that this route can answer."""
        codes: list[Code] = list(self.problems)
        if self.needs != "nobody":
            codes += ["unauthorized", "store_unavailable"]
        if self.needs in ("admin", "operator"):
            codes.append("forbidden")
        if self.query is not None or self.body is not None:
            codes.append("invalid")
        if self.body is not None:
            codes += ["not_json", "too_large", "unsupported_media_type"]
        return tuple(dict.fromkeys(codes))

    @cached_property
    def body_type(self) -> "TypeAdapter[Any] | None":
        """What checks the body."""
        return None if self.body is None else TypeAdapter(self.body)

    @cached_property
    def answer_types(self) -> "Mapping[int, TypeAdapter[Any]]":
        """What writes each answer."""
        return {status.value: TypeAdapter(kind) for status, kind in self.answers.items() if kind is not None}

    @property
    def operation_id(self) -> str:
        """The name of the operation, unique in the document."""
        return self.handler.__name__


def handler_of(route: Route, api: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Make the aiohttp handler of a route."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            given: dict[str, Any] = {
                name: part.encode("utf-8", "replace").decode() for name, part in request.match_info.items()
            }
            if route.needs != "nobody":
                given["caller"] = await _caller(route.needs, api, request)
            if route.query is not None:
                given["query"] = _query(route.query, request)
            if route.body is not None:
                given["body"] = await _body(route, request)
            if route.takes_request:
                given["request"] = request
            answer = await route.handler(api, **given)
        except Problem as problem:
            return problem.response()
        except (RedisError, StoreError, ConnectionError, TimeoutError) as error:
            log.warning("api_store_trouble", path=route.path, error=type(error).__name__)
            return Problem("store_unavailable", "The store does not answer just now; try again soon.").response()
        except StorageError as error:
            return Problem("storage_unavailable", f"{error}; try again later.").response()
        if isinstance(answer, web.StreamResponse):
            return answer
        return _written(route, answer)

    return handle


async def _caller(needs: Needs, api: Any, request: web.Request) -> Caller:
    caller: Caller | None = await api.tokens.caller(request.headers.get("Authorization"))
    if caller is None:
        raise Problem(
            "unauthorized",
            "Send a token of this relay: Authorization: Bearer …",
            headers={"WWW-Authenticate": 'Bearer realm="relay"'},
        )
    role: Role = caller.role
    if needs in ("admin", "operator") and role != "admin":
        raise Problem("forbidden", "This token may only look: a token with the role admin is needed.")
    if needs == "operator" and caller.tenant is not None:
        raise Problem("forbidden", "This is for the operator: a token without a tenant is needed.")
    return caller


def _query(model: type[BaseModel], request: web.Request) -> BaseModel:
    many = {info.alias or name for name, info in model.model_fields.items() if any(m is Listed for m in info.metadata)}
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name in request.query:
        if name in many:
            values[name] = request.query.getall(name)
        else:
            values[name] = request.query[name]
            if len(request.query.getall(name)) > 1:
                errors.append(FieldError(field=name[:64], message="may be given once"))
    if errors:
        raise _invalid(errors)
    return checked(TypeAdapter(model), model, values)  # type: ignore[no-any-return]  # it is the model


async def _body(route: Route, request: web.Request) -> Any:
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Problem("too_large", f"A body may have {BODY_MOST_BYTES} bytes.") from None
    if not raw and route.body_optional:
        raw = b"{}"
    elif request.content_type not in _JSON:
        raise Problem("unsupported_media_type", "Send a JSON body with Content-Type: application/json.")
    try:
        document = orjson.loads(raw)
    except ValueError:
        raise Problem("not_json", "The body is not JSON in UTF-8.") from None
    assert route.body_type is not None  # noqa: S101 - asked before
    return checked(route.body_type, route.body, document)


def checked(adapter: "TypeAdapter[Any]", model: Any, value: Any) -> Any:
    """Check what came in; a Problem says what is wrong with it, field by field, repeating no value."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise invalid_input(error, model) from None


def invalid_input(error: ValidationError, model: Any) -> Problem:
    """Turn what pydantic found into a problem."""
    known = model if isinstance(model, type) and issubclass(model, BaseModel) else _Nothing
    if get_origin(model) is Annotated:
        known = _Nothing
    found = [FieldError(field=dotted(place), message=words) for place, words in located_errors(error, known)]
    return _invalid(found or [FieldError(field="", message="is not what is asked for here")])


class _Nothing(BaseModel):
    """Stands for models whose fields are not known by name."""


def _invalid(errors: Sequence[FieldError]) -> Problem:
    first = errors[0]
    detail = f"{first.field}: {first.message}" if first.field else first.message
    if len(errors) > 1:
        detail += f" (and {len(errors) - 1} more)"
    return Problem("invalid", detail, tuple(errors[:_SHOWN_ERRORS]))


def _written(route: Route, answer: Any) -> web.Response:
    reply = answer if isinstance(answer, Reply) else Reply(answer, next(iter(route.answers)))
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **reply.headers}
    kind = route.answer_types.get(reply.status.value)
    if kind is None:
        return web.Response(status=reply.status, headers=headers)
    body = kind.dump_json(reply.value, by_alias=True)
    return web.Response(status=reply.status, body=body, content_type=route.media_type, headers=headers)
