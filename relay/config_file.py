"""Read relay.yaml strictly: a duplicate key, a tag or a syntax error is reported with its line number.

Outside `relay.settings`, because the command line looks up an address without importing every setting there is.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from relay.domain.json import Json
from relay.domain.text import printable

# A setting that holds its secret itself; those in files of their own (`…_file`) expose nothing.
_SECRET: Final = re.compile(rb"""["']?\b(?:\w*(?:key|token|secret|password)s?|(?<!_)url)["']?\s*:\s*[^\s#]""")


def locate(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Find the configuration: `path`, else what RELAY_CONFIG names, else a relay.yaml in the working directory."""
    if path is None and environ.get("RELAY_CONFIG"):
        return Path(environ["RELAY_CONFIG"])
    default = Path("relay.yaml")
    return default if path is None and default.is_file() else path


def read_file(path: Path, problems: list[str]) -> Json | None:
    """Read the map of settings in a file; None, and a message in `problems`, when it cannot be read at all."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.append(f"{path}: file not found; name another one with --config")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or type(error).__name__}")
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text")
    else:
        settings: Json | None = _read(content, str(path), problems, _Reader.settings)
        return settings
    return None


def parse(content: str, name: str, problems: list[str]) -> Any:
    """Read any YAML document as strictly; None, and messages in `problems` that begin with `name`, if it is invalid."""
    return _read(content, name, problems, _Reader.document)


def _read(content: str, name: str, problems: list[str], method: "Callable[[_Reader], Any]") -> Any:
    try:
        return method(_Reader(content, name, problems))
    except yaml.reader.ReaderError:
        reason = "is not valid YAML: it has a control character"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = f"{where}this is not valid YAML: {_reason(error)}"
    except RecursionError:
        reason = "is nested too deeply, or refers to itself"
    except _NotAMapping as error:
        reason = f"must be a map of setting names to values, not {error}"
    problems.append(f"{name}: {reason}")
    return None


class _NotAMapping(Exception):
    """The document is valid, but not a map."""


class _Loader(yaml.SafeLoader):
    """Plain values as YAML 1.2 reads them: `NO` is text, and so are `0101`, `+1555`, `12:30` and a date."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way; filled below


for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)", list("-.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)

_MERGE: Final = "tag:yaml.org,2002:merge"
_TAGS: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Reader:
    """Walks the nodes of one document: PyYAML itself loses line numbers and lets the last of two equal keys win."""

    def __init__(self, content: str, name: str, problems: list[str]) -> None:
        self._loader = _Loader(content)
        self._name = name
        self._problems = problems

    def settings(self) -> Json:
        try:
            node = self._loader.get_single_node()
            if node is None:
                return {}
            if not isinstance(node, yaml.MappingNode):
                raise _NotAMapping("a list" if isinstance(node, yaml.SequenceNode) else "a single value")
            return {name: value for name, value in self._map(node).items() if value is not None}
        finally:
            self._loader.dispose()

    def document(self) -> Any:
        try:
            node = self._loader.get_single_node()
            return None if node is None else self._value(node)
        finally:
            self._loader.dispose()

    def _value(self, node: yaml.Node) -> Any:
        if node.tag not in _TAGS:
            self._problem(node, "tags are not supported; put text that starts with ! in quotes")
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child) for child in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._map(node)
        try:
            value = self._loader.construct_object(node)
            return _whole_characters(value) if isinstance(value, str) else value
        except UnicodeError:
            self._problem(node, "the text has a lone surrogate")
        except (yaml.YAMLError, ValueError, KeyError, IndexError):
            self._problem(node, "the value does not match its tag")
        return None

    def _map(self, node: yaml.MappingNode) -> Json:
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            name = _key_name(key)
            if name in first_lines and key.tag != _MERGE:
                self._problem(key, f"{printable(name)} is a duplicate key, first in line {first_lines[name]}")
            first_lines.setdefault(name, key.start_mark.line + 1)
        self._loader.flatten_mapping(node)
        return {_key_name(key): self._value(value) for key, value in node.value}

    def _problem(self, node: yaml.Node, message: str) -> None:
        self._problems.append(f"{self._name}: line {node.start_mark.line + 1}: {message}")


def _key_name(node: yaml.Node) -> str:
    """Return a key as it is written, whatever type YAML would give it."""
    return str(node.value).encode("utf-8", "replace").decode() if isinstance(node, yaml.ScalarNode) else "?"


def _whole_characters(text: str) -> str:
    """Join surrogate pairs, as JSON escapes write them; UnicodeError when one is alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def _reason(error: yaml.MarkedYAMLError) -> str:
    """Return the parser's reason, unless it quotes the file, which might be part of a secret."""
    reason = error.problem or error.context or "it is incomplete"
    if "alias" in reason:
        return "an undefined alias; put text that starts with * in quotes"
    if isinstance(error, yaml.composer.ComposerError):
        return "expected one document, with unique anchors; put text that starts with & in quotes"
    return "check the quotes, colons and spaces around it" if re.search(r"'(?!\\.')[^'<]{2,}'|\"", reason) else reason


def exposes_secrets(path: Path) -> bool:
    """Whether a file holds secrets, or URLs of hooks, and other users may read it."""
    with contextlib.suppress(OSError):
        return bool(path.stat().st_mode & 0o077) and _SECRET.search(path.read_bytes()) is not None
    return False
