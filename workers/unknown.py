"""Work on sources and subscriptions that this process does not know: it goes back to its lane."""

from collections.abc import Sequence

from relay.queue.claim import Claim
from relay.queue.runner import Settle
from relay.queue.settlement import Retry
from relay.store.calls import claimed_call


def unknown_wait_ms(*, waiting_since_ms: int, now_ms: int) -> int:
    """Return when to try an item again whose source or subscription this process does not know: after as long as it has
    waited, from 1 s up to a minute.

    Another process may know it, or this one may have to read its configuration again. Only a removal ends it, in the
    store.
    """
    return min(max(now_ms - waiting_since_ms, 1000), 60_000)


def retry_unknown_calls(batch: Sequence[Claim], settle: Settle, *, now_ms: int) -> None:
    """Return calls of a source that this process does not know to their lane."""
    for claim in batch:
        since_ms = claimed_call(claim).ready_ms
        settle(claim, Retry(unknown_wait_ms(waiting_since_ms=since_ms, now_ms=now_ms)))
