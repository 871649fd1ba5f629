"""Options of a CINNOX source."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from relay.providers.base import HttpSourceOptions
from relay.providers.credentials import Credential, checked_url, credential, require_one

_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def _base_url(text: str) -> str:
    return checked_url(text, example="https://your-tenant.example.com", instead="token")


def _recording_path(text: str) -> str:
    if not text.startswith("/") or text.startswith("//") or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("recording_path must begin with / and contain printable ASCII characters only")
    if "{call_id}" not in text:
        raise ValueError("recording_path must contain {call_id} where the id of the call belongs")
    rest = text.replace("{call_id}", "").replace("{app_id}", "")
    if _PLACEHOLDER.search(rest) or "{" in rest or "}" in rest or "#" in rest:
        raise ValueError("recording_path supports the placeholders {app_id} and {call_id} only")
    return text


class CinnoxOptions(HttpSourceOptions):
    """One CINNOX tenant. Its token is set as `token`, or as `token_file`, which is read for each request."""

    provider: Literal["cinnox"] = Field("cinnox", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        description="address of the tenant's API, as the dashboard shows it beside the App ID"
    )
    app_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._~-]{0,127}$", description="the App ID of the dashboard")
    token: Credential | None = Field(None, description="the App Token of the dashboard")
    token_file: Path | None = Field(
        None, description="file with the App Token; a change takes effect without a restart"
    )
    list_from: Literal["call-detail", "call-log"] = Field(
        "call-detail", description="the list that calls are read from; columns of the other one are merged in"
    )
    merge_other_list: bool = Field(
        True, description="read the other of call-detail and call-log too, and fill in what the first leaves out"
    )
    merge_conferences: bool = Field(True, description="read conference-detail when there is a conference in the list")
    page_size: int = Field(500, ge=1, le=500, description="rows requested per page; the documented maximum is 500")
    settle_s: float = Field(
        60,
        ge=0,
        le=3600,
        description="calls of the last seconds are left to the next poll, so that no row moves while pages are read",
    )
    recordings: bool = Field(False, description="fetch the audio of answered calls; needs recording_path")
    recording_path: Annotated[str, AfterValidator(_recording_path)] | None = Field(
        None, description="path and query of Get Recording File, with the placeholders {app_id} and {call_id}"
    )
    contacts: bool = Field(False, description="has no effect: there is no address book")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        require_one(self, "token", "token_file", of="a CINNOX source")
        if self.recordings and self.recording_path is None:
            raise ValueError(
                "recordings: true needs recording_path, the path of Get Recording File in your tenant's API reference"
            )
        return self

    def credential(self) -> str:
        """Return the token; raises SettingsError when its file has none."""
        return credential(self.token, self.token_file, setting="token_file", what="the token")
