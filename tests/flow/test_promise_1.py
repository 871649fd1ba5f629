"""No call is missed: the real poller and store against random calls, clocks, zones, outages and deaths, on a clock of
the test's own.

Every finished call that the provider shows within 72 hours of its start is ingested exactly once as new, in whatever
order rows appear; what does not change makes no second event.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Record
from relay.simulator.timeline import CallPlan, Change, Habits
from relay.store.codes import RowOutcome
from tests.fakes.clock import ManualClock
from tests.fakes.timeline import calls_between
from tests.flow.polling import KEY, KILLS, SID, PollFault, PollHarness

HOUR = timedelta(hours=1)
CALLING = timedelta(hours=26)
SETTLING_S = 1800
RUN = settings(
    deadline=None,
    max_examples=25,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
LONG = settings(RUN, max_examples=400, phases=tuple(Phase))

ZONES = {
    "UTC": [datetime(2025, 7, 1, 9, tzinfo=UTC)],
    "America/New_York": [datetime(2025, 3, 8, 15, tzinfo=UTC), datetime(2025, 11, 1, 12, tzinfo=UTC)],
    "Europe/Berlin": [datetime(2025, 3, 29, 9, tzinfo=UTC), datetime(2025, 10, 25, 9, tzinfo=UTC)],
    "Australia/Lord_Howe": [datetime(2025, 4, 5, 1, tzinfo=UTC), datetime(2025, 10, 4, 1, tzinfo=UTC)],
    "Pacific/Kiritimati": [datetime(2025, 12, 30, 20, tzinfo=UTC)],
}
"""Zones, and days on which something happens to their clocks."""


@dataclass(frozen=True)
class Story:
    """What is drawn: an account and its calls, a relay and its troubles."""

    zone: str
    configured: str
    start: datetime
    skew_s: int
    plans: list[CallPlan]
    gaps_s: list[int]
    outages: list[tuple[float, float]]
    faults: list[PollFault]
    inclusive: bool
    answers_a_day: tuple[float, float] = (0, 0)
    """From which hour, and for how many, the provider answers 504 to what reaches back further than a day."""

    @property
    def zone_is_right(self) -> bool:
        return self.zone == self.configured

    def back_from(self, at: datetime) -> datetime:
        """When the relay is there again; `at` itself when it is not away."""
        for begins, length in sorted(self.outages):
            if begins <= (at - self.start) / HOUR < begins + length:
                at = self.start + timedelta(hours=begins + length)
        return at


@st.composite
def plans(draw: st.DrawFn, start: datetime, *, longest_late_h: float) -> list[CallPlan]:
    """An account's calls, among them the kinds that pollers lose."""
    habits = Habits(
        calls_per_hour=draw(st.sampled_from([0.5, 3, 8])),
        late=draw(st.sampled_from([0.0, 0.05, 0.4])),
        talk_sigma=draw(st.sampled_from([1.2, 2.5])),
        same_second=0.2,
        changed=0.1,
    )
    harness = calls_between(start - 8 * HOUR, start + CALLING, seed=draw(st.integers(0, 10_000)), habits=habits)
    plans: list[CallPlan] = []
    for rid in range(1, draw(st.integers(1, 12)) + 1):
        started = start + timedelta(seconds=draw(st.integers(-6 * 3600, int(CALLING.total_seconds()))))
        ended = started + timedelta(seconds=draw(st.one_of(st.integers(1, 60), st.integers(60, 6 * 3600))))
        late = timedelta(hours=draw(st.one_of(st.just(0.0), st.floats(0, 20), st.floats(20, longest_late_h))))
        visible = min(ended + timedelta(seconds=20) + late, started + timedelta(hours=longest_late_h + 6))
        changes: list[Change] = []
        disposition = draw(st.sampled_from(["ANSWERED", "NO ANSWER"]))
        if draw(st.booleans()) and draw(st.booleans()):  # listed while in progress
            visible, disposition = started, "IN PROGRESS"
            changes.append(Change(ended, {"disposition": "ANSWERED"}))
        if draw(st.booleans()):
            changed = max(visible, ended) + timedelta(seconds=draw(st.integers(1, 4 * 3600)))
            changes.append(Change(changed, {"cidname_outside": f"CHANGED {rid}"}))
        plans.append(
            CallPlan(
                rid=rid,
                started_at=started,
                ended_at=ended,
                visible_at=visible,
                disposition=disposition,
                changes=tuple(changes),
            )
        )
    return harness + plans


@st.composite
def stories(draw: st.DrawFn) -> Story:
    zone = draw(st.sampled_from(sorted(ZONES)))
    start = draw(st.sampled_from(ZONES[zone])) + timedelta(minutes=draw(st.integers(0, 600)))
    off_h = draw(st.one_of(st.just(0), st.integers(-14, 14)))
    configured = _zone_off_by(zone, start, off_h) if off_h else zone
    # A zone that is 14 h off takes 14 h from the 78 that the deepest look reaches back.
    longest_late_h = 52.0 if off_h else 66.0
    outage = st.tuples(st.floats(0, 60), st.one_of(st.floats(0.2, 5), st.floats(5, 48), st.floats(100, 200)))
    return Story(
        zone=zone,
        configured=configured,
        start=start,
        skew_s=draw(st.sampled_from([0, 0, 7, -90, 300, -300])),
        plans=draw(plans(start, longest_late_h=longest_late_h)),
        gaps_s=draw(st.lists(st.sampled_from([60, 600, 1800, 3600]), min_size=1, max_size=12)),
        outages=draw(st.lists(outage, max_size=3)),
        faults=draw(st.lists(st.sampled_from([PollFault.NONE, PollFault.NONE, *PollFault]), min_size=1, max_size=40)),
        inclusive=draw(st.booleans()),
        answers_a_day=(0, 0) if off_h else draw(st.tuples(st.sampled_from([-1, 0, 20]), st.sampled_from([0, 6, 48]))),
    )


def _zone_off_by(zone: str, start: datetime, hours: int) -> str:
    """A fixed zone that reads the rows of `zone` so many hours too early (negative: too late)."""
    offset = start.astimezone(ZoneInfo(zone)).utcoffset() or timedelta(0)
    east = max(-12, min(14, round(offset / HOUR) + hours))
    return f"Etc/GMT{-east:+d}" if east else "Etc/UTC"


async def live_through(
    story: Story,
    harness: PollHarness,
    clock: ManualClock,
    *,
    lost_at_h: float | None = None,
    after_poll: Callable[[], Awaitable[None]] | None = None,
) -> tuple[datetime, dict[datetime, datetime]]:
    """Poll until everything was shown for long enough; gives when the relay began, and from which moment on the calls
    since when were known.

    The store may be lost on the way.
    """
    harness.simulator.clock_skew_s = story.skew_s
    harness.simulator.inclusive = story.inclusive
    harness.simulator.add_calls(KEY, story.plans)
    last = max([story.start, *(max([plan.visible_at, *(c.at for c in plan.changes)]) for plan in story.plans)])
    gaps, faults = itertools.cycle(story.gaps_s), itertools.cycle(story.faults)
    settling = itertools.repeat(SETTLING_S, int(timedelta(hours=7).total_seconds()) // SETTLING_S)
    began: datetime | None = None
    known_since: dict[datetime, datetime] = {}
    while (gap_s := next(gaps) if clock.now() <= last else next(settling, 0)) > 0:
        await clock.advance((story.back_from(clock.now()) - clock.now()).total_seconds(), turns=0)
        if lost_at_h is not None and known_since and clock.now() >= story.start + lost_at_h * HOUR:
            await clock.advance(5400, turns=0)
            await harness.lose_the_store()
            lost_at_h = None
        begins, length = story.answers_a_day
        hours = (clock.now() - story.start) / HOUR
        short = begins <= hours < begins + length and clock.now() <= last
        harness.calls.deepest = 24 * HOUR if short else None
        await harness.poll(next(faults) if clock.now() <= last else PollFault.NONE)
        state = await harness.state()
        began = began or state.poll_state.started_at
        if state.poll_state.known_since is not None:
            known_since[clock.now()] = state.poll_state.known_since
        if after_poll is not None:
            await after_poll()
        await clock.advance(gap_s, turns=0)
    assert began is not None
    assert known_since
    return began, known_since


def check(
    story: Story,
    harness: PollHarness,
    began: datetime,
    known_since: dict[datetime, datetime],
    final: dict[str, Record],
) -> None:
    """Compare what was ingested with what the provider listed. The relay `began` with its first attempt."""
    new, changed = harness.ingested_rows(), harness.ingested_rows(RowOutcome.CHANGED)
    for plan in story.plans:
        key = str(plan.rid)
        # A wrong zone hides from where on calls are known; then the first poll could look all the way back.
        first = next(at for at, since in known_since.items() if since <= plan.started_at or not story.zone_is_right)
        was_there = plan.visible_at <= first
        under_way = plan.disposition == "IN PROGRESS" and plan.ended_at > first
        # The relay was running when it began; a wrong zone hides which of the first poll's rows are from before.
        owed = not was_there or under_way or (plan.started_at >= began and story.zone_is_right)
        unwanted = was_there and not under_way and plan.started_at < began - timedelta(seconds=1)
        note(f"{key}: {plan.started_at} {plan.visible_at} owed={owed}")
        if owed:
            assert new[key] == 1, f"call {key} was ingested {new[key]} times"
            assert ids.call_id(SID, key) == ids.call_id(SID, final[key].key)
        elif unwanted and story.zone_is_right:
            assert new[key] == 0, f"call {key} from before the relay was published"
        assert new[key] <= 1
        assert changed[key] <= len(plan.changes), f"call {key} changed {changed[key]} times"
    assert set(new) <= {str(plan.rid) for plan in story.plans}


async def read_finals(harness: PollHarness) -> dict[str, Record]:
    """What the provider shows in the end, and that the store has just that."""
    finals: dict[str, Record] = {}
    answer = harness.simulator.records(KEY, "2000-01-01 00:00:00", harness.now)
    new = harness.ingested_rows()
    for each in answer.body["records"]:  # type: ignore[index,call-overload]
        row = harness.row(each["rid"])
        assert isinstance(row, Record)
        finals[row.key] = row
        if new[row.key]:
            stored = await harness.call(each["rid"])
            assert stored is not None
            names = {side: (stored.record[side]["name"], row.content()[side]["name"]) for side in ("from", "to")}
            assert all(kept == shown for kept, shown in names.values()), f"call {row.key} shows {names}"
            assert stored.finished == row.finished
    return finals


async def run_story(valkey_url: str, story: Story) -> PollHarness:
    async with Redis.from_url(valkey_url) as redis:
        await redis.flushdb()
        clock = ManualClock(story.start)
        harness = PollHarness(redis, clock, zone=story.zone, timezone=story.configured)
        began, known_since = await live_through(story, harness, clock)
        check(story, harness, began, known_since, await read_finals(harness))
        return harness


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    """Thousands of calls are ingested here; the log of each would be most of the work."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@RUN
@given(story=stories())
async def test_every_call_is_ingested_exactly_once(valkey_url: str, story: Story) -> None:
    """Whatever the account does, and however often the relay is down, rejected, killed or overtaken."""
    await run_story(valkey_url, story)


@pytest.mark.long
@pytest.mark.timeout(3600)
@LONG
@given(story=stories())
async def test_every_call_is_ingested_exactly_once_at_length(valkey_url: str, story: Story) -> None:
    """The same, for a long time."""
    await run_story(valkey_url, story)


@settings(RUN, max_examples=8)
@given(story=stories().filter(lambda story: story.zone_is_right), lost_at_h=st.floats(0.5, 24))
async def test_a_lost_store_loses_no_call(valkey_url: str, story: Story, lost_at_h: float) -> None:
    """The marker in the recording storage has the cursor: calls are read again and get the same ids."""
    async with Redis.from_url(valkey_url) as redis:
        await redis.flushdb()
        harness = PollHarness(redis, clock := ManualClock(story.start), zone=story.zone)
        began, _ = await live_through(story, harness, clock, lost_at_h=lost_at_h)

    new = harness.ingested_rows()
    owed = {str(plan.rid): plan for plan in story.plans if plan.started_at >= began}
    missed = {key: (new[key], plan) for key, plan in owed.items() if new[key] not in (1, 2)}
    assert not missed, f"lost at {lost_at_h} h: {missed}"


def test_the_stories_have_all_that_loses_calls() -> None:
    """The generator is not so tame that the promise would hold without the poller's care."""
    features: set[str] = set()

    @settings(RUN, max_examples=150, database=None)
    @given(story=stories())
    def look(story: Story) -> None:
        late = max(plan.visible_at - plan.ended_at for plan in story.plans)
        features.update(fault.value for fault in story.faults)
        features.add("right zone" if story.zone_is_right else "wrong zone")
        features.add("late" if late > 20 * HOUR else "")
        features.add("long" if any(plan.ended_at - plan.started_at > 5 * HOUR for plan in story.plans) else "")
        features.add("outage" if any(length > 96 for _, length in story.outages) else "")
        features.add("skew" if abs(story.skew_s) == 300 else "")
        starts = Counter(plan.started_at for plan in story.plans)
        features.add("same second" if max(starts.values()) > 1 else "")
        features.add("changes" if any(plan.changes for plan in story.plans) else "")

    look()
    wanted = {"right zone", "wrong zone", "late", "long", "outage", "skew", "same second", "changes"}
    assert wanted | {fault.value for fault in (*KILLS, PollFault.OVERTAKEN)} <= features
