"""Sources and subscriptions that were made at run time: kept in the store, their options sealed.

Every change raises one number that all processes watch, so each of them reads again within a second.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import orjson
import structlog
from redis.asyncio import Redis

from relay.domain.json import Json
from relay.errors import RelayError
from relay.secrets import SecretBox
from relay.store import keys
from relay.store.scripts import load_script

log = structlog.get_logger(__name__)

Kind = Literal["source", "subscription", "token"]


@dataclass(frozen=True, slots=True)
class Declaration:
    """One thing made at run time: its document, whose it is (None: the operator's), and when it was made, ms."""

    id: str
    document: Json = field(repr=False)
    tenant: str | None
    created_ms: int
    updated_ms: int
    sealed: bytes = field(default=b"", repr=False, compare=False)


class Declarations:
    """Keeps them. A document is sealed as a whole: it may hold secrets anywhere."""

    def __init__(self, redis: Redis, box: SecretBox) -> None:
        self._redis = redis
        self._box = box
        self._declare = load_script(redis, "declare")
        self._opened: dict[Kind, dict[str, Declaration]] = {}

    async def version(self) -> int:
        """The number that every change raises."""
        return int(await self._redis.get(keys.DECLARED_VERSION) or 0)

    async def all(self, kind: Kind) -> dict[str, Declaration]:
        """Read all of a kind, oldest first. What did not change since the last time is not opened again."""
        values: dict[bytes, bytes] = await self._redis.hgetall(keys.declared(kind))  # type: ignore[misc]
        before = self._opened.get(kind, {})
        found: list[Declaration] = []
        for raw_name, value in values.items():
            name = raw_name.decode()
            known = before.get(name)
            found.append(known if known is not None and known.sealed == value else self._open(kind, name, value))
        self._opened[kind] = {each.id: each for each in sorted(found, key=lambda each: (each.created_ms, each.id))}
        return dict(self._opened[kind])

    async def get(self, kind: Kind, name: str) -> Declaration | None:
        """Read one."""
        value = await self._redis.hget(keys.declared(kind), name)  # type: ignore[misc]
        return self._open(kind, name, value) if value else None

    async def put(self, kind: Kind, name: str, document: Json, *, tenant: str | None) -> Declaration:
        """Make or replace one; the making's time is kept."""
        before = await self.get(kind, name)
        made = await self._made(kind, name, document, tenant, created_ms=before.created_ms if before else None)
        await self._declare(args=[kind, name, "*", made.sealed])
        return made

    async def create(self, kind: Kind, name: str, document: Json, *, tenant: str | None) -> Declaration | None:
        """Make one; None when the id is taken."""
        made = await self._made(kind, name, document, tenant)
        return made if await self._declare(args=[kind, name, "", made.sealed]) else None

    async def replace(self, kind: Kind, before: Declaration, document: Json) -> Declaration | None:
        """Replace what was read; None when somebody changed or removed it meanwhile."""
        made = await self._made(kind, before.id, document, before.tenant, created_ms=before.created_ms)
        return made if await self._declare(args=[kind, before.id, before.sealed, made.sealed]) else None

    async def remove(self, kind: Kind, name: str) -> bool:
        """Forget one; False when there was none."""
        return bool(await self._declare(args=[kind, name, "*", ""]))

    async def reseal(self) -> int:
        """Seal again, with the newest key, what an older one sealed; gives how many."""
        count = 0
        for kind in keys.DECLARED_KINDS:
            values: dict[bytes, bytes] = await self._redis.hgetall(keys.declared(kind))  # type: ignore[misc]
            for name, value in values.items():
                try:
                    if not self._box.needs_reencrypt(value.decode()):
                        continue
                    fresh = self._seal(kind, self._open(kind, name.decode(), value))
                except RelayError as error:
                    log.error("declaration_load_failed", kind=kind, name=name.decode(), error=str(error))
                    continue
                count += await self._declare(args=[kind, name.decode(), value, fresh])
        return count

    async def _made(
        self, kind: Kind, name: str, document: Json, tenant: str | None, *, created_ms: int | None = None
    ) -> Declaration:
        seconds, micros = await self._redis.time()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        made = Declaration(name, document, tenant, now_ms if created_ms is None else created_ms, now_ms)
        return replace(made, sealed=self._seal(kind, made).encode())

    def _seal(self, kind: str, each: Declaration) -> str:
        body = [each.document, each.tenant, each.created_ms, each.updated_ms]
        return self._box.encrypt(orjson.dumps(body).decode(), context=f"{kind}:{each.id}")

    def _open(self, kind: str, name: str, value: bytes) -> Declaration:
        document, tenant, created_ms, updated_ms = orjson.loads(
            self._box.decrypt(value.decode(), context=f"{kind}:{name}")
        )
        return Declaration(name, document, tenant, created_ms, updated_ms, value)
