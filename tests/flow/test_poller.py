"""One source, poll by poll, on a clock of the test's own: each way in which a poller loses calls, and what it does."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.domain import ids
from relay.domain.clock import ManualClock
from relay.domain.time import from_iso
from relay.errors import OverBudget
from relay.polling.poller import PAUSE_S
from relay.providers.base import CallPage, Window
from relay.queue.settlement import Done, Retry
from relay.simulator.timeline import CallPlan, Change
from relay.store import keys
from relay.store.codes import RowOutcome
from tests.fakes.faults import Fault, FaultKind
from tests.flow.polling import KEY, SID, Mishap, Office

START = datetime(2025, 7, 1, 12, tzinfo=UTC)
ODD = (Mishap.NOT_JSON, Mishap.SUCCESS_FALSE, Mishap.WRONG_COUNT, Mishap.PARTIAL)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START)


@pytest.fixture
def office(redis: Redis, clock: ManualClock) -> Office:
    return Office(redis, clock)


def call(rid: int, started_at: datetime, *, talk_s: float = 30, late_s: float = 0, **fields: Any) -> CallPlan:
    """A call that is listed when it ends, or `late_s` later."""
    ended = started_at + timedelta(seconds=talk_s)
    visible = fields.pop("visible_at", ended + timedelta(seconds=late_s))
    return CallPlan(rid=rid, started_at=started_at, ended_at=ended, visible_at=visible, **fields)


async def polls(office: Office, *, every_s: float, times: int) -> None:
    for _ in range(times):
        await office.clock.advance(every_s, turns=0)
        await office.poll()


async def begun(office: Office) -> None:
    """The first poll, of an account that had no calls."""
    await office.poll()
    await office.clock.advance(30, turns=0)


def metric(name: str, **labels: str) -> float:
    """What a counter stands at; those of a process are shared by its tests."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


# What pollers lose


async def test_calls_of_one_second_that_appear_one_after_the_other(office: Office) -> None:
    """The provider lists what started after a second, and the second call of that second comes later."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(1, office.now, talk_s=10), call(2, office.now, talk_s=90)])

    await polls(office, every_s=30, times=4)

    assert office.told() == {"1": 1, "2": 1}


async def test_a_long_call_that_appears_behind_the_cursor(office: Office) -> None:
    """Six hours of talk: when it is listed, hundreds of newer calls have moved the cursor on."""
    await begun(office)
    newer = [call(rid, office.now + timedelta(minutes=rid)) for rid in range(2, 350)]
    office.simulator.add_calls(KEY, [call(1, office.now, talk_s=6 * 3600), *newer])

    await polls(office, every_s=300, times=80)

    assert office.told() == {str(rid): 1 for rid in range(1, 350)}


async def test_a_call_that_is_listed_20_hours_late(office: Office) -> None:
    """The provider's own records were delayed: a deeper look finds it within a quarter of an hour."""
    await begun(office)
    started = office.now
    office.simulator.add_calls(KEY, [call(1, started, late_s=20 * 3600)])
    before = metric("relay_calls_admitted_total", tier="26h")

    await polls(office, every_s=300, times=20 * 12 + 4)

    assert office.told() == {"1": 1}
    assert metric("relay_calls_admitted_total", tier="26h") == before + 1


async def test_a_row_that_changes_later_is_told_once_more_and_a_cosmetic_change_not_at_all(office: Office) -> None:
    """A name is corrected; then a field appears that nobody is told of."""
    await begun(office)
    changes = [
        Change(office.now + timedelta(minutes=5), {"cidname_outside": "CORRECTED"}),
        Change(office.now + timedelta(minutes=10), {"a_field_of_their_own": 7}),
    ]
    office.simulator.add_calls(KEY, [call(1, office.now, changes=tuple(changes))])

    await polls(office, every_s=60, times=20)

    assert (office.told(), office.told(RowOutcome.CHANGED)) == ({"1": 1}, {"1": 1})
    stored = await office.call(1)
    assert stored is not None
    assert stored.record["from"]["name"] == "CORRECTED"


async def test_a_call_is_listed_while_it_goes_on(office: Office) -> None:
    """It is known as unfinished, and changes once: when it ends."""
    await begun(office)
    ended = Change(office.now + timedelta(minutes=20), {"disposition": "ANSWERED"})
    office.simulator.add_calls(
        KEY, [call(1, office.now, visible_at=office.now, disposition="IN PROGRESS", changes=(ended,))]
    )

    await polls(office, every_s=300, times=2)
    unfinished = await office.call(1)
    await polls(office, every_s=300, times=4)

    finished = await office.call(1)
    assert (unfinished and unfinished.finished, finished and finished.finished) == (False, True)
    assert (office.told(), office.told(RowOutcome.CHANGED)) == ({"1": 1}, {"1": 1})


@pytest.mark.parametrize("skew_s", [-300, 300])
async def test_a_providers_clock_that_is_off(office: Office, skew_s: int) -> None:
    """Five minutes off, either way: nothing is lost, the cursor is never ahead of our time, and it is said once."""
    office.simulator.clock_skew_s = skew_s
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=rid)) for rid in range(1, 60)])
    with capture_logs() as logs:
        for _ in range(80):
            await office.poll()
            state = await office.state()
            assert state.poll_state.cursor is not None
            assert state.poll_state.cursor <= office.now
            await office.clock.advance(60, turns=0)
        office.simulator.clock_skew_s = 0
        office.simulator.date_header = lambda: {"Date": office.now.strftime("%a, %d %b %Y %H:%M:%S GMT")}  # type: ignore[method-assign]
        await office.poll()

    assert office.told() == {str(rid): 1 for rid in range(1, 60)}
    said = [(log["event"], log.get("provider_ahead_s")) for log in logs if log["event"].startswith("clock_skew")]
    assert said == [("clock_skew_detected", skew_s), ("clock_skew_resolved", None)]


async def test_a_first_poll_that_succeeds_late_knows_when_the_relay_began_by_the_providers_clock(
    office: Office,
) -> None:
    """The provider is five minutes behind and was down at first: a call of after the relay's start is not old."""
    office.simulator.clock_skew_s = -300
    office.simulator.add_calls(KEY, [call(1, START - timedelta(minutes=2)), call(2, START + timedelta(minutes=1))])

    await office.poll(Mishap.DOWN)
    await polls(office, every_s=600, times=1)

    assert office.told() == {"2": 1}


FALL_BACK, SPRING_FORWARD = datetime(2025, 11, 2, 4, tzinfo=UTC), datetime(2025, 3, 9, 5, tzinfo=UTC)


@pytest.mark.parametrize("start", [FALL_BACK, SPRING_FORWARD], ids=["fall back", "spring forward"])
async def test_clocks_that_change(redis: Redis, start: datetime) -> None:
    """The rows carry local times: an hour comes twice, or not at all."""
    office = Office(redis, ManualClock(start), zone="America/New_York")
    await begun(office)
    office.simulator.add_calls(KEY, [call(rid, start + timedelta(minutes=3 * rid)) for rid in range(1, 120)])

    await polls(office, every_s=120, times=200)

    assert office.told() == {str(rid): 1 for rid in range(1, 120)}
    assert not office.told(RowOutcome.CHANGED)


@pytest.mark.parametrize("configured", ["Etc/GMT-14", "Etc/GMT+9", "Asia/Kolkata"])
async def test_a_zone_that_is_configured_wrong(redis: Redis, configured: str) -> None:
    """Up to 14 hours off: no call is lost, and the log says what zone the rows seem to have."""
    office = Office(redis, ManualClock(START), zone="UTC", timezone=configured)
    await begun(office)
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=3 * rid)) for rid in range(1, 60)])

    with capture_logs() as logs:
        await polls(office, every_s=60, times=240)

    assert office.told() == {str(rid): 1 for rid in range(1, 60)}
    hints = [log["rows_look_like"] for log in logs if log["event"] == "timezone_mismatch_detected"]
    assert hints == ["UTC+00:00"]


async def test_a_zone_that_fits_is_not_talked_about(office: Office) -> None:
    """A busy day with long calls between the short ones: silence."""
    await begun(office)
    office.simulator.add_calls(
        KEY, [call(rid, START + timedelta(minutes=3 * rid), talk_s=20 + 900 * (rid % 3)) for rid in range(1, 100)]
    )

    with capture_logs() as logs:
        await polls(office, every_s=60, times=330)

    assert not [log for log in logs if log["event"].startswith("timezone")]
    assert (await office.state()).zone_off_s == 0


@pytest.mark.parametrize("mishap", [Mishap.KILLED_HALF_WAY, Mishap.KILLED_AT_THE_END, Mishap.KILLED])
async def test_a_poll_that_dies_moves_no_cursor(office: Office, mishap: Mishap) -> None:
    """Some chunks were taken in, the rest was not: the next poll asks from where this one began."""
    await begun(office)
    before = (await office.state()).poll_state
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(seconds=rid)) for rid in range(1, 200)])
    await office.clock.advance(600, turns=0)

    await office.poll(mishap)
    half_way, after = len(office.told()), (await office.state()).poll_state
    await office.poll()

    assert after == before
    assert half_way == {Mishap.KILLED: 0, Mishap.KILLED_HALF_WAY: 100, Mishap.KILLED_AT_THE_END: 150}[mishap]
    assert office.told() == {str(rid): 1 for rid in range(1, 200)}


async def test_an_outage_of_ten_days(office: Office) -> None:
    """Longer than the deepest look and than the floor: each tier reaches back from its own last success."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=rid)) for rid in range(1, 240)])

    await office.clock.advance(10 * 86_400, turns=0)
    await office.poll()

    assert office.told() == {str(rid): 1 for rid in range(1, 240)}


async def test_a_source_that_was_edited_and_redeployed_goes_on_where_it_stood(redis: Redis, office: Office) -> None:
    """Another poller, with other tiers in mind, finds the cursor in the store."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(1, office.now)])
    await polls(office, every_s=60, times=1)
    deployed = Office(redis, office.clock, poll_interval_s=5)
    deployed.simulator = deployed.calls.simulator = office.simulator

    with capture_logs() as logs:
        await polls(deployed, every_s=60, times=3)

    assert not deployed.told()
    assert not [log for log in logs if log["event"] == "source_first_polled"]


@pytest.mark.parametrize("mishap", ODD)
async def test_an_odd_answer_moves_no_cursor_and_is_said_once(office: Office, mishap: Mishap) -> None:
    """Two hundred and all is well, but the body contradicts itself: an error, until it does not."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(1, office.now)])
    before = (await office.state()).poll_state
    await office.clock.advance(60, turns=0)

    for _ in range(3):
        await office.poll(mishap)
    during = await office.state()
    await office.poll()
    await office.poll()

    assert during.poll_state == before
    assert during.failures == 3
    assert [event["type"] for event in await office.said()] == ["source.error", "source.recovered"]
    assert office.told() == {"1": 1}


async def test_a_bad_row_does_not_hide_its_neighbours(office: Office) -> None:
    """Nonsense between good rows is put aside, once, with the reason; the log says so once."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(rid, office.now) for rid in range(1, 5)])
    await office.clock.advance(60, turns=0)
    garbage = Fault(kind=FaultKind.GARBAGE, at=office.now)

    with capture_logs() as logs:
        await office.poll(Mishap.NONE, garbage)
        await office.poll(Mishap.NONE, garbage)

    assert {"1", "2", "3", "4"} <= set(office.told())
    put_aside = await office.store.sources.quarantined(SID)
    assert len(put_aside) == 9
    assert "rid is missing" in {entry.reason for entry in put_aside}
    assert [log["rows"] for log in logs if log["event"] == "rows_quarantined"] == [9]


async def test_a_row_of_the_far_future_is_put_aside_and_leads_nothing_astray(office: Office) -> None:
    """More than 26 hours ahead is no time zone. One of five hours ahead is taken in, and the cursor stays at now."""
    await begun(office)
    at = office.now
    office.simulator.add_calls(
        KEY,
        [
            call(1, at + timedelta(hours=27), visible_at=at),
            call(2, at + timedelta(hours=5), visible_at=at),
            call(3, at, talk_s=1),
        ],
    )

    await office.poll()
    await polls(office, every_s=30, times=1)

    assert office.told() == {"2": 1, "3": 1}
    assert (await office.state()).poll_state.cursor == office.now
    (entry,) = await office.store.sources.quarantined(SID)
    assert "future" in str(entry.reason)


async def test_very_many_rows_make_short_looks(office: Office) -> None:
    """A call centre: once a look brings over 2,000 rows, most looks are short; then it is quiet and they are not."""
    await begun(office)
    busy = [call(rid, START + timedelta(seconds=rid // 2)) for rid in range(1, 2200)]
    quiet = [call(rid, START + timedelta(minutes=10 * (rid - 3000))) for rid in range(3004, 3024)]
    office.simulator.add_calls(KEY, [*busy, *quiet])

    await polls(office, every_s=60, times=28)
    heavy = (await office.state()).poll_state.heavy
    looks = [(window.until - window.since).total_seconds() for window in office.calls.asked[-6:]]
    await polls(office, every_s=300, times=36)

    assert heavy
    assert sorted(look < 1500 for look in looks) == [False] * 3 + [True] * 3
    assert not (await office.state()).poll_state.heavy
    assert set(office.told()) == {str(plan.rid) for plan in (*busy, *quiet) if plan.visible_at <= office.now}


async def test_rows_below_the_floor_are_counted_and_not_taken_for_new(office: Office) -> None:
    """A provider that ignores the lower bound sends years of calls: `seen` does not know them any more."""
    await begun(office)
    answer = office.calls.pages
    record = office.row  # how a row is read

    async def everything(window: Window) -> Any:
        async for page in answer(Window(START - timedelta(days=400), window.until)):
            yield page

    office.calls.pages = everything  # type: ignore[method-assign]
    old, edge = office.now - timedelta(days=30), office.now - timedelta(hours=95)
    office.simulator.add_calls(KEY, [call(1, old), call(2, edge), call(3, office.now, talk_s=1)])
    await polls(office, every_s=30, times=1)

    assert record(1)
    assert office.told() == {"2": 1, "3": 1}
    assert await office.redis.hget(keys.source(SID), "too_old") == b"1"


async def test_seen_forgets_old_days_and_nothing_is_told_again(office: Office) -> None:
    """Three weeks of calls: `seen` keeps eight days or so, and no row that comes back is new."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=2 * rid)) for rid in range(1, 250)])

    await polls(office, every_s=3600, times=21 * 24)

    days = sorted(await office.seen())
    assert office.told() == {str(rid): 1 for rid in range(1, 250)}
    assert 7 <= len(days) <= 9
    assert days[-1] == office.now.date().isoformat() or days[-1] == (office.now - timedelta(days=1)).date().isoformat()


# Beginning


async def test_the_first_poll_knows_what_was_there_and_sends_none(office: Office) -> None:
    """Nobody wants last week's calls when they install the relay; and the log says what happened."""
    office.simulator.add_calls(KEY, [call(rid, START - timedelta(minutes=20 * rid)) for rid in range(1, 215)])

    with capture_logs() as logs:
        await office.poll()
        await polls(office, every_s=30, times=3)

    assert not office.told()
    texts = [log["text"] for log in logs if log["event"] == "source_first_polled"]
    assert texts == ["214 calls of the last 78 h recorded, none published; waiting for calls."]
    assert (await office.state()).poll_state.started_at == START


async def test_when_the_relay_began_is_written_before_the_first_answer(office: Office) -> None:
    """The provider is down for two days at first: what started since then is told, what was before is not."""
    office.simulator.add_calls(
        KEY, [call(1, START - timedelta(hours=1)), call(2, START + timedelta(hours=1)), call(3, START, talk_s=5)]
    )
    await office.poll(Mishap.DOWN)
    await office.clock.advance(2 * 86_400, turns=0)

    with capture_logs() as logs:
        await office.poll()

    assert office.told() == {"2": 1, "3": 1}
    (text,) = [log["text"] for log in logs if log["event"] == "source_first_polled"]
    assert text == "1 call of the 78 h before the relay recorded, 2 since then published; waiting for calls."


async def test_a_call_that_goes_on_when_the_relay_begins_is_told_when_it_ends(office: Office) -> None:
    """It was known as unfinished, and nobody has heard of it."""
    ended = Change(START + timedelta(minutes=20), {"disposition": "ANSWERED"})
    began = START - timedelta(minutes=5)
    office.simulator.add_calls(
        KEY, [call(1, began, visible_at=began, disposition="IN PROGRESS", changes=(ended,)), call(2, began)]
    )
    await office.poll()
    assert not office.told()

    await polls(office, every_s=300, times=6)

    assert office.told() == {"1": 1}


async def test_a_first_poll_that_dies_half_way_tells_nothing_later(office: Office) -> None:
    """What it had not taken in is still from before the relay."""
    office.simulator.add_calls(KEY, [call(rid, START - timedelta(minutes=rid)) for rid in range(1, 200)])

    await office.poll(Mishap.KILLED_HALF_WAY)
    await polls(office, every_s=130, times=2)

    assert not office.told()


# Recovery


async def lived(office: Office) -> None:
    """A source with three days behind it, and a store that is then lost."""
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(hours=rid)) for rid in range(-20, 100) if rid])
    await office.poll()
    await polls(office, every_s=600, times=6 * 72)
    office.ingested.outcomes.clear()
    await office.lose_the_store()


async def test_an_empty_store_is_recovered_from_the_marker_with_the_same_ids(office: Office) -> None:
    """It is no first run: calls that nobody heard are told, the older ones again under ids that subscribers know."""
    await lived(office)
    await office.clock.advance(12 * 3600, turns=0)

    with capture_logs() as logs:
        await office.poll()

    assert "source_recovery_started" in [log["event"] for log in logs]
    assert {str(rid) for rid in range(1, 84)} == set(office.told())
    assert await office.redis.exists(keys.call(ids.call_id(SID, "83")))
    assert (await office.state()).poll_state.started_at == START


async def test_a_recovery_that_dies_goes_on_as_a_recovery(office: Office) -> None:
    """It neither becomes a first run nor reaches back to when the relay began, which may be years ago."""
    await lived(office)

    await office.poll(Mishap.KILLED_HALF_WAY)
    await office.poll()

    assert office.calls.asked[-1].since == office.calls.asked[-2].since
    assert {str(rid) for rid in range(1, 72)} <= set(office.told())


async def test_a_storage_that_cannot_be_read_is_no_first_run(office: Office) -> None:
    """The store is empty and the bucket is away: the source waits, and says so, rather than to forget what it owes."""
    await lived(office)
    office.notes.out_of_order = True
    for _ in range(5):
        await office.poll()
    asked = len(office.calls.asked)
    assert [event["type"] for event in await office.said()] == ["source.error"]

    office.notes.out_of_order = False
    await office.poll()

    assert len(office.calls.asked) == asked + 1
    assert {str(rid) for rid in range(1, 72)} <= set(office.told())


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"started_at": "yesterday"}', b'{"started_at": 7, "cursor": 7}'])
async def test_a_damaged_marker_is_no_first_run(office: Office, damaged: bytes) -> None:
    """A person decides: the sentence says which file it is and what deleting it means."""
    await lived(office)
    office.notes.kept[f"markers/{SID}.json"] = damaged

    await office.poll()

    state = await office.state()
    assert state.poll_state.started_at is None
    assert f"markers/{SID}.json" in state.error
    assert not office.told()


async def test_the_marker_is_renewed_each_hour(office: Office) -> None:
    """It follows the cursor, at the price of one small write."""
    office.simulator.add_calls(KEY, [call(rid, START + timedelta(minutes=rid)) for rid in range(1, 300)])
    await office.poll()
    written = office.notes.writes

    await polls(office, every_s=60, times=240)

    assert office.notes.writes == written + 4
    marker = office.marker()
    assert marker is not None
    assert office.now - from_iso(marker["cursor"]) < timedelta(minutes=65)


async def test_a_marker_that_could_not_be_written_is_tried_again_soon(office: Office) -> None:
    """Not only an hour later, and not with each poll either, which the storage would slow down."""
    await begun(office)
    office.notes.out_of_order = True
    with capture_logs() as logs:
        await polls(office, every_s=60, times=70)
    refused = sum(log["event"] == "marker_write_failed" for log in logs)

    office.notes.out_of_order = False
    before = office.notes.writes
    await polls(office, every_s=60, times=6)

    assert 2 <= refused <= 3
    assert office.notes.writes == before + 1


# Trouble


WAITS: dict[str, tuple[Mishap, Sequence[float]]] = {
    "down": (Mishap.DOWN, [30, 60, 120, 240, 300, 300]),
    "refused": (Mishap.REFUSED, [PAUSE_S, PAUSE_S]),
    "odd": (Mishap.NOT_JSON, [30, 60, 120]),
    "too many, without a hint": (Mishap.TOO_MANY, [30, 30]),
}


@pytest.mark.parametrize(("mishap", "waits_s"), WAITS.values(), ids=WAITS)
async def test_trouble_is_asked_again_after_longer_and_longer_waits(
    office: Office, mishap: Mishap, waits_s: Sequence[float]
) -> None:
    """A provider that is down is not hammered; a refused key waits a quarter of an hour; success goes on as before."""
    found = [settlement.after_ms for _ in waits_s if (settlement := await office.poll(mishap))]
    last = await office.poll()

    assert found == pytest.approx([wait_s * 1000 for wait_s in waits_s], abs=1)
    assert last is not None
    assert 29_000 < last.after_ms <= 30_001


async def test_a_hint_of_the_provider_is_heeded(office: Office) -> None:
    """`Retry-After: 77` is 77 seconds."""
    refusal = Fault(kind=FaultKind.STATUS, status=429)
    answer = office.simulator.records

    def hinting(*args: Any, **faults: Any) -> Any:
        return replace(answer(*args, **faults), headers={"Retry-After": "77"})

    office.simulator.records = hinting  # type: ignore[method-assign]
    settlement = await office.poll(Mishap.NONE, refusal)

    assert settlement is not None
    assert settlement.after_ms == pytest.approx(77_000, abs=1)


async def test_a_refused_key_is_told_at_once_and_trouble_that_passes_is_not_told(office: Office) -> None:
    """One time-out is nobody's business; five in a row are, and so is a key that is refused."""
    await begun(office)
    for _ in range(4):
        await office.poll(Mishap.DOWN)
    await office.poll()
    assert await office.said() == []

    await office.poll(Mishap.REFUSED)
    await office.poll(Mishap.REFUSED)
    await office.poll()
    for _ in range(6):
        await office.poll(Mishap.DOWN)
    await office.poll()

    said = await office.said()
    assert [event["type"] for event in said] == ["source.error", "source.recovered"] * 2
    assert len({event["id"] for event in said}) == 4
    assert "rejected the key" in said[0]["data"]["source"]["error"]
    assert KEY not in json.dumps(said)


async def test_a_recovery_that_was_not_said_is_said_by_the_next_poll(office: Office) -> None:
    """The process ended between the successful poll and the event."""
    await begun(office)
    await office.poll(Mishap.REFUSED)
    await office.poll()
    await office.store.sources.note(SID, error_published=True)

    await office.poll()

    assert not (await office.state()).error_published
    assert [event["type"] for event in await office.said()] == ["source.error", "source.recovered"]


async def test_a_used_up_budget_waits_and_is_no_error(office: Office) -> None:
    """Our own share is used up for 12 s: the poll is due then."""
    await begun(office)

    async def pages(window: Window) -> Any:
        raise OverBudget(12)
        yield CallPage([])

    before = metric("relay_polls_total", outcome="over_budget")
    office.calls.pages = pages  # type: ignore[method-assign]
    settlement = await office.poll()

    assert settlement is not None
    assert settlement.after_ms == 12_001
    assert not (await office.state()).error
    assert metric("relay_polls_total", outcome="over_budget") == before + 1


async def test_a_poll_whose_lease_ended_changes_nothing(office: Office) -> None:
    """Another poller was quicker; the stale answer brings neither old rows nor an old cursor back."""
    await begun(office)
    office.simulator.add_calls(
        KEY,
        [
            call(1, office.now, changes=(Change(office.now + timedelta(minutes=12), {"cidname_outside": "NEW"}),)),
            call(2, office.now + timedelta(minutes=11)),
        ],
    )
    await office.clock.advance(300, turns=0)
    await office.poll()
    await office.clock.advance(300, turns=0)

    settled = await office.poll(Mishap.OVERTAKEN)
    state = await office.state()
    await polls(office, every_s=30, times=2)

    assert settled is None
    assert state.last_poll == START + timedelta(seconds=30 + 600 + 600)
    assert (office.told(), office.told(RowOutcome.CHANGED)) == ({"1": 1, "2": 1}, {"1": 1})


async def test_a_failure_that_comes_after_the_lease_calls_nothing_broken(office: Office) -> None:
    """A poller that was asleep wake_ups up to a time-out; the source has been polled well by another one since."""
    await begun(office)
    answer = office.calls.pages

    async def slow(window: Window) -> Any:
        office.calls.pages = answer  # type: ignore[method-assign]
        await office._overtake()
        office.calls.mishap = Mishap.REFUSED
        async for page in answer(window):
            yield page

    office.calls.pages = slow  # type: ignore[method-assign]
    settled = await office.poll()

    assert settled is None
    assert not (await office.state()).error
    assert await office.said() == []


async def test_a_key_file_that_cannot_be_read_is_an_error_and_no_crash(
    redis: Redis, clock: ManualClock, tmp_path: Path
) -> None:
    """It is being replaced: the source says so and goes on when the key is there."""
    file = tmp_path / "key"
    office = Office(redis, clock, api_key=None, api_key_file=str(file))
    settlement = await office.poll()
    state = await office.state()
    file.write_text(KEY)
    await office.poll()

    assert settlement is not None
    assert isinstance(settlement, Retry)
    assert "api_key_file" in state.error
    assert (await office.state()).last_poll is not None


async def test_a_source_that_is_paused_or_gone_leaves_the_lane(office: Office) -> None:
    """It comes back with the sweep when it is wanted again."""
    office.source = replace(office.source, options=office.options.model_copy(update={"enabled": False}))

    settlement = await office.poll()

    assert settlement is not None
    assert settlement == Done()
    assert not office.calls.asked


async def test_what_polls_bring_is_measured(office: Office) -> None:
    """Rows by what became of them, calls by how late they were found, polls by how they ended."""
    await begun(office)
    office.simulator.add_calls(KEY, [call(1, office.now, talk_s=1), call(2, office.now, talk_s=1)])
    names = [("relay_rows_total", {"kind": kind}) for kind in ("new", "known", "changed", "quarantined")]
    names += [("relay_calls_admitted_total", {"tier": "2h"}), ("relay_polls_total", {"outcome": "ok"})]
    names += [("relay_polls_total", {"outcome": "unauthorized"})]
    before = [metric(name, **labels) for name, labels in names]

    await polls(office, every_s=30, times=2)
    await office.poll(Mishap.REFUSED)

    assert [metric(name, **labels) - was for (name, labels), was in zip(names, before, strict=True)] == [
        2, 2, 0, 0, 2, 2, 1,
    ]  # fmt: skip
    assert office.woken == 1
