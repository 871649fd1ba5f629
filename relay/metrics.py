"""Prometheus metrics. Labels are bounded; a webhook URL appears as its host only."""

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from relay.delivery.outcomes import AttemptOutcome
from relay.domain.time import from_iso

disable_created_metrics()  # type: ignore[no-untyped-call]  # doubles the number of series

# From a fast attempt to the call that a provider lists half a day late.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43_200)
# Searched for in the stored bytes, so that no delivered event is parsed for its metrics alone.
_TIMESTAMP = b'"timestamp":"'
_COMPLETED = b'"type":"call.completed"'
_ENDED = b'"ended_at":"'

CALLS = Counter("relay_calls_admitted", "Calls ingested, by the polling tier that saw them first.", ["tier"])
POLLS = Counter("relay_polls", "Polls, by outcome.", ["outcome"])
ROWS = Counter("relay_rows", "Provider rows, by kind.", ["kind"])
WORK_ERRORS = Counter("relay_work_errors", "Unexpected errors of work that is retried, by lane.", ["lane"])
CONTACTS = Counter("relay_contacts", "Contact lookups, by outcome.", ["outcome"])
RECORDINGS = Counter("relay_recordings", "Recordings, by final status.", ["status"])
EVENTS = Counter("relay_events", "Events published, by type.", ["type"])
ATTEMPTS = Counter("relay_delivery_attempts", "Delivery attempts, by outcome and host.", ["outcome", "host"])
GIVEN_UP = Counter("relay_deliveries_given_up", "Deliveries that failed for good, by reason.", ["reason"])
DELIVERY_LAG = Histogram("relay_delivery_lag_seconds", "From an event's creation to its delivery.", buckets=_SECONDS)
ATTEMPT_SECONDS = Histogram("relay_attempt_seconds", "Duration of delivery attempts.", buckets=_SECONDS)
LANE_DUE = Gauge("relay_lane_due", "Items that are due now.", ["lane"])
LANE_OLDEST = Gauge("relay_lane_oldest_due_seconds", "How long the oldest due item has been due.", ["lane"])
POLL_LAG = Gauge("relay_poll_lag_seconds", "Time since the last successful poll of a source.", ["source"])
SOURCE_GAP = Gauge("relay_source_gap_seconds", "Length of what a provider could not list so far.", ["source"])
QUIET = Gauge("relay_sources_quiet", "Sources without calls at a time when they usually have some.")
MISSING = Gauge("relay_completeness_missing", "What is missing of a source's last days.", ["source"])
BUDGET_LEFT = Gauge("relay_budget_left", "Requests to a provider that are allowed right now.", ["provider", "bucket"])
SUBSCRIPTIONS = Gauge("relay_subscriptions", "Subscriptions, by state.", ["state"])
BREAKERS = Gauge("relay_breakers", "Circuit breakers of subscriptions, by state.", ["state"])
STORE_MEMORY = Gauge("relay_store_memory_bytes", "Memory used by the store.")
STORE_LIMIT = Gauge("relay_store_memory_limit_bytes", "Memory limit of the store; 0 if there is none.")
STORE_UNSUITABLE = Gauge("relay_store_unsuitable", "1 while the store evicts data, or is a cluster or a replica.")
RETENTION_SUSPENDED = Gauge(
    "relay_retention_suspended", "1 while nothing is deleted by its age, because the store's clock has leapt."
)
CONNECTIONS = Counter("relay_connections_opened", "Connections opened to subscribers; all other attempts reused one.")
CALL_END_LAG = Histogram(
    "relay_call_end_to_delivered_seconds",
    "From a call's end, if the provider reports it, to the delivery of its call.completed.",
    buckets=_SECONDS,
)

_MAX_HOSTS = 200
_hosts: set[str] = set()


def host_label(host: str) -> str:
    """Return the label of a host: the first 200 have their own, the others share one."""
    if host in _hosts:
        return host
    if len(_hosts) >= _MAX_HOSTS:
        return "other"
    _hosts.add(host)
    return host


def attempted(outcome: AttemptOutcome, host: str) -> None:
    ATTEMPTS.labels(outcome.kind, host_label(host)).inc()
    ATTEMPT_SECONDS.observe(outcome.duration_ms / 1000)


def delivered(body: bytes, *, now_ms: int) -> None:
    start = body.index(_TIMESTAMP) + len(_TIMESTAMP)
    created_at = from_iso(body[start : body.index(b'"', start)].decode())
    DELIVERY_LAG.observe(max(now_ms / 1000 - created_at.timestamp(), 0))
    position = body.find(_ENDED) if _COMPLETED in body[:120] else -1
    if position >= 0:
        ended_at = from_iso(body[position + len(_ENDED) : body.index(b'"', position + len(_ENDED))].decode())
        CALL_END_LAG.observe(max(now_ms / 1000 - ended_at.timestamp(), 0))
