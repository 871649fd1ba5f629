"""Options of an NFON source."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from relay.providers.base import HttpSourceOptions
from relay.providers.credentials import Credential, checked_url, credential, require_one

DEFAULT_BASE_URL = "https://api.nfon.com/call-history"


def _base_url(text: str) -> str:
    return checked_url(text, example=DEFAULT_BASE_URL, instead="token")


def _token_url(text: str) -> str:
    example = "https://login.example.com/oauth2/token"
    checked_url(text, setting="token_url", example=example, instead="client_secret")
    return text


class OAuthOptions(BaseModel):
    """An OAuth2 client of Login with NFON, and the refresh token of a first login.

    NFON may rotate the refresh token at each use; the relay stores the newest one, encrypted. A different
    `refresh_token` here is a new login, and takes precedence over the stored one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    client_id: str = Field(min_length=1, max_length=256, description="the client's id at Login with NFON")
    client_secret: Credential | None = Field(None, description="the client's secret; a public client has none")
    client_secret_file: Path | None = Field(None, description="file with the client's secret")
    refresh_token: Credential | None = Field(None, description="refresh token of the first login")
    refresh_token_file: Path | None = Field(None, description="file with the refresh token of the first login")
    token_url: Annotated[str, AfterValidator(_token_url)] = Field(
        description="address of the token endpoint, which ends in /token or the like"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        require_one(self, "refresh_token", "refresh_token_file", of="oauth")
        if self.client_secret is not None and self.client_secret_file is not None:
            raise ValueError("set client_secret or client_secret_file under oauth, not both")
        return self

    @property
    def host(self) -> str:
        """The host of `token_url`: all that messages show of it."""
        return urlsplit(self.token_url).hostname or ""

    def secret(self) -> str:
        """Return the client's secret; empty for a public client."""
        return credential(
            self.client_secret, self.client_secret_file, setting="client_secret_file", what="the client's secret"
        )

    def first_refresh_token(self) -> str:
        return credential(
            self.refresh_token, self.refresh_token_file, setting="refresh_token_file", what="the refresh token"
        )


class NfonOptions(HttpSourceOptions):
    """One NFON account: a user's, or with `customer` and `extension` those of an administrator's."""

    provider: Literal["nfon"] = Field("nfon", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        DEFAULT_BASE_URL, description="address of the Call History API, up to the part before /records"
    )
    token: Credential | None = Field(None, description="access token, for as long as it lasts; oauth renews it")
    token_file: Path | None = Field(None, description="file with the access token; read for each request")
    oauth: OAuthOptions | None = Field(None, description="client and refresh token of Login with NFON")
    customer: str | None = Field(
        None, pattern=r"^[A-Za-z0-9]{1,32}$", description="K-number whose calls are listed; needs an administrator"
    )
    extension: str | None = Field(
        None, pattern=r"^[0-9A-Za-z]{1,32}$", description="extension whose calls are listed; needs an administrator"
    )
    stream: bool = Field(True, description="listen to NFON's event stream beside polling, so that calls arrive at once")
    stream_idle_s: float = Field(
        120, ge=5, le=3600, description="seconds without data after which the stream is reconnected"
    )
    time_unit: Literal["auto", "seconds", "milliseconds"] = Field(
        "auto", description="unit of `from` in a request, which NFON's document does not state; auto detects it safely"
    )
    page_size: int = Field(500, ge=2, le=5000, description="rows requested per page; NFON may return fewer")
    recordings: bool = Field(False, description="has no effect: the call history has no recordings")
    contacts: bool = Field(False, description="has no effect: there is no address book")

    @model_validator(mode="after")
    def _one_credential(self) -> Self:
        require_one(self, "token", "token_file", "oauth", of="an NFON source")
        if self.oauth is not None and urlsplit(self.oauth.token_url).scheme != urlsplit(self.base_url).scheme:
            raise ValueError("oauth.token_url and base_url must both be https (or, for a test, both http)")
        return self

    def access_token(self) -> str:
        """Return the configured access token; raises SettingsError when its file has none."""
        return credential(self.token, self.token_file, setting="token_file", what="the access token")

    def credential(self) -> str:
        """Identify what requests are counted by; it stays the same while an OAuth token is renewed."""
        if self.oauth is None:
            return self.access_token()
        login = f"{self.oauth.token_url}\x1f{self.oauth.client_id}\x1f{self.oauth.first_refresh_token()}"
        return hashlib.sha256(login.encode()).hexdigest()
