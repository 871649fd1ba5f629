"""What a WebFones source can be told; a wrong value is refused with the sentence that says what to set."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, SecretStr, model_validator

from relay.providers.base import SourceOptions
from relay.providers.credentials import checked_url, credential, one_word

DEFAULT_BASE_URL = "https://api.webfones.com:2343"


def _base_url(text: str) -> str:
    return checked_url(text, example=DEFAULT_BASE_URL, hint="key belongs into api_key")


def _header_safe(key: SecretStr) -> SecretStr:
    if not one_word(key.get_secret_value()):
        raise ValueError("api_key must be one word of plain characters, as the WebFones API Preferences page shows it")
    return key


class WebfonesOptions(SourceOptions):
    """One WebFones account. Its key is given as `api_key`, or as `api_key_file`, which is read for each request."""

    model_config = ConfigDict(hide_input_in_errors=True)

    provider: Literal["webfones"] = Field("webfones", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        DEFAULT_BASE_URL, description="where the API is; the port is part of it"
    )
    api_key: Annotated[SecretStr, AfterValidator(_header_safe)] | None = Field(
        None, description="the account's API key"
    )
    api_key_file: Path | None = Field(None, description="file with the API key; a change is taken up without a restart")
    auth: Literal["x-api-key", "bearer"] = Field("x-api-key", description="header in which the key is sent")

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (self.api_key is None) == (self.api_key_file is None):
            raise ValueError("set either api_key or api_key_file: a WebFones source needs exactly one of them")
        return self

    @property
    def host(self) -> str:
        """The host of `base_url`: what messages may show of it."""
        return urlsplit(self.base_url).hostname or ""

    def credential(self) -> str:
        """Return the API key; a key file is read each time. Raises SettingsError when it holds none."""
        return credential(self.api_key, self.api_key_file, setting="api_key_file", what="the API key")
