"""Timelines of calls from a seed: the same seed, start and habits always give the same calls.

Nothing here reads a clock. Starts are whole seconds, as in a provider's rows; everything else may be finer.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta

Scalar = str | int | float | bool | None

_FIRST_NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Luis")
_LAST_NAMES = ("Whittaker", "Okafor", "Lindqvist", "Moreau", "Tanaka", "Novak", "Silva", "Haddad", "Byrne", "Rossi")
_COMPANIES = ("Acme Corp", "Blue Harbor", "Cedar Dental", "Delta Freight", "Elm Street Law", "Foxglove Farms")
# Only 555-01xx numbers are made up, which are reserved for fiction.
_AREA_CODES = ("202", "212", "303", "312", "404", "415", "503", "617", "713", "808")
_EXTENSIONS = tuple(str(3200 + index) for index in range(12))
_UNANSWERED = ("NO ANSWER", "BUSY", "FAILED")
_WAV_HEADER_BYTES = 44


@dataclass(frozen=True, slots=True)
class Person:
    """Someone outside the account. `number` is ten national digits; a stranger is not in the address book."""

    firstname: str
    lastname: str
    organization: str
    number: str
    email: str
    stranger: bool

    @property
    def caller_id(self) -> str:
        """The name as a phone system shows it: `A WHITTAKER`."""
        return f"{self.firstname[0]} {self.lastname}".upper()


@dataclass(frozen=True, slots=True)
class Change:
    """From `at` on, the row shows `fields` instead of what it showed before."""

    at: datetime
    fields: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPlan:
    """One call and when the provider knows what about it; all instants aware.

    `direction` and `disposition` are in WebFones' words. `recording_at` is when the audio becomes available, None
    for never. `changes` are in order of time. `extra` is added to the row as it is.
    """

    rid: int
    started_at: datetime
    ended_at: datetime
    visible_at: datetime
    direction: str = "INCOMING"
    disposition: str = "ANSWERED"
    outside_number: str = "(202) 555-0147"
    outside_name: str = "A WHITTAKER"
    inside_number: str = "(202) 555-0100, x3203"
    extension: str = "3203"
    recording_at: datetime | None = None
    recording_bytes: int = 32_044
    changes: tuple[Change, ...] = ()
    extra: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        instants = (self.started_at, self.ended_at, self.visible_at, self.recording_at, *(c.at for c in self.changes))
        if any(instant is not None and instant.tzinfo is None for instant in instants):
            raise ValueError(f"the times of call {self.rid} need a zone")
        if self.recording_bytes < _WAV_HEADER_BYTES:
            raise ValueError(f"recording_bytes of call {self.rid} must be at least {_WAV_HEADER_BYTES}, a WAV header")

    @property
    def answered(self) -> bool:
        return self.disposition == "ANSWERED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What the calls of an account are like. Shares are of 1; ranges are (least, most)."""

    calls_per_hour: float = 60.0
    unanswered: float = 0.30
    ring_s: tuple[float, float] = (4.0, 45.0)
    talk_median_s: float = 134.0
    talk_sigma: float = 1.2
    talk_max_s: float = 21_600.0
    visible_after_s: tuple[float, float] = (15.0, 60.0)
    late: float = 0.0005
    late_max_s: float = 72_000.0
    same_second: float = 0.05
    changed: float = 0.03
    change_after_s: tuple[float, float] = (30.0, 3_600.0)
    recorded: float = 0.95
    recording_after_s: tuple[float, float] = (0.0, 45.0)
    recording_bytes_per_s: int = 16_000
    recording_max_bytes: int = 400_000_000
    strangers: float = 0.4
    people: int = 60

    def __post_init__(self) -> None:
        shares = ("unanswered", "late", "same_second", "changed", "recorded", "strangers")
        wrong = [name for name in shares if not 0.0 <= getattr(self, name) <= 1.0]
        wrong += [
            name for name in ("calls_per_hour", "talk_median_s", "talk_max_s", "people") if getattr(self, name) <= 0
        ]
        if wrong:
            raise ValueError(f"outside of its range: {', '.join(wrong)}")

    def hurried(self, factor: float) -> "Habits":
        """Shorten every duration by `factor`, so that a demo sees whole calls; the number of calls stays."""
        changes: dict[str, object] = {}
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if name.endswith("_s") and not name.endswith("_per_s"):
                changes[name] = tuple(bound / factor for bound in value) if isinstance(value, tuple) else value / factor
        return replace(self, **changes)  # type: ignore[arg-type]  # each value keeps its field's type


def people(seed: int, *, habits: Habits | None = None) -> tuple[Person, ...]:
    """The people that `calls` with the same seed and habits talks to, strangers included."""
    habits = habits or Habits()
    rng = random.Random(f"people {seed}")  # noqa: S311  # simulation, not cryptography
    lines = len(_AREA_CODES) * 100
    numbers = rng.sample(range(lines), min(habits.people, lines))
    return tuple(_person(rng, number, stranger=rng.random() < habits.strangers) for number in numbers)


def calls(start: datetime, *, seed: int, habits: Habits | None = None, first_rid: int = 211_159) -> Iterator[CallPlan]:
    """Yield calls without end, in order of their start, the first at or after `start`."""
    habits = habits or Habits()
    rng = random.Random(f"calls {seed}")  # noqa: S311  # simulation, not cryptography
    callers = people(seed, habits=habits)
    exact = start
    for rid in itertools.count(first_rid):
        if rid == first_rid or rng.random() >= habits.same_second:
            exact += timedelta(seconds=rng.expovariate((1 - habits.same_second) * habits.calls_per_hour / 3600))
        yield _call(rng, rid, _whole_second(exact, not_before=start), callers, habits)


def _call(rng: random.Random, rid: int, started_at: datetime, callers: tuple[Person, ...], habits: Habits) -> CallPlan:
    direction = rng.choices(("INCOMING", "OUTGOING"), (0.55, 0.45))[0]
    person = rng.choice(callers)
    extension = rng.choice(_EXTENSIONS)
    answered = rng.random() >= habits.unanswered
    length_s = _talk_s(rng, habits) if answered else rng.uniform(*habits.ring_s)
    ended_at = started_at + timedelta(seconds=length_s)
    visible_at = ended_at + timedelta(seconds=rng.uniform(*habits.visible_after_s))
    if rng.random() < habits.late:
        visible_at += timedelta(seconds=rng.uniform(0, habits.late_max_s))
    recorded = answered and rng.random() < habits.recorded
    recording_at = ended_at + timedelta(seconds=rng.uniform(*habits.recording_after_s))
    audio_bytes = int(length_s * habits.recording_bytes_per_s) // 2 * 2
    return CallPlan(
        rid=rid,
        started_at=started_at,
        ended_at=ended_at,
        visible_at=visible_at,
        direction=direction,
        disposition="ANSWERED" if answered else rng.choices(_UNANSWERED, (0.7, 0.2, 0.1))[0],
        outside_number=formatted(person.number),
        outside_name=person.caller_id,
        inside_number=f"(202) 555-0100, x{extension}",
        extension=extension,
        recording_at=recording_at if recorded else None,
        recording_bytes=_WAV_HEADER_BYTES + min(audio_bytes, habits.recording_max_bytes),
        changes=_changes(rng, visible_at, person, habits),
    )


def _talk_s(rng: random.Random, habits: Habits) -> float:
    return min(rng.lognormvariate(math.log(habits.talk_median_s), habits.talk_sigma), habits.talk_max_s)


def _changes(rng: random.Random, visible_at: datetime, person: Person, habits: Habits) -> tuple[Change, ...]:
    if rng.random() >= habits.changed:
        return ()
    at = visible_at + timedelta(seconds=rng.uniform(*habits.change_after_s))
    return (Change(at, {"cidname_outside": f"{person.firstname} {person.lastname}"}),)


def _person(rng: random.Random, number: int, *, stranger: bool) -> Person:
    firstname, lastname = rng.choice(_FIRST_NAMES), rng.choice(_LAST_NAMES)
    area, line = divmod(number, 100)
    return Person(
        firstname=firstname,
        lastname=lastname,
        organization=rng.choice(_COMPANIES),
        number=f"{_AREA_CODES[area]}55501{line:02d}",
        email=f"{firstname}.{lastname}@example.com".lower(),
        stranger=stranger,
    )


def _whole_second(instant: datetime, *, not_before: datetime) -> datetime:
    whole = instant.astimezone(UTC).replace(microsecond=0)
    return whole if whole >= not_before else whole + timedelta(seconds=1)


def formatted(number: str) -> str:
    """Ten national digits as the provider shows them: `(202) 555-0147`."""
    return f"({number[:3]}) {number[3:6]}-{number[6:]}"
