"""Options of an Unpod source."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from relay.providers.base import HttpSourceOptions
from relay.providers.credentials import Credential, checked_url, credential, require_one

DEFAULT_BASE_URL = "https://unpod.dev/api/v2/platform"


def _base_url(text: str) -> str:
    return checked_url(text, example=DEFAULT_BASE_URL, instead="token")


class UnpodOptions(HttpSourceOptions):
    """One Unpod organisation. Its token is set as `token`, or as `token_file`, which is read for each request."""

    provider: Literal["unpod"] = Field("unpod", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        DEFAULT_BASE_URL, description="address of the API, up to the part before /call-logs/"
    )
    org_handle: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$", description="the organisation's handle, as in its own address"
    )
    token: Credential | None = Field(None, description="the API token")
    token_file: Path | None = Field(
        None, description="file with the API token; a change takes effect without a restart"
    )
    page_size: int = Field(100, ge=1, le=1000, description="rows requested per page; a server may return fewer")
    date_margin_days: int = Field(
        1,
        ge=0,
        le=7,
        description="days added on both sides of the requested range, since the list filters by whole days",
    )
    date_format: Literal["date", "datetime"] = Field(
        "date", description="how start_date and end_date are written: 2025-11-18, or 2025-11-18T00:00:00Z"
    )
    record_key: Literal["auto", "natural"] = Field(
        "auto", description="identity of a call: the row's id where it has one, or always its time and numbers"
    )
    recordings: bool = Field(False, description="has no effect: the call log has no recordings")
    contacts: bool = Field(False, description="has no effect: there is no address book")

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        require_one(self, "token", "token_file", of="an Unpod source")
        return self

    def credential(self) -> str:
        """Return the token; raises SettingsError when its file has none."""
        return credential(self.token, self.token_file, setting="token_file", what="the token")
