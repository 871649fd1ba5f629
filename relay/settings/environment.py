"""RELAY_… variables, merged into what the file says."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from relay.domain.json import Json
from relay.settings.messages import Place, did_you_mean
from relay.settings.options import MAPS, Settings

_NOT_SETTINGS: Final = frozenset({"RELAY_URL", "RELAY_TOKEN", "RELAY_CONFIG"})
"""Variables of the command line, which are nobody's mistake."""

_SERVICE_LINK = re.compile(
    r"RELAY_(?:[A-Z0-9_]+?_)??"
    r"(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?|(?P<bare>PORT))"
)


def merge_environment(
    environ: Mapping[str, str],
    tree: Json,
    *,
    takes_json: Callable[[tuple[str, ...]], bool],
    problems: list[str],
) -> dict[Place, str]:
    """Put the variables into the tree, shorter names first; answer which place was set by which variable."""
    variables: dict[Place, str] = {}
    service_links: list[str] = []
    declared = {section: list(tree[section]) for section in MAPS if isinstance(tree.get(section), dict)}
    names = [name for name in environ if name.upper().startswith("RELAY_") and environ[name] != ""]
    for name in sorted(names, key=lambda name: (name.count("__"), name)):
        parts = tuple(name.lower().removeprefix("relay_").split("__"))
        if name.upper() in _NOT_SETTINGS:
            continue
        if _is_service_link(name.upper(), environ[name]):
            service_links.append(name)
        elif parts[0] not in Settings.model_fields:
            known = [f"RELAY_{field.upper()}" for field in Settings.model_fields] + sorted(_NOT_SETTINGS)
            problems.append(f"{name}: there is no such setting; {did_you_mean(f'RELAY_{parts[0].upper()}', known)}")
        elif not all(parts):
            problems.append(f"{name}: has an empty name between its underscores")
        elif len(alike := _same_ids(parts, declared)) > 1:
            problems.append(f"{name}: could mean {' or '.join(alike)}; set it in the file")
        else:
            place = (parts[0], alike[0], *parts[2:]) if alike else parts
            try:
                value = _value(environ[name], is_json=takes_json(place))
            except (ValueError, RecursionError) as error:
                unreadable = isinstance(error, UnicodeError)
                problems.append(f"{name}: is not {'UTF-8 text' if unreadable else 'valid JSON'}")
                continue
            variables[place] = name
            _merge(tree, place, value)
    if service_links:
        problems.append(
            f"{', '.join(service_links)}: Kubernetes adds these for a Service whose name starts with relay; "
            "set enableServiceLinks: false in the pod"
        )
    return variables


def _value(text: str, *, is_json: bool) -> Any:
    """Read a variable; ValueError when it is neither text nor, where that is wanted and begun, JSON."""
    text.encode()
    if not is_json or text.lstrip()[:1] not in ("[", "{"):
        return text
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _same_ids(parts: Sequence[str], declared: Mapping[str, Sequence[str]]) -> list[str]:
    """Find the ids in the file that a variable may mean: the very one, else those that differ in - and _ only."""
    ids = declared.get(parts[0], ()) if len(parts) > 1 else ()
    if len(parts) > 1 and parts[1] in ids:
        return [parts[1]]
    return [known for known in ids if known.replace("-", "_") == parts[1].replace("-", "_")]


def _is_service_link(name: str, value: str) -> bool:
    found = _SERVICE_LINK.fullmatch(name)
    return found is not None and "__" not in name and (not found["bare"] or "://" in value)


def _merge(tree: Json, place: Sequence[str], value: Any) -> None:
    name, rest = place[0], place[1:]
    inner = tree.get(name)
    if not rest and not (isinstance(inner, dict) and isinstance(value, dict)):
        tree[name] = value
        return
    if not isinstance(inner, dict):
        inner = tree[name] = {}
    if rest:
        _merge(inner, rest, value)
    else:
        for key, entry in value.items():
            _merge(inner, (key,), entry)
