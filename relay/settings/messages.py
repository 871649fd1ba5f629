"""pydantic's errors as an operator reads them: where, what is wrong, what to set; never the value that was given."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from relay.domain.text import printable

ID_FORMAT = "1 to 63 lower-case letters, digits, - and _, starting with a letter or a digit"

# Where a setting is: `("poll", "tiers", 0, "every_s")`.
Location = tuple[str | int, ...]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}"


def error_messages(error: ValidationError, model: type[BaseModel]) -> list[str]:
    return [f"{dotted(place)}: {text}" if place else text for place, text in located_errors(error, model)]


def located_errors(
    error: ValidationError, model: type[BaseModel], *, more_names: Mapping[str, Iterable[str]] | None = None
) -> Iterable[tuple[Location, str]]:
    """Yield each error's location and message; `more_names` are names, by top-level name, that a model lacks."""
    errors = error.errors(include_url=False, include_input=False)
    locations = [details["loc"] for details in errors]
    for details in errors:
        location = details["loc"]
        if details["type"] == "default_factory_not_called" or (
            details["type"] == "too_short"
            and any(other[: len(location)] == location and other != location for other in locations)
        ):
            continue  # follows from another error
        place = tuple(part for part in location if part != "[key]" and not str(part).startswith("tag:"))
        match details["type"]:
            case "extra_forbidden":
                names = [*_names_at(model, location[:-1]), *(more_names or {}).get(str(location[0]), ())]
                yield place, f"is not recognized; {did_you_mean(str(place[-1]), names)}"
            case "union_tag_not_found" | "union_tag_invalid":
                yield (*place, "provider"), _provider_message(details)
            case "string_pattern_mismatch" if location[-1] == "[key]":
                yield place, f"is not a valid id; use {ID_FORMAT}"
            case _:
                yield place, _message(details, location, model)


def _provider_message(details: ErrorDetails) -> str:
    names = [name.strip(" '").removeprefix("tag:") for name in details["ctx"]["expected_tags"].split(",")]
    name = str(details["ctx"]["tag"]).removeprefix("tag:")
    if not name:
        return f"is missing; providers are {', '.join(names)}"
    return f"{printable(name)} is not a provider; {did_you_mean(name, names)}"


def _message(details: ErrorDetails, location: Location, model: type[BaseModel]) -> str:
    context = details.get("ctx", {})
    kind = details["type"]
    field = field_at(model, location)
    about = field.description if field else None
    hint = f" ({about})" if about else ""
    match kind:
        case "missing":
            return f"is missing ({about or 'it has no default'})"
        case "value_error":
            return str(context["error"])
        case "literal_error" | "enum":
            return f"must be {context['expected']}"
        case "string_type":
            return "must be text; put it in quotes"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "must be a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "tuple_type" | "list_type":
            return "must be a list; in a variable, a JSON list"
        case "dict_type" | "mapping_type" | "model_type" | "model_attributes_type":
            return "must be a map of names to values; in a variable, a JSON object"
        case "greater_than_equal":
            return f"must be at least {_number(context['ge'])}{hint}"
        case "greater_than":
            return f"must be more than {_number(context['gt'])}{hint}"
        case "less_than_equal":
            return f"must be at most {_number(context['le'])}{hint}"
        case "less_than":
            return f"must be less than {_number(context['lt'])}{hint}"
        case "too_short" if context["min_length"] == 1:
            return "must not be empty; leave it out for the default"
        case "too_short" | "too_long":
            bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
            return f"must have {bound} entries"
        case "string_too_short":
            return f"must have at least {context['min_length']} characters"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
        case "string_pattern_mismatch":
            return f"is not valid{hint or ': it must match ' + context['pattern']}"
        case _:
            return details["msg"][:1].lower() + details["msg"][1:]


def _number(bound: Any) -> str:
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)


def inside(annotation: Any, part: str | int) -> Any:
    """Take one step of a location: a field's name, a map's key, a list's index or a union's tag; None if it is none."""
    if isinstance(annotation, FieldInfo):
        annotation = annotation.annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return inside(arguments[0], part)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields.get(str(part))
    if origin is Mapping or origin in (dict, tuple, list):
        return arguments[-1] if origin in (dict, Mapping) else arguments[0]
    if origin is Literal:
        return None
    for argument in arguments:
        if any(isinstance(mark, Tag) and mark.tag == part for mark in getattr(argument, "__metadata__", ())):
            return argument
    return next((step for argument in arguments if (step := inside(argument, part)) is not None), None)


def field_at(model: type[BaseModel], location: Location) -> FieldInfo | None:
    """Find the field that a location leads to, or the field whose list or map holds it."""
    annotation: Any = model
    field: FieldInfo | None = None
    for part in location:
        annotation = inside(annotation, part)
        field = annotation if isinstance(annotation, FieldInfo) else field
    return field


def _names_at(model: type[BaseModel], location: Location) -> list[str]:
    annotation: Any = model
    for part in location:
        annotation = inside(annotation, part)
    owner = model_in(annotation)
    return list(owner.model_fields) if owner else []


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, FieldInfo):
        annotation = annotation.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    arguments = () if get_origin(annotation) is Literal else get_args(annotation)
    return next((model for argument in arguments if (model := model_in(argument)) is not None), None)


def dotted(location: Location) -> str:
    text = ""
    for part in location:
        name = printable(part, quote="")
        text += f"[{part}]" if isinstance(part, int) else f".{name}" if text else name
    return text
