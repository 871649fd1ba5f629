"""How a payload field is declared, and how a payload model is walked."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Final, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from relay.domain.json import Json

_JOINED: Final = "*"


@dataclass(frozen=True, slots=True)
class Info:
    """What a field declares beside its name and type.

    `sample` is JSON, or a timedelta that is added to the event's timestamp. An object has the samples of its own
    fields; a mapping here replaces some of them.

    `flat` is the name in the flat form, by default the names on the way to the field joined with `_`; None leaves the
    field out. On an object it is the prefix of its fields, or None to leave out those that name no `flat` themselves.
    Lists and maps have no flat form unless they name one.

    `essential` fields are what remains of a body that would be too large without everything else.
    """

    description: str
    sample: Any = None
    flat: str | tuple[str, ...] | None = _JOINED
    essential: bool = False

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        return {**handler(core_schema), "description": self.description}


class PayloadField(NamedTuple):
    """A field, and where it stands: `path` in the full event, `flat` its names in the flat form."""

    path: tuple[str, ...]
    annotation: Any
    info: Info
    flat: tuple[str, ...] = ()


def fields_of(model: type[BaseModel], path: tuple[str, ...] = (), prefix: str | None = "") -> Iterator[PayloadField]:
    """List the fields of a model, each object before its own fields."""
    for attribute, declared in model.model_fields.items():
        name = declared.alias or attribute
        info = info_of(declared)
        where, inner = (*path, name), object_of(declared.annotation)
        if inner is None:
            yield PayloadField(where, declared.annotation, info, _flat_names(name, declared.annotation, info, prefix))
        else:
            yield PayloadField(where, declared.annotation, info)
            yield from fields_of(inner, where, _flat_prefix(name, info, prefix))


def info_of(declared: FieldInfo) -> Info:
    return next(item for item in declared.metadata if isinstance(item, Info))


def object_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that holds an object, null or not; None for any other field."""
    options = get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _flat_names(name: str, annotation: Any, info: Info, prefix: str | None) -> tuple[str, ...]:
    match info.flat:
        case tuple() as names:
            return names
        case None:
            return ()
        case str() as flat if flat != _JOINED:
            return (flat,)
    options = (annotation, *get_args(annotation))
    if prefix is None or any(get_origin(option) in (list, dict) for option in options):
        return ()
    return (prefix + name,)


def _flat_prefix(name: str, info: Info, prefix: str | None) -> str | None:
    if info.flat is None or prefix is None:
        return None
    return f"{prefix}{name}_" if info.flat == _JOINED else str(info.flat)


def names_of(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(declared.alias or attribute for attribute, declared in model.model_fields.items())
