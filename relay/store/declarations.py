"""Declarations: sources, subscriptions and tokens that were created over the API, encrypted.

Every change raises a version that all processes watch, so that each of them reads again within a second.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import orjson
import structlog
from redis.asyncio import Redis

from relay.domain.json import Json
from relay.errors import ForeignId, RelayError
from relay.secrets import SecretBox
from relay.store import connection, keys
from relay.store.scripts import load_script

log = structlog.get_logger(__name__)

Kind = Literal["source", "subscription", "token"]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What was declared: its options, its tenant (None: the operator), and when it was created and changed, ms."""

    id: str
    document: Json = field(repr=False)
    tenant: str | None
    created_ms: int
    updated_ms: int
    sealed: bytes = field(default=b"", repr=False, compare=False)


class Declarations:
    """Reads and writes declarations. A document is encrypted as a whole: it may hold secrets anywhere."""

    def __init__(self, redis: Redis, box: SecretBox) -> None:
        self._redis = redis
        self._box = box
        self._declare = load_script(redis, "declare")
        self._decrypted: dict[Kind, dict[str, Declaration]] = {}

    async def version(self) -> int:
        return int(await self._redis.get(keys.DECLARED_VERSION) or 0)

    async def all(self, kind: Kind) -> dict[str, Declaration]:
        """Read all of a kind, oldest first; only what has changed since the last call is decrypted."""
        values: dict[bytes, bytes] = await self._redis.hgetall(keys.declared(kind))  # type: ignore[misc]
        cached = self._decrypted.get(kind, {})
        declarations: list[Declaration] = []
        for raw_name, value in values.items():
            name = raw_name.decode()
            unchanged = name in cached and cached[name].sealed == value
            declarations.append(cached[name] if unchanged else self._decrypt(kind, name, value))
        declarations.sort(key=lambda declaration: (declaration.created_ms, declaration.id))
        self._decrypted[kind] = {declaration.id: declaration for declaration in declarations}
        return dict(self._decrypted[kind])

    async def count(self, kind: Kind) -> int:
        return int(await self._redis.hlen(keys.declared(kind)))  # type: ignore[misc]  # both clients

    async def get(self, kind: Kind, name: str) -> Declaration | None:
        value = await self._redis.hget(keys.declared(kind), name)  # type: ignore[misc]
        return self._decrypt(kind, name, value) if value else None

    async def put(self, kind: Kind, name: str, document: Json, *, tenant: str | None) -> Declaration:
        """Create or replace one; it keeps the time of its creation."""
        before = await self.get(kind, name)
        created_ms = before.created_ms if before else None
        declaration = await self._build(kind, name, document, tenant, created_ms=created_ms)
        await self._declare(args=[kind, name, "*", declaration.sealed])
        return declaration

    async def create(self, kind: Kind, name: str, document: Json, *, tenant: str | None) -> Declaration | None:
        """Create one; None when the id is taken. Raises ForeignId when it has data of another owner."""
        declaration = await self._build(kind, name, document, tenant)
        created = await self._declare(args=[kind, name, "", declaration.sealed, tenant or keys.OPERATOR])
        if created < 0:
            raise ForeignId(f"{kind} {name} has data of another owner")
        return declaration if created else None

    async def owners(self, kind: Kind) -> dict[str, str | None]:
        """Read the owner (None: the operator) of each id that is or was in use."""
        owners: dict[bytes, bytes] = await self._redis.hgetall(keys.owners(kind))  # type: ignore[misc]
        return {
            name.decode(): None if owner == keys.OPERATOR.encode() else owner.decode() for name, owner in owners.items()
        }

    async def replace(self, kind: Kind, before: Declaration, document: Json) -> Declaration | None:
        """Replace what was read; None when it was changed or removed meanwhile."""
        declaration = await self._build(kind, before.id, document, before.tenant, created_ms=before.created_ms)
        replaced = await self._declare(args=[kind, before.id, before.sealed, declaration.sealed])
        return declaration if replaced else None

    async def remove(self, kind: Kind, name: str) -> bool:
        return bool(await self._declare(args=[kind, name, "*", ""]))

    async def reseal(self) -> int:
        """Encrypt with the newest key what an older one encrypted; returns how many."""
        count = 0
        for kind in keys.DECLARED_KINDS:
            values: dict[bytes, bytes] = await self._redis.hgetall(keys.declared(kind))  # type: ignore[misc]
            for name, value in values.items():
                try:
                    if not self._box.needs_reencrypt(value.decode()):
                        continue
                    fresh = self._encrypt(kind, self._decrypt(kind, name.decode(), value))
                except RelayError as error:
                    log.error("declaration_load_failed", kind=kind, name=name.decode(), error=str(error))
                    continue
                count += await self._declare(args=[kind, name.decode(), value, fresh])
        return count

    async def _build(
        self, kind: Kind, name: str, document: Json, tenant: str | None, *, created_ms: int | None = None
    ) -> Declaration:
        now_ms = await connection.wall_ms(self._redis)
        declaration = Declaration(name, document, tenant, now_ms if created_ms is None else created_ms, now_ms)
        return replace(declaration, sealed=self._encrypt(kind, declaration).encode())

    def _encrypt(self, kind: Kind, declaration: Declaration) -> str:
        fields = [declaration.document, declaration.tenant, declaration.created_ms, declaration.updated_ms]
        return self._box.encrypt(orjson.dumps(fields).decode(), context=f"{kind}:{declaration.id}")

    def _decrypt(self, kind: Kind, name: str, value: bytes) -> Declaration:
        text = self._box.decrypt(value.decode(), context=f"{kind}:{name}")
        document, tenant, created_ms, updated_ms = orjson.loads(text)
        return Declaration(name, document, tenant, created_ms, updated_ms, value)
