"""A lane hands due work out once, loses no update, and lets nobody stand in another's way; against a real Valkey."""

import re
from importlib import resources
from typing import Any, get_args

import orjson
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from relay.ledger import keys
from relay.ledger.calls import Landmark, Ledger, Row, Said, claimed_call, claimed_event
from relay.ledger.deliveries import DeliveryState
from relay.ledger.lane import LANES, Claim, Lane, LaneName, Settlement, Verb
from relay.ledger.pack import pack
from relay.model import Record, from_iso

EVENT_TTL_S = 1000


def lane_of(redis: Redis, name: LaneName = "poll", *, lease_s: float = 60, most: int = 50) -> Lane:
    return Lane(redis, name, lease_s=lease_s, most=most, event_ttl_s=EVENT_TTL_S)


def ledger_of(redis: Redis) -> Ledger:
    return Ledger(redis, calls_ttl_s=3000, events_ttl_s=EVENT_TTL_S)


async def claims_of(lane: Lane, want: int = 100) -> list[Claim]:
    return list((await lane.exchange(want=want)).claims)


async def claim_one(lane: Lane) -> Claim:
    [claim] = await claims_of(lane)
    return claim


async def settle(lane: Lane, claim: Claim, verb: Verb = "done", **also: Any) -> bool:
    """Settle; False when it was refused."""
    return not (await lane.exchange([Settlement(claim, verb, **also)])).refused


async def let_leases_end(redis: Redis, lane: Lane, *partitions: str) -> None:
    """What the passing of time does: each lease's end, and what the index says of it, lie in the past."""
    for partition in partitions or ("",):
        for item in await redis.zrange(keys.leased(lane.name, partition), 0, -1):
            await redis.zadd(keys.leased(lane.name, partition), {item: 1})
        await lane.change([("new", partition, "rescore", 10**9), ("drop", partition, "rescore", 0)])


async def let_dues_pass(redis: Redis, lane: Lane, partition: str = "") -> None:
    """Make everything that waits due."""
    for item in await redis.zrange(keys.waiting(lane.name, partition), 0, -1):
        await lane.put(partition, item.decode())


async def queue_event(redis: Redis, sub: str, subject: str, *eids: str) -> None:
    ledger = ledger_of(redis)
    for eid in eids:
        await ledger.publish(None, {}, [Said(eid, {"id": eid}, [sub])], subject=subject)


async def admit_call(redis: Redis, key: str = "7") -> str:
    """Take a call in; gives its id. The call waits in the enrich lane of `main`, and in its record lane."""
    record = _record(key)
    await ledger_of(redis).admit("main", [Row(record, record.content_hash())], token=b"", mapping=1, via="poll")
    [cid] = await redis.zrange(keys.waiting("enrich", "main"), -1, -1)
    return cid.decode()


def _record(key: str) -> Record:
    return Record(key=key, started_at=from_iso("2025-07-01T12:00:00Z"), local_date="2025-07-01", audio=True)
