"""Addresses and credentials as options take them: a wrong one is refused in a sentence that does not repeat it."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

from relay.errors import SettingsError


def checked_url(text: str, *, example: str, hint: str) -> str:
    """Take the address of an API; `example` is what it looks like, `hint` where its credential belongs."""
    wanted = f"base_url must look like {example}"
    try:
        parts = urlsplit(text)
        port_is_possible = parts.port != 0
    except ValueError:
        raise ValueError(wanted) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_possible:
        raise ValueError(wanted)
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"base_url must not hold a user name or password; the {hint}")
    if parts.query or parts.fragment or not text.isprintable() or " " in text:
        raise ValueError(f"{wanted}, with nothing after the path")
    return text.rstrip("/")


def one_word(text: str) -> bool:
    """Whether text can be a credential in a header: one word of plain characters."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _checked_word(secret: SecretStr) -> SecretStr:
    if not one_word(secret.get_secret_value()):
        raise ValueError("must be one word of plain characters")
    return secret


Credential = Annotated[SecretStr, AfterValidator(_checked_word)]


def credential(value: SecretStr | None, path: Path | None, *, setting: str, what: str) -> str:
    """Return a credential; from its file where it has one, which is read each time. Raises SettingsError.

    `setting` is the name of the file's setting, `what` says what the file must hold, as in "the API key".
    """
    if path is None:
        return value.get_secret_value() if value else ""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not plain text"
        raise SettingsError(f"{setting} {path} cannot be read: {cause}") from error
    if not one_word(text):
        raise SettingsError(f"{setting} {path} must hold {what}, one word, and nothing else")
    return text
