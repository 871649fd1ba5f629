"""Write the tables of docs/events.md from the payload model and the event types; `--check` only compares."""

import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import AwareDatetime, BaseModel

from relay.events.fields import PayloadField, fields_of
from relay.events.payload import CallUpdatedEvent, CallWithRawPayload, model_of
from relay.events.types import DESCRIPTIONS, EVENT_TYPES

PAGE = Path(__file__).parent.parent / "docs" / "events.md"
_TABLE = re.compile(r"(<!-- table: (\w+), written by \.ci/events_reference\.py -->\n).*?(<!-- end -->)", re.DOTALL)
_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    AwareDatetime: "time",
    datetime: "time",
    list: "list",
    dict: "object",
}


def page() -> str:
    """The page, its tables as they should be."""
    return _TABLE.sub(lambda table: "".join((table[1], *_TABLES[table[2]](), table[3])), PAGE.read_text())


def _types() -> Iterator[str]:
    yield "| type | when |\n|---|---|\n"
    for event_type in EVENT_TYPES:
        yield f"| `{event_type}` | {DESCRIPTIONS[event_type]} |\n"


def _envelope() -> Iterator[str]:
    fields = fields_of(CallUpdatedEvent)
    return _rows(field for field in fields if field.path[:2] != ("data", "call") or len(field.path) == 2)


def _call() -> Iterator[str]:
    names = {field.path: field for field in fields_of(CallUpdatedEvent)}
    return _rows(
        names["data", "call", *field.path]._replace(path=field.path) for field in fields_of(CallWithRawPayload)
    )


def _operations() -> Iterator[str]:
    yield "| type | field | type | flat | description |\n|---|---|---|---|---|\n"
    for event_type in EVENT_TYPES:
        if not event_type.startswith("call."):
            for field in fields_of(model_of(event_type)):
                if field.path[0] == "data" and len(field.path) > 1 and not _is_object(field.annotation):
                    yield f"| `{event_type}` {_row(field)}"


def _rows(fields: Iterable[PayloadField]) -> Iterator[str]:
    yield "| field | type | flat | description |\n|---|---|---|---|\n"
    yield from map(_row, fields)


def _row(field: PayloadField) -> str:
    flat = ", ".join(f"`{name}`" for name in field.flat) or "—"
    return f"| `{'.'.join(field.path)}` | {_type(field.annotation)} | {flat} | {field.info.description} |\n"


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "string"
    if origin is UnionType:
        return " or ".join("null" if option is NoneType else _type(option) for option in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{value}`" for value in annotation)
    if _is_object(annotation):
        return "object"
    return _TYPES[origin or annotation]


def _is_object(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


_TABLES = {"types": _types, "envelope": _envelope, "call": _call, "operations": _operations}

if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(None if PAGE.read_text() == page() else "docs/events.md is old: run .ci/events_reference.py")
    PAGE.write_text(page())
