"""A lane: due items in partitions, handed out under leases. Whatever must be one step is one Lua file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from relay.queue import changes, settlement
from relay.queue.changes import Change, Drop, Put
from relay.queue.claim import Claim
from relay.queue.process import Process
from relay.queue.scripts import load_script
from relay.queue.settlement import Settlement


@dataclass(frozen=True, slots=True)
class Room:
    """What a runner has room for: free slots, how many of them unproven partitions may have, how many only partitions
    without an item in flight, and whether a suspect may run. One slot works on `batch` items; `owners` are the slots in
    use by tenant."""

    slots: int = 0
    unproven: int = 0
    reserve: int = 0
    suspect: bool = True
    batch: int = 1
    owners: Mapping[str, int] = field(default_factory=dict)


_NO_ROOM = Room()


@dataclass(frozen=True, slots=True)
class Exchange:
    """The reply to an exchange. `next_due_ms` is None when nothing waits that the runner could claim; `refused` lists
    the settlements of items that are no longer leased to us."""

    now_ms: int
    next_due_ms: int | None
    refused: Sequence[tuple[Claim, Settlement]] = ()
    claims: Sequence[Claim] = field(default_factory=list)


class Lane:
    """One kind of work.

    `process` is the one in whose name items are leased (default: one of its own). `hooks` is Lua that does, in the
    step of a claim or settle, what only this lane needs (exchange.lua lists them); `hook_argument` is theirs.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        process: Process | None = None,
        *,
        hooks: str = "",
        hook_argument: int | bytes = 0,
    ) -> None:
        self.name = name
        self.process = process or Process(redis)
        self._hook_argument = hook_argument
        self._exchange = load_script(redis, "relay.queue", "exchange", prelude=hooks)
        self._change = load_script(redis, "relay.queue", "change")

    async def exchange(
        self, settlements: Sequence[tuple[Claim, Settlement]] = (), *, want: int = 0, room: Room | None = None
    ) -> Exchange:
        """Settle claims and claim what there is `room` for, in one round trip. `want` is short for so many slots, for
        proven and unproven partitions alike."""
        if room is None:
            room = Room(want, want) if want else _NO_ROOM
        args: list[Any] = [
            self.name,
            self._hook_argument,
            self.process.id,
            self.process.next_exchange(),
            room.slots,
            room.unproven,
            room.reserve,
            int(room.suspect),
            room.batch,
            len(room.owners),
        ]
        for owner, slots in room.owners.items():
            args += (owner, slots)
        args.append(len(settlements))
        for claim, settled in settlements:
            args += settlement.encode(claim, settled)
        now_ms, wall_ms, next_due_ms, accepted, claims = await self._exchange(args=args)
        self.process.clock.note(now_ms, wall_ms)
        return Exchange(
            now_ms=now_ms,
            next_due_ms=next_due_ms if next_due_ms >= 0 else None,
            refused=[pair for pair, ok in zip(settlements, accepted, strict=True) if not ok],
            claims=[
                Claim(partition.decode(), item.decode(), token, deaths, bool(proven), owner.decode(), payload)
                for partition, item, token, deaths, proven, owner, *payload in claims
            ],
        )

    @property
    def store_now_ms(self) -> int:
        """The relay's clock, by which everything is scheduled; see StoreClock."""
        return self.process.clock.now_ms

    @property
    def wall_ms(self) -> int:
        """The time of day at the store, which people read and signatures carry; see StoreClock."""
        return self.process.clock.wall_ms

    async def put(self, partition: str, item: str, *, after_ms: int = 0, keep_due: bool = False) -> None:
        await self.apply(Put(partition, item, after_ms, keep_due))

    async def drop(self, partition: str, item: str) -> None:
        await self.apply(Drop(partition, item))

    async def apply(self, *changes_: Change) -> int:
        """Apply changes in one step; returns the relay's time, ms."""
        args: list[Any] = [self.name, len(changes_)]
        for change in changes_:
            args += changes.encode(change)
        now_ms, wall_ms = await self._change(args=args)
        self.process.clock.note(now_ms, wall_ms)
        return int(now_ms)

    async def give_back(self, working: Sequence[Claim]) -> int:
        """Give back the items that are leased to this process and not among `working`; returns how many there were."""
        return await self.process.give_back(self.name, [claim.token.decode() for claim in working])
