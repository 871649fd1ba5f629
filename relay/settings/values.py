"""Types of single values; error messages never repeat a value that may be secret."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BeforeValidator, SecretStr, WrapSerializer

from relay.delivery.signature import decode_secret
from relay.domain.text import printable
from relay.domain.url import check_base_url, parse_url
from relay.events.render import check_map
from relay.events.samples import sample
from relay.events.types import EVENT_TYPES, matches
from relay.secrets import KEY_MIN_CHARS, TOKEN_MIN_CHARS

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def whole_numbers_as_text(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple(str(entry) if isinstance(entry, int) and not isinstance(entry, bool) else entry for entry in entries)


def lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _network(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ip_network(value)
    except ValueError:
        pass
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError("must be an address or a network such as 10.0.0.0/8 or fd00::/8") from None
    raise ValueError(f"has bits beyond its prefix; did you mean {network}?")


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:.]+", text):
        raise ValueError("must be a host name or an IP address")
    return text


def _secret_url(value: SecretStr) -> SecretStr:
    parse_url(value.get_secret_value())
    return value


def _secret_whsec(value: SecretStr) -> SecretStr:
    decode_secret(value.get_secret_value())
    return value


def _public_url(text: str) -> str:
    return check_base_url(text, example="https://relay.example.com")


def _not_blank(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty")
    return value


def _storage_url(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if separator and (scheme not in ("s3", "gs", "az") or not rest.strip("/") or "@" in rest or "?" in rest):
        raise ValueError("must be a path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
    return text


def _redis_url(value: SecretStr) -> SecretStr:
    if not re.match(r"(rediss?|unix)://\S+$", value.get_secret_value()):
        raise ValueError("must be redis://host:6379/0, rediss://… or unix://…")
    return value


def _token(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if len(text) < TOKEN_MIN_CHARS or not re.fullmatch(r"[!-~]+", text):
        raise ValueError(f"must have at least {TOKEN_MIN_CHARS} characters, without spaces")
    return value


def _split_keys(value: Any) -> Any:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _strong_key(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < KEY_MIN_CHARS:
        raise ValueError(f"is too short; a secret key needs at least {KEY_MIN_CHARS} characters")
    return value


def _event_pattern(pattern: str) -> str:
    if not any(matches([pattern], event_type) for event_type in EVENT_TYPES):
        raise ValueError(
            f"{printable(pattern)} matches no event type; they are {', '.join(EVENT_TYPES)}; * is a wildcard"
        )
    return pattern


_RESERVED_HEADERS: Final = re.compile(
    r"webhook-.*|proxy-.*|content-(?:length|type|encoding)|transfer-encoding|accept-encoding|host|connection|keep-alive|"
    r"te|trailer|upgrade|expect|user-agent",
    re.IGNORECASE,
)


def check_headers(headers: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
    if len(headers) > 32:
        raise ValueError("must have at most 32 headers")
    seen: set[str] = set()
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name):
            raise ValueError("has an invalid header name; use letters, digits and -")
        if _RESERVED_HEADERS.fullmatch(name):
            raise ValueError(f"must not set {name}; the relay sets this header itself")
        if name.lower() in seen:
            raise ValueError(f"sets {name} twice")
        if not re.fullmatch(r"[!-~]([ -~\t]{0,4094}[!-~])?", value.get_secret_value()):
            raise ValueError(f"has an invalid value for {name}; use one line of ASCII characters, at most 4 kB")
        seen.add(name.lower())
    return headers


_SAMPLE_TIME = datetime(2026, 1, 1, tzinfo=UTC)


def check_field_map(fields: Mapping[str, str]) -> Mapping[str, str]:
    if not 1 <= len(fields) <= 200:
        raise ValueError("must have 1 to 200 fields")
    for name, expression in fields.items():
        if not 1 <= len(name) <= 200:
            raise ValueError("has a field name that is empty or longer than 200 characters")
        if not 1 <= len(expression.strip()) <= 1_000:
            raise ValueError(f"has an expression for {printable(name)} that is empty or longer than 1000 characters")
    if problems := _map_problems(tuple(fields.items())):
        raise ValueError(problems)
    return fields


@lru_cache(maxsize=4096)
def _map_problems(fields: tuple[tuple[str, str], ...]) -> str:
    # Cached: every change of a declaration makes all processes validate those that are stored.
    return "; ".join(check_map(dict(fields), sample("call.completed", now=_SAMPLE_TIME), refuse_costly=False))


def read_only(mapping: Mapping[_Key, _Value]) -> Mapping[_Key, _Value]:
    return MappingProxyType(dict(mapping))


def _as_dict(mapping: Any, serialize: Any) -> Any:
    return serialize(dict(mapping))


# Metadata that makes a `Mapping` field read-only.
Frozen = (AfterValidator(read_only), WrapSerializer(_as_dict))

NetworkRange = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
HostName = Annotated[str, AfterValidator(_host)]
PublicUrl = Annotated[str, AfterValidator(_public_url)]
DirectoryPath = Annotated[Path, BeforeValidator(_not_blank)]
StorageUrl = Annotated[str, BeforeValidator(_not_blank), AfterValidator(_storage_url)]
SecretUrl = Annotated[SecretStr, AfterValidator(_secret_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
SigningSecret = Annotated[SecretStr, AfterValidator(_secret_whsec)]
ApiToken = Annotated[SecretStr, AfterValidator(_token)]
SecretKeys = Annotated[tuple[Annotated[SecretStr, AfterValidator(_strong_key)], ...], BeforeValidator(_split_keys)]
EventPattern = Annotated[str, AfterValidator(_event_pattern)]
