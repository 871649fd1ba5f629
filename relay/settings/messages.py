"""What is wrong, in a sentence: pydantic's errors as an operator reads them, never with a value that was given."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Place = tuple[str | int, ...]
"""Where a setting is: `("poll", "tiers", 0, "every_s")`."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Say what pydantic found wrong with options, a sentence each, without any value that was given."""
    return [f"{dotted(place)}: {sentence}" if place else sentence for place, sentence in placed_sentences(error, model)]


def placed_sentences(
    error: ValidationError, model: type[BaseModel], *, also: Iterable[str] = ()
) -> Iterable[tuple[Place, str]]:
    """Say it with the place of each; `also` are names that are known beside the model's own."""
    errors = error.errors(include_url=False, include_input=False)
    locations = [details["loc"] for details in errors]
    for details in errors:
        location = details["loc"]
        if details["type"] == "default_factory_not_called" or (
            details["type"] == "too_short"
            and any(other[: len(location)] == location and other != location for other in locations)
        ):
            continue  # follows from another error
        place = tuple(part for part in location if not str(part).startswith("tag:"))
        if details["type"] == "extra_forbidden":
            known = _names_at(model, place[:-1]) + (list(also) if len(place) == 1 else [])
            yield place, f"there is no such setting; {did_you_mean(str(place[-1]), known)}"
        else:
            yield place, _sentence(details, place, model)


def _sentence(details: ErrorDetails, place: Place, model: type[BaseModel]) -> str:
    context = details.get("ctx", {})
    kind = details["type"]
    match kind:
        case "missing":
            return f"is missing ({_description(model, place)})"
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
            return "must be a list, in a variable as JSON"
        case "dict_type" | "mapping_type" | "model_type" | "model_attributes_type":
            return "must be a map of names to values, in a variable as JSON"
        case "greater_than_equal":
            return f"must be at least {_number(context['ge'])}{_about(model, place)}"
        case "greater_than":
            return f"must be more than {_number(context['gt'])}{_about(model, place)}"
        case "less_than_equal":
            return f"must be at most {_number(context['le'])}{_about(model, place)}"
        case "less_than":
            return f"must be less than {_number(context['lt'])}{_about(model, place)}"
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
            return f"has not the right form{_about(model, place) or ': ' + context['pattern']}"
        case _:
            return details["msg"][:1].lower() + details["msg"][1:]


def _number(bound: Any) -> str:
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)


def _description(model: type[BaseModel], place: Place) -> str:
    field = _field(model, place)
    return (field.description if field else None) or "it has no default"


def _about(model: type[BaseModel], place: Place) -> str:
    field = _field(model, place)
    return f" ({field.description})" if field and field.description else ""


def _field(model: type[BaseModel], place: Place) -> FieldInfo | None:
    names = [part for part in place if isinstance(part, str)]
    if not names:
        return None
    owner: type[BaseModel] | None = model
    for name in names[:-1]:
        field = owner.model_fields.get(name) if owner else None
        owner = model_in(field.annotation) if field else None
    return owner.model_fields.get(names[-1]) if owner else None


def annotation_at(model: type[BaseModel], place: Place) -> Any:
    field = _field(model, place)
    return field.annotation if field else None


def _names_at(model: type[BaseModel], place: Place) -> list[str]:
    owner = model_in(annotation_at(model, place)) if any(isinstance(part, str) for part in place) else model
    return list(owner.model_fields) if owner else []


def _parts_of(annotation: Any) -> Iterable[Any]:
    """Yield the types inside an annotation, outermost first."""
    yield annotation
    for argument in get_args(annotation):
        if get_origin(annotation) is not Literal:
            yield from _parts_of(argument)


def model_in(annotation: Any) -> type[BaseModel] | None:
    return next(
        (part for part in _parts_of(annotation) if isinstance(part, type) and issubclass(part, BaseModel)), None
    )


def is_structured(annotation: Any) -> bool:
    return any(
        get_origin(part) in (list, tuple, dict, Mapping) or (isinstance(part, type) and issubclass(part, BaseModel))
        for part in _parts_of(annotation)
    )


def dotted(place: Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{shown(part, quote='')}" if text else shown(part, quote="")
    return text


def shown(value: Any, *, quote: str = "'", keep: int = 64) -> str:
    """Repeat a name in a message: short, and on one line."""
    text = str(value)
    text = text if len(text) <= keep else text[: keep - 1] + "…"
    return quote + text.encode("unicode_escape").decode() + quote
