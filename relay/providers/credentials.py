"""Addresses and credentials as options take them: a wrong one is refused in a sentence that does not repeat it."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, SecretStr

from relay.domain.url import check_base_url
from relay.errors import SettingsError


def checked_url(text: str, *, example: str, hint: str) -> str:
    """Check the address of an API; `example` is a valid one, `hint` says where its credential belongs."""
    try:
        return check_base_url(text, example=example, credentials=f"the {hint}")
    except ValueError as error:
        raise ValueError(f"base_url {error}") from None


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
