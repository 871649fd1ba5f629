"""Who wants to hear what, and how to say it to them: the subscriptions in force, read once and asked often."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from yarl import URL

from relay.delivery import filters, signature
from relay.domain.json import Json
from relay.events.render import Payload
from relay.queue.changes import LimitInFlight, LimitRate
from relay.settings import FieldMap, SubscriptionOptions

ZAPIER_HOSTS = frozenset({"hooks.zapier.com"})
ZAPIER_RATE_PER_S = 30.0
"""Zapier throttles a hook beyond this; told to its hosts unless the subscription says otherwise."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription, ready to use: `keys` sign, newest first, and `former_keys` too until
    they end (Unix seconds); `plain` bodies are the canonical event as it is."""

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
        """Prepare what every delivery needs."""
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
        """Whether the subscriber wants to hear that it is not told any more (Zapier's reverse unsubscribe)."""
        return self.host in ZAPIER_HOSTS

    def keys_at(self, now_s: float) -> tuple[bytes, ...]:
        """The keys that sign now."""
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
    """Give the claim interval and the slack, ms, that let no 10 s hold more than 10 s worth of the rate.

    A tenth of a second's worth may go at once; the rest of the ten seconds is spread evenly. One post in 10 s is
    given up to absorb the time between a claim and its post.
    """
    most = max(int(rate_per_s * 10) - 1, 1)
    burst = max(int(rate_per_s / 10), 1)
    interval_ms = 10_000 / max(most - burst + 1, 1)
    return interval_ms, (burst - 1) * interval_ms


class Subscriptions(Mapping[str, Subscription]):
    """All subscriptions, by id: those that are switched off too, for what they miss is written down."""

    def __init__(self, by_id: Mapping[str, Subscription]) -> None:
        self._by_id = dict(by_id)

    def __getitem__(self, sid: str) -> Subscription:
        return self._by_id[sid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def replace(self, by_id: Mapping[str, Subscription]) -> None:
        """Put others in force."""
        self._by_id = dict(by_id)

    def of(self, document: Json, *, tenant: str | None = None) -> Sequence[str]:
        """Ids of the subscriptions that want an event of a tenant's; a tenant's subscription hears only its own."""
        return [
            sid
            for sid, each in self._by_id.items()
            if each.tenant in (None, tenant) and filters.wants(each.options, document, subscription_id=sid) is None
        ]
