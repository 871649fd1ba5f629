"""Accounts at the fake providers, by the provider's name, and the source with which a relay reads each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from zoneinfo import ZoneInfo

from relay.domain.json import Json
from relay.simulator.cinnox import FakeCinnox
from relay.simulator.nfon import FakeNfon
from relay.simulator.provider import FakeProvider
from relay.simulator.timeline import CallPlan, Person
from relay.simulator.unpod import FakeUnpod
from relay.simulator.webfones import FakeWebFones

Fakes = Mapping[str, type[FakeProvider[Any]]]

FAKES: Final[Fakes] = {fake.name: fake for fake in (FakeWebFones, FakeUnpod, FakeCinnox, FakeNfon)}
PROVIDER_NAMES: Final = tuple(FAKES)


@dataclass(frozen=True, slots=True)
class SimulatedAccount:
    """One account at a fake provider; `key` is its credential."""

    provider: FakeProvider[Any]
    key: str

    @property
    def name(self) -> str:
        return self.provider.name

    @property
    def polled(self) -> bool:
        return self.provider.statuses[self.key, self.provider.list_endpoint, 200] > 0

    @property
    def plans(self) -> Mapping[int, CallPlan]:
        """The calls that have begun, by rid; some are not visible yet."""
        plans: Mapping[int, CallPlan] = self.provider.accounts[self.key].plans
        return plans

    def visible(self) -> list[CallPlan]:
        return self.provider.visible(self.key, self.provider.clock())

    def call_id(self, plan: CallPlan) -> str:
        return self.provider.call_id(self.key, plan)

    def feed(self, plans: Iterator[CallPlan]) -> None:
        self.provider.feed(self.key, plans)

    def source(self, url: str) -> Json:
        """Build the source that a relay needs, where `url` is where the provider is served."""
        base_url = url + self.provider.base_path
        return {"provider": self.name, "base_url": base_url, **self.provider.source_options(self.key)}


def open_account(
    provider: str, key: str, *, zone: str = "UTC", people: Iterable[Person] = (), fakes: Fakes = FAKES
) -> SimulatedAccount:
    """Open an account at a new fake provider.

    `zone` is that of WebFones' rows, and `people` fill its address book; the others' rows carry their zone, and they
    have no address book. Raises ValueError for an unknown zone, and for one that the provider has no use for.
    """
    if provider != FakeWebFones.name and zone != "UTC":
        raise ValueError(f"only webfones takes a zone; the rows of {provider} carry theirs")
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{zone!r} is not a valid time zone; use a name such as Europe/Berlin") from None
    fake = fakes[provider]()
    if isinstance(fake, FakeWebFones):
        fake.add_account(key, zone=zone)
        fake.put_people(key, people)
    else:
        fake.add_account(key)
    return SimulatedAccount(fake, key)
