"""What a source must remember in secret, such as a refresh token that NFON exchanged: encrypted, one key a source.

Only one process at a time may exchange such a token; the lock for that ends by itself, should its holder die.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay.errors import Unavailable
from relay.secrets import SecretBox
from relay.store import keys

KEPT_S: Final = 90 * 86_400
LOCK_S: Final = 30
_LOOK_EVERY_S: Final = 0.05
_UNLOCK: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
"""Race closed: a holder that took too long must not take away the lock of the next one."""


class StoredCredentials:
    """The safe of one source; see `relay.providers.base.CredentialStore`."""

    def __init__(self, redis: Redis, box: SecretBox, sid: str) -> None:
        self._redis = redis
        self._box = box
        self._sid = sid
        self._unlock = redis.register_script(_UNLOCK)

    async def read(self) -> str | None:
        """Read what was written last. Raises SettingsError when its key is gone, StoreError when it is damaged."""
        sealed = await self._redis.get(keys.safe(self._sid))
        return None if sealed is None else self._box.decrypt(sealed.decode(), context=keys.safe(self._sid))

    async def write(self, text: str) -> None:
        """Keep a text, encrypted."""
        sealed = self._box.encrypt(text, context=keys.safe(self._sid))
        await self._redis.set(keys.safe(self._sid), sealed, ex=KEPT_S)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait for the lock, LOCK_S at most; raises Unavailable when it is not to be had."""
        name, mine = keys.safe_lock(self._sid), secrets.token_hex(8)
        try:
            async with asyncio.timeout(LOCK_S):
                while not await self._redis.set(name, mine, nx=True, px=LOCK_S * 1000):  # noqa: ASYNC110 - over processes
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            raise Unavailable(
                f"another process has been renewing the login of source {self._sid} for too long"
            ) from None
        try:
            yield
        finally:
            with suppress(RedisError, OSError):  # it ends by itself
                await self._unlock(keys=[name], args=[mine])
