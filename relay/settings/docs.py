"""Every setting with its type, default and description, for the documents."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from relay.providers import PROVIDERS
from relay.providers.base import ProviderKind, SourceOptions
from relay.settings.messages import model_in
from relay.settings.options import MAPS, SUBSCRIPTION_FILES, Settings, SubscriptionOptions, revealed_value


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One setting, as documents show it. `default` is as written in the file; None when the setting is required."""

    path: str
    type: str
    default: str | None
    description: str
    provider: str | None = None


def describe(providers: Mapping[str, ProviderKind] = PROVIDERS) -> list[SettingDoc]:
    """List every setting, in the order of the file; entries of the maps under `<id>`, of lists under `[]`."""
    docs = [doc for doc in _docs(Settings, "") if doc.path not in MAPS]
    docs += _docs(SourceOptions, "sources.<id>.")
    for kind in providers.values():
        own = [doc for doc in _docs(kind.options, "sources.<id>.", provider=kind.name)]
        common = {doc.path: doc for doc in docs}
        docs += [doc for doc in own if doc.path not in common or common[doc.path].provider]
    docs += _docs(SubscriptionOptions, "subscriptions.<id>.")
    docs += [
        SettingDoc(f"subscriptions.<id>.{name}", "path", "null", text) for name, text in SUBSCRIPTION_FILES.items()
    ]
    return docs


def _docs(model: type[BaseModel], prefix: str, *, provider: str | None = None) -> list[SettingDoc]:
    docs: list[SettingDoc] = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            docs += _docs(field.annotation, f"{path}.", provider=provider)
            continue
        if (section := _optional_section(field.annotation)) is not None:
            docs.append(SettingDoc(path, "map", _default(field), field.description or "", provider))
            docs += _docs(section, f"{path}.", provider=provider)
            continue
        inner = model_in(field.annotation)
        docs.append(SettingDoc(path, _type_name(field.annotation), _default(field), field.description or "", provider))
        if inner is not None and path not in MAPS and get_origin(field.annotation) is tuple:
            docs += _docs(inner, f"{path}[].", provider=provider)
    return docs


def _optional_section(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a section that may be left out as a whole."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if len(parts) == 1 and NoneType in get_args(annotation) and isinstance(parts[0], type):
        return parts[0] if issubclass(parts[0], BaseModel) else None
    return None


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True, validated_data={"data_dir": Path("relay-data")})
    return json.dumps(revealed_value(value), ensure_ascii=False)


_TYPE_NAMES: Final[dict[Any, str]] = {
    str: "text",
    SecretStr: "secret",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    IPv4Network: "network",
    IPv6Network: "network",
    NoneType: "",
}


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    if origin in (dict, Mapping):
        return "map"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    if arguments:
        return " or ".join(dict.fromkeys(name for name in map(_type_name, arguments) if name))
    return "map"
