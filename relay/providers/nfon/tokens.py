"""The access token of an NFON account, and how it is renewed: before it expires, or when NFON rejects it.

NFON may rotate the refresh token at each use, and using an old one can end the whole login. So one process at a time
renews, under the store's lock, and stores the new tokens before it uses them; the other processes read them there.
"""

import asyncio
import hashlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import aiohttp
import orjson

from relay.errors import ProviderError, Unauthorized, Unavailable
from relay.providers.base import CredentialStore, Purpose
from relay.providers.http import HttpAccount
from relay.providers.nfon import wire
from relay.providers.nfon.options import NfonOptions, OAuthOptions
from relay.providers.parsing import ErrorResponse, load_json, provider_error

# How long a token lasts when the response does not say: five minutes, as in NFON's CTI API.
DEFAULT_LIFETIME_S: Final = 300.0
# A token must not expire on its way to NFON, nor while the clocks differ a little.
_RENEW_EARLY_S: Final = 60.0
_MAX_BODY_BYTES: Final = 64 * 1024
_TIMEOUT: Final = aiohttp.ClientTimeout(total=15)
_NAME: Final = "NFON's login"


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A token to send, and when to stop using it: seconds since 1970, None when that is unknown."""

    text: str
    renew_at: float | None = None


@dataclass(frozen=True, slots=True)
class _StoredTokens:
    """What the credential store holds. `login` identifies the configured refresh token that they descend from."""

    login: str
    refresh: str
    access: str
    renew_at: float


def _parse_stored(text: str | None) -> _StoredTokens | None:
    try:
        fields: Any = orjson.loads(text or "null")
        return _StoredTokens(
            str(fields["login"]), str(fields["refresh"]), str(fields["access"]), float(fields["renew_at"])
        )
    except (orjson.JSONDecodeError, TypeError, KeyError, ValueError):
        return None


class NfonTokens:
    """Provides the access token; with `oauth` it renews it."""

    def __init__(self, options: NfonOptions, account: HttpAccount, store: CredentialStore | None) -> None:
        self._options = options
        self._store = store
        self._clock = account.clock
        self._tokens: _StoredTokens | None = None
        self._renewing = asyncio.Lock()
        if options.oauth is not None:
            self._login_account = replace(
                account,
                name=_NAME,
                base_url=options.oauth.token_url,
                host=options.oauth.host,
                load=partial(load_json, name=_NAME),
                error_of=_error_of,
                max_body_bytes=_MAX_BODY_BYTES,
            )

    async def current(self, *, rejected: str | None = None) -> AccessToken:
        """Return a token that is valid as far as we know; `rejected` is one that NFON has just rejected.

        Raises Unauthorized when a person has to log in again, SettingsError for a bad key file, and other
        ProviderErrors when the token endpoint fails.
        """
        oauth = self._options.oauth
        if oauth is None:
            return AccessToken(self._options.access_token())
        login = _login(oauth)
        tokens = self._tokens
        if tokens is None or not self._usable(tokens, login, rejected):
            async with self._renewing:
                tokens = self._tokens
                if tokens is None or not self._usable(tokens, login, rejected):
                    tokens = self._tokens = await self._stored_or_renewed(oauth, login, rejected)
        return AccessToken(tokens.access, tokens.renew_at)

    def _usable(self, tokens: _StoredTokens, login: str, rejected: str | None) -> bool:
        fresh = tokens.renew_at > self._clock.now().timestamp()
        return fresh and tokens.login == login and tokens.access != rejected

    async def _stored_or_renewed(self, oauth: OAuthOptions, login: str, rejected: str | None) -> _StoredTokens:
        store = self._store
        if store is None:
            raise Unavailable("NFON's refresh token is not used without the relay's store, where the next one is kept")
        stored = _parse_stored(await store.read())
        if stored is not None and self._usable(stored, login, rejected):
            return stored
        async with store.alone():
            # Another process may have renewed while this one waited for the lock.
            stored = _parse_stored(await store.read())
            if stored is not None and self._usable(stored, login, rejected):
                return stored
            same_login = stored is not None and stored.login == login
            renewed = await self._renew(oauth, login, stored.refresh if stored and same_login else None)
            await store.write(orjson.dumps(asdict(renewed)).decode())
            return renewed

    async def _renew(self, oauth: OAuthOptions, login: str, refresh_token: str | None) -> _StoredTokens:
        started_at = self._clock.now().timestamp()
        refresh_token = refresh_token or oauth.first_refresh_token()
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": oauth.client_id}
        if secret := oauth.secret():
            form["client_secret"] = secret
        account, what = self._login_account, "a new access token"
        async with account.request(
            "POST", "", what, Purpose.POLL, _TIMEOUT, form=form, authenticated=False
        ) as response:
            grant = wire.read_grant((await account.read_json(response, what)).document)
        lifetime_s = grant.expires_in if grant.expires_in is not None else DEFAULT_LIFETIME_S
        renew_at = started_at + lifetime_s - min(_RENEW_EARLY_S, lifetime_s / 5)
        return _StoredTokens(login, grant.refresh_token or refresh_token, grant.access_token, renew_at)


def _error_of(response: ErrorResponse) -> ProviderError:
    # RFC 6749, section 5.2: an invalid refresh token or client is a 400 or a 401.
    if response.status in (400, 401, 403):
        return Unauthorized(
            f"{_NAME} at {response.host} rejected the refresh token or the client ({response.status}). Log in again "
            "and set the new oauth.refresh_token.",
            status=response.status,
        )
    return provider_error(response, name=_NAME, credential="client")


def _login(oauth: OAuthOptions) -> str:
    """Identify the configured login; another configured token is another login."""
    parts = (oauth.token_url, oauth.client_id, oauth.first_refresh_token())
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
