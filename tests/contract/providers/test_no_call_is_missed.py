"""Promise 1 on every provider: whatever order rows appear in and whatever fails, each call is ingested, and once."""

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
from tests.contract.providers.harness import START, PollHarness, open_harness
from tests.contract.providers.under_test import ListFault, MakeProvider

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
class DrawnCall:
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


drawn_calls = st.builds(
    DrawnCall,
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


class PollMishaps:
    """What goes wrong during a poll, and is over after it."""

    def __init__(self, harness: PollHarness, plans: list[CallPlan]) -> None:
        self._harness = harness
        self._plans = plans
        self._extra = 10_000

    async def poll(self, step: Step) -> set[str]:
        """Poll under this step's mishap; return the keys of the calls that it may have hidden from the poll."""
        provider, budgets = self._harness.provider, self._harness.budgets
        first = budgets.requests
        transient = [refusal for refusal in provider.refusals if refusal.status >= 500 or refusal.status == 429]
        gone: list[CallPlan] = []
        hidden: set[str] = set()

        def strike(paid: int) -> None:
            nth = paid - first
            match step.mishap:
                case "drop" if nth == 1:
                    provider.inject(ListFault.DROP, times=None)
                case "not_json" if nth == 1:
                    provider.inject(ListFault.NOT_JSON, times=None)
                case "refused" if nth == step.nth:
                    provider.refuse(transient[step.nth % len(transient)], times=None)
                case "breaks_off" if nth == step.nth:
                    provider.inject(ListFault.DROP, times=None)
                case "rows_come" if nth <= step.nth:
                    # The looks of a poll are requests of their own: one that was answered before does not have the row.
                    hidden.add(self._come())
                case "rows_go" if nth == step.nth + 1:
                    gone.extend(self._plans[:: step.nth + 1])
                    # Whatever was listed may have moved to a page that was read before.
                    hidden.update(provider.key(plan) for plan in self._plans)
                    for plan in gone:
                        provider.remove(plan)
                case _:
                    pass

        budgets.before_request = strike
        await self._harness.poll()
        budgets.before_request = None
        provider.clear_faults()
        provider.add(gone)
        return hidden

    def _come(self) -> str:
        """One more call, in front of all others; returns its key."""
        self._extra += 1
        now = self._harness.now.replace(microsecond=0)
        plan = CallPlan(rid=self._extra, started_at=now - timedelta(seconds=1), ended_at=now, visible_at=now)
        self._plans.append(plan)
        self._harness.provider.add([plan])
        return self._harness.provider.key(plan)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a failing example is small enough, and shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=st.lists(drawn_calls, min_size=1, max_size=14), before=st.lists(steps, min_size=1, max_size=14))
async def test_each_call_is_ingested_as_new_once_whatever_happens(
    make: MakeProvider, redis: Redis, http: aiohttp.ClientSession, drawn: list[DrawnCall], before: list[Step]
) -> None:
    """Long calls, late rows, the same seconds, outages, broken readings, shifting pages, changes."""
    async with open_harness(make, redis, http, page_size=3) as harness:
        plans = [drawn_call.plan(rid) for rid, drawn_call in enumerate(drawn, start=1)]
        harness.provider.add(plans)
        changed = set()
        for drawn_call, plan in zip(drawn, plans, strict=True):
            if drawn_call.changes_after_s is not None:
                harness.provider.change(plan, at=plan.visible_at + timedelta(seconds=drawn_call.changes_after_s))
                changed.add(harness.provider.key(plan))
        mishaps = PollMishaps(harness, plans)
        hidden, hidden_from_seeding = set[str](), set[str]()
        seeded_at = None
        for step in before:
            hidden_now = await mishaps.poll(step)
            hidden |= hidden_now
            if seeded_at is None and not await harness.error():
                seeded_at, hidden_from_seeding = harness.now, hidden_now
            harness.advance(seconds=step.gap_s)
        seeded_at = await settle(harness, plans) if seeded_at is None else seeded_at
        await settle(harness, plans)

        seeded = {
            harness.provider.key(plan) for plan in plans if plan.started_at < START and plan.visible_at <= seeded_at
        }
        expected = {harness.provider.key(plan) for plan in plans} - seeded
        late_finds = set(harness.new_keys) - expected
        assert harness.new_keys == Counter(expected | late_finds)
        assert late_finds <= seeded & hidden_from_seeding
        came_between = {harness.provider.key(plan) for plan in plans[len(drawn) :]}
        # A row that is missing from one of two lists is completed by a later poll.
        assert set(harness.count(RowOutcome.CHANGED)) <= changed | came_between | hidden


async def settle(harness: PollHarness, plans: list[CallPlan]) -> datetime:
    """Let all calls be listed, and the poller look as far back as it ever does; gives when the first poll went well."""
    end = max(plan.visible_at for plan in plans)
    first = None
    for gap_s in (0, 30, 16 * MINUTE_S, 6 * HOUR_S + 1, 30):
        harness.advance(seconds=gap_s)
        if gap_s > HOUR_S and harness.now < end:
            harness.clock.at = end + timedelta(seconds=1)
        await harness.poll()
        assert not await harness.error()
        first = first or harness.now
    assert first is not None
    return first
