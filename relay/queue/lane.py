"""A lane: due items in partitions, handed out under leases. Whatever must be one step is one Lua file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay.queue import changes, settlement
from relay.queue.changes import Change, Drop, FollowClockBack, Put
from relay.queue.claim import Claim
from relay.queue.scripts import load_script
from relay.queue.settlement import Settlement

log = structlog.get_logger(__name__)

_CLOCK_STEP_MS = 5000


@dataclass(frozen=True, slots=True)
class Exchange:
    """The reply to an exchange. `next_due_ms` is None when nothing waits; `refused` lists those whose lease had
    ended."""

    now_ms: int
    next_due_ms: int | None
    refused: Sequence[tuple[Claim, Settlement]] = ()
    claims: Sequence[Claim] = field(default_factory=list)


class Lane:
    """One kind of work. `lease_s` must outlast one attempt; one exchange claims at most `most` items of a partition.

    `hooks` is Lua that does, in the step of a claim or settle, what only this lane needs (exchange.lua says which
    hooks there are); `hook_argument` is theirs.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        lease_s: float,
        most: int = 50,
        hooks: str = "",
        hook_argument: int | bytes = 0,
    ) -> None:
        self.name = name
        self.lease_s = lease_s
        self._most = most
        self._hook_argument = hook_argument
        self._store_ahead_ms: float | None = None
        self._exchange = load_script(redis, "relay.queue", "exchange", prelude=hooks)
        self._change = load_script(redis, "relay.queue", "change")

    async def exchange(self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0) -> Exchange:
        """Settle claims and claim up to `want` items, in one round trip."""
        requested_at = time.monotonic()
        args: list[Any] = [
            self.name,
            want,
            int(self.lease_s * 1000),
            self._most,
            self._hook_argument,
            len(settlements),
        ]
        for claim, settled in settlements:
            args += settlement.encode(claim, settled)
        now_ms, next_due_ms, accepted, claims = await self._exchange(args=args)
        await self._check_clock(now_ms, requested_at)
        until = requested_at + self.lease_s
        return Exchange(
            now_ms=now_ms,
            next_due_ms=next_due_ms if next_due_ms >= 0 else None,
            refused=[pair for pair, ok in zip(settlements, accepted, strict=True) if not ok],
            claims=[
                Claim(partition.decode(), item.decode(), token, expiries, until, payload)
                for partition, item, token, expiries, *payload in claims
            ],
        )

    @property
    def store_now_ms(self) -> int:
        """The store's time as of the last exchange or change, advanced by our monotonic clock; before, our own."""
        if self._store_ahead_ms is None:
            return int(time.time() * 1000)
        return int(time.monotonic() * 1000 + self._store_ahead_ms)

    async def put(self, partition: str, item: str, *, after_ms: int = 0, keep_due: bool = False) -> None:
        """Make one item due; see Put."""
        await self.apply(Put(partition, item, after_ms, keep_due))

    async def drop(self, partition: str, item: str) -> None:
        """Remove one item; see Drop."""
        await self.apply(Drop(partition, item))

    async def apply(self, *changes_: Change) -> int:
        """Apply changes in one step; returns the store's time, ms."""
        args: list[Any] = [self.name, len(changes_)]
        for change in changes_:
            args += changes.encode(change)
        now_ms = int(await self._change(args=args))
        if self._store_ahead_ms is None:
            self._store_ahead_ms = now_ms - time.monotonic() * 1000
        return now_ms

    async def _check_clock(self, now_ms: int, requested_at: float) -> None:
        """Note the store's time. When its clock stepped back, shift the lane's dues with it, so that no item waits that
        long. A reply that was delayed on its way looks late, not early: the earliest it can have left counts."""
        ahead_ms = now_ms - time.monotonic() * 1000
        if self._store_ahead_ms is not None:
            back_ms = self._store_ahead_ms - (now_ms - requested_at * 1000)
            if back_ms > _CLOCK_STEP_MS:
                try:
                    await self.apply(FollowClockBack(int(back_ms)))
                except (RedisError, OSError):
                    return  # the next exchange sees it again
                log.warning("store_clock_stepped_back", lane=self.name, by_s=round(back_ms / 1000))
        self._store_ahead_ms = ahead_ms
