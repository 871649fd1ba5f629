"""URLs that people configure: parse them strictly, the same way everywhere. Pure; nothing is resolved or dialled."""

import base64
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final
from urllib.parse import quote, unquote

import idna
import yarl

MAX_URL_CHARS: Final = 2048
IPAddress = IPv4Address | IPv6Address

_SHAPE: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?]*)(?P<path>[^?]*)(?P<query>.*)")
_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_DOTS: Final = str.maketrans({"\u3002": ".", "\uff0e": ".", "\uff61": "."})
_KEEP: Final = "".join(chr(code) for code in range(0x21, 0x7F))


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """A URL in normal form. `url` has no credentials; `host` is what logs may show; `plain` means http, without TLS."""

    url: yarl.URL = field(repr=False)
    host: str
    plain: bool
    address: IPAddress | None = None
    authorization: str | None = field(default=None, repr=False)


def parse_url(text: str) -> ParsedUrl:
    """Parse an http or https URL; a ValueError says what is wrong with it and repeats no more of it than the host.

    Path and query stay byte for byte as they are, because a receiver may have signed them. Credentials become a Basic
    `authorization`. `address` is set when the host is an IP address, in whatever spelling.
    """
    if len(text) > MAX_URL_CHARS:
        raise ValueError(f"a URL must have at most {MAX_URL_CHARS} characters; this one has {len(text)}")
    if any(char.isspace() or char == "\\" or unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in text):
        raise ValueError("a URL must not contain spaces, line breaks, backslashes or control characters")
    if "#" in text:
        raise ValueError("a URL must not have a fragment (#…); fragments are never sent")
    shape = _SHAPE.fullmatch(text)
    if shape is None:
        raise ValueError("a URL must look like https://host/path")
    scheme = shape["scheme"].lower()
    if scheme not in ("http", "https"):
        raise ValueError(f"the scheme must be https or http, not {scheme[:20]}")
    userinfo, at, hostport = shape["authority"].rpartition("@")
    if "@" in userinfo:
        raise ValueError("more than one @ before the path; write it as %40 in a name or password")
    host, port = _host_and_port(hostport)
    name, address = _canonical(host)
    plain = scheme == "http"
    authority = name if port in (None, 80 if plain else 443) else f"{name}:{port}"
    path_and_query = quote(f"{shape['path'] or '/'}{shape['query']}", safe=_KEEP)
    return ParsedUrl(
        url=yarl.URL(f"{scheme}://{authority}{path_and_query}", encoded=True),
        host=name,
        plain=plain,
        address=address,
        authorization=_basic(userinfo) if at and userinfo else None,
    )


def check_base_url(text: str, *, example: str, credentials: str = "") -> str:
    """Return the base address of an API without its last slash; raise ValueError when it is not one.

    `example` is a valid one; `credentials` says where credentials belong, for the message.
    """
    try:
        parse_url(text)
    except ValueError as error:
        raise ValueError(f"must look like {example}: {error}") from None
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise ValueError(f"must not contain a user name or password{credentials and '; '}{credentials}")
    if "?" in text:
        raise ValueError(f"must look like {example}, without a query")
    return text.rstrip("/")


def _basic(userinfo: str) -> str:
    login, _, password = userinfo.partition(":")
    credentials = f"{unquote(login)}:{unquote(password)}"
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def _host_and_port(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address must be in brackets: https://[2001:db8::1]:8443/path")
        host, port_text = host + "]", rest[1:]
    else:
        host, _, port_text = text.partition(":")
        if ":" in port_text:
            raise ValueError("an IPv6 address must be in brackets: https://[2001:db8::1]:8443/path")
    if not host or host == "[]":
        raise ValueError("the URL has no host")
    if not port_text:
        return host, None
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and 1 <= int(port_text) <= 65_535):
        raise ValueError("the port must be a number from 1 to 65535")
    return host, int(port_text)


def _canonical(host: str) -> tuple[str, IPAddress | None]:
    """Normalise a host: a lower-case ASCII name, or an address in its canonical spelling."""
    if host.startswith("["):
        if "%" in host:
            raise ValueError("an IPv6 address in a URL must not have a zone (%…)")
        try:
            address = IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError(f"{host[:60]} is not a valid IPv6 address") from None
        return f"[{address}]", address
    if "%" in host:
        raise ValueError("the host must not be percent-encoded")
    name = unicodedata.normalize("NFKC", host.translate(_DOTS)).translate(_DOTS).lower()
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise ValueError("the host is not a valid international domain name") from None
    name = name.removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        ip = _ipv4(labels)
        if ip is None:
            raise ValueError(f"{name[:60]} ends in a number but is not a valid IPv4 address")
        return str(ip), ip
    if len(name) > 253 or not all(_NAME.fullmatch(label) for label in labels):
        raise ValueError("the host is not a valid domain name")
    return name, None


def _ipv4(parts: Sequence[str]) -> IPv4Address | None:
    """Parse an IPv4 address as inet_aton does: one to four numbers, decimal, 0octal or 0xhex (WHATWG URL §3.5)."""
    if not 1 <= len(parts) <= 4:
        return None
    numbers: list[int] = []
    for part in parts:
        if not _NUMBER.fullmatch(part) or len(part) > 20:
            return None
        try:
            if part.startswith("0x"):
                numbers.append(int(part[2:] or "0", 16))
            else:
                numbers.append(int(part, 8 if len(part) > 1 and part.startswith("0") else 10))
        except ValueError:
            return None
    *first, last = numbers
    if any(number > 255 for number in first) or last >= 256 ** (5 - len(numbers)):
        return None
    return IPv4Address(sum(number << 8 * (3 - place) for place, number in enumerate(first)) + last)
