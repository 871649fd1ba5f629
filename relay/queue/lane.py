"""A lane: due work in partitions, handed out under leases. Everything that must be one step is one of the Lua files."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay.queue.scripts import load_script

log = structlog.get_logger(__name__)

_STEP_BACK_MS = 5000

Verb = Literal["done", "again", "renew", "intent", "part"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One item under lease. `work` is what the lane hands out with it; `until` is the lease's end on our monotonic
    clock, counted from before the claim was asked for, so never too late."""

    partition: str
    item: str
    token: bytes
    expiries: int
    until: float
    work: Sequence[Any] = ()

    @property
    def left_s(self) -> float:
        """Seconds of lease left."""
        return self.until - time.monotonic()


@dataclass(frozen=True, slots=True)
class Settlement:
    """How the work on a claim ended; see exchange.lua for the verbs and for `a`, `b` and `c`."""

    claim: Claim
    verb: Verb
    wait_ms: int = 0
    a: str = ""
    b: bytes = b""
    c: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """The answer to an exchange. `next_due_ms` is None when nothing waits; `refused` are those whose lease ended."""

    now_ms: int
    next_due_ms: int | None
    refused: Sequence[Settlement] = ()
    claims: Sequence[Claim] = field(default_factory=list)


class Lane:
    """One kind of work. `lease_s` must outlast one attempt; `most` is the most of one partition in one claim."""

    def __init__(self, redis: Redis, name: str, *, lease_s: float, most: int = 50, event_ttl_s: int = 0) -> None:
        self.name = name
        self.lease_s = lease_s
        self._most = most
        self._event_ttl_s = event_ttl_s
        self._redis = redis
        self._store_ahead_ms: float | None = None
        self._exchange = load_script(redis, "relay.queue", "exchange")
        self._put = load_script(redis, "relay.queue", "put")

    async def exchange(self, settlements: Sequence[Settlement] = (), *, want: int = 0) -> Exchange:
        """Settle what is done and claim up to `want` items, in one round trip."""
        asked_at = time.monotonic()
        args: list[Any] = [self.name, want, int(self.lease_s * 1000), self._most, self._event_ttl_s, len(settlements)]
        for each in settlements:
            claim = each.claim
            args += (claim.partition, claim.item, claim.token, each.verb, each.wait_ms, each.a, each.b, each.c)
        now_ms, next_due_ms, settled, claims = await self._exchange(args=args)
        await self._look_at_clock(now_ms, asked_at)
        until = asked_at + self.lease_s
        return Exchange(
            now_ms=now_ms,
            next_due_ms=next_due_ms if next_due_ms >= 0 else None,
            refused=[each for each, ok in zip(settlements, settled, strict=True) if not ok],
            claims=[
                Claim(partition.decode(), item.decode(), token, expiries, until, work)
                for partition, item, token, expiries, *work in claims
            ],
        )

    @property
    def store_now_ms(self) -> int:
        """The store's time as of the last exchange or change, carried on by our monotonic clock; before, our own."""
        if self._store_ahead_ms is None:
            return int(time.time() * 1000)
        return int(time.monotonic() * 1000 + self._store_ahead_ms)

    async def put(self, partition: str, item: str, *, wait_ms: int = 0, keep_due: bool = False) -> None:
        """Make an item due `wait_ms` from now; with `keep_due` only if the lane does not have it."""
        await self.change([("new" if keep_due else "put", partition, item, wait_ms)])

    async def drop(self, partition: str, item: str) -> None:
        """Forget an item, whoever holds it."""
        await self.change([("drop", partition, item, 0)])

    async def gate(self, partition: str, until_ms: int | Literal["inf"] | None) -> None:
        """Let nothing be claimed from a partition before a moment; None opens it."""
        await self.change([("gate", partition, "" if until_ms is None else until_ms, 0)])

    async def cap(self, partition: str, most_in_flight: int) -> None:
        """Limit how many items of a partition are out at once, over all processes."""
        await self.change([("cap", partition, most_in_flight, 0)])

    async def off(self, partition: str, why: str | None) -> None:
        """Queue and claim nothing for a partition; None switches it on again, with its health forgotten."""
        await self.change([("off", partition, why or "", 0)])

    async def lapse(self) -> None:
        """End every lease now: only for who knows that all former holders are dead."""
        await self.change([("lapse", "", "", 0)])

    async def change(self, changes: Iterable[tuple[str, str, str | float, float]]) -> int:
        """Do several of the above in one step; gives the store's time, ms."""
        args: list[Any] = [0]
        for verb, partition, a, b in changes:
            args += (verb, self.name, partition, a, b)
            args[0] += 1
        now_ms = int(await self._put(args=args))
        if self._store_ahead_ms is None:
            self._store_ahead_ms = now_ms - time.monotonic() * 1000
        return now_ms

    async def _look_at_clock(self, now_ms: int, asked_at: float) -> None:
        """Note what time the store has. When its clock was set back, move the lane's dues with it: nobody waits so
        long. An answer that was long on its way looks late, not set back: the earliest it can have left counts."""
        ahead_ms = now_ms - time.monotonic() * 1000
        if self._store_ahead_ms is not None:
            back_ms = self._store_ahead_ms - (now_ms - asked_at * 1000)
            if back_ms > _STEP_BACK_MS:
                try:
                    await self.change([("back", "", "", int(back_ms))])
                except (RedisError, OSError):
                    return  # seen again at the next exchange
                log.warning("store_clock_stepped_back", lane=self.name, by_s=round(back_ms / 1000))
        self._store_ahead_ms = ahead_ms
