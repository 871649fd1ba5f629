"""Options of a WebFones source."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from relay.providers.base import HttpSourceOptions
from relay.providers.credentials import Credential, checked_url, credential, require_one

DEFAULT_BASE_URL = "https://api.webfones.com:2343"


def _base_url(text: str) -> str:
    return checked_url(text, example=DEFAULT_BASE_URL, instead="api_key")


class WebfonesOptions(HttpSourceOptions):
    """One WebFones account. Its key is set as `api_key`, or as `api_key_file`, which is read for each request."""

    provider: Literal["webfones"] = Field("webfones", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        DEFAULT_BASE_URL, description="address of the API; the port is part of it"
    )
    api_key: Credential | None = Field(None, description="the account's API key")
    api_key_file: Path | None = Field(
        None, description="file with the API key; a change takes effect without a restart"
    )
    auth: Literal["x-api-key", "bearer"] = Field("x-api-key", description="header in which the key is sent")

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        require_one(self, "api_key", "api_key_file", of="a WebFones source")
        return self

    def credential(self) -> str:
        """Return the API key; raises SettingsError when its file has none."""
        return credential(self.api_key, self.api_key_file, setting="api_key_file", what="the API key")
