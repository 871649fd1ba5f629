"""Render the body that is signed and sent, from the stored event: pure, and the same on every attempt but for the
recording link.

There are three forms: `full` is the event as it is; `flat` is one level of the keys in `FLAT_FIELDS`; a map is the
subscriber's own output fields, each a JMESPath expression over the full event.

A body has at most 20 KB. When it would have more, parts are left out in this order until it fits, and `truncated` names
them: `raw`, `participants`, `transfers`, `contact.others`, `custom`, `transcription.text` (cut), `changes` (their
values), `long strings` (cut), `details` (all but the essential fields of the payload model). In a map's result the
largest fields become null.
"""

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Literal, cast

import jmespath
import orjson
from jmespath.exceptions import JMESPathError
from jmespath.functions import Functions, signature
from jmespath.visitor import Options, TreeInterpreter

from relay.domain.json import Json
from relay.domain.time import iso
from relay.events.payload import ESSENTIAL_PATHS, FLAT_FIELDS, FLAT_PATHS

# Standard Webhooks recommends bodies below 20 kB.
MAX_BODY_BYTES: Final = 20_000
Payload = Literal["full", "flat"] | Mapping[str, str]
# The address of the audio, and when it stops working.
RecordingLink = tuple[str, datetime]


def render(
    event: Json,
    *,
    payload: Payload = "full",
    include_raw: bool = False,
    raw: Json | None = None,
    recording_link: RecordingLink | None = None,
) -> bytes:
    """Build the body for one subscription; `event` is not changed.

    `raw`, the provider's own row, becomes `data.call.raw`, only with `include_raw`.
    """
    if recording_link is not None:
        event = _with_link(event, *recording_link)
    if include_raw and raw is not None and "call" in event["data"]:
        event = _with_call(event, {**event["data"]["call"], "raw": raw})
    if payload == "full":
        body = orjson.dumps(event)
        # The copy is for the cuts, which work in place; hardly any event needs one.
        return body if len(body) <= MAX_BODY_BYTES else _fit(copy.deepcopy(event), _FULL_CUTS)
    if payload == "flat":
        flattened = flatten(event)
        body = orjson.dumps(flattened)
        return body if len(body) <= MAX_BODY_BYTES else _fit(flattened, _FLAT_CUTS)
    return _render_map(_compiled_map(tuple(payload.items())), event)


def render_json(event: Json, payload: Payload, **options: Any) -> Json:
    document: Json = orjson.loads(render(event, payload=payload, **options))
    return document


def _with_link(event: Json, url: str, expires_at: datetime) -> Json:
    call = event["data"].get("call")
    if call is None or not call.get("recording"):
        return event
    return _with_call(event, {**call, "recording": {**call["recording"], "url": url, "expires_at": iso(expires_at)}})


def _with_call(event: Json, call: Json) -> Json:
    return {**event, "data": {**event["data"], "call": call}}


# --- flat ------------------------------------------------------------------------------------------------------------

# The payload as a tree: each object's fields, each leaf's names in the flat form.
_FlatPlan = dict[str, "_FlatPlan | tuple[str, ...]"]


def _flat_plan() -> _FlatPlan:
    plan: _FlatPlan = {}
    for path, names in FLAT_PATHS:
        node = plan
        for step in path[:-1]:
            node = cast(_FlatPlan, node.setdefault(step, {}))
        node[path[-1]] = names
    return plan


_FLAT_PLAN: Final = _flat_plan()


def flatten(event: Json) -> Json:
    """Write an event on one level, without lists and maps; of `changes` the names remain, comma-separated."""
    flattened: Json = dict.fromkeys(FLAT_FIELDS)
    _flatten(event, _FLAT_PLAN, flattened)
    return flattened


def _flatten(node: Json, plan: _FlatPlan, flattened: Json) -> None:
    for name, target in plan.items():
        value = node.get(name)
        if value is None:
            continue
        if isinstance(target, dict):
            if isinstance(value, dict):
                _flatten(value, target, flattened)
        elif not isinstance(value, list):
            for flat_name in target:
                flattened[flat_name] = ",".join(value) if isinstance(value, dict) else value


def _at(document: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(document, dict):
            return None
        document = document.get(name)
    return document


# --- 20 KB -----------------------------------------------------------------------------------------------------------

# The name of a cut, and the function that makes it in place; it returns False when there was nothing to cut.
_Cut = tuple[str, Callable[[Json], bool]]


def _fit(document: Json, cuts: Sequence[_Cut]) -> bytes:
    truncated: list[str] = []
    for name, cut in cuts:
        if not cut(document):
            continue
        if name not in truncated:
            truncated.append(name)
        document["truncated"] = truncated
        body = orjson.dumps(document)
        if len(body) <= MAX_BODY_BYTES:
            break
    return body


def _empty(name: str, *path: str) -> Callable[[Json], bool]:
    def cut(event: Json) -> bool:
        holder = _at(event, ("data", "call", *path))
        if not isinstance(holder, dict) or not holder.get(name):
            return False
        holder[name] = type(holder[name])()
        return True

    return cut


def _drop_raw(event: Json) -> bool:
    call = event["data"].get("call")
    return call is not None and call.pop("raw", None) is not None


def _cut_transcription(event: Json) -> bool:
    transcription = _at(event, ("data", "call", "transcription"))
    if not isinstance(transcription, dict):
        return False
    return _cut_strings(transcription, longest=4000)


def _drop_changes(event: Json) -> bool:
    changes = event["data"].get("changes")
    if not isinstance(changes, dict) or not changes:
        return False
    event["data"]["changes"] = {name[:100]: None for name in list(changes)[:50]}
    return True


def _shorten(longest: int) -> Callable[[Json], bool]:
    return lambda document: _cut_strings(document, longest=longest)


def _cut_strings(node: Any, *, longest: int) -> bool:
    """Cut every string in place, except for URLs, which would stop working."""
    cut = False
    for key, value in _entries(node):
        if isinstance(value, str):
            if len(value) > longest and not (isinstance(key, str) and key.endswith(("url", "link"))):
                node[key] = value[: longest - 1] + "…"
                cut = True
        elif isinstance(value, dict | list) and key != "links":
            cut = _cut_strings(value, longest=longest) or cut
    return cut


def _entries(node: Any) -> Iterator[tuple[Any, Any]]:
    return iter(list(node.items() if isinstance(node, dict) else enumerate(node)))


_ENVELOPE_ESSENTIALS: Final = tuple(path[0] for path in ESSENTIAL_PATHS if len(path) == 1)
_CALL_ESSENTIALS: Final = tuple(path[2] for path in ESSENTIAL_PATHS if path[:2] == ("data", "call"))
_FLAT_ESSENTIALS: Final = frozenset(name for path, names in FLAT_PATHS if path in ESSENTIAL_PATHS for name in names)


def _keep_essentials(event: Json) -> bool:
    call = event["data"].get("call")
    data: Json = {}
    if isinstance(call, dict):
        data["call"] = {name: _scalar(call.get(name)) for name in _CALL_ESSENTIALS}
    envelope = {name: _scalar(event.get(name)) for name in _ENVELOPE_ESSENTIALS}
    truncated = event.get("truncated")
    event.clear()
    event.update(envelope, data=data, truncated=truncated)
    return True


def _keep_flat_essentials(flattened: Json) -> bool:
    for name in flattened:
        if name != "truncated":
            flattened[name] = _scalar(flattened[name]) if name in _FLAT_ESSENTIALS else None
    return True


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        return value[:200]
    return value if isinstance(value, int | float) else None


_FULL_CUTS: Final[tuple[_Cut, ...]] = (
    ("raw", _drop_raw),
    ("participants", _empty("participants")),
    ("transfers", _empty("transfers")),
    ("contact.others", _empty("others", "contact")),
    ("custom", _empty("custom")),
    ("transcription.text", _cut_transcription),
    ("changes", _drop_changes),
    ("long strings", _shorten(500)),
    ("long strings", _shorten(100)),
    ("details", _keep_essentials),
)
_FLAT_CUTS: Final[tuple[_Cut, ...]] = (
    ("long strings", _shorten(4000)),
    ("long strings", _shorten(500)),
    ("long strings", _shorten(100)),
    ("details", _keep_flat_essentials),
)


# --- maps ------------------------------------------------------------------------------------------------------------

MAX_FIELDS: Final = 100
MAX_FIELD_NAME_CHARS: Final = 100
MAX_EXPRESSION_CHARS: Final = 512
# jmespath parses and evaluates recursively.
MAX_EXPRESSION_DEPTH: Final = 20
MAX_RESULT_BYTES: Final = 16 * 1024
MAX_MAP_CHARS: Final = 20_000
# Processor time for all fields of a map together.
MAP_BUDGET_S: Final = 0.02
_MAX_WEIGHT: Final = 256 * 1024
_STEPS_PER_CHECK: Final = 64
_SLICE_S: Final = 0.001
_PAUSE_S: Final = 0.0005
_SENT_WHEN_CUT: Final = "truncated"

# A compiled expression: jmespath's own syntax tree.
Expression = dict[str, Any]


class InvalidExpression(ValueError):
    """An expression that cannot be used; the text says why."""


class MapTooCostly(InvalidExpression):
    """A map that exceeds its time budget: as a whole, so that no other field is sent without it."""

    def __init__(self) -> None:
        super().__init__(f"the map takes more than {MAP_BUDGET_S * 1000:g} ms to evaluate; simplify its expressions")


class _Budget:
    """The processor time that one evaluation of a map may take.

    jmespath is pure Python, so a thread alone would not free the event loop: it would wait for the interpreter lock
    each time that it wakes up. After each millisecond of work the thread therefore pauses.
    """

    def __init__(self, *, pauses: bool) -> None:
        self._pauses = pauses
        self._slice_started_s = time.thread_time()
        self._ends_s = self._slice_started_s + MAP_BUDGET_S
        self._steps = 0

    def step(self) -> None:
        """Count one step. Raises MapTooCostly."""
        self._steps += 1
        if self._steps % _STEPS_PER_CHECK:
            return
        # Not the time of the clock: a busy machine makes no map costly.
        now_s = time.thread_time()
        if now_s > self._ends_s:
            raise MapTooCostly
        if self._pauses and now_s - self._slice_started_s > _SLICE_S:
            self._slice_started_s = now_s
            time.sleep(_PAUSE_S)


def check_map(mapping: Mapping[str, str], sample: Json, *, refuse_costly: bool = True) -> list[str]:
    """Return what is wrong with a map, one message per field; nothing when it works on the sample event.

    A stored map is checked without `refuse_costly`: a slower machine must not lose the subscription.
    """
    if not mapping:
        return ["the map has no fields; add some as output field: expression"]
    if len(mapping) > MAX_FIELDS:
        return [f"the map has {len(mapping)} fields; at most {MAX_FIELDS} are allowed"]
    if (total_chars := sum(len(str(text)) for text in mapping.values())) > MAX_MAP_CHARS:
        return [f"the expressions have {total_chars} characters; at most {MAX_MAP_CHARS} are allowed"]
    errors: list[str] = []
    total_bytes = 0
    budget = _Budget(pauses=_off_the_event_loop())
    for name, text in mapping.items():
        try:
            total_bytes += len(orjson.dumps({_field_name(name): _evaluate(_compile(text), sample, budget)}))
        except MapTooCostly as error:
            return [*errors, str(error)] if refuse_costly else errors
        except InvalidExpression as error:
            errors.append(f"{str(name)[:MAX_FIELD_NAME_CHARS]}: {error}")
    if total_bytes > MAX_RESULT_BYTES:
        errors.append(f"the result has {total_bytes} bytes for the sample event; at most {MAX_RESULT_BYTES} are sent")
    return errors


def _off_the_event_loop() -> bool:
    return threading.current_thread() is not threading.main_thread()


def _field_name(name: object) -> str:
    if not isinstance(name, str) or not name or len(name) > MAX_FIELD_NAME_CHARS or not name.isprintable():
        raise InvalidExpression(f"an output field must be text of 1 to {MAX_FIELD_NAME_CHARS} printable characters")
    return name


def _compile(text: object) -> Expression:
    if not isinstance(text, str) or not text.strip():
        raise InvalidExpression("an expression must be text, such as data.call.contact.name")
    if len(text) > MAX_EXPRESSION_CHARS:
        raise InvalidExpression(
            f"an expression must have at most {MAX_EXPRESSION_CHARS} characters; this one has {len(text)}"
        )
    try:
        with warnings.catch_warnings():
            # jmespath still takes a literal without quotes (`foo`), and only warns of it (JEP 12).
            warnings.simplefilter("error")
            parsed = cast(Expression, jmespath.compile(text).parsed)
    except (JMESPathError, Warning, ValueError) as error:
        raise InvalidExpression(f"not a valid JMESPath expression: {_first_line(error)}") from error
    except RecursionError:
        raise InvalidExpression(f"an expression must be at most {MAX_EXPRESSION_DEPTH} levels deep") from None
    if _depth(parsed) > MAX_EXPRESSION_DEPTH:
        raise InvalidExpression(f"an expression must be at most {MAX_EXPRESSION_DEPTH} levels deep")
    return parsed


def _depth(expression: Expression) -> int:
    deepest = 0
    level: list[Any] = [expression]
    while level:
        deepest += 1
        level = [
            child for node in level for child in node.get("children", ()) if isinstance(child, dict) and "type" in child
        ]
    return deepest


@lru_cache(maxsize=1024)
def _compiled_map(fields: tuple[tuple[str, str], ...]) -> tuple[tuple[str, Expression | None], ...]:
    return tuple((name, _compiled_or_none(text)) for name, text in fields)


def _compiled_or_none(text: str) -> Expression | None:
    try:
        return _compile(text)
    except InvalidExpression:
        return None


def _render_map(fields: Sequence[tuple[str, Expression | None]], event: Json) -> bytes:
    """Evaluate a map. A field that cannot be evaluated for this event is null; the others are sent all the same."""
    result: Json = {}
    budget = _Budget(pauses=_off_the_event_loop())
    for name, expression in fields:
        try:
            result[name] = None if expression is None else _evaluate(expression, event, budget)
        except MapTooCostly:
            raise
        except InvalidExpression:
            result[name] = None
    body = orjson.dumps(result)
    if len(body) <= MAX_RESULT_BYTES:
        return body
    sizes = {name: len(orjson.dumps(value)) for name, value in result.items()}
    dropped: list[str] = []
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        result[name] = None
        dropped.append(name)
        body = orjson.dumps({_SENT_WHEN_CUT: dropped, **result})
        if len(body) <= MAX_RESULT_BYTES:
            break
    return body


def _evaluate(expression: Expression, event: Json, budget: _Budget) -> Any:
    """Evaluate within bounds: return JSON of at most 16 KiB or raise InvalidExpression, whatever the expression."""
    try:
        value = _Bounded(budget).visit(expression, event)
        size_bytes = len(orjson.dumps(value))
    except InvalidExpression:
        raise
    except RecursionError:
        raise InvalidExpression("the result is nested too deeply") from None
    except JMESPathError as error:
        raise InvalidExpression(_first_line(error)) from error
    except Exception as error:  # jmespath functions raise anything for a value of the wrong type
        raise InvalidExpression(f"its result is not JSON: {_first_line(error)}") from error
    if size_bytes > MAX_RESULT_BYTES:
        raise InvalidExpression(f"its result has {size_bytes} bytes; at most {MAX_RESULT_BYTES} are sent")
    return value


class _Functions(Functions):
    """jmespath's functions, with a limit on `join`, whose result can be the product of its arguments."""

    @signature({"types": ["string"]}, {"types": ["array-string"]})
    def _func_join(self, separator: str, array: list[str]) -> str:
        if len(separator) * len(array) > _MAX_WEIGHT:
            raise InvalidExpression("it builds a value that is too large")
        return separator.join(array)


_OPTIONS: Final = Options(custom_functions=_Functions())


class _Bounded(TreeInterpreter):
    """An interpreter that stops when a map runs too long or an expression builds too much.

    jmespath has no such limit: `[@, @] | [@, @] | …` doubles its value at each step. Only the nodes below can return a
    value larger than their input, so their results are weighed. Functions and comparisons cost what their input weighs.
    """

    _BUILDERS: Final = frozenset(
        {
            "multi_select_list",
            "multi_select_dict",
            "flatten",
            "projection",
            "filter_projection",
            "value_projection",
            "function_expression",
        }
    )

    def __init__(self, budget: _Budget) -> None:
        super().__init__(_OPTIONS)
        self._budget = budget

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        value = super().visit(node, *args, **kwargs)
        self._budget.step()
        if node["type"] in self._BUILDERS:
            self._weigh(value)
        return value

    def visit_function_expression(self, node: Any, value: Any) -> Any:
        return super().visit_function_expression(self._weighed(node, value), value)

    def visit_comparator(self, node: Any, value: Any) -> Any:
        return super().visit_comparator(self._weighed(node, value), value)

    def _weighed(self, node: Any, value: Any) -> Any:
        """Evaluate and weigh the operands of a node, and put them back as literals."""
        operands = [self.visit(child, value) for child in node["children"]]
        for operand in operands:
            self._weigh(operand)
        literals = [{"type": "literal", "value": operand, "children": []} for operand in operands]
        return {**node, "children": literals}

    def _weigh(self, value: Any) -> None:
        """Count values and characters, a shared value once for each reference to it, as in JSON."""
        weight = 0
        rest = [value]
        while rest:
            self._budget.step()
            node = rest.pop()
            weight += len(node) + 1 if isinstance(node, str) else 1
            if isinstance(node, dict):
                rest.extend(node.values())
                weight += sum(map(len, node))
            elif isinstance(node, list):
                rest.extend(node)
            if weight > _MAX_WEIGHT:
                raise InvalidExpression("it builds a value that is too large")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
