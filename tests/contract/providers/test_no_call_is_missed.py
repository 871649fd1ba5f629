"""Promise 1 on every provider: whatever order rows appear in and whatever goes wrong, each call is told, and once."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import aiohttp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from relay.simulator.timeline import CallPlan
from relay.store.codes import RowOutcome
from tests.contract.providers.desk import START, Desk, open_desk
from tests.contract.providers.subject import MakeSubject, Trouble

HOUR_S = 3600
MINUTE_S = 60

Mishap = Literal["none", "drop", "not_json", "refused", "breaks_off", "rows_come", "rows_go"]
MISHAPS: tuple[Mishap, ...] = (
    "none",
    "none",
    "none",
    "drop",
    "not_json",
    "refused",
    "breaks_off",
    "rows_come",
    "rows_go",
)


@dataclass(frozen=True)
class Sketch:
    """A call as it is drawn: begun so long after the relay, talked about, listed so long after its end."""

    start_s: int
    talk_s: int
    late_s: int
    changes_after_s: int | None

    def plan(self, rid: int) -> CallPlan:
        started_at = START + timedelta(seconds=self.start_s)
        ended_at = started_at + timedelta(seconds=self.talk_s)
        return CallPlan(
            rid=rid, started_at=started_at, ended_at=ended_at, visible_at=ended_at + timedelta(seconds=self.late_s)
        )


@dataclass(frozen=True)
class Step:
    """A poll, so long after the one before, and what happens at its `nth` request."""

    gap_s: int
    mishap: Mishap
    nth: int


sketches = st.builds(
    Sketch,
    start_s=st.one_of(
        st.integers(-48 * HOUR_S, 60 * HOUR_S),
        st.sampled_from([0, 1, 30, HOUR_S, HOUR_S + 1, 24 * HOUR_S]),  # the same seconds, again and again
    ),
    talk_s=st.one_of(st.integers(0, 300), st.integers(0, 20 * HOUR_S)),
    late_s=st.one_of(st.integers(0, 60), st.integers(0, 52 * HOUR_S)),
    changes_after_s=st.one_of(st.none(), st.integers(1, 4 * HOUR_S)),
)
steps = st.builds(
    Step,
    gap_s=st.one_of(
        st.sampled_from([30, 30, 300, 16 * MINUTE_S]), st.integers(1, 3 * HOUR_S), st.integers(1, 30 * HOUR_S)
    ),
    mishap=st.sampled_from(MISHAPS),
    nth=st.integers(1, 5),
)


class Weather:
    """What goes wrong during a poll, and is over after it."""

    def __init__(self, desk: Desk, plans: list[CallPlan]) -> None:
        self._desk = desk
        self._plans = plans
        self.went_between: set[str] = set()
        self._extra = 10_000

    async def poll(self, step: Step) -> None:
        """Poll under this step's mishap."""
        subject, budgets = self._desk.subject, self._desk.budgets
        first = budgets.requests
        transient = [each for each in subject.refusals if each.status >= 500 or each.status == 429]
        gone: list[CallPlan] = []

        def strike(paid: int) -> None:
            nth = paid - first
            match step.mishap:
                case "drop" if nth == 1:
                    subject.trouble(Trouble.DROP, times=None)
                case "not_json" if nth == 1:
                    subject.trouble(Trouble.NOT_JSON, times=None)
                case "refused" if nth == step.nth:
                    subject.refuse(transient[step.nth % len(transient)], times=None)
                case "breaks_off" if nth == step.nth:
                    subject.trouble(Trouble.DROP, times=None)
                case "rows_come" if nth <= step.nth:
                    self._come()
                case "rows_go" if nth == step.nth + 1:
                    gone.extend(self._plans[:: step.nth + 1])
                    self.went_between |= {self._desk.subject.key(plan) for plan in gone}
                    for plan in gone:
                        subject.remove(plan)
                case _:
                    pass

        budgets.before_request = strike
        await self._desk.poll()
        budgets.before_request = None
        subject.behave()
        subject.add(gone)

    def _come(self) -> None:
        """One more call, in front of all others."""
        self._extra += 1
        now = self._desk.now.replace(microsecond=0)
        plan = CallPlan(rid=self._extra, started_at=now - timedelta(seconds=1), ended_at=now, visible_at=now)
        self._plans.append(plan)
        self._desk.subject.add([plan])


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a failing example is small enough, and shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=st.lists(sketches, min_size=1, max_size=14), before=st.lists(steps, min_size=1, max_size=14))
async def test_each_call_is_told_once_whatever_happens(
    make: MakeSubject, redis: Redis, http: aiohttp.ClientSession, drawn: list[Sketch], before: list[Step]
) -> None:
    """Long calls, late rows, the same seconds, outages, broken readings, shifting pages, changes."""
    async with open_desk(make, redis, http, page_size=3) as desk:
        plans = [sketch.plan(rid) for rid, sketch in enumerate(drawn, start=1)]
        desk.subject.add(plans)
        changed = set()
        for sketch, plan in zip(drawn, plans, strict=True):
            if sketch.changes_after_s is not None:
                desk.subject.change(plan, at=plan.visible_at + timedelta(seconds=sketch.changes_after_s))
                changed.add(desk.subject.key(plan))
        weather = Weather(desk, plans)
        seeded_at = None
        for step in before:
            await weather.poll(step)
            if seeded_at is None and not await desk.error():
                seeded_at = desk.now
            desk.pass_(seconds=step.gap_s)
        seeded_at = await settle(desk, plans) if seeded_at is None else seeded_at
        await settle(desk, plans)

        known = {desk.subject.key(plan) for plan in plans if plan.started_at < START and plan.visible_at <= seeded_at}
        to_tell = {desk.subject.key(plan) for plan in plans} - known
        assert desk.told_keys == Counter(to_tell)
        came_between = {desk.subject.key(plan) for plan in plans[len(drawn) :]}
        # A row that goes away between the list and its details is completed when it is back.
        assert set(desk.count(RowOutcome.CHANGED)) <= changed | came_between | weather.went_between


async def settle(desk: Desk, plans: list[CallPlan]) -> datetime:
    """Let all calls be listed, and the poller look as far back as it ever does; gives when the first poll went well."""
    end = max(plan.visible_at for plan in plans)
    first = None
    for gap_s in (0, 30, 16 * MINUTE_S, 6 * HOUR_S + 1, 30):
        desk.pass_(seconds=gap_s)
        if gap_s > HOUR_S and desk.now < end:
            desk.moment.at = end + timedelta(seconds=1)
        await desk.poll()
        assert not await desk.error()
        first = first or desk.now
    assert first is not None
    return first
