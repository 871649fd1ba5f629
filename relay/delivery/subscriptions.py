"""The subscriptions in force: which events each receives, and what a delivery to it needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from yarl import URL

from relay.delivery import filters, signature
from relay.domain.json import Json
from relay.events.render import Payload
from relay.queue.changes import LimitInFlight, LimitRate
from relay.settings import FieldMap, SubscriptionOptions

ZAPIER_HOSTS = frozenset({"hooks.zapier.com"})
# Zapier throttles a hook beyond this; the default for its hosts.
ZAPIER_RATE_PER_S = 30.0


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription, prepared for deliveries.

    `keys` sign, newest first; `former_keys`, each with its end in Unix seconds, sign too until then. `plain` means that
    the body is the stored event as it is.
    """

    id: str
    options: SubscriptionOptions
    url: str
    host: str
    keys: tuple[bytes, ...]
    headers: Mapping[str, str]
    payload: Payload
    plain: bool
    tenant: str | None = None
    former_keys: tuple[tuple[bytes, float], ...] = ()

    @classmethod
    def of(cls, sid: str, options: SubscriptionOptions, *, tenant: str | None = None) -> "Subscription":
        """Decode and parse once what every delivery needs."""
        form = options.payload
        payload: Payload = dict(form.map) if isinstance(form, FieldMap) else form
        return cls(
            id=sid,
            options=options,
            url=options.url.get_secret_value(),
            host=URL(options.url.get_secret_value()).host or "",
            keys=(signature.decode_secret(options.secret.get_secret_value()),),
            headers={name: value.get_secret_value() for name, value in options.headers.items()},
            payload=payload,
            plain=payload == "full" and not options.include_raw,
            tenant=tenant,
        )

    @property
    def unsubscribes(self) -> bool:
        """Whether to send DELETE to the hook when the subscription ends (Zapier's reverse unsubscribe)."""
        return self.host in ZAPIER_HOSTS

    def keys_at(self, now_s: float) -> tuple[bytes, ...]:
        if not self.former_keys:
            return self.keys
        return (*self.keys, *(key for key, until_s in self.former_keys if until_s > now_s))

    def limits(self) -> tuple[LimitInFlight, LimitRate]:
        """The changes by which the deliver lane keeps to this subscription's limits."""
        rate = self.options.rate_per_s
        if rate is None and self.host in ZAPIER_HOSTS:
            rate = ZAPIER_RATE_PER_S
        interval_ms, slack_ms = (None, 0.0) if rate is None else pacing(rate)
        return LimitInFlight(self.id, self.options.max_in_flight), LimitRate(self.id, interval_ms, slack_ms)


def pacing(rate_per_s: float) -> tuple[float, float]:
    """Return the claim interval and slack, ms, that allow no 10 s more than 10 s worth of the rate.

    A tenth of a second's worth may go at once; the rest of the ten seconds is spread evenly. One request in 10 s is
    left out to absorb the time between a claim and its request.
    """
    most = max(int(rate_per_s * 10) - 1, 1)
    burst = max(int(rate_per_s / 10), 1)
    interval_ms = 10_000 / max(most - burst + 1, 1)
    return interval_ms, (burst - 1) * interval_ms


class Subscriptions(Mapping[str, Subscription]):
    """All subscriptions by id, disabled ones included: what they miss is recorded, to be replayed."""

    def __init__(self, by_id: Mapping[str, Subscription]) -> None:
        self._by_id = dict(by_id)

    def __getitem__(self, sid: str) -> Subscription:
        return self._by_id[sid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def replace(self, by_id: Mapping[str, Subscription]) -> None:
        self._by_id = dict(by_id)

    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
        """Return the ids of the subscriptions that receive an event; a tenant's receives only the tenant's own."""
        return [
            sid
            for sid, subscription in self._by_id.items()
            if subscription.tenant in (None, tenant)
            and filters.mismatch(subscription.options, document, subscription_id=sid) is None
        ]
