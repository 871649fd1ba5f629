"""What every provider has to do, whatever its document is like: on its simulator, through the real poller and store."""

import re
from collections import Counter
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from redis.asyncio import Redis

from relay.domain.call import Direction, InvalidRow, Outcome, Record
from relay.errors import OverBudget, ProviderError
from relay.providers import PROVIDERS
from relay.providers import http as http_module
from relay.providers.base import Purpose, Window
from relay.providers.source import Source
from relay.simulator.timeline import CallPlan
from relay.store.codes import RowOutcome
from tests.contract.providers.desk import START, Desk, open_desk
from tests.contract.providers.subject import MakeSubject, Refusal, Trouble
from tests.contract.providers.subjects import SUBJECTS

HOUR_S = 3600
_LONG_NUMBER = re.compile(r"[0-9]{8}")

REFUSALS = [
    pytest.param(make, refusal, id=f"{name}-{refusal.name}")
    for name, make in sorted(SUBJECTS.items())
    for refusal in make(lambda: START, "UTC").refusals
]


async def listed(source: Source, window: Window) -> list[Record | InvalidRow]:
    return [row async for page in source.provider.calls.pages(window) for row in page.rows]


async def records(desk: Desk, *, days: float = 1) -> dict[str, Record]:
    """What the provider lists of the last days; no row may be bad."""
    rows = await listed(desk.source, Window(desk.now - timedelta(days=days), desk.now))
    assert not [row for row in rows if isinstance(row, InvalidRow)]
    return {row.key: row for row in rows if isinstance(row, Record)}


def test_every_provider_is_under_test() -> None:
    """A provider that is not in the suite promises nothing."""
    assert set(SUBJECTS) == set(PROVIDERS)


# -- which calls are told ---------------------------------------------------------------------------------------------


async def test_the_first_run_seeds(desk: Desk) -> None:
    """What was there before the relay is known and never told; what begins after it is."""
    old = [desk.call(rid, start_s=-rid * 600) for rid in range(1, 13)]

    await desk.poll()

    assert not desk.told_keys
    assert desk.count(RowOutcome.SEEDED) == Counter(desk.subject.key(plan) for plan in old)
    desk.pass_(seconds=60)
    fresh = desk.call(100, start_s=-40)
    await desk.poll()
    assert desk.told_keys == Counter([desk.subject.key(fresh)])


async def test_a_call_is_told_once_however_often_it_is_listed(desk: Desk) -> None:
    await desk.poll()
    desk.pass_(seconds=90)
    call = desk.call(1)

    for _ in range(4):
        await desk.poll()
        desk.pass_(seconds=30)

    assert desk.told_keys == Counter([desk.subject.key(call)])
    assert not desk.count(RowOutcome.CHANGED)


async def test_calls_of_the_same_second_are_all_told(desk: Desk) -> None:
    """Nobody may tell calls apart by their time; some show only after others of their second were seen."""
    await desk.poll()
    desk.pass_(seconds=120)
    calls = [desk.call(rid, start_s=-60, late_s=rid * 10) for rid in range(1, 9)]
    for _ in range(5):
        await desk.poll()
        desk.pass_(seconds=30)

    assert desk.told_keys == Counter(desk.subject.key(call) for call in calls)


async def test_a_long_call_that_surfaces_behind_the_cursor_is_told(desk: Desk) -> None:
    await desk.poll()
    long = desk.call(1, start_s=0, talk_s=6 * HOUR_S)
    for rid in range(2, 13):
        desk.pass_(minutes=30)
        desk.call(rid, start_s=-60)
        await desk.poll()
    assert desk.subject.key(long) not in desk.told_keys

    for _ in range(3):
        desk.pass_(minutes=16)
        await desk.poll()

    assert desk.told_keys[desk.subject.key(long)] == 1


async def test_a_call_that_is_listed_twenty_hours_late_is_told(desk: Desk) -> None:
    await desk.poll()
    late = desk.call(1, start_s=0, late_s=20 * HOUR_S)
    for _ in range(21):
        desk.pass_(hours=1)
        await desk.poll()

    assert desk.told_keys == Counter([desk.subject.key(late)])


async def test_a_changed_row_is_a_change_once(desk: Desk) -> None:
    await desk.poll()
    desk.pass_(seconds=90)
    call, other = desk.call(1), desk.call(2)
    await desk.poll()
    desk.subject.change(call, at=desk.now + timedelta(seconds=10))
    for _ in range(3):
        desk.pass_(seconds=30)
        await desk.poll()

    assert desk.count(RowOutcome.CHANGED) == Counter([desk.subject.key(call)])
    assert desk.told_keys == Counter([desk.subject.key(call), desk.subject.key(other)])


async def test_a_row_that_is_deleted_takes_nothing_with_it(desk: Desk) -> None:
    await desk.poll()
    desk.pass_(seconds=300)
    calls = [desk.call(rid, start_s=-rid * 10) for rid in range(4, 16)]
    await desk.poll()
    desk.subject.remove(calls[3])
    await desk.poll()
    desk.subject.add([calls[3]])
    await desk.poll()

    assert desk.told_keys == Counter(desk.subject.key(call) for call in calls)
    assert not desk.count(RowOutcome.CHANGED)


async def test_rows_that_come_while_pages_are_read_are_told(desk: Desk) -> None:
    """Each request finds one more call in front of the others, which pushes the rest down a place."""
    await desk.poll()
    desk.pass_(seconds=600)
    calls = [desk.call(rid, start_s=-rid * 10) for rid in range(10, 35)]
    before = desk.budgets.requests

    def one_more(paid: int) -> None:
        if paid < before + 6:
            calls.append(desk.call(1000 + paid, start_s=-50 + paid - before, talk_s=1))

    desk.budgets.before_request = one_more
    await desk.poll()
    desk.budgets.before_request = None
    desk.pass_(seconds=30)
    await desk.poll()

    assert desk.told_keys == Counter(desk.subject.key(call) for call in calls)


async def test_rows_that_go_while_pages_are_read_hide_no_others_for_long(desk: Desk) -> None:
    """A deleted row pulls the rest up a place; what slips through is found by the next poll."""
    await desk.poll()
    desk.pass_(seconds=600)
    calls = [desk.call(rid, start_s=-rid * 10) for rid in range(10, 35)]
    going = [call for call in calls if call.rid % 5 == 0]
    before = desk.budgets.requests
    desk.budgets.before_request = lambda paid: desk.subject.remove(going.pop()) if paid > before + 1 and going else None
    await desk.poll()
    desk.budgets.before_request = None
    gone = {desk.subject.key(call) for call in calls if call.rid % 5 == 0}
    desk.pass_(seconds=30)
    await desk.poll()

    stayed = {desk.subject.key(call) for call in calls} - gone
    assert stayed <= set(desk.told_keys)
    assert max(desk.told_keys.values()) == 1


async def test_ten_thousand_rows_are_listed_whole(make: MakeSubject, redis: Redis, http: aiohttp.ClientSession) -> None:
    async with open_desk(make, redis, http) as desk:
        calls = [
            CallPlan(rid=rid, started_at=at, ended_at=at, visible_at=at)
            for rid in range(1, 10_001)
            for at in [desk.now - timedelta(seconds=7 * rid)]
        ]
        desk.subject.add(calls)

        rows = await listed(desk.source, Window(desk.now - timedelta(hours=26), desk.now))

        assert {row.key for row in rows if isinstance(row, Record)} == {desk.subject.key(call) for call in calls}


# -- what a row means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "disposition", "said", "outcome"),
    [
        ("INCOMING", "ANSWERED", Direction.INBOUND, Outcome.ANSWERED),
        ("OUTGOING", "ANSWERED", Direction.OUTBOUND, Outcome.ANSWERED),
        ("INCOMING", "NO ANSWER", Direction.INBOUND, Outcome.NO_ANSWER),
    ],
)
async def test_who_called_whom_and_how_it_ended(
    desk: Desk, direction: str, disposition: str, said: Direction, outcome: Outcome
) -> None:
    call = desk.call(1, direction=direction, disposition=disposition)

    record = (await records(desk))[desk.subject.key(call)]

    assert (record.direction, record.outcome, record.finished) == (said, outcome, True)
    assert record.missed is (disposition == "NO ANSWER")
    assert record.external is not None
    assert record.external.number == "+12025550147"
    outside, inside = (record.caller, record.callee) if said is Direction.INBOUND else (record.callee, record.caller)
    assert outside == record.external
    assert inside == record.internal
    assert (inside.internal, outside.internal) == (True, False)
    assert record.started_at == call.started_at


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"])
@pytest.mark.parametrize("month", [1, 3, 7, 11])
async def test_a_start_is_the_same_instant_whatever_zone_the_rows_are_in(
    make: MakeSubject, redis: Redis, http: aiohttp.ClientSession, zone: str, month: int
) -> None:
    async with open_desk(make, redis, http, zone=zone) as desk:
        desk.moment.at = datetime(2025, month, 15, 3, 30, 20, tzinfo=UTC)
        calls = [desk.call(rid, start_s=-rid * 5 * HOUR_S + 240) for rid in range(1, 6)]

        found = await records(desk, days=2)

        assert {key: record.started_at for key, record in found.items()} == {
            desk.subject.key(call): call.started_at for call in calls
        }


async def test_the_same_row_has_the_same_hash_each_time(desk: Desk) -> None:
    desk.call(1)

    first, second = await records(desk), await records(desk)

    assert [one.content_hash() for one in first.values()] == [one.content_hash() for one in second.values()]


async def test_the_row_as_it_came_is_kept_apart_from_the_content(desk: Desk) -> None:
    call = desk.call(1)

    record = (await records(desk))[desk.subject.key(call)]

    assert record.raw
    assert "raw" not in record.content()


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "refusal"), REFUSALS)
async def test_a_documented_error_is_named_and_moves_nothing(
    make: MakeSubject, refusal: Refusal, redis: Redis, http: aiohttp.ClientSession
) -> None:
    async with open_desk(make, redis, http, page_size=5) as desk:
        await desk.poll()
        desk.pass_(seconds=90)
        call = desk.call(1)
        cursor = await desk.cursor()
        desk.subject.refuse(refusal)
        with pytest.raises(refusal.error) as caught:
            await listed(desk.source, Window(desk.now - timedelta(hours=1), desk.now))
        assert_sayable(str(caught.value), desk)

        desk.subject.refuse(refusal)
        await desk.poll()
        assert await desk.cursor() == cursor
        assert await desk.error()
        desk.pass_(seconds=30)
        await desk.poll()

        assert desk.told_keys == Counter([desk.subject.key(call)])
        assert not await desk.error()


def assert_sayable(message: str, desk: Desk) -> None:
    """A message names the host and nothing that is secret."""
    credential = desk.source.kind.credential(desk.source.options)
    assert credential not in message
    assert "http://" not in message
    assert not _LONG_NUMBER.search(message)


@pytest.mark.parametrize("what", [Trouble.DROP, Trouble.NOT_JSON, Trouble.PARTIAL])
async def test_trouble_moves_nothing_and_loses_nothing(desk: Desk, what: Trouble) -> None:
    await desk.poll()
    desk.pass_(seconds=90)
    call = desk.call(1)
    cursor = await desk.cursor()
    desk.subject.trouble(what, times=None)

    for _ in range(3):
        await desk.poll()
        assert await desk.cursor() == cursor
        assert await desk.error()
        desk.pass_(seconds=30)
    desk.subject.behave()
    await desk.poll()

    assert desk.told_keys == Counter([desk.subject.key(call)])
    assert not await desk.error()


async def test_a_reading_that_breaks_off_half_way_moves_no_cursor(desk: Desk) -> None:
    """The connection is lost at each request in turn; whatever came before it is known, and the rest is not lost."""
    await desk.poll()
    desk.pass_(seconds=600)
    calls = [desk.call(rid, start_s=-rid * 10) for rid in range(10, 35)]
    cursor = await desk.cursor()
    for nth in range(1, 30):
        before = desk.budgets.requests
        desk.budgets.before_request = lambda paid, last=before + nth: (
            desk.subject.trouble(Trouble.DROP, times=None) if paid == last else None
        )
        await desk.poll()
        desk.subject.behave()
        if not await desk.error():
            break
        assert await desk.cursor() == cursor
    desk.budgets.before_request = None

    assert desk.told_keys == Counter(desk.subject.key(call) for call in calls)
    assert nth > 1


async def test_garbage_hides_no_neighbour(make: MakeSubject, redis: Redis, http: aiohttp.ClientSession) -> None:
    """Rows that nobody should believe are put aside, masked; the ones between them are told."""
    async with open_desk(make, redis, http) as desk:
        await desk.poll()
        desk.pass_(seconds=300)
        calls = [desk.call(rid, start_s=-rid * 10) for rid in range(4, 16)]
        desk.subject.trouble(Trouble.GARBAGE, times=None)

        rows = await listed(desk.source, Window(desk.now - timedelta(hours=1), desk.now))
        await desk.poll()

        bad = [row for row in rows if isinstance(row, InvalidRow)]
        assert len(bad) >= 5
        assert all(row.reason for row in bad)
        assert not [row for row in bad if _LONG_NUMBER.search(row.excerpt)]
        assert {desk.subject.key(call) for call in calls} <= set(desk.told_keys)
        assert not await desk.error()


async def test_a_body_over_the_cap_is_given_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "MAX_BODY_BYTES", 1024 * 1024)
    await desk.poll()
    desk.pass_(seconds=90)
    call = desk.call(1)
    desk.subject.trouble(Trouble.HUGE)

    await desk.poll()

    assert "more than 1 MiB" in await desk.error()
    assert not desk.told_keys
    await desk.poll()
    assert desk.told_keys == Counter([desk.subject.key(call)])


async def test_wrong_credentials_pause_the_source_and_are_told(
    make: MakeSubject, redis: Redis, http: aiohttp.ClientSession
) -> None:
    async with open_desk(make, redis, http) as desk:
        base_url = str(getattr(desk.source.options, "base_url"))  # noqa: B009 - the base class has none
        for options in desk.subject.wrong_credentials(base_url):
            provider = desk.source.kind.connect(options, http, desk.source.budget)
            with pytest.raises(ProviderError) as caught:
                [page async for page in provider.calls.pages(Window(desk.now - timedelta(hours=1), desk.now))]
            assert type(caught.value).__name__ == "Unauthorized"
            assert desk.source.kind.credential(options) not in str(caught.value)
            health = await provider.health()
            assert not health.ok
            assert desk.source.kind.credential(options) not in " ".join(health.lines)


async def test_a_refused_credential_is_not_hammered(desk: Desk) -> None:
    refusal = next(each for each in desk.subject.refusals if each.status == 401)
    desk.subject.refuse(refusal)

    wait_ms = await desk.poll()

    assert wait_ms >= 15 * 60 * 1000
    assert len(desk.told.errors) == 1
    assert_sayable(desk.told.errors[0], desk)


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_every_request_is_paid_for_before_it_is_sent(desk: Desk) -> None:
    for rid in range(10, 35):
        desk.call(rid, start_s=-rid * 10)
    assert desk.subject.requests == 0

    await desk.poll()
    await desk.source.provider.health()

    assert desk.budgets.requests == desk.subject.requests > 0


async def test_nothing_is_sent_that_the_budget_does_not_pay_for(desk: Desk) -> None:
    desk.budgets.exhausted = True

    with pytest.raises(OverBudget):
        await listed(desk.source, Window(desk.now - timedelta(hours=1), desk.now, Purpose.BACKFILL))
    health = await desk.source.provider.health()

    assert desk.subject.requests == 0
    assert not health.ok


async def test_health_asks_at_most_twice(desk: Desk) -> None:
    health = await desk.source.provider.health()

    assert health.ok
    assert health.lines
    assert desk.subject.requests <= 2


async def test_a_provider_that_knows_an_upper_bound_keeps_to_it(desk: Desk) -> None:
    """A backfill reads a long range in steps; a step must not bring everything up to now."""
    recent = [desk.call(rid, start_s=-rid * 60) for rid in range(1, 30)]
    old = desk.call(100, start_s=-10 * 24 * HOUR_S)

    rows = await listed(desk.source, Window(desk.now - timedelta(days=11), desk.now - timedelta(days=9)))

    keys = {row.key for row in rows if isinstance(row, Record)}
    assert desk.subject.key(old) in keys
    assert keys.isdisjoint(desk.subject.key(call) for call in recent) is desk.source.kind.upper_bound
