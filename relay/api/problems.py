"""Error responses: RFC 9457 problems, each with a code that programs may rely on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Literal

import orjson
from aiohttp import web
from pydantic import BaseModel, Field

from relay.domain.json import Json

Code = Literal[
    "not_json",
    "unauthorized",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "declared_in_configuration",
    "id_not_available",
    "changed_meanwhile",
    "source_paused",
    "subscription_disabled",
    "already_delivered",
    "already_over",
    "not_for_this_subscription",
    "no_recording_links",
    "event_gone",
    "request_timeout",
    "too_large",
    "unsupported_media_type",
    "invalid",
    "address_refused",
    "too_many_streams",
    "store_unavailable",
    "storage_unavailable",
    "internal_error",
]

STATUSES: Final[dict[Code, HTTPStatus]] = {
    "not_json": HTTPStatus.BAD_REQUEST,
    "unauthorized": HTTPStatus.UNAUTHORIZED,
    "forbidden": HTTPStatus.FORBIDDEN,
    "not_found": HTTPStatus.NOT_FOUND,
    "method_not_allowed": HTTPStatus.METHOD_NOT_ALLOWED,
    "declared_in_configuration": HTTPStatus.CONFLICT,
    "id_not_available": HTTPStatus.CONFLICT,
    "changed_meanwhile": HTTPStatus.CONFLICT,
    "source_paused": HTTPStatus.CONFLICT,
    "subscription_disabled": HTTPStatus.CONFLICT,
    "already_delivered": HTTPStatus.CONFLICT,
    "already_over": HTTPStatus.CONFLICT,
    "not_for_this_subscription": HTTPStatus.CONFLICT,
    "no_recording_links": HTTPStatus.CONFLICT,
    "event_gone": HTTPStatus.GONE,
    "request_timeout": HTTPStatus.REQUEST_TIMEOUT,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_media_type": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "invalid": HTTPStatus.UNPROCESSABLE_ENTITY,
    "address_refused": HTTPStatus.UNPROCESSABLE_ENTITY,
    "too_many_streams": HTTPStatus.SERVICE_UNAVAILABLE,
    "store_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "storage_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "internal_error": HTTPStatus.INTERNAL_SERVER_ERROR,
}
RETRY_AFTER_S: Final = 2


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str = Field(description="path of the field, like `payload.map.name`; empty for the whole input")
    message: str = Field(description="what is wrong and what to set")


class ProblemDocument(BaseModel):
    """An error in the form of RFC 9457."""

    type: str = Field("about:blank", description="always about:blank; `code` identifies the problem")
    title: str = Field(description="phrase of the HTTP status")
    status: int = Field(description="HTTP status")
    code: Code = Field(description="what is wrong, for programs")
    detail: str = Field(description="what is wrong and what to do, for people")
    errors: list[FieldError] | None = Field(None, description="with `invalid`: what is wrong, field by field")


@dataclass(eq=False)
class Problem(Exception):
    """Ends a request with a problem document."""

    code: Code
    detail: str
    errors: tuple[FieldError, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> web.Response:
        members: Json = {"code": self.code}
        if self.errors:
            members["errors"] = [error.model_dump() for error in self.errors]
        return problem_response(STATUSES[self.code], self.detail, headers=self.headers, **members)


def problem_response(
    status: HTTPStatus, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
) -> web.Response:
    """Build a response with a problem document; `members` are added to those of RFC 9457."""
    document = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail, **members}
    common = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        common["Retry-After"] = str(RETRY_AFTER_S)
    return web.Response(
        status=status,
        body=orjson.dumps(document),
        content_type="application/problem+json",
        headers={**common, **(headers or {})},
    )


def invalid(field_name: str, message: str) -> Problem:
    detail = f"{field_name}: {message}" if field_name else message
    return Problem("invalid", detail, (FieldError(field=field_name, message=message),))


def declared_in_configuration(name: str) -> Problem:
    return Problem("declared_in_configuration", f"{name} is declared in the configuration; change it there.")


def id_not_available() -> Problem:
    """Refuse an id that is in use, without revealing whose it is."""
    return Problem("id_not_available", "This id is not available; choose another one, or retry later.")


def changed_meanwhile() -> Problem:
    """Fail after several concurrent changes in a row."""
    return Problem("changed_meanwhile", "Concurrent changes kept interfering; retry.")


def not_found(what: str) -> Problem:
    """The same problem for what does not exist and for what belongs to another tenant."""
    return Problem("not_found", f"{what} not found.")
