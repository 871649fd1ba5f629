"""What the API still calls by former names; goes away with its last caller."""

from collections.abc import Sequence

from relay.domain.json import Json
from relay.store.calls import StoredCall
from relay.store.store import Store


class Ledger:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def call(self, call_id: str) -> StoredCall | None:
        return await self._store.calls.get(call_id)

    async def event(self, event_id: str) -> Json | None:
        return await self._store.events.get(event_id)

    async def events(self, event_ids: Sequence[str]) -> list[Json | None]:
        return await self._store.events.get_many(event_ids)

    async def replay(self, event_id: str, key: str, subscriptions: Sequence[str], *, at_ms: int, force: bool) -> str:
        outcomes = await self._store.deliveries.replay(event_id, key, subscriptions, at_ms=at_ms, force=force)
        letters = {"queued": "q", "waiting": "w", "delivered": "d", "disabled": "o", "gone": "g"}
        return "".join(letters[outcome] for outcome in outcomes)
