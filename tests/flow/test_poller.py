"""One source, poll by poll, on a clock of the test's own: each way in which a poller loses calls, and what it does."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.domain import ids
from relay.domain.call import Outcome, Party, Record
from relay.domain.time import from_iso
from relay.errors import OverBudget
from relay.polling.poller import PAUSE_S
from relay.providers.base import CallPage, Window
from relay.queue import keys as queue_keys
from relay.queue.lane import Lane
from relay.queue.settlement import Done, Retry
from relay.simulator.timeline import CallPlan, Change
from relay.store import keys
from relay.store.codes import RowOutcome
from tests.fakes.clock import ManualClock
from tests.fakes.faults import Fault, FaultKind
from tests.flow.polling import KEY, SID, PollFault, PollHarness

START = datetime(2025, 7, 1, 12, tzinfo=UTC)
MALFORMED = (PollFault.NOT_JSON, PollFault.SUCCESS_FALSE, PollFault.WRONG_COUNT, PollFault.PARTIAL)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START)


@pytest.fixture
def harness(redis: Redis, clock: ManualClock) -> PollHarness:
    return PollHarness(redis, clock)


def call(rid: int, started_at: datetime, *, talk_s: float = 30, late_s: float = 0, **fields: Any) -> CallPlan:
    """A call that is listed when it ends, or `late_s` later."""
    ended = started_at + timedelta(seconds=talk_s)
    visible = fields.pop("visible_at", ended + timedelta(seconds=late_s))
    return CallPlan(rid=rid, started_at=started_at, ended_at=ended, visible_at=visible, **fields)


async def polls(harness: PollHarness, *, every_s: float, times: int) -> None:
    for _ in range(times):
        await harness.clock.advance(every_s, turns=0)
        await harness.poll()


async def begun(harness: PollHarness) -> None:
    """The first poll, of an account that had no calls."""
    await harness.poll()
    await harness.clock.advance(30, turns=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the poll under test runs beside it
            await asyncio.sleep(0.01)


def metric(name: str, **labels: str) -> float:
    """What a counter stands at; those of a process are shared by its tests."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


# What pollers lose


async def test_calls_of_one_second_that_appear_one_after_the_other(harness: PollHarness) -> None:
    """The provider lists what started after a second, and the second call of that second comes later."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(1, harness.now, talk_s=10), call(2, harness.now, talk_s=90)])

    await polls(harness, every_s=30, times=4)

    assert harness.ingested_rows() == {"1": 1, "2": 1}


async def test_a_long_call_that_appears_behind_the_cursor(harness: PollHarness) -> None:
    """Six hours of talk: when it is listed, hundreds of newer calls have moved the cursor on."""
    await begun(harness)
    newer = [call(rid, harness.now + timedelta(minutes=rid)) for rid in range(2, 350)]
    harness.simulator.add_calls(KEY, [call(1, harness.now, talk_s=6 * 3600), *newer])

    await polls(harness, every_s=300, times=80)

    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 350)}


async def test_a_call_that_is_listed_20_hours_late(harness: PollHarness) -> None:
    """The provider's own records were delayed: a deeper look finds it within a quarter of an hour."""
    await begun(harness)
    started = harness.now
    harness.simulator.add_calls(KEY, [call(1, started, late_s=20 * 3600)])
    before = metric("relay_calls_admitted_total", tier="26h")

    await polls(harness, every_s=300, times=20 * 12 + 4)

    assert harness.ingested_rows() == {"1": 1}
    assert metric("relay_calls_admitted_total", tier="26h") == before + 1


async def test_a_row_that_changes_later_is_a_change_once_and_a_cosmetic_change_none(harness: PollHarness) -> None:
    """A name is corrected; then a field appears that no event has."""
    await begun(harness)
    changes = [
        Change(harness.now + timedelta(minutes=5), {"cidname_outside": "CORRECTED"}),
        Change(harness.now + timedelta(minutes=10), {"a_field_of_their_own": 7}),
    ]
    harness.simulator.add_calls(KEY, [call(1, harness.now, changes=tuple(changes))])

    await polls(harness, every_s=60, times=20)

    assert (harness.ingested_rows(), harness.ingested_rows(RowOutcome.CHANGED)) == ({"1": 1}, {"1": 1})
    stored = await harness.call(1)
    assert stored is not None
    assert stored.record["from"]["name"] == "CORRECTED"


async def test_a_call_is_listed_while_it_is_in_progress(harness: PollHarness) -> None:
    """It is known as unfinished, and changes once: when it ends."""
    await begun(harness)
    ended = Change(harness.now + timedelta(minutes=20), {"disposition": "ANSWERED"})
    harness.simulator.add_calls(
        KEY, [call(1, harness.now, visible_at=harness.now, disposition="IN PROGRESS", changes=(ended,))]
    )

    await polls(harness, every_s=300, times=2)
    unfinished = await harness.call(1)
    await polls(harness, every_s=300, times=4)

    finished = await harness.call(1)
    assert (unfinished and unfinished.finished, finished and finished.finished) == (False, True)
    assert (harness.ingested_rows(), harness.ingested_rows(RowOutcome.CHANGED)) == ({"1": 1}, {"1": 1})


@pytest.mark.parametrize("skew_s", [-300, 300])
async def test_a_providers_clock_that_is_wrong(harness: PollHarness, skew_s: int) -> None:
    """Five minutes off, either way: nothing is lost, the cursor is never ahead of our time, and it is logged once."""
    harness.simulator.clock_skew_s = skew_s
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=rid)) for rid in range(1, 60)])
    with capture_logs() as logs:
        for _ in range(80):
            await harness.poll()
            state = await harness.state()
            assert state.poll_state.cursor is not None
            assert state.poll_state.cursor <= harness.now
            await harness.clock.advance(60, turns=0)
        harness.simulator.clock_skew_s = 0
        harness.simulator.date_header = lambda: {"Date": harness.now.strftime("%a, %d %b %Y %H:%M:%S GMT")}  # type: ignore[method-assign]
        await harness.poll()

    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 60)}
    events = [(log["event"], log.get("provider_ahead_s")) for log in logs if log["event"].startswith("clock_skew")]
    assert events == [("clock_skew_detected", skew_s), ("clock_skew_resolved", None)]


async def test_a_late_first_poll_dates_the_relays_start_by_the_providers_clock(
    harness: PollHarness,
) -> None:
    """The provider is five minutes behind and was down at first: a call of after the relay's start is not old."""
    harness.simulator.clock_skew_s = -300
    harness.simulator.add_calls(KEY, [call(1, START - timedelta(minutes=2)), call(2, START + timedelta(minutes=1))])

    await harness.poll(PollFault.DOWN)
    await polls(harness, every_s=600, times=1)

    assert harness.ingested_rows() == {"2": 1}


FALL_BACK, SPRING_FORWARD = datetime(2025, 11, 2, 4, tzinfo=UTC), datetime(2025, 3, 9, 5, tzinfo=UTC)


@pytest.mark.parametrize("start", [FALL_BACK, SPRING_FORWARD], ids=["fall back", "spring forward"])
async def test_clocks_that_change(redis: Redis, start: datetime) -> None:
    """The rows carry local times: an hour comes twice, or not at all."""
    harness = PollHarness(redis, ManualClock(start), zone="America/New_York")
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, start + timedelta(minutes=3 * rid)) for rid in range(1, 120)])

    await polls(harness, every_s=120, times=200)

    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 120)}
    assert not harness.ingested_rows(RowOutcome.CHANGED)


@pytest.mark.parametrize("configured", ["Etc/GMT-14", "Etc/GMT+9", "Asia/Kolkata"])
async def test_a_time_zone_that_is_configured_wrong(redis: Redis, configured: str) -> None:
    """Up to 14 hours wrong: no call is lost, and the log names the apparent zone."""
    harness = PollHarness(redis, ManualClock(START), zone="UTC", timezone=configured)
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=3 * rid)) for rid in range(1, 60)])

    with capture_logs() as logs:
        await polls(harness, every_s=60, times=240)

    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 60)}
    hints = [log["rows_look_like"] for log in logs if log["event"] == "timezone_mismatch_detected"]
    assert hints == ["UTC+00:00"]


async def test_a_matching_time_zone_is_not_reported(harness: PollHarness) -> None:
    """A busy day with long calls between the short ones: silence."""
    await begun(harness)
    harness.simulator.add_calls(
        KEY, [call(rid, START + timedelta(minutes=3 * rid), talk_s=20 + 900 * (rid % 3)) for rid in range(1, 100)]
    )

    with capture_logs() as logs:
        await polls(harness, every_s=60, times=330)

    assert not [log for log in logs if log["event"].startswith("timezone")]
    assert (await harness.state()).zone_off_s == 0


@pytest.mark.parametrize("fault", [PollFault.KILLED_HALF_WAY, PollFault.KILLED_AT_THE_END, PollFault.KILLED])
async def test_a_poll_that_dies_moves_no_cursor(harness: PollHarness, fault: PollFault) -> None:
    """Some chunks were ingested, the rest was not: the next poll starts where this one did."""
    await begun(harness)
    before = (await harness.state()).poll_state
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(seconds=rid)) for rid in range(1, 200)])
    await harness.clock.advance(600, turns=0)

    await harness.poll(fault)
    half_way, after = len(harness.ingested_rows()), (await harness.state()).poll_state
    await harness.poll()

    assert after == before
    assert half_way == {PollFault.KILLED: 0, PollFault.KILLED_HALF_WAY: 100, PollFault.KILLED_AT_THE_END: 150}[fault]
    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 200)}


async def test_an_outage_of_ten_days(harness: PollHarness) -> None:
    """Longer than the deepest look and than the floor: each tier reaches back from its own last success."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=rid)) for rid in range(1, 240)])

    await harness.clock.advance(10 * 86_400, turns=0)
    await harness.poll()

    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 240)}


async def test_a_source_that_was_edited_and_redeployed_keeps_its_cursor(redis: Redis, harness: PollHarness) -> None:
    """Another poller, with other tiers in mind, finds the cursor in the store."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(1, harness.now)])
    await polls(harness, every_s=60, times=1)
    deployed = PollHarness(redis, harness.clock, poll_interval_s=5)
    deployed.simulator = deployed.calls.simulator = harness.simulator

    with capture_logs() as logs:
        await polls(deployed, every_s=60, times=3)

    assert not deployed.ingested_rows()
    assert not [log for log in logs if log["event"] == "source_first_polled"]


@pytest.mark.parametrize("fault", MALFORMED)
async def test_an_unexpected_response_moves_no_cursor_and_is_logged_once(
    harness: PollHarness, fault: PollFault
) -> None:
    """Status 200 with a body that contradicts itself: an error, until it does not."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(1, harness.now)])
    before = (await harness.state()).poll_state
    await harness.clock.advance(60, turns=0)

    for _ in range(3):
        await harness.poll(fault)
    during = await harness.state()
    await harness.poll()
    await harness.poll()

    assert during.poll_state == before
    assert during.failures == 3
    assert [event["type"] for event in await harness.operational_events()] == ["source.error", "source.recovered"]
    assert harness.ingested_rows() == {"1": 1}


async def test_an_invalid_row_does_not_hide_valid_ones(harness: PollHarness) -> None:
    """Invalid rows between valid ones are quarantined once, with the reason, and logged once."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, harness.now) for rid in range(1, 5)])
    await harness.clock.advance(60, turns=0)
    garbage = Fault(kind=FaultKind.GARBAGE, at=harness.now)

    with capture_logs() as logs:
        await harness.poll(PollFault.NONE, garbage)
        await harness.poll(PollFault.NONE, garbage)

    assert {"1", "2", "3", "4"} <= set(harness.ingested_rows())
    put_aside = await harness.store.sources.quarantined(SID)
    assert len(put_aside) == 9
    assert "rid is missing" in {entry.reason for entry in put_aside}
    assert [log["rows"] for log in logs if log["event"] == "rows_quarantined"] == [9]


async def test_two_rows_with_one_id_are_one_call(harness: PollHarness) -> None:
    """Thirty polls show both: one event, of the row that is listed later; the other is quarantined, once, by name."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(1, harness.now, talk_s=1), call(2, harness.now, talk_s=1)])
    pages = harness.calls.pages

    async def doubled(window: Window) -> Any:
        async for page in pages(window):
            rows = [row for row in page.rows if isinstance(row, Record)]
            twins = [replace(row, status_raw="BUSY", outcome=Outcome.BUSY) for row in rows if row.key == "1"]
            yield replace(page, rows=[*rows, *twins])

    harness.calls.pages = doubled  # type: ignore[method-assign]
    await polls(harness, every_s=30, times=30)

    stored = await harness.call(1)
    assert (harness.ingested_rows(), harness.ingested_rows(RowOutcome.CHANGED)) == ({"1": 1, "2": 1}, {})
    assert stored is not None
    assert stored.record["status_raw"] == "BUSY"
    [quarantined] = await harness.store.sources.quarantined(SID)
    assert (quarantined.key, "has this id" in quarantined.reason) == ("1", True)


async def test_an_id_that_is_used_again_is_another_call(harness: PollHarness) -> None:
    """The provider restarted its count: the new call is published as new, and the old one stays as it was."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(1, harness.now, talk_s=1)])
    await polls(harness, every_s=30, times=2)
    before = await harness.call(1)
    await harness.clock.advance(600, turns=0)
    pages, started = harness.calls.pages, harness.now

    async def reused(window: Window) -> Any:
        async for page in pages(window):
            rows = [row for row in page.rows if isinstance(row, Record)]
            other = Party(raw="(202) 555-0199", number="+12025550199")
            yield replace(page, rows=[replace(row, started_at=started, caller=other, callee=other) for row in rows])

    harness.calls.pages = reused  # type: ignore[method-assign]
    await polls(harness, every_s=30, times=10)

    assert (harness.ingested_rows(), harness.ingested_rows(RowOutcome.CHANGED)) == ({"1": 1, "1~2": 1}, {})
    assert await harness.call(1) == before


async def test_a_corrected_zone_corrects_calls_silently(redis: Redis, clock: ManualClock) -> None:
    """The advice of the log is followed: no call is published again, and each has its right start."""
    wrong = PollHarness(redis, clock, zone="UTC", timezone="Etc/GMT+5")
    await begun(wrong)
    wrong.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=rid)) for rid in range(1, 60)])
    await polls(wrong, every_s=60, times=80)
    ingested = wrong.ingested_rows()
    right = PollHarness(redis, clock, zone="UTC", timezone="UTC")
    right.simulator = right.calls.simulator = wrong.simulator

    await polls(right, every_s=60, times=40)

    assert ingested == {str(rid): 1 for rid in range(1, 60)}
    assert right.ingested_rows() == right.ingested_rows(RowOutcome.CHANGED) == {}
    starts = {rid: stored.started_ms for rid in range(1, 60) if (stored := await right.call(rid))}
    assert starts == {rid: int((START + timedelta(minutes=rid)).timestamp() * 1000) for rid in range(1, 60)}


async def test_a_row_of_the_far_future_is_quarantined_and_moves_no_cursor(harness: PollHarness) -> None:
    """No time zone is more than 26 hours ahead. A row five hours ahead is ingested, and the cursor stays at now."""
    await begun(harness)
    at = harness.now
    harness.simulator.add_calls(
        KEY,
        [
            call(1, at + timedelta(hours=27), visible_at=at),
            call(2, at + timedelta(hours=5), visible_at=at),
            call(3, at, talk_s=1),
        ],
    )

    await harness.poll()
    await polls(harness, every_s=30, times=1)

    assert harness.ingested_rows() == {"2": 1, "3": 1}
    assert (await harness.state()).poll_state.cursor == harness.now
    (entry,) = await harness.store.sources.quarantined(SID)
    assert "future" in str(entry.reason)


async def test_very_many_rows_shorten_the_look_back(harness: PollHarness) -> None:
    """A call centre: once a look brings over 2,000 rows, most looks are short; then it is quiet and they are not."""
    await begun(harness)
    busy = [call(rid, START + timedelta(seconds=rid // 2)) for rid in range(1, 2200)]
    quiet = [call(rid, START + timedelta(minutes=10 * (rid - 3000))) for rid in range(3004, 3024)]
    harness.simulator.add_calls(KEY, [*busy, *quiet])

    await polls(harness, every_s=60, times=28)
    heavy = (await harness.state()).poll_state.heavy
    looks = [(window.until - window.since).total_seconds() for window in harness.calls.asked[-6:]]
    await polls(harness, every_s=300, times=36)

    assert heavy
    assert sorted(look < 1500 for look in looks) == [False] * 2 + [True] * 4, "the short look at each of four polls"
    assert not (await harness.state()).poll_state.heavy
    assert set(harness.ingested_rows()) == {str(plan.rid) for plan in (*busy, *quiet) if plan.visible_at <= harness.now}


async def test_rows_below_the_floor_are_counted_and_not_new(harness: PollHarness) -> None:
    """A provider that ignores the lower bound sends years of calls: `seen` does not know them any more."""
    await polls(harness, every_s=3600, times=6 * 24)
    answer = harness.calls.pages
    record = harness.row  # how a row is read

    async def everything(window: Window) -> Any:
        async for page in answer(Window(START - timedelta(days=400), window.until)):
            yield page

    harness.calls.pages = everything  # type: ignore[method-assign]
    old, edge = harness.now - timedelta(days=30), harness.now - timedelta(hours=95)
    harness.simulator.add_calls(KEY, [call(1, old), call(2, edge), call(3, harness.now, talk_s=1)])
    await polls(harness, every_s=30, times=1)

    assert record(1)
    assert harness.ingested_rows() == {"2": 1, "3": 1}
    assert await harness.redis.hget(keys.source(SID), "too_old") == b"1"


async def test_seen_forgets_old_days_and_nothing_is_ingested_again(harness: PollHarness) -> None:
    """Three weeks of calls: `seen` keeps eight days or so, and no row that comes back is new."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=2 * rid)) for rid in range(1, 250)])

    await polls(harness, every_s=3600, times=21 * 24)

    days = sorted(await harness.seen())
    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 250)}
    assert 7 <= len(days) <= 9
    assert (
        days[-1] == harness.now.date().isoformat() or days[-1] == (harness.now - timedelta(days=1)).date().isoformat()
    )


# Tiers


async def test_what_a_provider_cannot_answer_hides_no_call(harness: PollHarness) -> None:
    """Windows over 24 h fail for two days: every call is ingested, those listed a day late as soon as that ends."""
    await begun(harness)
    on_time = [call(rid, START + timedelta(minutes=6 * rid)) for rid in range(1, 500)]
    late = [call(rid, START + timedelta(minutes=7 * (rid - 1000)), late_s=30 * 3600) for rid in range(1000, 1300)]
    harness.simulator.add_calls(KEY, [*on_time, *late])
    harness.calls.deepest = timedelta(hours=24)
    delays: list[float] = []
    for _ in range(48 * 12):
        await harness.clock.advance(300, turns=0)
        await harness.poll()
        state = await harness.state()
        assert not state.error, "no error of the source"
        delays.append((harness.now - (state.last_poll or START)).total_seconds())
    while_failing = set(harness.ingested_rows())
    gaps = (await harness.state()).poll_state.failing

    harness.calls.deepest = None
    await polls(harness, every_s=300, times=30 * 12)

    assert max(delays) == 0, "no poll was skipped"
    assert {str(plan.rid) for plan in on_time if plan.visible_at <= START + timedelta(hours=48)} <= while_failing
    assert gaps
    assert harness.ingested_rows() == {str(plan.rid): 1 for plan in (*on_time, *late)}
    assert not (await harness.state()).poll_state.failing


async def test_a_history_that_cannot_be_read_delays_no_new_call(harness: PollHarness) -> None:
    """The first poll gets an answer for three hours only, for ever: what starts now is new, what was there is not."""
    harness.calls.deepest = timedelta(hours=3)
    old = [call(rid, START - timedelta(minutes=10 * rid)) for rid in range(1, 300)]
    harness.simulator.add_calls(KEY, [*old, call(1000, START + timedelta(seconds=5), talk_s=10)])
    with capture_logs() as logs:
        await harness.poll()
    await polls(harness, every_s=30, times=1)
    first_minute = harness.ingested_rows()

    await polls(harness, every_s=900, times=96)
    harness.calls.deepest = None
    await polls(harness, every_s=900, times=32)

    (text,) = [log["text"] for log in logs if log["event"] == "source_first_polled"]
    assert "of the last 2 h recorded, none published" in text
    assert first_minute == {"1000": 1}
    assert harness.ingested_rows() == {"1000": 1}, "the history that is read in the end was there before the relay"


async def test_a_deep_look_that_hangs_delays_no_near_one(redis: Redis, clock: ManualClock) -> None:
    """It takes minutes, and the near look goes on at its interval meanwhile, under the same lease."""
    harness = PollHarness(redis, clock, poll_interval_s=1)
    harness.calls.hold = asyncio.Event()
    harness.simulator.add_calls(KEY, [call(1, START - timedelta(hours=5)), call(2, START, talk_s=1)])
    poll = asyncio.create_task(harness.poll())
    await until(lambda: len(harness.calls.asked) == 2)
    await clock.advance(60, turns=0)

    await until(lambda: len(harness.calls.asked) >= 4)
    ingested = harness.ingested_rows()
    depths = [harness.now - window.since for window in harness.calls.asked]
    harness.calls.hold.set()
    settlement = await poll

    assert ingested == {"2": 1}
    assert [depth > timedelta(hours=3) for depth in depths[:4]] == [False, True, False, False]
    assert settlement is not None
    assert (await harness.state()).poll_state.reached.keys() == {7200, 280_800}


async def test_a_provider_whose_clock_is_hours_ahead_delays_no_call(harness: PollHarness) -> None:
    """Its newest calls start later than our now, so a list with an upper bound is asked for as much more."""
    harness.simulator.clock_skew_s = 7200

    await polls(harness, every_s=30, times=2)

    assert harness.calls.asked[-1].until - harness.now == timedelta(hours=2)


async def test_a_list_without_an_end_is_an_error_of_the_poll(
    harness: PollHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page comes within its own time limit, and the pages never end: the poll has one deadline."""
    await begun(harness)
    monkeypatch.setattr("relay.polling.poller.NEAR_DEADLINE_S", 0.2)

    async def endless(window: Window) -> Any:
        while True:
            yield CallPage([])
            await asyncio.sleep(0.01)

    harness.calls.pages = endless  # type: ignore[method-assign]
    before = (await harness.state()).poll_state
    settlement = await harness.poll()

    state = await harness.state()
    assert settlement is not None
    assert "took longer than" in state.error
    assert state.poll_state == before


async def test_a_poll_whose_pages_come_slowly_is_one_poll(harness: PollHarness) -> None:
    """Two minutes between pages: as long as its process lives, no other one polls, and the cursor moves."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, harness.now, talk_s=1) for rid in range(1, 241)])
    await harness.clock.advance(30, turns=0)
    pages, ours, other = harness.calls.pages, harness.lane.process, Lane(harness.redis, "poll")
    claims: list[int] = []

    async def slow(window: Window) -> Any:
        async for page in pages(window):
            for _ in range(40):  # three seconds between two heartbeats
                await harness.redis.zincrby(queue_keys.PROCESSES, -3000, ours.id)
                await ours.beat()
                await other.process.beat()
            claims.append(len((await other.exchange(want=1)).claims))
            yield page

    harness.calls.pages = slow  # type: ignore[method-assign]
    settlement = await harness.poll()

    assert settlement is not None
    assert claims == [0] * 4
    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 241)}
    assert (await harness.state()).poll_state.cursor == START + timedelta(seconds=30)


async def test_what_a_tier_owes_is_reported_until_it_is_read(harness: PollHarness) -> None:
    """The source is not failing; the gap has its bounds and its reason, in the state and in the log, once."""
    await begun(harness)
    harness.calls.deepest = timedelta(hours=24)
    with capture_logs() as logs:
        await polls(harness, every_s=60, times=60)
        state = await harness.state()
        harness.calls.deepest = None
        await polls(harness, every_s=300, times=24)

    (failure,) = state.poll_state.failing.values()
    assert not state.error
    assert "504" in failure.error
    assert failure.since < failure.until < harness.now
    reports = [log for log in logs if log["event"].startswith("source_gap")]
    assert [log["event"] for log in reports] == ["source_gap_opened", "source_gap_closed"]
    assert "could not be read: " in reports[0]["reason"]
    assert not (await harness.state()).poll_state.failing


async def test_an_outage_that_cannot_be_read_at_once_delays_no_new_call(harness: PollHarness) -> None:
    """The relay was down for ten days, and the provider answers for a day at most: new calls first, the rest later."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=rid)) for rid in range(1, 260)])
    await harness.clock.advance(10 * 86_400, turns=0)
    harness.calls.deepest = timedelta(hours=24)

    await harness.poll()
    first = set(harness.ingested_rows())
    await polls(harness, every_s=300, times=12)
    harness.calls.deepest = None
    await polls(harness, every_s=300, times=20 * 12)

    assert str(10 * 24 - 1) in first
    assert harness.ingested_rows() == {str(rid): 1 for rid in range(1, 260)}


async def test_a_process_that_dies_before_the_history_is_read_leaves_it_owed(harness: PollHarness) -> None:
    """The near look of the first poll succeeded; the next process reads the rest, and publishes none of it."""
    harness.simulator.add_calls(KEY, [call(rid, START - timedelta(hours=rid)) for rid in range(1, 70)])
    harness.calls.killed_beyond = timedelta(hours=3)
    await harness.poll()
    harness.calls.killed_beyond = None

    await polls(harness, every_s=30, times=2)

    assert not harness.ingested_rows()
    assert sum(map(len, (await harness.seen()).values())) == 69


# Beginning


async def test_the_first_poll_records_earlier_calls_and_publishes_none(harness: PollHarness) -> None:
    """Subscribers do not want last week's calls when the relay is installed; the log shows what happened."""
    harness.simulator.add_calls(KEY, [call(rid, START - timedelta(minutes=20 * rid)) for rid in range(1, 215)])

    with capture_logs() as logs:
        await harness.poll()
        await polls(harness, every_s=30, times=3)

    assert not harness.ingested_rows()
    texts = [log["text"] for log in logs if log["event"] == "source_first_polled"]
    assert texts == ["214 calls of the last 78 h recorded, none published; waiting for calls."]
    assert (await harness.state()).poll_state.started_at == START


async def test_the_relays_start_is_written_before_the_first_response(harness: PollHarness) -> None:
    """The provider is down for two days at first: calls since then are published, earlier ones are not."""
    harness.simulator.add_calls(
        KEY, [call(1, START - timedelta(hours=1)), call(2, START + timedelta(hours=1)), call(3, START, talk_s=5)]
    )
    await harness.poll(PollFault.DOWN)
    await harness.clock.advance(2 * 86_400, turns=0)

    with capture_logs() as logs:
        await harness.poll()

    assert harness.ingested_rows() == {"2": 1, "3": 1}
    (text,) = [log["text"] for log in logs if log["event"] == "source_first_polled"]
    assert text == "1 call of the 78 h before the relay recorded, 2 since then published; waiting for calls."


async def test_a_call_in_progress_when_the_relay_starts_is_ingested_when_it_ends(harness: PollHarness) -> None:
    """It was recorded as unfinished, and never published."""
    ended = Change(START + timedelta(minutes=20), {"disposition": "ANSWERED"})
    began = START - timedelta(minutes=5)
    harness.simulator.add_calls(
        KEY, [call(1, began, visible_at=began, disposition="IN PROGRESS", changes=(ended,)), call(2, began)]
    )
    await harness.poll()
    assert not harness.ingested_rows()

    await polls(harness, every_s=300, times=6)

    assert harness.ingested_rows() == {"1": 1}


async def test_a_first_poll_that_dies_half_way_publishes_nothing_later(harness: PollHarness) -> None:
    """What it had not ingested is still from before the relay."""
    harness.simulator.add_calls(KEY, [call(rid, START - timedelta(minutes=rid)) for rid in range(1, 200)])

    await harness.poll(PollFault.KILLED_HALF_WAY)
    await polls(harness, every_s=130, times=2)

    assert not harness.ingested_rows()


# Recovery


async def lived(harness: PollHarness) -> None:
    """A source with three days behind it, and a store that is then lost."""
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=rid)) for rid in range(-20, 100) if rid])
    await harness.poll()
    await polls(harness, every_s=600, times=6 * 72)
    harness.ingested.outcomes.clear()
    await harness.lose_the_store()


async def test_an_empty_store_is_recovered_from_the_marker_with_the_same_ids(harness: PollHarness) -> None:
    """It is not a first run: unpublished calls are published, older ones again under the ids that subscribers know."""
    await lived(harness)
    await harness.clock.advance(12 * 3600, turns=0)

    with capture_logs() as logs:
        await harness.poll()

    assert "source_recovery_started" in [log["event"] for log in logs]
    assert {str(rid) for rid in range(1, 84)} == set(harness.ingested_rows())
    assert await harness.redis.exists(keys.call(ids.call_id(SID, "83")))
    assert (await harness.state()).poll_state.started_at == START


async def test_a_recovery_that_dies_continues_as_a_recovery(harness: PollHarness) -> None:
    """It neither becomes a first run nor reaches back to when the relay began, which may be years ago."""
    await lived(harness)

    await harness.poll(PollFault.KILLED_HALF_WAY)
    killed = len(harness.calls.asked)
    await harness.poll()

    assert harness.calls.asked[killed].since == harness.calls.asked[killed - 1].since
    assert {str(rid) for rid in range(1, 72)} <= set(harness.ingested_rows())


async def test_an_unreadable_storage_is_not_a_first_run(harness: PollHarness) -> None:
    """The store is empty and the bucket unavailable: the source waits and reports it, and loses no call."""
    await lived(harness)
    harness.notes.out_of_order = True
    for _ in range(5):
        await harness.poll()
    asked = len(harness.calls.asked)
    assert [event["type"] for event in await harness.operational_events()] == ["source.error"]

    harness.notes.out_of_order = False
    await harness.poll()

    assert len(harness.calls.asked) == asked + 2, "the near look and the deepest one"
    assert {str(rid) for rid in range(1, 72)} <= set(harness.ingested_rows())


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"started_at": "yesterday"}', b'{"started_at": 7, "cursor": 7}'])
async def test_a_damaged_marker_is_not_a_first_run(harness: PollHarness, damaged: bytes) -> None:
    """A person decides: the message names the file and what deleting it means."""
    await lived(harness)
    harness.notes.kept[f"markers/{SID}.json"] = damaged

    await harness.poll()

    state = await harness.state()
    assert state.poll_state.started_at is None
    assert f"markers/{SID}.json" in state.error
    assert not harness.ingested_rows()


async def test_the_marker_is_rewritten_every_hour(harness: PollHarness) -> None:
    """It follows the cursor, at the price of one small write."""
    harness.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=rid)) for rid in range(1, 300)])
    await harness.poll()
    written = harness.notes.writes

    await polls(harness, every_s=60, times=240)

    assert harness.notes.writes == written + 4
    marker = harness.marker()
    assert marker is not None
    assert harness.now - from_iso(marker["cursor"]) < timedelta(minutes=65)


async def test_a_failed_marker_is_retried_soon(harness: PollHarness) -> None:
    """Not only an hour later, and not with each poll either, which the storage would slow down."""
    await begun(harness)
    harness.notes.out_of_order = True
    with capture_logs() as logs:
        await polls(harness, every_s=60, times=70)
    refused = sum(log["event"] == "marker_write_failed" for log in logs)

    harness.notes.out_of_order = False
    before = harness.notes.writes
    await polls(harness, every_s=60, times=6)

    assert 2 <= refused <= 3
    assert harness.notes.writes == before + 1


# Trouble


WAITS: dict[str, tuple[PollFault, Sequence[float]]] = {
    "down": (PollFault.DOWN, [30, 60, 120, 240, 300, 300]),
    "refused": (PollFault.REFUSED, [PAUSE_S, PAUSE_S]),
    "odd": (PollFault.NOT_JSON, [30, 60, 120]),
    "too many, without a hint": (PollFault.TOO_MANY, [30, 30]),
}


@pytest.mark.parametrize(("fault", "waits_s"), WAITS.values(), ids=WAITS)
async def test_failed_polls_back_off(harness: PollHarness, fault: PollFault, waits_s: Sequence[float]) -> None:
    """A provider that is down is not hammered; a rejected key waits 15 minutes; a success restores the interval."""
    found = [settlement.after_ms for _ in waits_s if (settlement := await harness.poll(fault))]
    last = await harness.poll()

    assert found == pytest.approx([wait_s * 1000 for wait_s in waits_s], abs=1)
    assert last is not None
    assert 29_000 < last.after_ms <= 30_001


async def test_a_retry_after_of_the_provider_is_honoured(harness: PollHarness) -> None:
    """`Retry-After: 77` is 77 seconds."""
    refusal = Fault(kind=FaultKind.STATUS, status=429)
    answer = harness.simulator.records

    def hinting(*args: Any, **faults: Any) -> Any:
        return replace(answer(*args, **faults), headers={"Retry-After": "77"})

    harness.simulator.records = hinting  # type: ignore[method-assign]
    settlement = await harness.poll(PollFault.NONE, refusal)

    assert settlement is not None
    assert settlement.after_ms == pytest.approx(77_000, abs=1)


async def test_a_rejected_key_is_published_at_once_and_a_passing_failure_is_not(harness: PollHarness) -> None:
    """One time-out is routine; five in a row are published, and so is a rejected key."""
    await begun(harness)
    for _ in range(4):
        await harness.poll(PollFault.DOWN)
    await harness.poll()
    assert await harness.operational_events() == []

    await harness.poll(PollFault.REFUSED)
    await harness.poll(PollFault.REFUSED)
    await harness.poll()
    for _ in range(6):
        await harness.poll(PollFault.DOWN)
    await harness.poll()

    events = await harness.operational_events()
    assert [event["type"] for event in events] == ["source.error", "source.recovered"] * 2
    assert len({event["id"] for event in events}) == 4
    assert "rejected the key" in events[0]["data"]["source"]["error"]
    assert KEY not in json.dumps(events)


async def test_a_recovery_that_was_not_published_is_published_by_the_next_poll(harness: PollHarness) -> None:
    """The process ended between the successful poll and the event."""
    await begun(harness)
    await harness.poll(PollFault.REFUSED)
    await harness.poll()
    await harness.store.sources.note(SID, error_published=True)

    await harness.poll()

    assert not (await harness.state()).error_published
    assert [event["type"] for event in await harness.operational_events()] == ["source.error", "source.recovered"]


async def test_an_exhausted_budget_waits_and_is_not_an_error(harness: PollHarness) -> None:
    """Our own share is used up for 12 s: the poll is due then."""
    await begun(harness)

    async def pages(window: Window) -> Any:
        raise OverBudget(12)
        yield CallPage([])

    before = metric("relay_polls_total", outcome="over_budget")
    harness.calls.pages = pages  # type: ignore[method-assign]
    settlement = await harness.poll()

    assert settlement is not None
    assert settlement.after_ms == 12_001
    assert not (await harness.state()).error
    assert metric("relay_polls_total", outcome="over_budget") == before + 1


async def test_a_poll_without_its_lease_changes_nothing(harness: PollHarness) -> None:
    """Another poller was quicker; the stale answer brings neither old rows nor an old cursor back."""
    await begun(harness)
    harness.simulator.add_calls(
        KEY,
        [
            call(1, harness.now, changes=(Change(harness.now + timedelta(minutes=12), {"cidname_outside": "NEW"}),)),
            call(2, harness.now + timedelta(minutes=11)),
        ],
    )
    await harness.clock.advance(300, turns=0)
    await harness.poll()
    await harness.clock.advance(300, turns=0)

    settled = await harness.poll(PollFault.OVERTAKEN)
    state = await harness.state()
    await polls(harness, every_s=30, times=2)

    assert settled is None
    assert state.last_poll == START + timedelta(seconds=30 + 600 + 600)
    assert (harness.ingested_rows(), harness.ingested_rows(RowOutcome.CHANGED)) == ({"1": 1, "2": 1}, {"1": 1})


async def test_a_failure_after_the_lease_ended_is_not_recorded(harness: PollHarness) -> None:
    """A poller that was asleep wake_ups up to a time-out; the source has been polled well by another one since."""
    await begun(harness)
    answer = harness.calls.pages

    async def slow(window: Window) -> Any:
        harness.calls.pages = answer  # type: ignore[method-assign]
        await harness._overtake()
        harness.calls.fault = PollFault.REFUSED
        async for page in answer(window):
            yield page

    harness.calls.pages = slow  # type: ignore[method-assign]
    settled = await harness.poll()

    assert settled is None
    assert not (await harness.state()).error
    assert await harness.operational_events() == []


async def test_an_unreadable_key_file_is_an_error_and_not_a_crash(
    redis: Redis, clock: ManualClock, tmp_path: Path
) -> None:
    """It is being replaced: the source reports it and continues when the key is there."""
    file = tmp_path / "key"
    harness = PollHarness(redis, clock, api_key=None, api_key_file=str(file))
    settlement = await harness.poll()
    state = await harness.state()
    file.write_text(KEY)
    await harness.poll()

    assert settlement is not None
    assert isinstance(settlement, Retry)
    assert "api_key_file" in state.error
    assert (await harness.state()).last_poll is not None


async def test_a_source_that_is_paused_or_gone_leaves_the_lane(harness: PollHarness) -> None:
    """It comes back with the sweep when it is wanted again."""
    harness.source = replace(harness.source, options=harness.options.model_copy(update={"enabled": False}))

    settlement = await harness.poll()

    assert settlement is not None
    assert settlement == Done()
    assert not harness.calls.asked


async def test_polls_are_measured(harness: PollHarness) -> None:
    """Rows by what became of them, calls by how late they were found, polls by how they ended."""
    await begun(harness)
    harness.simulator.add_calls(KEY, [call(1, harness.now, talk_s=1), call(2, harness.now, talk_s=1)])
    names = [("relay_rows_total", {"kind": kind}) for kind in ("new", "known", "changed", "quarantined")]
    names += [("relay_calls_admitted_total", {"tier": "2h"}), ("relay_polls_total", {"outcome": "ok"})]
    names += [("relay_polls_total", {"outcome": "unauthorized"})]
    before = [metric(name, **labels) for name, labels in names]

    await polls(harness, every_s=30, times=2)
    await harness.poll(PollFault.REFUSED)

    assert [metric(name, **labels) - was for (name, labels), was in zip(names, before, strict=True)] == [
        2, 2, 0, 0, 2, 2, 1,
    ]  # fmt: skip
    assert harness.woken == 1
