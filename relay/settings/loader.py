"""Merge the file and the environment, validate them, and report every problem at once."""

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from relay.config_file import locate, read_file
from relay.delivery.guard import vet_url
from relay.delivery.signature import new_secret
from relay.domain.json import Json
from relay.domain.text import printable
from relay.errors import SettingsError
from relay.events.render import check_map
from relay.events.samples import sample
from relay.settings.environment import Environment
from relay.settings.messages import Location, did_you_mean, dotted, located_errors
from relay.settings.options import SUBSCRIPTION_FILES, FieldMap, Settings

_FILE_MAX_BYTES: Final = 65_536


def load(config_path: Path | None, environ: Mapping[str, str], *, model: type[Settings] = Settings) -> Settings:
    """Read the environment and the file, which `locate` finds when no path is given.

    Raises SettingsError with one line for each problem.
    """
    path = locate(config_path, environ)
    problems: list[str] = []
    file = read_file(path, problems) if path else {}
    environment = Environment(model, environ, file=file or {}, problems=problems)
    tree = _merge(file or {}, environment())
    validation = _Validation(model, base=path.absolute().parent if path else Path.cwd(), names=environment.names)
    settings = validation.settings(tree) if file is not None else None
    if settings is None or problems:
        raise SettingsError(_masked("\n".join(problems + validation.problems), tree, validation.contents))
    return settings


def _merge(lower: Json, higher: Json) -> Json:
    """Merge two trees; where both have a value and they are not both maps, the higher one wins."""
    merged = dict(lower)
    for name, value in higher.items():
        below = merged.get(name)
        merged[name] = _merge(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


class _Validation:
    """One pass over the merged tree. `contents` are the texts of secret files, which no message may repeat."""

    def __init__(self, model: type[Settings], *, base: Path, names: Mapping[Location, str]) -> None:
        self.problems: list[str] = []
        self.contents: set[str] = set()
        self._model = model
        self._base = base
        self._names = names
        self._unreadable: set[Location] = set()

    def settings(self, tree: Json) -> Settings | None:
        fields = self._model.model_fields
        for name in [name for name in tree if name not in fields]:
            # Not left to pydantic: BaseSettings takes names such as `_env_file` for options of its own.
            del tree[name]
            self._problem((name,), f"is not a setting; {did_you_mean(name, fields)}")
        self._resolve_paths(tree)
        settings: Settings | None = None
        try:
            settings = self._model.model_validate(tree)
        except ValidationError as error:
            for location, message in located_errors(
                error, self._model, more_names={"subscriptions": SUBSCRIPTION_FILES}
            ):
                if location in self._unreadable:
                    continue
                if location[:1] == ("subscriptions",) and location[-1] == "secret" and message.startswith("is missing"):
                    message = f"is missing; use this new one: {new_secret()}"
                self._problem(location, message)
        self._check_sources_exist(tree)
        if settings is not None and not self.problems:
            self._check_subscriptions(settings)
        return None if self.problems else settings

    def _check_sources_exist(self, tree: Json) -> None:
        sources = _map_at(tree, "sources")
        for subscription_id, options in _map_at(tree, "subscriptions").items():
            names = options.get("sources") if isinstance(options, dict) else None
            for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
                if isinstance(name, str) and name not in sources:
                    hint = did_you_mean(name, sources) if sources else "no source is configured"
                    place = ("subscriptions", subscription_id, "sources")
                    self._problem(place, f"{printable(name)} is not a source; {hint}")

    def _check_subscriptions(self, settings: Settings) -> None:
        """Reject URLs that the guard would never connect to, and field maps that cost too much.

        What a name resolves to is checked at each attempt.
        """
        for subscription_id, subscription in settings.subscriptions.items():
            try:
                if subscription.enabled:
                    vet_url(subscription.url.get_secret_value(), settings.delivery.allowed_networks)
            except ValueError as error:
                self._problem(("subscriptions", subscription_id, "url"), str(error))
            if isinstance(subscription.payload, FieldMap):
                for problem in check_map(subscription.payload.map, sample("call.completed", now=datetime.now(UTC))):
                    self._problem(("subscriptions", subscription_id, "payload", "map"), problem)

    def _resolve_paths(self, tree: Json) -> None:
        """Make paths absolute and read secret files: a subscription gets the content, a source re-reads its file."""
        for name, default in (("data_dir", "relay-data"), ("storage_url", None)):
            text = tree.get(name, default)
            if isinstance(text, str) and text.strip() and "://" not in text:
                tree[name] = str(self._path(text))
        for section in ("sources", "subscriptions"):
            if isinstance(tree.get(section), dict):
                tree[section] = {
                    name: self._with_files((section, name), options) if isinstance(options, dict) else options
                    for name, options in tree[section].items()
                }

    def _with_files(self, place: Location, options: Json) -> Json:
        resolved = dict(options)
        for name, value in options.items():
            twin = name.removesuffix("_file")
            replaces = place[0] == "subscriptions" and len(place) == 2 and name in SUBSCRIPTION_FILES
            if isinstance(value, dict):
                resolved[name] = self._with_files((*place, name), value)
            elif twin == name or (place[0] == "subscriptions" and not replaces):
                continue
            elif value is not None and options.get(twin) is not None:
                self._problem(place, f"has both {twin} and {name}; keep one of them")
                del resolved[name]
            elif isinstance(value, str):
                content = self._content((*place, name), value)
                resolved |= {twin: content} if replaces else {name: str(self._path(value))}
            elif replaces and value is not None:
                self._problem((*place, name), "must be the path of a file")
                self._unreadable.add((*place, twin))
            if replaces:
                resolved.pop(name, None)
        return resolved

    def _content(self, place: Location, text: str) -> str | None:
        path = self._path(text)
        try:
            with path.open("rb") as file:
                raw = file.read(_FILE_MAX_BYTES + 1)
            content = raw.decode().strip()
        except OSError as error:
            reason = "file not found" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        except ValueError:
            reason = "cannot be read: it is not UTF-8 text"
        else:
            self.contents.add(content)
            if content and len(raw) <= _FILE_MAX_BYTES:
                return content
            reason = "is too large for a secret" if content else "is empty"
        self._problem(place, f"{printable(path, quote='', max_chars=300)}: {reason}")
        self._unreadable.add((*place[:-1], str(place[-1]).removesuffix("_file")))
        return None

    def _path(self, text: str) -> Path:
        return self._base / os.path.expanduser(text)

    def _problem(self, place: Location, message: str) -> None:
        variable = next(
            (self._names[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self._names), ""
        )
        text = f"{dotted(place)}: {message}" if place else message
        self.problems.append(f"{text} (from {variable})" if variable else text)


def _map_at(tree: Json, name: str) -> Json:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


_CONFIDENTIAL = re.compile(r"(?:key|token|secret|password|authorization|credential|url|header)s?$", re.IGNORECASE)


def _masked(text: str, tree: Json, contents: Iterable[str]) -> str:
    """Mask what the tree holds under confidential names, in case a provider's own message repeats it."""
    for secret in sorted({*contents, *_confidential(tree)}, key=len, reverse=True):
        if len(secret) >= 8:
            text = text.replace(secret, "•••")
    return "\n".join(dict.fromkeys(text.split("\n")))


def _confidential(tree: Any, *, below: bool = False) -> Iterable[str]:
    match tree:
        case dict():
            for name, value in tree.items():
                yield from _confidential(value, below=below or bool(_CONFIDENTIAL.search(name)))
        case list():
            for value in tree:
                yield from _confidential(value, below=below)
        case str() if below:
            yield tree
            yield from (part.strip() for part in tree.split(","))
