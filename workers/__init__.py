"""The work of every lane, the operator's jobs and the sweep, hosted by an arq worker."""

# When the provider rejects an extra (contacts, recordings), it is paused for this long; calls go on without it.
EXTRA_PAUSE_S = 900


def unknown_wait_ms(*, waiting_since_ms: int, now_ms: int) -> int:
    """Return when to try an item again whose source or subscription this process does not know: after as long as it has
    waited, from 1 s up to a minute.

    Another process may know it, or this one may have to read its configuration again. Only a removal ends it, in the
    store.
    """
    return min(max(now_ms - waiting_since_ms, 1000), 60_000)
