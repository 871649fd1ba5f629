"""What a CINNOX source can be told; a wrong value is refused with the sentence that says what to set."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from relay.providers.base import SourceOptions
from relay.providers.credentials import Credential, checked_url, credential

_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def _base_url(text: str) -> str:
    return checked_url(text, example="https://your-tenant.example.com", hint="token belongs into token")


def _recording_path(text: str) -> str:
    if not text.startswith("/") or text.startswith("//") or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("recording_path must begin with / and hold plain characters only")
    if "{call_id}" not in text:
        raise ValueError("recording_path must hold {call_id} where the id of the call belongs")
    rest = text.replace("{call_id}", "").replace("{app_id}", "")
    if _PLACEHOLDER.search(rest) or "{" in rest or "}" in rest or "#" in rest:
        raise ValueError("recording_path knows the placeholders {app_id} and {call_id}, and no other")
    return text


class CinnoxOptions(SourceOptions):
    """One CINNOX tenant. Its token is given as `token`, or as `token_file`, which is read for each request."""

    model_config = ConfigDict(hide_input_in_errors=True)

    provider: Literal["cinnox"] = Field("cinnox", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        description="where the tenant's API is, as the dashboard shows it beside the App ID"
    )
    app_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._~-]{0,127}$", description="the App ID of the dashboard")
    token: Credential | None = Field(None, description="the App Token of the dashboard")
    token_file: Path | None = Field(None, description="file with the App Token; a change is taken up without a restart")
    list_from: Literal["call-detail", "call-log"] = Field(
        "call-detail", description="the list that is read for calls; what the other one knows is merged in"
    )
    merge_other_list: bool = Field(
        True, description="read the other of call-detail and call-log too, and fill in what the first leaves out"
    )
    merge_conferences: bool = Field(True, description="read conference-detail when there is a conference in the list")
    page_size: int = Field(500, ge=1, le=500, description="rows asked for in one request; the documented most is 500")
    settle_s: float = Field(
        60,
        ge=0,
        le=3600,
        description="calls that started in the last seconds wait for the next poll, so that no row moves while pages are read",  # noqa: E501
    )
    recordings: bool = Field(False, description="fetch the audio of answered calls; needs recording_path")
    recording_path: Annotated[str, AfterValidator(_recording_path)] | None = Field(
        None, description="path and query of Get Recording File, with {app_id} and {call_id} in it"
    )
    contacts: bool = Field(False, description="has no effect: there is no address book")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.token is None) == (self.token_file is None):
            raise ValueError("set either token or token_file: a CINNOX source needs exactly one of them")
        if self.recordings and self.recording_path is None:
            raise ValueError(
                "recordings: true needs recording_path, the path of Get Recording File in your tenant's API reference"
            )
        return self

    @property
    def host(self) -> str:
        """The host of `base_url`: what messages may show of it."""
        return urlsplit(self.base_url).hostname or ""

    def credential(self) -> str:
        """Return the token; a token file is read each time. Raises SettingsError when it holds none."""
        return credential(self.token, self.token_file, setting="token_file", what="the token")
