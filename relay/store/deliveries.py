"""Deliveries: one event for one subscription each, with its state. Lists of them, and dead letters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
from redis.asyncio import Redis

from relay.domain.json import Json
from relay.queue.claim import Claim
from relay.store import keys
from relay.store.codes import ReplayOutcome
from relay.store.documents import unpack, unpack_bytes
from relay.store.listings import Entry, Listing
from relay.store.scripts import load_script

Status = Literal["waiting", "intent", "delivered", "exhausted", "unknown", "expired", "missing", "poison", "dropped"]

_KEPT_ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class DeliveryState:
    """How far a delivery is: a few bytes while all goes well, with its attempts when it does not.

    `unfiltered` when whoever published the event did not know the subscription: its filters are still to be applied.
    `at_ms` is the last attempt's time, `next_ms` the next one's; `restarted_ms` is when a replay was asked for, from
    where the retry schedule then counts.
    """

    status: Status = "waiting"
    attempts: int = 0
    at_ms: int = 0
    next_ms: int = 0
    restarted_ms: int = 0
    log: Sequence[Json] = ()
    unfiltered: bool = False

    @classmethod
    def read(cls, stored: bytes) -> "DeliveryState":
        """Parse what `write` returned; empty for a delivery that waits for its first attempt."""
        if not stored:
            return cls()
        if stored.isdigit():
            return cls("delivered", 1, int(stored))
        fields = orjson.loads(stored)
        return cls(
            fields["s"],
            fields.get("n", 0),
            fields.get("t", 0),
            fields.get("next", 0),
            fields.get("r", 0),
            tuple(fields.get("a", ())),
            "f" in fields,
        )

    def write(self) -> bytes:
        """Serialise without empty fields; success at the first attempt, as for most deliveries, is just its time."""
        if self == DeliveryState("delivered", 1, self.at_ms) and self.at_ms > 0:
            return b"%d" % self.at_ms
        fields: Json = {"s": self.status}
        if self.attempts:
            fields["n"] = self.attempts
        if self.at_ms:
            fields["t"] = self.at_ms
        if self.next_ms:
            fields["next"] = self.next_ms
        if self.restarted_ms:
            fields["r"] = self.restarted_ms
        if self.log:
            fields["a"] = self.log
        if self.unfiltered:
            fields["f"] = 1
        return orjson.dumps(fields)

    def attempted(self, status: Status, attempt: Json | None, *, at_ms: int, next_ms: int = 0) -> "DeliveryState":
        """Add an attempt. A successful one is logged only where others failed before."""
        log = tuple(self.log)
        if attempt is not None and (status != "delivered" or log):
            log = (*log, {"at": at_ms, **attempt})[-_KEPT_ATTEMPTS:]
        return replace(
            self,
            status=status,
            attempts=self.attempts + 1,
            at_ms=at_ms,
            next_ms=next_ms,
            log=log,
            unfiltered=False,
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one subscription. `queued_ms` is when it was queued first, 0 when that is not kept any more."""

    event_id: str
    subscription: str
    state: DeliveryState
    queued_ms: int = 0


class DeliveryStore:
    """Reads and replays deliveries. Their states live in the event's HASH, written by publish.lua and settlements."""

    def __init__(self, redis: Redis, *, events_ttl_s: int) -> None:
        self._redis = redis
        self._events_ttl_s = events_ttl_s
        self._replay = load_script(redis, "replay")

    async def get(self, event_id: str, subscription: str) -> Delivery | None:
        return (await self.get_many([(event_id, subscription)]))[0]

    async def get_many(self, ids: Sequence[tuple[str, str]]) -> list[Delivery | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for event_id, subscription in ids:
                pipe.hget(keys.event(event_id), subscription)
                pipe.zscore(keys.deliveries_of(subscription), event_id)
            rows = await pipe.execute()
        return [
            None if state is None else Delivery(event_id, subscription, DeliveryState.read(state), int(queued_ms or 0))
            for (event_id, subscription), state, queued_ms in zip(ids, rows[::2], rows[1::2], strict=True)
        ]

    async def of_event(self, event_id: str) -> list[Delivery]:
        """Read every delivery of an event, also after its document has expired."""
        names: list[bytes] = await self._redis.hkeys(keys.event(event_id))  # type: ignore[misc]  # both clients
        subscriptions = [name.decode() for name in names if name.decode() not in (keys.BODY, keys.SEQUENCE)]
        deliveries = await self.get_many([(event_id, subscription) for subscription in subscriptions])
        return [delivery for delivery in deliveries if delivery is not None]

    async def states(self, event_id: str, subscriptions: Sequence[str]) -> list[DeliveryState | None]:
        """Read the states of an event's deliveries; None where a subscription has none."""
        if not subscriptions:
            return []
        states = await self._redis.hmget(keys.event(event_id), list(subscriptions))  # type: ignore[misc]  # both clients
        return [None if state is None else DeliveryState.read(state) for state in states]

    async def with_documents(
        self, event_ids: Sequence[str], subscription: str
    ) -> list[tuple[Json | None, DeliveryState | None]]:
        """Read events, each with its delivery to one subscription."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for event_id in event_ids:
                pipe.hmget(keys.event(event_id), [keys.BODY, subscription])
            rows = await pipe.execute()
        return [
            (unpack(packed) if packed else None, None if state is None else DeliveryState.read(state))
            for packed, state in rows
        ]

    def of_subscriptions(self, subscriptions: Sequence[str]) -> Listing:
        """List the events that have a delivery to one of the subscriptions, by when it was queued first."""
        return Listing(self._redis, tuple(map(keys.deliveries_of, subscriptions)))

    async def queued_at(self, entries: Sequence[Entry], subscriptions: Sequence[str]) -> list[list[Delivery]]:
        """Read, for each entry of `of_subscriptions`, the deliveries that it stands for."""
        event_ids = [event_id for _, event_id in entries]
        async with self._redis.pipeline(transaction=False) as pipe:
            for event_id in event_ids:
                pipe.hmget(keys.event(event_id), list(subscriptions))
            for subscription in subscriptions:
                pipe.zmscore(keys.deliveries_of(subscription), event_ids)
            rows = await pipe.execute()
        states, queued_ms = rows[: len(entries)], rows[len(entries) :]
        return [
            [
                Delivery(event_id, subscription, DeliveryState.read(state), at_ms)
                for subscription, state, scores in zip(subscriptions, states[number], queued_ms, strict=True)
                if state is not None and scores[number] is not None and int(scores[number]) == at_ms
            ]
            for number, (at_ms, event_id) in enumerate(entries)
        ]

    def dead_letters(self) -> Listing:
        """List the deliveries that failed for good, by when they did; `of_dead_letters` reads them."""
        return Listing(self._redis, (keys.DEAD,))

    async def of_dead_letters(self, entries: Sequence[Entry]) -> list[Delivery | None]:
        """Read the deliveries that entries of `dead_letters` stand for; None for those not kept any more."""
        names = [name.split(keys.SEPARATOR, 1) for _, name in entries]
        return await self.get_many([(event_id, subscription) for subscription, event_id in names])

    async def replay(
        self, event_id: str, ordering_key: str, subscriptions: Sequence[str], *, at_ms: int, force: bool
    ) -> list[ReplayOutcome]:
        """Queue an event again in its old place of the order; its retry schedule starts anew at `at_ms`."""
        state = DeliveryState(restarted_ms=at_ms).write()
        args: list[Any] = [
            event_id,
            ordering_key,
            int(force),
            self._events_ttl_s,
            state,
            len(subscriptions),
            *subscriptions,
        ]
        return [ReplayOutcome(reply.decode()) for reply in await self._replay(args=args)]


@dataclass(frozen=True, slots=True)
class ClaimedEvent:
    """What comes with a claim of the deliver lane: the first pending event of the ordering key. `body` is None when
    the event is not kept any more."""

    id: str
    body: bytes | None
    state: bytes


def claimed_event(claim: Claim) -> ClaimedEvent:
    """Read the event that comes with a claim of the deliver lane."""
    event_id, packed, state = claim.payload
    return ClaimedEvent(event_id.decode(), unpack_bytes(packed) if packed else None, state)
