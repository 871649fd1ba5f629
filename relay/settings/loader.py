"""File and environment become one tree, the tree becomes settings, and every mistake on the way is collected."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from relay.delivery.guard import vet_url
from relay.delivery.signature import new_secret
from relay.domain.json import Json
from relay.errors import SettingsError
from relay.providers import PROVIDERS
from relay.providers.base import ProviderKind, SourceOptions
from relay.settings.environment import merge_environment
from relay.settings.file import read_file
from relay.settings.messages import Place, annotation_at, did_you_mean, dotted, is_structured, placed_sentences, shown
from relay.settings.options import ID_PATTERN, MAPS, SUBSCRIPTION_FILES, Settings, SubscriptionOptions
from relay.settings.values import read_only

_FILE_MAX_BYTES: Final = 65_536


def load(
    config_path: Path | None, environ: Mapping[str, str], *, providers: Mapping[str, ProviderKind] = PROVIDERS
) -> Settings:
    """Read the file and the environment. Without a path it is the file that RELAY_CONFIG names, else a relay.yaml in
    the working directory, else none.

    Raises SettingsError with everything that is wrong, a line each.
    """
    here = Path("relay.yaml")
    path = config_path or (Path(environ["RELAY_CONFIG"]) if environ.get("RELAY_CONFIG") else None)
    if path is None and here.is_file():
        path = here
    reading = _Reading(base=path.absolute().parent if path else Path.cwd(), providers=providers)
    tree = read_file(path, reading.problems) if path else {}
    merged: Json = tree or {}
    reading.variables = merge_environment(environ, merged, takes_json=reading.takes_json, problems=reading.problems)
    settings = None if tree is None else reading.settings(merged)
    if settings is None:
        raise reading.error(merged)
    return settings


class _Reading:
    """One pass over the tree, which collects what is wrong."""

    def __init__(self, *, base: Path, providers: Mapping[str, ProviderKind]) -> None:
        self.problems: list[str] = []
        self.variables: dict[Place, str] = {}
        self._base = base
        self._providers = providers
        self._file_contents: set[str] = set()

    def error(self, tree: Json) -> SettingsError:
        """Put the problems together; what the tree holds under confidential names is masked, should it have got in."""
        text = "\n".join(dict.fromkeys(self.problems))
        for secret in sorted(self._file_contents.union(_confidential(tree)), key=len, reverse=True):
            if len(secret) >= 8:
                text = text.replace(secret, "•••")
        return SettingsError(text)

    def takes_json(self, place: tuple[str, ...]) -> bool:
        """Say whether a list or a map may stand here, so that a text in brackets is read as JSON."""
        section, rest = place[0], place[2:]
        if section not in MAPS:
            return section != "secret_key" and is_structured(annotation_at(Settings, place))
        if not rest:
            return True
        models = [SubscriptionOptions] if section == "subscriptions" else [k.options for k in self._providers.values()]
        return any(is_structured(annotation_at(model, rest)) for model in models)

    def settings(self, tree: Json) -> Settings | None:
        """Check everything in the tree; None when there were problems, now or before."""
        known = list(Settings.model_fields)
        for name in tree:
            if name not in known:
                self._problem((name,), f"there is no such setting; {did_you_mean(name, known)}")
        rest = self._with_paths({name: tree[name] for name in tree if name in known and name not in MAPS})
        plain: Settings | None = self._checked(Settings, rest, ())
        sources = {
            source_id: self._source(("sources", source_id), options)
            for source_id, options in self._entries(tree, "sources")
        }
        subscriptions = {
            subscription_id: self._subscription(("subscriptions", subscription_id), options)
            for subscription_id, options in self._entries(tree, "subscriptions")
        }
        for subscription_id, subscription in subscriptions.items():
            if subscription is not None:
                self._check_sources_exist(subscription_id, subscription, tree.get("sources"))
        if plain is None or self.problems:
            return None
        for subscription_id, subscription in subscriptions.items():
            if subscription is not None and subscription.enabled:
                self._check_dialled(subscription_id, subscription, plain)
        if self.problems:
            return None
        return plain.model_copy(update={"sources": read_only(sources), "subscriptions": read_only(subscriptions)})

    def _check_sources_exist(self, subscription_id: str, subscription: SubscriptionOptions, declared: Any) -> None:
        names = list(declared) if isinstance(declared, dict) else []
        for wanted in subscription.sources or ():
            if wanted not in names:
                hint = did_you_mean(wanted, names) if names else "there are none"
                place = ("subscriptions", subscription_id, "sources")
                self._problem(place, f"no source is called {shown(wanted)}; {hint}")

    def _check_dialled(self, subscription_id: str, subscription: SubscriptionOptions, plain: Settings) -> None:
        """Refuse a URL that would never be dialled, as far as its text tells; what a name resolves to is seen later."""
        try:
            vet_url(subscription.url.get_secret_value(), plain.delivery.allowed_networks)
        except ValueError as error:
            self._problem(("subscriptions", subscription_id, "url"), str(error))

    def _with_paths(self, rest: Json) -> Json:
        """Put the paths among the plain settings where they belong."""
        data_dir, storage_url = rest.get("data_dir", "relay-data"), rest.get("storage_url")
        if isinstance(data_dir, str) and data_dir.strip():
            rest["data_dir"] = self._path(data_dir)
        if isinstance(storage_url, str) and storage_url.strip() and "://" not in storage_url:
            rest["storage_url"] = str(self._path(storage_url))
        return rest

    def _path(self, text: str) -> Path:
        return self._base / os.path.expanduser(text)

    def _entries(self, tree: Json, section: str) -> Iterable[tuple[str, Json]]:
        entries = tree.get(section, {})
        if not isinstance(entries, dict):
            self._problem((section,), "must be a map of ids to options")
            return
        for entry_id, options in entries.items():
            if not re.fullmatch(ID_PATTERN, entry_id):
                self._problem(
                    (section, entry_id),
                    "an id has 1 to 63 lower-case letters, digits, - and _, and starts with a letter or a digit",
                )
            elif options is None or isinstance(options, dict):
                yield entry_id, dict(options or {})
            else:
                self._problem((section, entry_id), "must be a map of names to values")

    def _source(self, place: Place, options: Json) -> SourceOptions | None:
        name = options.get("provider")
        if name is None:
            self._problem((*place, "provider"), f"is missing; providers are {', '.join(sorted(self._providers))}")
            return None
        kind = self._providers.get(name) if isinstance(name, str) else None
        if kind is None:
            hint = did_you_mean(str(name), self._providers)
            self._problem((*place, "provider"), f"no provider is called {shown(name)}; {hint}")
            return None
        source: SourceOptions | None = self._checked(kind.options, self._with_files(place, options), place)
        return source

    def _with_files(self, place: Place, options: Json) -> Json:
        """Make the paths under `…_file` absolute and see that something is in them; the source reads them itself."""
        placed = dict(options)
        for name, value in options.items():
            twin = name.removesuffix("_file")
            if isinstance(value, dict):
                placed[name] = self._with_files((*place, name), value)
            elif twin != name and value is not None and options.get(twin) is not None:
                self._problem(place, f"has both {twin} and {name}; keep one of them")
                del placed[name]
            elif twin != name and isinstance(value, str):
                placed[name] = str(self._path(value))
                self._content((*place, name), value)
        return placed

    def _subscription(self, place: Place, options: Json) -> SubscriptionOptions | None:
        """Check a subscription, with the contents of its files in their places."""
        unread: set[str] = set()
        for file_name in SUBSCRIPTION_FILES:
            value, name = options.pop(file_name, None), file_name.removesuffix("_file")
            if options.get(name) is None:
                options.pop(name, None)
            if value is None:
                continue
            if name in options:
                self._problem(place, f"has both {name} and {file_name}; keep one of them")
            elif not isinstance(value, str):
                self._problem((*place, file_name), "must be the path of a file")
                unread.add(name)
            elif (content := self._content((*place, file_name), value)) is not None:
                options[name] = content
            else:
                unread.add(name)
        subscription: SubscriptionOptions | None = self._checked(SubscriptionOptions, options, place, unread=unread)
        return subscription

    def _content(self, place: Place, text: str) -> str | None:
        path = self._path(text)
        try:
            with path.open("rb") as file:
                raw = file.read(_FILE_MAX_BYTES + 1)
            content = raw.decode().strip()
        except OSError as error:
            reason = (
                "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            )
        except ValueError:
            reason = "cannot be read: it is not UTF-8 text"
        else:
            self._file_contents.add(content)
            if content and len(raw) <= _FILE_MAX_BYTES:
                return content
            reason = "is too large for a secret" if content else "is empty"
        self._problem(place, f"{shown(path, quote='', keep=300)}: {reason}")
        return None

    def _checked(self, model: type[Any], data: Json, place: Place, *, unread: Collection[str] = ()) -> Any:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            for found, sentence in placed_sentences(error, model, also=self._also(model)):
                if found and str(found[0]) in unread:
                    continue
                if model is SubscriptionOptions and found == ("secret",) and "secret" not in data:
                    sentence = f"is missing; here is a fresh one to paste: {new_secret()}"
                self._problem((*place, *found), sentence)
            return None

    def _also(self, model: type[Any]) -> Iterable[str]:
        return SUBSCRIPTION_FILES if model is SubscriptionOptions else ()

    def _problem(self, place: Place, sentence: str) -> None:
        variable = self.variables.get(place)
        where = dotted(place)
        self.problems.append(f"{where}: {sentence}{f' (from {variable})' if variable else ''}" if where else sentence)


_CONFIDENTIAL = re.compile(r"(?:key|token|secret|password|authorization|credential|url|header)s?$", re.IGNORECASE)


def _confidential(tree: Any, *, inside: bool = False) -> Iterable[str]:
    """Yield the texts whose names say that they are secret, wherever they are."""
    match tree:
        case dict():
            for name, value in tree.items():
                yield from _confidential(value, inside=inside or bool(_CONFIDENTIAL.search(name)))
        case list():
            for value in tree:
                yield from _confidential(value, inside=inside)
        case str() if inside:
            yield tree
            yield from (part.strip() for part in tree.split(","))
        case _:
            return
