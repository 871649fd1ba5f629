"""Which relay a command talks to: an address and a token, or the relay of a configuration on this machine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from relay.config_file import locate, read_file
from relay.domain.url import check_base_url
from relay.errors import SettingsError

# As `relay.settings` has them; a test compares the two.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "api.host": "127.0.0.1",
    "api.port": 8080,
    "api.tokens": [],
    "internal.host": "127.0.0.1",
    "internal.port": 9090,
    "data_dir": "relay-data",
}
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


@dataclass(frozen=True, slots=True)
class ApiTarget:
    url: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LocalRelay:
    """Where the relay of a configuration listens on this machine, and where it keeps the token it generated."""

    api_host: str
    api_port: int
    internal_host: str
    internal_port: int
    data_dir: Path
    tokens: tuple[str, ...] = field(repr=False)

    def internal_url(self) -> str:
        return _loopback_url(self.internal_host, self.internal_port)


def find_target(url: str | None, token: str | None, config: Path | None, environ: Mapping[str, str]) -> ApiTarget:
    """Return the given address, else that of the configuration. Raises SettingsError.

    The token that a relay generated for itself is only ever sent to the address of its own configuration.
    """
    if url is not None:
        if token is None:
            raise SettingsError("no token for this address: set RELAY_TOKEN or pass --token")
        return ApiTarget(check_relay_url(url), check_token(token))
    relay = read_local_relay(config, environ)
    if relay.api_port == 0:
        raise SettingsError("api.port is 0, so the relay picks a free port: pass its address with --url")
    if token is None:
        token = relay.tokens[0] if relay.tokens else _generated_token(relay.data_dir)
    return ApiTarget(_loopback_url(relay.api_host, relay.api_port), check_token(token))


def read_local_relay(config: Path | None, environ: Mapping[str, str]) -> LocalRelay:
    """Read the few settings that a client needs. Raises SettingsError.

    `relay.settings` takes longer to import than any command may run, so it is asked only about what is unusual or
    wrong: it has a message for everything.
    """
    path = locate(config, environ)
    problems: list[str] = []
    tree = (read_file(path, problems) if path else None) or {}
    variables = {name.upper(): value for name, value in environ.items() if value}
    values = {name: _value(name, tree, variables) for name in _DEFAULTS}
    whole_sections = {"RELAY_API", "RELAY_INTERNAL"} & set(variables)
    if problems or whole_sections or not all(_is_plain(name, value) for name, value in values.items()):
        return _complete_reading(config, environ)
    base = path.absolute().parent if path else Path.cwd()
    return LocalRelay(
        values["api.host"],
        int(values["api.port"]),
        values["internal.host"],
        int(values["internal.port"]),
        base / Path(values["data_dir"]).expanduser(),
        tuple(values["api.tokens"]),
    )


def _value(name: str, tree: Mapping[str, Any], variables: Mapping[str, str]) -> Any:
    variable = variables.get("RELAY_" + name.replace(".", "__").upper())
    if variable is not None:
        return _json(variable) if variable.lstrip().startswith("[") else variable
    section, _, key = name.rpartition(".")
    scope = tree.get(section, {}) if section else tree
    # A section that is not a map is left to the complete reading, which has the message for it.
    value = scope.get(key) if isinstance(scope, dict) else scope
    return _DEFAULTS[name] if value is None and isinstance(scope, dict) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_plain(name: str, value: Any) -> bool:
    match _DEFAULTS[name]:
        case int():
            return str(value).isascii() and str(value).isdigit() and int(value) < 65_536
        case list():
            return isinstance(value, list) and all(isinstance(token, str) for token in value)
        case _:
            return isinstance(value, str) and value == value.strip() != ""


def _complete_reading(config: Path | None, environ: Mapping[str, str]) -> LocalRelay:
    from relay.settings import load

    settings = load(config, environ)
    api, internal = settings.api, settings.internal
    tokens = tuple(token.get_secret_value() for token in api.tokens)
    return LocalRelay(api.host, api.port, internal.host, internal.port, settings.data_dir, tokens)


def _generated_token(data_dir: Path) -> str:
    from relay.secrets import TOKEN_FILE  # imports cryptography, which nothing else in a client needs

    path = data_dir / TOKEN_FILE
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise SettingsError(
            f"no token: {path} does not exist. Pass the relay's own configuration with --config relay.yaml, "
            "or set RELAY_URL and RELAY_TOKEN"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not plain text"
        raise SettingsError(f"the token in {path} cannot be read: {reason}; set RELAY_TOKEN") from None


def _loopback_url(host: str, port: int) -> str:
    host = _LOOPBACK.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def check_relay_url(text: str) -> str:
    """Return the address of a relay without `/v1`; a path before it is kept. Raises SettingsError."""
    try:
        return check_base_url(text, example="https://relay.example.com").removesuffix("/v1")
    except ValueError as error:
        raise SettingsError(f"the address of the relay (RELAY_URL, --url) {error}") from None


def check_token(text: str) -> str:
    """Return a token that can be sent in a header. Raises SettingsError, without repeating it."""
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError("a token must be one word of ASCII characters (RELAY_TOKEN, --token)")
    return token
