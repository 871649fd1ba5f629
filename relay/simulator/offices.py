"""The simulated providers by name: an account at each, and the source by which a relay reads it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from zoneinfo import ZoneInfo

from relay.domain.json import Json
from relay.simulator import cinnox, nfon, unpod, webfones
from relay.simulator.switchboard import Switchboard
from relay.simulator.timeline import CallPlan, Person


@dataclass(frozen=True, slots=True)
class Office:
    """One account at a simulated provider, with `key` as its credential.

    `call_id` names a call as its row does; no two providers name calls alike, so one subscriber can tell them apart.
    `listed` is the kind of request that reads the list. `options` are those of the source. `recorded`
    says whether audio can be had. `transcribe` makes the words of a call, by its rid, ready now.
    """

    provider: str
    simulator: Switchboard[Any]
    key: str
    call_id: Callable[[CallPlan], str]
    listed: str
    path: str = ""
    options: Json = field(default_factory=dict)
    recorded: bool = False
    transcribe: Callable[[int], object] | None = None

    @property
    def polled(self) -> bool:
        """Whether the call list has been read."""
        return self.simulator.statuses[self.key, self.listed, 200] > 0

    @property
    def plans(self) -> Mapping[int, CallPlan]:
        """The calls that have begun, by rid; some are not visible yet."""
        plans: Mapping[int, CallPlan] = self.simulator.accounts[self.key].plans
        return plans

    def visible(self) -> list[CallPlan]:
        """The calls that the list shows now, by rid."""
        return self.simulator.visible(self.key, self.simulator.clock())

    def feed(self, plans: Iterator[CallPlan]) -> None:
        """Take calls from an iterator as their time comes."""
        self.simulator.feed(self.key, plans)

    def source(self, url: str) -> Json:
        """Write the source that a relay needs, where `url` is where the simulator is served."""
        return {"provider": self.provider, "base_url": url + self.path, **self.options}


def _webfones(key: str, zone: str, everyone: Iterable[Person]) -> Office:
    simulator = webfones.WebfonesSimulator()
    simulator.add_account(key, zone=zone)
    simulator.put_people(key, everyone)
    return Office(
        "webfones",
        simulator,
        key,
        call_id=lambda plan: str(plan.rid),
        listed=webfones.Kind.RECORDS,
        options={"api_key": key, "timezone": zone},
        recorded=True,
    )


def _unpod(key: str, zone: str, everyone: Iterable[Person]) -> Office:
    simulator = unpod.UnpodSimulator()
    handle = simulator.add_account(key).handle
    return Office(
        "unpod",
        simulator,
        key,
        call_id=unpod.call_id,
        listed=unpod.LIST,
        path=unpod.BASE_PATH,
        options={"org_handle": handle, "token": key},
    )


def _cinnox(key: str, zone: str, everyone: Iterable[Person]) -> Office:
    simulator = cinnox.CinnoxSimulator()
    app_id = simulator.add_account(key).handle
    return Office(
        "cinnox",
        simulator,
        key,
        call_id=cinnox.hid,
        listed=cinnox.LOG,
        # The pages of a real list may move while they are read, and its newest calls wait for that; these stay.
        options={
            "app_id": app_id,
            "token": key,
            "settle_s": 0,
            "recordings": True,
            "recording_path": cinnox.RECORDING_PATH,
        },
        recorded=True,
    )


def _nfon(key: str, zone: str, everyone: Iterable[Person]) -> Office:
    simulator = nfon.NfonSimulator()
    simulator.add_account(key)
    return Office(
        "nfon",
        simulator,
        key,
        call_id=lambda plan: simulator.uuid_of(key, plan.rid),
        listed=nfon.Kind.RECORDS,
        options={"token": key},
        transcribe=lambda rid: simulator.transcribe(key, rid),
    )


_OPENED_BY: Final = {"webfones": _webfones, "unpod": _unpod, "cinnox": _cinnox, "nfon": _nfon}
NAMES: Final = tuple(_OPENED_BY)
"""Every simulated provider."""


def open_office(provider: str, key: str, *, zone: str = "UTC", everyone: Iterable[Person] = ()) -> Office:
    """Open an account at a new simulator.

    `zone` is that of WebFones' rows, and `everyone` fills its address book; the others' rows carry their zone, and
    they have no address book. Raises ValueError for a zone that is none, and for one that the provider has no use for.
    """
    if provider != "webfones" and zone != "UTC":
        raise ValueError(f"a zone is for webfones: the rows of {provider} carry theirs")
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{zone!r} is no time zone") from None
    return _OPENED_BY[provider](key, zone, everyone)
