"""Who was on the call: at most one request for a batch of calls, and an answer that is never guessed.

Answers are cached per source (24 h with a contact, 1 h without). A batch whose numbers are all cached only asks whether
the address book has changed, at most once a minute; a batch with a new number looks up all of its numbers at once, the
cached ones too, and needs no such question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from relay.domain.call import Contact
from relay.domain.json import Json
from relay.events.payload import NO_CONTACT
from relay.providers.base import ContactSource
from relay.store.contacts import BookState, ContactStore

CHECK_EVERY_S = 60
# Seconds from each failed look-up to the next; after the last one the contact stays `unavailable`.
LADDER_S = (1, 3, 15, 60, 300, 1800, 7200)


class AddressBook:
    """Looks numbers up at a source's provider, through the cache of earlier answers."""

    def __init__(self, cache: ContactStore) -> None:
        self._cache = cache

    async def find(self, sid: str, source: ContactSource, numbers: Iterable[str]) -> dict[str, Json]:
        """Find the `contact` part of each E.164 number. Raises ProviderError and OverBudget."""
        wanted = sorted(set(numbers))
        book = await self._cache.book(sid)
        cached = await self._cache.cached(sid, book.generation, wanted)
        if len(cached) == len(wanted) and await self._unchanged(sid, source, book):
            return cached
        parts: dict[str, Json] = {}
        for at in range(0, len(wanted), source.batch):
            batch = wanted[at : at + source.batch]
            matches = await source.search(batch)
            parts |= {number: contact_part(matches[number]) for number in batch}
        # Another process may have found the book changed meanwhile: the cache is then that of a new generation.
        await self._cache.cache(sid, (await self._cache.book(sid)).generation, parts)
        return parts

    async def _unchanged(self, sid: str, source: ContactSource, book: BookState) -> bool:
        """Ask whether the address book changed, which ends everything that is cached; at most once a minute."""
        if book.checked_s_ago < CHECK_EVERY_S:
            return True
        # The first answer only tells the book's version: what was cached before may be older than that.
        changes = await source.changes_after(book.version)
        await self._cache.checked(sid, book, version=changes.version, changed=changes.changed)
        return not changes.changed


def after_failure(lookup: Json | None, number: str) -> tuple[int | None, Json]:
    """Return the seconds to the next look-up, None when retries are exhausted, and the progress to be kept."""
    failures = (lookup or {}).get("failures", 0)
    if failures >= len(LADDER_S):
        return None, {"exhausted_for": number}
    return LADDER_S[failures], {"failures": failures + 1}


def contact_part(matches: Sequence[Contact]) -> Json:
    """Build the `contact` of a call: the first match, the others (at most ten) listed beside it."""
    if not matches:
        return NO_CONTACT | {"lookup_status": "none"}
    first, *others = matches
    return NO_CONTACT | {
        "lookup_status": "matched",
        "count": len(matches),
        **asdict(first),
        "others": [asdict(other) for other in others[:10]],
    }
