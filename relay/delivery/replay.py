"""Delivering many events again: those of a subscription since a time, each in its old place of its call's order."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal, Protocol

from redis.asyncio import Redis

from relay.delivery import filters
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.store import keys
from relay.store.calls import Ledger
from relay.store.deliveries import DeliveryState
from relay.store.documents import unpack

ReplayStatus = Literal["exhausted", "missing", "any"]
"""Which deliveries: given up (or put aside), never queued because it was off, or all that it would want now."""

_STATUSES: Final[dict[ReplayStatus, frozenset[str]]] = {
    "exhausted": frozenset({"exhausted", "poison"}),
    "missing": frozenset({"missing", "dropped"}),
    "any": frozenset(),
}
_BATCH: Final = 200


class Belongs(Protocol):
    """Whose an event is; None is the operator."""

    def __call__(self, document: Json) -> str | None: ...


@dataclass(slots=True)
class Replayed:
    """How far a replay is. `at_ms` is the time up to which the index was read."""

    at_ms: int
    looked_at: int = 0
    queued: int = 0
    waiting: int = 0
    delivered: int = 0
    gone: int = 0

    def counts(self) -> dict[str, int]:
        """Give the numbers by name."""
        return {name: value for name, value in asdict(self).items() if name != "at_ms"}


class SwitchedOff(Exception):
    """The subscription was switched off meanwhile: nothing can be queued for it."""


async def replay_since(
    ledger: Ledger,
    subscription: Subscription,
    *,
    done: Replayed,
    until_ms: int,
    status: ReplayStatus,
    force: bool,
    belongs: Belongs,
    step: Callable[[Replayed], Awaitable[None]],
) -> None:
    """Go on from `done`, oldest first, up to `until_ms`. Raises SwitchedOff; `step` may raise to end it.

    What is due already, and what was delivered (unless forced), is left alone, so running it twice does no harm.
    """
    redis = ledger.redis
    index = keys.EVENTS if status == "any" else keys.deliveries_of(subscription.id)
    before: set[bytes] = set()
    while True:
        rows = await _batch(redis, index, done.at_ms, until_ms, before)
        if not rows:
            await step(done)
            return
        members = [member for member, _ in rows]
        wanted = await _wanted(ledger, subscription, [member.decode() for member in members], status, belongs)
        for eid, subject in wanted:
            letter = await ledger.replay(eid, subject, [subscription.id], at_ms=until_ms, force=force)
            match letter:
                case "q":
                    done.queued += 1
                case "w":
                    done.waiting += 1
                case "d":
                    done.delivered += 1
                case "o":
                    raise SwitchedOff
                case _:
                    done.gone += 1
        newest = rows[-1][1]
        before = {member for member, score in rows if score == newest} | (before if newest == done.at_ms else set())
        done.at_ms = newest
        done.looked_at += len(rows)
        await step(done)


async def _batch(
    redis: Redis, index: str, from_ms: int, until_ms: int, before: set[bytes]
) -> Sequence[tuple[bytes, int]]:
    """Read what follows, oldest first; of the very ms at which the last batch ended only what was not in it."""
    rows = await redis.zrangebyscore(index, from_ms, until_ms, start=0, num=_BATCH + len(before), withscores=True)
    return [(member, int(score)) for member, score in rows if member not in before][:_BATCH]


async def _wanted(
    ledger: Ledger, subscription: Subscription, eids: Sequence[str], status: ReplayStatus, belongs: Belongs
) -> list[tuple[str, str]]:
    """Choose from events those to deliver again, each with its subject."""
    async with ledger.redis.pipeline(transaction=False) as pipe:
        for eid in eids:
            pipe.hmget(keys.event(eid), [keys.BODY, subscription.id])
        answers = await pipe.execute()
    chosen: list[tuple[str, str]] = []
    for eid, (packed, stored) in zip(eids, answers, strict=True):
        if not packed:
            continue
        if status != "any" and (stored is None or DeliveryState.read(stored).status not in _STATUSES[status]):
            continue
        document: Json = unpack(packed)
        if subscription.tenant not in (None, belongs(document)):
            continue
        if status == "any" and filters.mismatch(subscription.options, document, subscription_id=subscription.id):
            continue
        call = document["data"].get("call")
        chosen.append((eid, str(call["id"]) if call else eid))
    return chosen
