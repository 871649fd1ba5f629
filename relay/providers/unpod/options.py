"""What an Unpod source can be told; a wrong value is refused with the sentence that says what to set."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from relay.providers.base import SourceOptions
from relay.providers.credentials import Credential, checked_url, credential

DEFAULT_BASE_URL = "https://unpod.dev/api/v2/platform"


def _base_url(text: str) -> str:
    return checked_url(text, example=DEFAULT_BASE_URL, hint="token belongs into token")


class UnpodOptions(SourceOptions):
    """One Unpod organisation. Its token is given as `token`, or as `token_file`, which is read for each request."""

    model_config = ConfigDict(hide_input_in_errors=True)

    provider: Literal["unpod"] = Field("unpod", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        DEFAULT_BASE_URL, description="where the API is, up to the part before /call-logs/"
    )
    org_handle: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$", description="the organisation's handle, as in its own address"
    )
    token: Credential | None = Field(None, description="the API token")
    token_file: Path | None = Field(None, description="file with the API token; a change is taken up without a restart")
    page_size: int = Field(100, ge=1, le=1000, description="rows asked for in one request; a server may give fewer")
    date_margin_days: int = Field(
        1, ge=0, le=7, description="days added on both sides of the asked range, since the list filters by whole days"
    )
    date_format: Literal["date", "datetime"] = Field(
        "date", description="how start_date and end_date are written: 2025-11-18, or 2025-11-18T00:00:00Z"
    )
    record_key: Literal["auto", "natural"] = Field(
        "auto", description="what tells two calls apart: the row's id where it has one, or always its time and numbers"
    )
    recordings: bool = Field(False, description="has no effect: the call log has no recordings")
    contacts: bool = Field(False, description="has no effect: there is no address book")

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if (self.token is None) == (self.token_file is None):
            raise ValueError("set either token or token_file: an Unpod source needs exactly one of them")
        return self

    @property
    def host(self) -> str:
        """The host of `base_url`: what messages may show of it."""
        return urlsplit(self.base_url).hostname or ""

    def credential(self) -> str:
        """Return the token; a token file is read each time. Raises SettingsError when it holds none."""
        return credential(self.token, self.token_file, setting="token_file", what="the token")
