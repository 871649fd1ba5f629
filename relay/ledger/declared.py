"""Sources and subscriptions that were made at run time: kept in the store, their options sealed.

Every change raises one number that all processes watch, so each of them reads again within a second.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import orjson
from redis.asyncio import Redis

from relay.ledger import keys
from relay.model import Json
from relay.secrets import SecretBox

Kind = Literal["source", "subscription", "token"]


@dataclass(frozen=True, slots=True)
class Declared:
    """One thing made at run time: its document, whose it is (None: the operator's), and when it was made, ms."""

    id: str
    document: Json
    tenant: str | None
    created_ms: int
    updated_ms: int


class Declarations:
    """Keeps them. A document is sealed as a whole: it may hold secrets anywhere."""

    def __init__(self, redis: Redis, box: SecretBox) -> None:
        self._redis = redis
        self._box = box

    async def version(self) -> int:
        """The number that every change raises."""
        return int(await self._redis.get(keys.DECLARED_VERSION) or 0)

    async def all(self, kind: Kind) -> dict[str, Declared]:
        """Read all of a kind, oldest first."""
        values: dict[bytes, bytes] = await self._redis.hgetall(keys.declared(kind))  # type: ignore[misc]
        found = [self._open(kind, name.decode(), value) for name, value in values.items()]
        return {each.id: each for each in sorted(found, key=lambda each: (each.created_ms, each.id))}

    async def get(self, kind: Kind, name: str) -> Declared | None:
        """Read one."""
        value = await self._redis.hget(keys.declared(kind), name)  # type: ignore[misc]
        return self._open(kind, name, value) if value else None

    async def put(self, kind: Kind, name: str, document: Json, *, tenant: str | None) -> Declared:
        """Make or replace one; the making's time is kept."""
        before = await self.get(kind, name)
        seconds, micros = await self._redis.time()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        made = Declared(name, document, tenant, before.created_ms if before else now_ms, now_ms)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.declared(kind), name, self._seal(kind, made))
            pipe.incr(keys.DECLARED_VERSION)
            await pipe.execute()
        return made

    async def remove(self, kind: Kind, name: str) -> bool:
        """Forget one; False when there was none."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(keys.declared(kind), name)
            pipe.incr(keys.DECLARED_VERSION)
            removed, _ = await pipe.execute()
        return bool(removed)

    async def reseal(self) -> int:
        """Seal again, with the newest key, what an older one sealed; gives how many."""
        count = 0
        for kind in keys.DECLARED_KINDS:
            values: dict[bytes, bytes] = await self._redis.hgetall(keys.declared(kind))  # type: ignore[misc]
            for name, value in values.items():
                if self._box.needs_reencrypt(value.decode()):
                    fresh = self._seal(kind, self._open(kind, name.decode(), value))
                    count += await self._swap(kind, name, value, fresh)
        return count

    async def _swap(self, kind: Kind, name: bytes, old: bytes, fresh: str) -> int:
        """Replace a value only if nobody changed it meanwhile."""
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(keys.declared(kind))
            if await pipe.hget(keys.declared(kind), name.decode()) != old:  # type: ignore[misc]
                return 0
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(keys.declared(kind), name.decode(), fresh)
            await pipe.execute()
        return 1

    def _seal(self, kind: str, each: Declared) -> str:
        body = [each.document, each.tenant, each.created_ms, each.updated_ms]
        return self._box.encrypt(orjson.dumps(body).decode(), context=f"{kind}:{each.id}")

    def _open(self, kind: str, name: str, value: bytes) -> Declared:
        document, tenant, created_ms, updated_ms = orjson.loads(
            self._box.decrypt(value.decode(), context=f"{kind}:{name}")
        )
        return Declared(name, document, tenant, created_ms, updated_ms)


def documents(declared: Mapping[str, Declared]) -> dict[str, Json]:
    """Give the documents by id."""
    return {name: each.document for name, each in declared.items()}
