"""The access token of an NFON account, and how it is renewed: before it ends, or when NFON refuses it.

A refresh token may be exchanged at each use, and an old one that is used again can end the whole login. So one process
at a time renews, under the safe's lock; what it got is in the safe before it is used; the others find it there.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson
from yarl import URL

from relay import __version__
from relay.domain.clock import Clock
from relay.errors import ProviderError, RateLimited, SettingsError, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers.base import CredentialStore
from relay.providers.nfon import wire
from relay.providers.nfon.options import NfonOptions, OAuthOptions
from relay.providers.parsing import load_json, retry_after_s

LIFE_UNSAID_S: Final = 300.0
"""How long an access token is taken to last when the answer does not say: NFON's sibling API has five minutes."""
_MARGIN_S: Final = 60.0
_LARGEST_ANSWER_BYTES: Final = 64 * 1024
_TIMEOUT: Final = aiohttp.ClientTimeout(total=15)


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A token to send, and when to stop using it: seconds since 1970, None when nobody knows."""

    text: str
    renew_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the safe holds. `login` names the configured refresh token that all of it stems from."""

    login: str
    refresh_token: str
    access_token: str
    renew_at: float

    def write(self) -> str:
        return orjson.dumps(
            {"login": self.login, "refresh": self.refresh_token, "access": self.access_token, "renew_at": self.renew_at}
        ).decode()


def _read_kept(text: str | None) -> _Kept | None:
    try:
        fields: Any = orjson.loads(text or "null")
        return _Kept(str(fields["login"]), str(fields["refresh"]), str(fields["access"]), float(fields["renew_at"]))
    except (orjson.JSONDecodeError, TypeError, KeyError, ValueError):
        return None


class Tokens:
    """Gives the token to send; with `oauth` it renews it."""

    def __init__(
        self, options: NfonOptions, http: aiohttp.ClientSession, safe: CredentialStore | None, *, clock: Clock
    ) -> None:
        self._options = options
        self._http = http
        self._safe = safe
        self._clock = clock
        self._kept: _Kept | None = None
        self._one_at_a_time = asyncio.Lock()

    async def current(self, *, refused: str | None = None) -> AccessToken:
        """Give a token that is good, as far as we know; `refused` is one that NFON has just refused.

        Raises Unauthorized when only a person can help, and the ProviderErrors of the token endpoint.
        """
        try:
            if self._options.oauth is None:
                return AccessToken(self._options.access_token())
            login = _login(self._options.oauth)
        except SettingsError as error:
            raise Unavailable(f"NFON was not asked: {error}") from error
        if not self._good(self._kept, login, refused):
            async with self._one_at_a_time:
                if not self._good(self._kept, login, refused):
                    self._kept = await self._from_safe(self._options.oauth, login, refused)
        assert self._kept is not None  # noqa: S101 - one of the two branches has set it
        return AccessToken(self._kept.access_token, self._kept.renew_at)

    def _good(self, kept: _Kept | None, login: str, refused: str | None) -> bool:
        return (
            kept is not None
            and kept.login == login
            and kept.access_token != refused
            and kept.renew_at > self._clock.now().timestamp()
        )

    async def _from_safe(self, oauth: OAuthOptions, login: str, refused: str | None) -> _Kept:
        if self._safe is None:
            raise Unavailable("NFON was not asked: without the relay's store its refresh token cannot be used safely")
        kept = _read_kept(await self._safe.read())
        if kept is not None and self._good(kept, login, refused):
            return kept
        async with self._safe.alone():
            kept = _read_kept(await self._safe.read())
            if kept is not None and self._good(kept, login, refused):
                return kept
            same_login = kept is not None and kept.login == login
            return await self._renew(oauth, login, kept.refresh_token if kept and same_login else None)

    async def _renew(self, oauth: OAuthOptions, login: str, refresh_token: str | None) -> _Kept:
        assert self._safe is not None  # noqa: S101 - asked before
        began = self._clock.now().timestamp()
        sent = refresh_token or oauth.first_refresh_token()
        granted = wire.read_grant(await self._exchange(oauth, sent))
        life_s = granted.expires_in if granted.expires_in is not None else LIFE_UNSAID_S
        renew_at = began + life_s - min(_MARGIN_S, life_s / 5)
        made = _Kept(login, granted.refresh_token or sent, granted.access_token, renew_at)
        await self._safe.write(made.write())
        return made

    async def _exchange(self, oauth: OAuthOptions, refresh_token: str) -> object:
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": oauth.client_id}
        if secret := oauth.secret():
            form["client_secret"] = secret
        try:
            async with self._http.post(
                URL(oauth.token_url, encoded=True),
                data=form,
                headers={"Accept": "application/json", "User-Agent": f"call-relay/{__version__}"},
                timeout=_TIMEOUT,
                allow_redirects=False,
                proxy=self._options.proxy_url,
            ) as response:
                body = b""
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _LARGEST_ANSWER_BYTES:
                        raise UnexpectedResponse(
                            f"NFON's login at {oauth.host} sent far too much; check oauth.token_url"
                        )
                status, headers = response.status, response.headers
        except TimeoutError as error:
            raise Unavailable(f"NFON's login at {oauth.host} took too long to renew the token") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(
                f"the connection to NFON's login at {oauth.host} failed ({type(error).__name__})"
            ) from error
        if status == 200:
            return load_json(body, name="NFON's login")
        raise self._refused(oauth, status, headers)

    def _refused(self, oauth: OAuthOptions, status: int, headers: Mapping[str, str]) -> ProviderError:
        if status in (400, 401, 403):
            return Unauthorized(
                f"NFON's login at {oauth.host} refuses the refresh token or the client ({status}); log in again and "
                "set the new oauth.refresh_token",
                status=status,
            )
        if status == 429:
            wait_s = retry_after_s(headers, self._clock.now())
            return RateLimited(
                f"NFON's login at {oauth.host} says there were too many requests", bucket="key", retry_after_s=wait_s
            )
        if status >= 500:
            return Unavailable(f"NFON's login at {oauth.host} failed to renew the token ({status})")
        return UnexpectedResponse(f"NFON's login at {oauth.host} answered with status {status}; check oauth.token_url")


def _login(oauth: OAuthOptions) -> str:
    """Name the login that the configuration tells of; another configured token is another login."""
    told = "\x1f".join((oauth.token_url, oauth.client_id, oauth.first_refresh_token()))
    return hashlib.sha256(told.encode()).hexdigest()
