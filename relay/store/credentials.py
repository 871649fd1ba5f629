"""Secrets that a provider hands out at run time, such as NFON's refresh token: encrypted, one key a source."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from redis.asyncio import Redis

from relay.errors import Unavailable
from relay.secrets import SecretBox
from relay.store import keys
from relay.store.connection import STORE_ERRORS

_TTL_S: Final = 490 * 86_400
_LOCK_TTL_S: Final = 30
_LOCK_POLL_S: Final = 0.05


class StoredCredentials:
    """The secret of one source; implements `relay.providers.base.CredentialStore`."""

    def __init__(self, redis: Redis, box: SecretBox, sid: str) -> None:
        self._redis = redis
        self._box = box
        self._sid = sid
        self._name = keys.credentials(sid)

    async def read(self) -> str | None:
        """Read what was written last. Raises SettingsError without its key, StoreError when it is damaged."""
        sealed = await self._redis.get(self._name)
        return None if sealed is None else self._box.decrypt(sealed.decode(), context=self._name)

    async def write(self, text: str) -> None:
        await self._redis.set(self._name, self._box.encrypt(text, context=self._name), ex=_TTL_S)

    async def forget(self) -> None:
        await self._redis.delete(self._name)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the lock that all processes share: a token may be exchanged once. Raises Unavailable after 30 s."""
        # The lock has a TTL, so it ends with a holder that died; only its own holder can release it.
        lock = self._redis.lock(keys.credentials_lock(self._sid), timeout=_LOCK_TTL_S, sleep=_LOCK_POLL_S)
        if not await lock.acquire(blocking_timeout=_LOCK_TTL_S):
            raise Unavailable(f"another process has been renewing the login of source {self._sid} for too long")
        try:
            yield
        finally:
            with suppress(*STORE_ERRORS):
                await lock.release()
