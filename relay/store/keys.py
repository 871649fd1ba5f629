"""Every key of the store but those of the queue: its shape, how long it lives, and why.

All keys start with `relay:`; a database belongs to one relay. No key expires before what depends on it: a call outlives
its events, an event outlives the retry schedule of its deliveries.
"""

import base64
import hashlib
from typing import Literal

# STR   fingerprint of the relay that owns this database; no TTL: a second relay must find it.
IDENTITY = "relay:identity"
# STR   written by `relay check`, to find out whether that is possible; TTL 10 s.
WRITE_TEST = "relay:write-test"
# STR   number of the newest layout that has written here; no TTL.
SCHEMA = "relay:schema"
# STR   there while the lists were trimmed less than an hour ago: its TTL is the interval.
TRIMMED = "relay:trimmed"
# STR   there while sources were checked for unusual silence less than five minutes ago: its TTL is the interval.
SILENCE_CHECKED = "relay:silence-checked"
# ZSET  call id → first seen, ms; trimmed by the sweep after `retention.calls_days`.
CALLS = "relay:calls"
# ZSET  event id → created, ms; trimmed by the sweep after `retention.events_days`.
EVENTS = "relay:events"
# ZSET  subscription and event id (U+001F between) of failed deliveries → when, ms; trimmed with the events.
DEAD = "relay:dead"
# HASH  calls, events and quarantined items so far; no TTL: they are totals.
COUNTS = "relay:counts"

# HASH  source → how much is missing of it, and when that was found out, ms; an entry goes with its source.
COMPLETENESS = "relay:completeness"
# STR   there while sources were checked for completeness less than a minute ago: its TTL is the interval.
COMPLETENESS_CHECKED = "relay:completeness-checked"
# HASH  subscription → digest of its filters, and since when it has them, ms; an entry goes with its subscription.
FILTERS = "relay:filters"

# STR   number that each change of a declaration raises; no TTL: processes compare it with the last one they read.
DECLARED_VERSION = "relay:declared-version"
DECLARED_KINDS: tuple[Literal["source", "subscription", "token"], ...] = ("source", "subscription", "token")

SCHEMA_VERSION = 1

# The TTL of what has a retention is longer by this: the sweep deletes it in time, and not while the store's clock may
# be wrong, which an expiry would follow at once.
FALLBACK_TTL_S = 400 * 86_400

# Field of an event: the document. Like SEQUENCE it can be no subscription's name.
BODY = "="
# Field of an event: its number within its ordering key.
SEQUENCE = "#"
# Between the two ids of an entry that names a pair.
SEPARATOR = "\x1f"


def declared(kind: str) -> str:
    """HASH  id → encrypted document of a source, subscription or token created over the API; no TTL: kept until it is
    deleted."""
    return f"relay:declared:{kind}"


def source(sid: str) -> str:
    """HASH  started_at, cursor, last success per tier, errors and notes; no TTL: without it a source starts over."""
    return f"relay:source:{sid}"


def seen(sid: str, day: str) -> str:
    """HASH  record key → mapping version, flag, content hash. The last chunk of a poll deletes days older than the
    cursor less 96 h; the TTL of 490 d, renewed by each ingest, only cleans up after a source that was removed."""
    return f"relay:seen:{sid}:{day}"


def shown(sid: str) -> str:
    """HASH  day → keys of the rows that the last deep look showed of it, packed; day and `@` → when that covered the
    whole day, ms. Dropped with the day of `seen`; TTL 90 d like that."""
    return f"relay:shown:{sid}"


def quarantine(sid: str) -> str:
    """HASH  fingerprint of an invalid row → reason and masked excerpt; TTL 7 d from the newest, at most 100 entries."""
    return f"relay:quarantine:{sid}"


def call(cid: str) -> str:
    """HASH  one call: version, parts, what was published of it. Deleted by the sweep `calls_days`
    after its last change; TTL longer by FALLBACK_TTL_S."""
    return f"relay:call:{cid}"


def event(eid: str) -> str:
    """HASH  one event: `=` the canonical document, packed (gone when it was erased), `#` its number within its ordering
    key, and subscription → state of that delivery. Deleted by the sweep
    `events_days` after its last settlement or replay; TTL longer by FALLBACK_TTL_S."""
    return f"relay:event:{eid}"


def calls_of(sid: str) -> str:
    """ZSET  call id → first seen, ms, of one source; trimmed like `relay:calls`; expires after
    that long without its source."""
    return f"relay:calls:{sid}"


def events_of(sid: str) -> str:
    """ZSET  event id → created, ms, of one source's calls; trimmed like `relay:events`, expires like the calls'."""
    return f"relay:events:{sid}"


def deliveries_of(sub: str) -> str:
    """ZSET  event id → queued first, ms, of one subscription; trimmed like `relay:events`."""
    return f"relay:deliveries-of:{sub}"


def pending(sub: str, ordering_key: str) -> str:
    """ZSET  event id → its number within the ordering key; exists exactly while that is in the deliver lane."""
    return f"relay:pending:{sub}:{ordering_key}"


def owed(lane: str) -> str:
    """SET   partitions of a lane in which something is owed."""
    return f"relay:owed:{lane}"


def owed_items(lane: str, partition: str) -> str:
    """ZSET  item → since when it is owed, ms; from the step that makes it due to the step that settles it for good."""
    return f"relay:owed:{lane}:{partition}"


# ZSET  version of a configuration → when a process with it was last alive, ms; forgotten after a day without any.
CONFIGURATIONS = "relay:configurations"
# STR   generation of the newest configuration; no TTL.
CONFIGURATION_GENERATION = "relay:configuration-generation"


def configuration(version: str) -> str:
    """HASH  generation of a configuration, and the sources and subscriptions that it declares; goes with its entry in
    `relay:configurations`."""
    return f"relay:configuration:{version}"


def configured(kind: str) -> str:
    """SET   ids that a configuration declares, or did until a moment ago: without one they get a tombstone."""
    return f"relay:configured:{kind}"


# Owner of what has no tenant; it can be no tenant's id.
OPERATOR = "@"


def owners(kind: str) -> str:
    """HASH  id of a source or subscription → its owner. No TTL: it outlives a removal, so that data and deliveries of
    the id stay with their owner."""
    return f"relay:owners:{kind}"


def removed(kind: str) -> str:
    """HASH  id of a removed source or subscription → when, ms. Its work ends, but what it was owed is kept for as long
    as its events: declaring it again continues."""
    return f"relay:removed:{kind}"


def budget(bucket: str) -> str:
    """HASH  GCRA state of one limit at a provider; TTL a day, renewed by each request: an old state equals none."""
    return f"relay:budget:{bucket}"


def contacts(sid: str) -> str:
    """HASH  generation of the cache, version of the address book, checked_at; TTL 30 d, longer than a contact."""
    return f"relay:contacts:{sid}"


def contact(sid: str, generation: int, number: str) -> str:
    """STR   the contacts of one number, packed; TTL 24 h when there are any, 1 h when there are none."""
    digest = hashlib.sha256(number.encode()).digest()[:9]
    return f"relay:contacts:{sid}:{generation}:{base64.urlsafe_b64encode(digest).decode()}"


def failing_notice(sub: str) -> str:
    """STR   there while `subscription.failing` was published less than a day ago: its TTL is the interval."""
    return f"relay:failing-notice:{sub}"


# HASH  id of a source that is being removed → its tenant; no TTL: the sweep resumes one that was interrupted.
REMOVALS = "relay:removals"


def removing(sid: str) -> str:
    """STR   there while a process removes the source: TTL two minutes, renewed by each step; from the end of the
    removal 5 s, by when every process has read of it."""
    return f"relay:removing:{sid}"


def credentials(sid: str) -> str:
    """STR   secret that a provider handed out, encrypted; TTL 490 d from the last write: an older login has ended."""
    return f"relay:credentials:{sid}"


def credentials_lock(sid: str) -> str:
    """STR   lock of the process that renews these credentials; TTL 30 s, longer than a renewal takes."""
    return f"relay:credentials:{sid}:lock"


def listener(sid: str) -> str:
    """STR   the process that listens to the source's stream; TTL a lease, renewed while it lives."""
    return f"relay:listener:{sid}"


def job(job_id: str) -> str:
    """HASH  state, progress and position of a backfill, a replay or the like; TTL 7 d from its last step."""
    return f"relay:job:{job_id}"


def digest(*parts: str) -> str:
    """Name something without spelling it out (an API key, say)."""
    return base64.urlsafe_b64encode(hashlib.sha256("\x1f".join(parts).encode()).digest()[:12]).decode()
