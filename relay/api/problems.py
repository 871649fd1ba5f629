"""What can be answered instead of what was asked for: RFC 9457 problems, each with a code that programs may rely on."""

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, Literal

import orjson
from aiohttp import web
from pydantic import BaseModel, Field

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

    field: str = Field(description="where it is, as `payload.map.name`; empty for the whole")
    message: str = Field(description="a sentence that says what to set")


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field("about:blank", description="always about:blank; the code tells problems apart")
    title: str = Field(description="the status in words")
    status: int = Field(description="the HTTP status")
    code: Code = Field(description="what is wrong, for programs")
    detail: str = Field(description="what is wrong, and what to do, for people")
    errors: list[FieldError] | None = Field(None, description="with `invalid`: what is wrong, field by field")


@dataclass(eq=False)
class Problem(Exception):
    """Ends a request with a problem document."""

    code: Code
    detail: str
    errors: tuple[FieldError, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> web.Response:
        """Write it."""
        status = STATUSES[self.code]
        document = ProblemDocument(
            title=status.phrase,
            status=status.value,
            code=self.code,
            detail=self.detail,
            errors=list(self.errors) or None,
        )
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        body = orjson.dumps(document.model_dump(exclude_none=True))
        return web.Response(
            status=status, body=body, content_type="application/problem+json", headers=headers | self.headers
        )


def invalid(field_name: str, message: str) -> Problem:
    """Refuse one field."""
    where = f"{field_name}: {message}" if field_name else message
    return Problem("invalid", where, (FieldError(field=field_name, message=message),))


def configured(name: str) -> Problem:
    """Say that an id is the configuration's, where alone it can be changed."""
    return Problem("declared_in_configuration", f"The configuration declares {name}: change it there.")


def taken() -> Problem:
    """Say that an id cannot be used, without saying whose it is."""
    return Problem("id_not_available", "This id is not available, or not yet again; choose another one.")


def changed() -> Problem:
    """Say that others were quicker, again and again."""
    return Problem("changed_meanwhile", "Somebody else changes this all the time; try again.")


def not_found(what: str) -> Problem:
    """Say that there is no such thing: the same words for what does not exist and for what is somebody else's."""
    return Problem("not_found", f"There is no {what} with this id.")
