"""RELAY_… variables, read by pydantic-settings and checked for what it would pass over in silence.

pydantic-settings ignores a variable that matches no field, so a typo would go unnoticed. It also cannot name the
variable behind a wrong value, and it knows no ids from the file. All three need the names before it splits them.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource

from relay.domain.json import Json
from relay.settings.messages import Location, did_you_mean, dotted, inside

_COMMAND_LINE: Final = frozenset({"RELAY_URL", "RELAY_TOKEN", "RELAY_CONFIG"})

# Kubernetes adds these to every pod for a Service called relay or relay-…: RELAY_PORT=tcp://10.0.0.1:8080.
_SERVICE_LINK: Final = re.compile(
    r"RELAY_(?:[A-Z0-9_]+?_)??"
    r"(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?|(?P<bare>PORT))"
)


class Environment(EnvSettingsSource):
    """The variables as a tree of settings. `names` tells which variable set a value; problems are appended."""

    def __init__(
        self, settings: type[BaseSettings], environ: Mapping[str, str], *, file: Json, problems: list[str]
    ) -> None:
        super().__init__(settings)
        self._problems = problems
        self.names: dict[Location, str] = {}
        self.env_vars = {}
        for name in sorted(environ, key=lambda name: (name.count("__"), name)):  # a map before what goes into it
            if not name.upper().startswith(self.env_prefix) or _is_ignored(name.upper(), environ[name]):
                continue
            location = tuple(name.lower()[self.env_prefix_len :].split("__"))
            candidates = _ids_like(location, file)
            if location[0] not in settings.model_fields:
                expected = {f"{self.env_prefix}{field.upper()}" for field in settings.model_fields} | _COMMAND_LINE
                hint = did_you_mean(f"{self.env_prefix}{location[0].upper()}", expected)
                problems.append(f"{name}: is not a setting; {hint}")
            elif not all(location):
                problems.append(f"{name}: has an empty name between its underscores")
            elif len(candidates) > 1:
                problems.append(f"{name}: matches both {' and '.join(candidates)}; set it in the file")
            elif not _is_utf8(environ[name]):
                problems.append(f"{name}: is not UTF-8 text")
            else:
                location = (location[0], *candidates, *location[2:]) if candidates else location
                self.names[location] = name
                self.env_vars[f"{self.env_prefix}{'__'.join(location)}".lower()] = environ[name]

    def __call__(self) -> Json:
        tree: Json = super().__call__()
        for location, name in self.names.items():
            value: Any = tree
            for part in location:
                value = value.get(part) if isinstance(value, dict) else None
            if value is None:
                self._problems.append(f"{name}: is not a setting; {dotted(location[:-1])} is not a map")
        return tree

    def next_field(self, field: Any, key: str, case_sensitive: bool | None = None) -> FieldInfo | None:
        """Find the field a part of a name leads to, through maps by id as well."""
        step: FieldInfo | None = inside(field, key)
        return step

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Decode JSON where a list or a map begins; other text is left to validation, which can name the variable."""
        if not value.lstrip().startswith(("[", "{")):
            return value
        try:
            decoded = json.loads(value)
            json.dumps(decoded, ensure_ascii=False).encode()  # JSON can hold lone surrogates; nothing else can
        except (ValueError, RecursionError):
            return value
        return decoded


def _is_ignored(name: str, value: str) -> bool:
    link = _SERVICE_LINK.fullmatch(name) if "__" not in name else None
    return value == "" or name in _COMMAND_LINE or (link is not None and (not link["bare"] or "://" in value))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ids_like(location: tuple[str, ...], file: Json) -> list[str]:
    """Find the ids in the file that a variable may mean: the same one, else those that differ in - and _ only."""
    section = file.get(location[0])
    if len(location) < 2 or not isinstance(section, dict) or location[0] not in ("sources", "subscriptions"):
        return []
    if location[1] in section:
        return [location[1]]
    return [name for name in section if name.replace("-", "_") == location[1].replace("-", "_")]
