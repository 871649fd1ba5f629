"""What is measured, for people on call: freshness first. Labels are bounded; hook URLs appear as host only."""

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from relay.delivery.outcomes import AttemptOutcome
from relay.domain.time import from_iso

disable_created_metrics()  # type: ignore[no-untyped-call]  # series that nobody reads

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43_200)
_TIMESTAMP = b'"timestamp":"'
_COMPLETED = b'"type":"call.completed"'
_ENDED = b'"ended_at":"'

CALLS = Counter("relay_calls_admitted", "Calls taken in, by how far back they were found.", ["tier"])
POLLS = Counter("relay_polls", "Polls, by how they ended.", ["outcome"])
ROWS = Counter("relay_rows", "Rows of providers, by what became of them.", ["kind"])
CONTACTS = Counter("relay_contacts", "Contact look-ups, by their outcome.", ["outcome"])
RECORDINGS = Counter("relay_recordings", "Recordings, by what became of them.", ["status"])
EVENTS = Counter("relay_events", "Events published, by type.", ["type"])
ATTEMPTS = Counter("relay_delivery_attempts", "Attempts to deliver, by outcome and host.", ["outcome", "host"])
GIVEN_UP = Counter("relay_deliveries_given_up", "Deliveries that ended without being heard.", ["reason"])
DELIVERY_LAG = Histogram("relay_delivery_lag_seconds", "From an event's making to its being heard.", buckets=_SECONDS)
ATTEMPT_SECONDS = Histogram("relay_attempt_seconds", "How long an attempt took.", buckets=_SECONDS)
LANE_DUE = Gauge("relay_lane_due", "Items that are due now.", ["lane"])
LANE_OLDEST = Gauge("relay_lane_oldest_due_seconds", "How long the oldest due item has been due.", ["lane"])
POLL_LAG = Gauge("relay_poll_lag_seconds", "Since a source was last polled with success.", ["source"])
QUIET = Gauge("relay_sources_quiet", "Sources that have no calls when they always have some.")
BUDGET_LEFT = Gauge("relay_budget_left", "Requests that could go to a provider right now.", ["provider", "bucket"])
SUBSCRIPTIONS = Gauge("relay_subscriptions", "Subscriptions, by state.", ["state"])
BREAKERS = Gauge("relay_breakers", "Breakers of subscriptions, by state.", ["state"])
STORE_MEMORY = Gauge("relay_store_memory_bytes", "Memory that the store uses.")
STORE_LIMIT = Gauge("relay_store_memory_limit_bytes", "Memory that the store may use; 0 when it has no limit.")
CONNECTIONS = Counter("relay_connections_opened", "Connections opened to subscribers; the other attempts reused one.")
CALL_END_LAG = Histogram(
    "relay_call_end_to_delivered_seconds",
    "From a call's end, where the provider tells it, to its call.completed being heard.",
    buckets=_SECONDS,
)

_MOST_HOSTS = 200
_hosts: set[str] = set()


def host_label(host: str) -> str:
    """Bound the hosts: the first 200 have a series of their own, the others share one."""
    if host in _hosts:
        return host
    if len(_hosts) >= _MOST_HOSTS:
        return "other"
    _hosts.add(host)
    return host


def attempted(outcome: AttemptOutcome, host: str) -> None:
    """Count an attempt."""
    ATTEMPTS.labels(outcome.kind, host_label(host)).inc()
    ATTEMPT_SECONDS.observe(outcome.duration_ms / 1000)


def delivered(body: bytes, *, now_ms: int) -> None:
    """Measure how fresh an event was when it was heard."""
    start = body.index(_TIMESTAMP) + len(_TIMESTAMP)
    made_at = from_iso(body[start : body.index(b'"', start)].decode())
    DELIVERY_LAG.observe(max(now_ms / 1000 - made_at.timestamp(), 0))
    ended = body.find(_ENDED) if _COMPLETED in body[:120] else -1
    if ended >= 0:
        ended_at = from_iso(body[ended + len(_ENDED) : body.index(b'"', ended + len(_ENDED))].decode())
        CALL_END_LAG.observe(max(now_ms / 1000 - ended_at.timestamp(), 0))
