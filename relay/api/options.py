"""Options as they come in and go out: secrets masked in answers, masked values given back keep what they stand for."""

import copy
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel, SecretStr
from yarl import URL

from relay.api.auth import Caller
from relay.api.problems import Problem
from relay.delivery.guard import ForbiddenAddress, Guard, NoAddress
from relay.domain.json import Json

MASK: Final = "********"


def masked(options: BaseModel) -> Json:
    """Write options without their secrets: of an address only the host is left, of a proxy not its password."""
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
    """Show the host of an address and that there is more."""
    parts = URL(url)
    return f"{parts.scheme}://{parts.host or ''}{f':{parts.explicit_port}' if parts.explicit_port else ''}/{MASK}"


def unmasked(given: Any, shown: Any, stands: Any) -> Any:
    """Put back what a masked value stands for, where it came back as it was shown."""
    if isinstance(given, dict) and isinstance(shown, dict) and isinstance(stands, dict):
        return {name: unmasked(value, shown.get(name), stands.get(name)) for name, value in given.items()}
    if isinstance(given, str) and MASK in given and given == shown:
        return stands
    return given


def patched(document: Json, changes: Json) -> Json:
    """Apply a merge patch to options: null gives a setting back to its default (RFC 7396, one level deep)."""
    return {name: value for name, value in {**document, **changes}.items() if value is not None}


async def vet(guard: Guard, caller: Caller, field: str, url: str) -> None:
    """Refuse an address that would not be dialled. What a name resolves to inside is the operator's business."""
    try:
        target = guard.vet_url(url)
        if target.address is None:
            await guard.addresses(target.host, plain=target.plain)
    except (ValueError, ForbiddenAddress, NoAddress) as error:
        why = str(error)
        if caller.tenant is not None and not isinstance(error, NoAddress):
            why = "this address is not one that may be dialled here"
        raise Problem("address_refused", f"{field}: {why}") from None


def inlined(schema: Json) -> Json:
    """Write a JSON Schema without `$defs`, so that it can stand anywhere in another document."""
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                rest = {name: resolve(value) for name, value in node.items() if name != "$ref"}
                return {**resolve(definitions[node["$ref"].rpartition("/")[2]]), **rest}
            return {name: resolve(value) for name, value in node.items() if name not in ("$defs", "discriminator")}
        return [resolve(each) for each in node] if isinstance(node, list) else node

    resolved: Json = resolve(schema)
    return resolved


def changes_schema(model: type[BaseModel]) -> Json:
    """Write the schema of a merge patch of options: any of its fields, null for the default."""
    schema = copy.deepcopy(inlined(model.model_json_schema(by_alias=True)))
    properties = {
        name: {
            "anyOf": [each, {"type": "null"}],
            **({"description": each["description"]} if "description" in each else {}),
        }
        for name, each in schema["properties"].items()
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}
