"""Who wants to hear what, and how to say it to them: the subscriptions in force, read once and asked often."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from yarl import URL

from relay.delivery import filters, signature
from relay.events.render import Payload
from relay.model import Json
from relay.settings import FieldMap, SubscriptionOptions


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription, ready to use: `keys` sign, newest first; `plain` bodies are the canonical event as it is."""

    id: str
    options: SubscriptionOptions
    url: str
    host: str
    keys: tuple[bytes, ...]
    headers: Mapping[str, str]
    payload: Payload
    plain: bool

    @classmethod
    def of(cls, sid: str, options: SubscriptionOptions) -> "Subscription":
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
        )


class Subscriptions(Mapping[str, Subscription]):
    """All subscriptions in force, by id."""

    def __init__(self, options: Mapping[str, SubscriptionOptions]) -> None:
        self._by_id = {sid: Subscription.of(sid, each) for sid, each in options.items() if each.enabled}

    def __getitem__(self, sid: str) -> Subscription:
        return self._by_id[sid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def replace(self, options: Mapping[str, SubscriptionOptions]) -> None:
        """Put others in force."""
        self._by_id = Subscriptions(options)._by_id

    def of(self, document: Json) -> Sequence[str]:
        """Ids of the subscriptions that want an event."""
        return [
            sid
            for sid, each in self._by_id.items()
            if filters.wants(each.options, document, subscription_id=sid) is None
        ]
