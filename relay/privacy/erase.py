"""Forgetting: a person by number, a source that was removed. Promise: nothing of it is left that the relay can reach.

Audio goes first, then the call with its events in one step (erase.lua), so that a run which breaks off can be run again
and finds what is left. A provider's own rows are not ours: what `seen` knows of them is only their key and a hash, and
keeps an erased call from coming back with the next poll.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Protocol

import phonenumbers
from redis.asyncio import Redis

from relay.domain.time import from_ms
from relay.errors import StoreError
from relay.queue import keys as queue_keys
from relay.recordings.storage import object_paths
from relay.store import keys
from relay.store.calls import Ledger, StoredCall, read_call
from relay.store.scripts import load_script

FORGOTTEN_TTL_S: Final = 7 * 86_400
REMEMBERED_S: Final = 5
"""How long a cleared-up source still counts as forgotten: every process has heard of it by then."""

_BATCH: Final = 200
_TRIES: Final = 20
_SEEN_DAYS: Final = 400
_PHONE: Final = re.compile(r"[+\d][\d\s().\-/]*")
_URI: Final = re.compile(r"(?:sips?|tel):([^@;>]+)", re.IGNORECASE)
_NO_DIGIT: Final = re.compile(r"[^0-9]")

Step = Callable[["Erased"], Awaitable[None]]
"""Is told how far an erasure is; may raise to end it."""


class AudioStore(Protocol):
    """Where the audio is."""

    async def size(self, path: str) -> int | None: ...

    async def delete(self, path: str) -> None: ...


@dataclass(slots=True)
class Erased:
    """How much was erased so far; `deliveries` are those that were still waiting and have ended as expired."""

    scanned: int = 0
    calls: int = 0
    events: int = 0
    recordings: int = 0
    contacts: int = 0
    deliveries: int = 0

    def counts(self) -> dict[str, int]:
        """Give the numbers by name."""
        return asdict(self)


def spellings(number: str) -> frozenset[str]:
    """List the digits that stand for an E.164 number: with its country code, with a prefix for abroad, as at home."""
    digits = number.removeprefix("+")
    written = {digits, f"00{digits}", f"011{digits}"}
    try:
        national = phonenumbers.national_significant_number(phonenumbers.parse(number, None))
    except phonenumbers.NumberParseException:
        return frozenset(written)
    if len(national) >= 7:
        written |= {national, f"0{national}"}
    return frozenset(written)


def mentions(document: Any, written: Collection[str]) -> bool:
    """Whether a number stands anywhere in a document, in any of its spellings and with any punctuation."""
    match document:
        case dict():
            return any(mentions(value, written) for value in document.values())
        case list() | tuple():
            return any(mentions(value, written) for value in document)
        case bool() | float() | None:
            return False
        case int():
            return str(document) in written
        case str():
            uri = _URI.search(document)
            candidates = [uri.group(1)] if uri else _PHONE.findall(document[:2000])
            return any(_NO_DIGIT.sub("", candidate) in written for candidate in candidates)
        case _:
            return False


class Eraser:
    """Erases calls, events, audio and kept contacts."""

    def __init__(self, ledger: Ledger, storage: AudioStore) -> None:
        self._ledger = ledger
        self._redis: Redis = ledger.redis
        self._storage = storage
        self._erase = load_script(ledger.redis, "erase")
        self._forget = load_script(ledger.redis, "remove_subscription")

    async def number(
        self, number: str, *, sources: Collection[str] | None, books: Collection[str], step: Step
    ) -> Erased:
        """Erase everything that mentions an E.164 number: in these sources (None: everywhere), and in their contacts.

        Looks at every call and every event that the store has. Raises StorageError.
        """
        written = spellings(number)
        done = Erased()
        for sid in books:
            done.contacts += await self._forget_contact(sid, number)
        async for calls in self._every_call():
            done.scanned += len(calls)
            for call in calls:
                if sources is not None and call.source_id not in sources:
                    continue
                parts = (call.record, call.contact, call.said, call.raw)
                if any(mentions(part, written) for part in parts):
                    await self._erase_call(call, done)
            await step(done)
        async for batch in self._scan("relay:event:*"):
            eids = [name.decode().removeprefix("relay:event:") for name in batch]
            done.scanned += len(batch)
            for eid, document in zip(eids, await self._ledger.events(eids), strict=True):
                if document is None or not mentions(document, written):
                    continue
                call_part = document["data"].get("call") or {}
                sid = call_part.get("source_id", "")
                if sources is None or sid in sources:
                    await self._erase_events([eid], call_part.get("id", eid), sid, done)
            await step(done)
        return done

    async def source(self, sid: str, *, step: Step) -> Erased:
        """Erase all that is known of a source that was removed; nothing of it is admitted meanwhile."""
        done = Erased()
        async for calls in self._every_call():  # the list is no guide: one that changed lately outlives its place in it
            for call in calls:
                if call.source_id == sid:
                    done.scanned += 1
                    await self._erase_call(call, done)
            await step(done)
        while gone := await self._redis.zrange(keys.calls_of(sid), 0, _BATCH - 1):
            await self._redis.zrem(keys.calls_of(sid), *gone)
            await self._redis.zrem(keys.CALLS, *gone)
        while members := await self._redis.zrange(keys.events_of(sid), 0, _BATCH - 1):
            for member in members:
                eid = member.decode()
                document = await self._ledger.event(eid)
                subject = document["data"]["call"]["id"] if document and "call" in document["data"] else eid
                await self._erase_events([eid], subject, sid, done)
            done.scanned += len(members)
            await step(done)
        await self._clear_source(sid)
        return done

    async def subscription(self, sub: str) -> None:
        """Forget what waits for a subscription and what was told to it; it is switched off as `deleted` before."""
        while await self._forget(args=[sub, _BATCH]):
            pass

    async def _clear_source(self, sid: str) -> None:
        today = datetime.now(UTC).date()
        days = [(today + timedelta(days=2 - back)).isoformat() for back in range(_SEEN_DAYS)]
        async with self._redis.pipeline(transaction=True) as pipe:
            for lane in ("enrich", "record"):
                pipe.zrem(queue_keys.lane(lane), sid)
                pipe.delete(
                    queue_keys.waiting(lane, sid),
                    queue_keys.leased(lane, sid),
                    queue_keys.leases(lane, sid),
                    queue_keys.partition(lane, sid),
                )
            pipe.delete(*(keys.seen(sid, day) for day in days))
            pipe.delete(keys.source(sid), keys.quarantine(sid), keys.calls_of(sid), keys.events_of(sid))
            pipe.delete(keys.safe(sid), keys.safe_lock(sid), keys.listener(sid))
            await pipe.execute()
        async for batch in self._scan(f"{keys.contacts(sid)}:*"):
            await self._redis.delete(*batch)
        await self._redis.delete(keys.contacts(sid))

    async def _erase_call(self, call: StoredCall, done: Erased) -> None:
        current: StoredCall | None = call
        for _ in range(_TRIES):
            if current is None:
                return
            done.recordings += await self._delete_audio(current)
            args: list[Any] = [
                current.id,
                current.version,
                current.id,
                current.source_id,
                len(current.events),
                *current.events,
            ]
            answer = await self._erase(args=args)
            if answer != -1:
                done.calls += 1
                done.events += answer[0]
                done.deliveries += answer[1]
                if current.recording is None:  # one that was being kept just now
                    done.recordings += await self._delete_wherever(current.id, _started_on(current))
                return
            current = await self._ledger.call(current.id)
        raise StoreError(f"call {call.id} changes all the time, so it could not be erased; try again")

    async def _erase_events(self, eids: Sequence[str], subject: str, sid: str, done: Erased) -> None:
        events, deliveries = await self._erase(args=["", "", subject, sid, len(eids), *eids])
        done.events += events
        done.deliveries += deliveries

    async def _delete_audio(self, call: StoredCall) -> int:
        path = call.recording.get("path") if call.recording else None
        if not path:
            return 0
        await self._storage.delete(path)
        return 1

    async def _delete_wherever(self, call_id: str, started_on: date) -> int:
        found = 0
        for path in object_paths(call_id, started_on):
            if await self._storage.size(path) is not None:
                await self._storage.delete(path)
                found += 1
        return found

    async def _forget_contact(self, sid: str, number: str) -> int:
        generation = int(await self._redis.hget(keys.contacts(sid), "generation") or 0)  # type: ignore[misc]
        names = [keys.contact(sid, each, number) for each in range(max(generation - 5, 0), generation + 1)]
        return int(await self._redis.delete(*names))

    async def _every_call(self) -> AsyncIterator[list[StoredCall]]:
        async for batch in self._scan("relay:call:*"):
            call_ids = [name.decode().removeprefix("relay:call:") for name in batch]
            async with self._redis.pipeline(transaction=False) as pipe:
                for call_id in call_ids:
                    pipe.hgetall(keys.call(call_id))
                found = await pipe.execute()
            yield [read_call(call_id, fields) for call_id, fields in zip(call_ids, found, strict=True) if fields]

    async def _scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        """Walk over the keys of a pattern: every key that is there from beginning to end, perhaps twice."""
        cursor = 0
        while True:
            cursor, batch = await self._redis.scan(cursor, match=pattern, count=1000)
            for at in range(0, len(batch), _BATCH):
                yield batch[at : at + _BATCH]
            if cursor == 0:
                return


def _started_on(call: StoredCall) -> date:
    return from_ms(call.started_ms).date()
