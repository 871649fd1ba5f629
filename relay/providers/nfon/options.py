"""What an NFON source can be told; a wrong value is refused with the sentence that says what to set."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from relay.providers.base import SourceOptions
from relay.providers.credentials import Credential, checked_url, credential

DEFAULT_BASE_URL = "https://api.nfon.com/call-history"


def _base_url(text: str) -> str:
    return checked_url(text, example=DEFAULT_BASE_URL, hint="token belongs into token")


def _token_url(text: str) -> str:
    try:
        checked_url(text, example="https://login.example.com/oauth2/token", hint="client's secret into client_secret")
    except ValueError as error:
        raise ValueError(str(error).replace("base_url", "token_url")) from None
    return text


class OAuthOptions(BaseModel):
    """An OAuth2 client of Login with NFON, and the refresh token that a first login gave.

    NFON may exchange the refresh token at each use: the relay keeps the newest one, encrypted, in its store. Another
    `refresh_token` here is a new login and goes before what was kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    client_id: str = Field(min_length=1, max_length=256, description="the client's id at Login with NFON")
    client_secret: Credential | None = Field(None, description="the client's secret; a public client has none")
    client_secret_file: Path | None = Field(None, description="file with the client's secret")
    refresh_token: Credential | None = Field(None, description="refresh token of the first login")
    refresh_token_file: Path | None = Field(None, description="file with the refresh token of the first login")
    token_url: Annotated[str, AfterValidator(_token_url)] = Field(
        description="where tokens are issued, an address that ends in /token or the like"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if (self.refresh_token is None) == (self.refresh_token_file is None):
            raise ValueError("set either refresh_token or refresh_token_file under oauth: exactly one of them")
        if self.client_secret is not None and self.client_secret_file is not None:
            raise ValueError("set client_secret or client_secret_file under oauth, not both")
        return self

    @property
    def host(self) -> str:
        """The host of `token_url`: what messages may show of it."""
        return urlsplit(self.token_url).hostname or ""

    def secret(self) -> str:
        """Return the client's secret, empty for a public client."""
        return credential(
            self.client_secret, self.client_secret_file, setting="client_secret_file", what="the client's secret"
        )

    def first_refresh_token(self) -> str:
        """Return the refresh token of the first login."""
        return credential(
            self.refresh_token, self.refresh_token_file, setting="refresh_token_file", what="the refresh token"
        )


class NfonOptions(SourceOptions):
    """One NFON account: a user's, or with `customer` and `extension` those that an administrator may read."""

    model_config = ConfigDict(hide_input_in_errors=True)

    provider: Literal["nfon"] = Field("nfon", description="the kind of phone system")
    base_url: Annotated[str, AfterValidator(_base_url)] = Field(
        DEFAULT_BASE_URL, description="where the Call History API is, up to the part before /records"
    )
    token: Credential | None = Field(None, description="access token, for as long as it lasts; oauth renews it")
    token_file: Path | None = Field(None, description="file with the access token; read for each request")
    oauth: OAuthOptions | None = Field(None, description="client and refresh token of Login with NFON")
    customer: str | None = Field(
        None, pattern=r"^[A-Za-z0-9]{1,32}$", description="K-number whose calls are asked for; needs an administrator"
    )
    extension: str | None = Field(
        None, pattern=r"^[0-9A-Za-z]{1,32}$", description="extension whose calls are asked for; needs an administrator"
    )
    stream: bool = Field(True, description="listen to NFON's event stream beside polling, so that calls come at once")
    stream_idle_s: float = Field(
        120, ge=5, le=3600, description="a stream that said nothing for so long is opened again"
    )
    time_unit: Literal["auto", "seconds", "milliseconds"] = Field(
        "auto", description="unit of `from` in a request, which NFON's document leaves open; auto finds out safely"
    )
    page_size: int = Field(500, ge=2, le=5000, description="rows asked for in one request; NFON may give fewer")
    recordings: bool = Field(False, description="has no effect: the call history has no recordings")
    contacts: bool = Field(False, description="has no effect: there is no address book")

    @model_validator(mode="after")
    def _one_credential(self) -> Self:
        given = [name for name in ("token", "token_file", "oauth") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("set one of token, token_file and oauth: an NFON source needs exactly one of them")
        if self.oauth is not None and urlsplit(self.oauth.token_url).scheme != urlsplit(self.base_url).scheme:
            raise ValueError("oauth.token_url and base_url must both be https (or, for a test, both http)")
        return self

    @property
    def host(self) -> str:
        """The host of `base_url`: what messages may show of it."""
        return urlsplit(self.base_url).hostname or ""

    def access_token(self) -> str:
        """Return the configured access token; a file is read each time. Raises SettingsError when it holds none."""
        return credential(self.token, self.token_file, setting="token_file", what="the access token")

    def credential(self) -> str:
        """Name whose limit requests count towards; stays the same while an OAuth token is renewed."""
        if self.oauth is None:
            return self.access_token()
        login = f"{self.oauth.token_url}\x1f{self.oauth.client_id}\x1f{self.oauth.first_refresh_token()}"
        return hashlib.sha256(login.encode()).hexdigest()
