"""Options in requests and responses: responses mask secrets, and a masked value in a request keeps the secret."""

import copy
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel, SecretStr
from yarl import URL

from relay.api.auth import Caller
from relay.api.problems import Problem, invalid
from relay.delivery.guard import ForbiddenAddress, Guard, NoAddress, hidden_reason
from relay.domain.json import Json

MASK: Final = "********"


def masked(options: BaseModel) -> Json:
    """Serialize options without secrets: of a subscriber's URL only the host is left, of a proxy's no password."""
    return {name: _masked(name, getattr(options, name)) for name in type(options).model_fields}


def _masked(name: str, value: Any) -> Any:
    match value:
        case SecretStr() if name == "url":
            return masked_url(value.get_secret_value())
        case SecretStr():
            return MASK
        case BaseModel():
            return masked(value)
        case Mapping():
            return {str(key): _masked("", inner) for key, inner in value.items()}
        case list() | tuple():
            return [_masked("", inner) for inner in value]
        case Enum():
            return value.value
        case None | bool() | int() | float():
            return value
        case _ if name.endswith("_url") and "@" in str(value):
            return masked_url(str(value))
        case _:
            return str(value)


def masked_url(url: str) -> str:
    parts = URL(url)
    return f"{parts.scheme}://{parts.host or ''}{f':{parts.explicit_port}' if parts.explicit_port else ''}/{MASK}"


def unmasked(value: Any, masked_value: Any, current: Any) -> Any:
    """Restore the current secrets in a request that sends masked values back as they were shown."""
    if isinstance(value, dict) and isinstance(masked_value, dict) and isinstance(current, dict):
        return {name: unmasked(inner, masked_value.get(name), current.get(name)) for name, inner in value.items()}
    # Only exactly where it was shown: a mask in another place is a mistake, which the caller refuses.
    if isinstance(value, str) and MASK in value and value == masked_value:
        return current
    return value


def require_secrets(body: Mapping[str, Any], options: BaseModel, *, prefix: str = "") -> None:
    """Raise a Problem unless a request that changes where an account's secrets are sent holds all of them itself.

    Otherwise a new address would receive secrets that are never shown to the one who sets it.
    """
    for name in type(options).model_fields:
        value, given = getattr(options, name), body.get(name)
        path = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            require_secrets(given if isinstance(given, Mapping) else {}, value, prefix=f"{path}.")
        elif isinstance(value, SecretStr) and (not isinstance(given, str) or MASK in given):
            raise invalid(path, "must be sent again, because the provider, host or port changes")


def origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a URL: where secrets are sent."""
    parts = URL(url)
    return parts.scheme, parts.host or "", parts.port


def merge_patched(document: Json, changes: Json) -> Json:
    """Apply a merge patch to options, one level deep (RFC 7396): null resets a setting to its default."""
    return {name: value for name, value in {**document, **changes}.items() if value is not None}


async def check_url(guard: Guard, caller: Caller, field: str, url: str) -> None:
    """Raise a Problem for a URL whose address must not be dialled."""
    try:
        target = guard.vet_url(url)
        if target.address is None:
            await guard.addresses(target.host, target.url.port, plain=target.plain)
    except (ValueError, ForbiddenAddress, NoAddress) as error:
        why = str(error)
        if caller.tenant is not None:
            named = isinstance(error, ForbiddenAddress | NoAddress)
            why = hidden_reason(URL(url).host or "") if named else "this address is not allowed"
        raise Problem("address_refused", f"{field}: {why}") from None


def inlined(schema: Json) -> Json:
    """Inline the `$defs` of a JSON Schema, so that it can be embedded in another document."""
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                rest = {name: resolve(value) for name, value in node.items() if name != "$ref"}
                return {**resolve(definitions[node["$ref"].rpartition("/")[2]]), **rest}
            return {name: resolve(value) for name, value in node.items() if name not in ("$defs", "discriminator")}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: Json = resolve(schema)
    return resolved


def merge_patch_schema(model: type[BaseModel]) -> Json:
    """Build the schema of a merge patch of options: any of its fields, null for the default."""
    schema = copy.deepcopy(inlined(model.model_json_schema(by_alias=True)))
    properties = {
        name: {
            "anyOf": [field, {"type": "null"}],
            **({"description": field["description"]} if "description" in field else {}),
        }
        for name, field in schema["properties"].items()
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}
