"""Erasing a person by number, or a source that was removed: afterwards the relay holds nothing of it.

Audio goes first, then the call with its events in one step (erase.lua), so that a run which breaks off can be repeated
and finds what is left. `seen` keeps the keys and hashes of the provider's rows: they hold no personal data, and keep an
erased call from coming back with the next poll.
"""

import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Final, Protocol

import phonenumbers

from relay.domain.time import from_ms
from relay.errors import StoreError
from relay.recordings.storage import object_paths
from relay.store.calls import StoredCall
from relay.store.erasure import ErasedEvents
from relay.store.store import Store

_BATCH: Final = 200
_TRIES: Final = 20
_PHONE: Final = re.compile(r"[+\d][\d\s().\-/]*")
_URI: Final = re.compile(r"(?:sips?|tel):([^@;>]+)", re.IGNORECASE)
_NO_DIGIT: Final = re.compile(r"[^0-9]")

# Called with the progress of an erasure; may raise to end it.
Step = Callable[["Erased"], Awaitable[None]]


class AudioStore(Protocol):
    async def size(self, path: str) -> int | None: ...

    async def delete(self, path: str) -> None: ...


@dataclass(slots=True)
class Erased:
    """How much was erased so far; `deliveries` were still pending and have ended as expired."""

    scanned: int = 0
    calls: int = 0
    events: int = 0
    recordings: int = 0
    contacts: int = 0
    deliveries: int = 0

    def add(self, erased: ErasedEvents) -> None:
        self.events += erased.events
        self.deliveries += erased.deliveries

    def counts(self) -> dict[str, int]:
        return asdict(self)


def spellings(number: str) -> frozenset[str]:
    """List the digits that an E.164 number may be written with: international, with a dialling prefix, national."""
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
    """Whether a number occurs anywhere in a document, in any of its spellings and with any punctuation."""
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
    def __init__(self, store: Store, storage: AudioStore) -> None:
        self._store = store
        self._storage = storage

    async def number(
        self, number: str, *, sources: Collection[str] | None, books: Collection[str], step: Step
    ) -> Erased:
        """Erase everything that mentions an E.164 number: in these sources (None: everywhere), and in the cached
        contacts of `books`.

        Reads every call and every event in the store. Raises StorageError.
        """
        written = spellings(number)
        erased = Erased()
        for sid in books:
            erased.contacts += await self._store.erasure.contact(sid, number)
        async for calls in self._store.calls.every():
            erased.scanned += len(calls)
            for call in calls:
                parts = (call.record, call.contact, call.published, call.raw)
                if (sources is None or call.source_id in sources) and any(mentions(part, written) for part in parts):
                    await self._erase_call(call, erased)
            await step(erased)
        async for events in self._store.events.every():
            erased.scanned += len(events)
            for event_id, document in events:
                if document is None or not mentions(document, written):
                    continue
                sid = (document["data"].get("call") or {}).get("source_id", "")
                if sources is None or sid in sources:
                    erased.add(await self._store.erasure.event(event_id, document, source_id=sid))
            await step(erased)
        return erased

    async def source(self, sid: str, *, step: Step) -> Erased:
        """Erase everything of a source that is being removed; nothing of it is ingested meanwhile."""
        erased = Erased()
        # Every call is read: one that changed lately outlives its place in the source's list.
        async for calls in self._store.calls.every():
            for call in calls:
                if call.source_id == sid:
                    erased.scanned += 1
                    await self._erase_call(call, erased)
            await step(erased)
        events = self._store.events.of_sources([sid])
        while (entries := await events.oldest_first(0, limit=_BATCH))[1]:
            event_ids = [event_id for _, event_id in entries[1]]
            for event_id, document in zip(event_ids, await self._store.events.get_many(event_ids), strict=True):
                erased.add(await self._store.erasure.event(event_id, document, source_id=sid))
            erased.scanned += len(event_ids)
            await step(erased)
        await self._store.erasure.source(sid)
        return erased

    async def subscription(self, sub: str) -> None:
        """Drop every delivery of a subscription, which is disabled as removed before."""
        await self._store.erasure.subscription(sub)

    async def _erase_call(self, call: StoredCall, erased: Erased) -> None:
        current: StoredCall | None = call
        for _ in range(_TRIES):
            if current is None:
                return
            erased.recordings += await self._delete_audio(current)
            events = await self._store.erasure.call(current)
            if events is not None:
                erased.calls += 1
                erased.add(events)
                if current.recording is None:  # it may have been stored a moment ago
                    erased.recordings += await self._delete_wherever(current.id, from_ms(current.started_ms).date())
                return
            current = await self._store.calls.get(current.id)
        raise StoreError(f"call {call.id} kept changing while it was being erased; try again")

    async def _delete_audio(self, call: StoredCall) -> int:
        path = call.recording.get("path") if call.recording else None
        if not path:
            return 0
        await self._storage.delete(path)
        return 1

    async def _delete_wherever(self, call_id: str, started_on: date) -> int:
        deleted = 0
        for path in object_paths(call_id, started_on):
            if await self._storage.size(path) is not None:
                await self._storage.delete(path)
                deleted += 1
        return deleted
