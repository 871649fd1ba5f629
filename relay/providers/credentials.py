"""Validates API addresses and credentials in options; messages never repeat the value."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, SecretStr

from relay.domain.url import check_base_url
from relay.errors import SettingsError


def checked_url(text: str, *, setting: str = "base_url", example: str, instead: str) -> str:
    """Return an API address without its trailing slash; `instead` is the setting for a credential in it."""
    try:
        return check_base_url(text, example=example, credentials=f"use {instead} instead")
    except ValueError as error:
        raise ValueError(f"{setting} {error}") from None


def is_header_safe(text: str) -> bool:
    """Whether text can be sent as a credential in a header: printable ASCII without blanks."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _header_safe(secret: SecretStr) -> SecretStr:
    if not is_header_safe(secret.get_secret_value()):
        raise ValueError("must be a single word of printable ASCII characters")
    return secret


Credential = Annotated[SecretStr, AfterValidator(_header_safe)]


def require_one(options: BaseModel, *settings: str, of: str) -> None:
    """Raise ValueError unless exactly one of `settings` is set; `of` names the thing they belong to."""
    if sum(getattr(options, setting) is not None for setting in settings) != 1:
        raise ValueError(f"set exactly one of {', '.join(settings[:-1])} and {settings[-1]} for {of}")


def credential(value: SecretStr | None, path: Path | None, *, setting: str, what: str) -> str:
    """Return a credential, read again from its file each time where it has one; raises SettingsError.

    `setting` is the name of the file's setting, `what` describes its content, as in "the API key".
    """
    if path is None:
        return value.get_secret_value() if value else ""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not plain text"
        raise SettingsError(f"{setting} {path} cannot be read: {reason}") from error
    if not is_header_safe(text):
        raise SettingsError(f"{setting} {path} must contain {what} as a single word, and nothing else")
    return text
