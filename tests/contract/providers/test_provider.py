"""What every provider has to do, whatever its document is like: on its fake, through the real poller and store."""

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
from tests.contract.providers.harness import START, PollHarness, open_harness
from tests.contract.providers.registry import UNDER_TEST
from tests.contract.providers.under_test import ListFault, MakeProvider, Refusal

HOUR_S = 3600
_LONG_NUMBER = re.compile(r"[0-9]{8}")

REFUSALS = [
    pytest.param(make, refusal, id=f"{name}-{refusal.name}")
    for name, make in sorted(UNDER_TEST.items())
    for refusal in make(lambda: START, "UTC").refusals
]


async def listed(source: Source, window: Window) -> list[Record | InvalidRow]:
    return [row async for page in source.provider.calls.pages(window) for row in page.rows]


async def records(harness: PollHarness, *, days: float = 1) -> dict[str, Record]:
    """What the provider lists of the last days; no row may be bad."""
    rows = await listed(harness.source, Window(harness.now - timedelta(days=days), harness.now))
    assert not [row for row in rows if isinstance(row, InvalidRow)]
    return {row.key: row for row in rows if isinstance(row, Record)}


def test_every_provider_is_under_test() -> None:
    """A provider that is not in the suite promises nothing."""
    assert set(UNDER_TEST) == set(PROVIDERS)


# -- which calls are new ----------------------------------------------------------------------------------------------


async def test_the_first_run_seeds(harness: PollHarness) -> None:
    """Calls that were there before the relay are seeded and never published; calls that begin after it are."""
    old = [harness.call(rid, start_s=-rid * 600) for rid in range(1, 13)]

    await harness.poll()

    assert not harness.new_keys
    assert harness.count(RowOutcome.SEEDED) == Counter(harness.provider.key(plan) for plan in old)
    harness.advance(seconds=60)
    fresh = harness.call(100, start_s=-40)
    await harness.poll()
    assert harness.new_keys == Counter([harness.provider.key(fresh)])


async def test_a_call_is_new_once_however_often_it_is_listed(harness: PollHarness) -> None:
    await harness.poll()
    harness.advance(seconds=90)
    call = harness.call(1)

    for _ in range(4):
        await harness.poll()
        harness.advance(seconds=30)

    assert harness.new_keys == Counter([harness.provider.key(call)])
    assert not harness.count(RowOutcome.CHANGED)


async def test_calls_of_the_same_second_are_all_ingested(harness: PollHarness) -> None:
    """Calls are not told apart by their time; some appear only after others of their second were seen."""
    await harness.poll()
    harness.advance(seconds=120)
    calls = [harness.call(rid, start_s=-60, late_s=rid * 10) for rid in range(1, 9)]
    for _ in range(5):
        await harness.poll()
        harness.advance(seconds=30)

    assert harness.new_keys == Counter(harness.provider.key(call) for call in calls)


async def test_a_long_call_that_appears_behind_the_cursor_is_ingested(harness: PollHarness) -> None:
    await harness.poll()
    long = harness.call(1, start_s=0, talk_s=6 * HOUR_S)
    for rid in range(2, 13):
        harness.advance(minutes=30)
        harness.call(rid, start_s=-60)
        await harness.poll()
    assert harness.provider.key(long) not in harness.new_keys

    for _ in range(3):
        harness.advance(minutes=16)
        await harness.poll()

    assert harness.new_keys[harness.provider.key(long)] == 1


async def test_a_call_that_is_listed_twenty_hours_late_is_ingested(harness: PollHarness) -> None:
    await harness.poll()
    late = harness.call(1, start_s=0, late_s=20 * HOUR_S)
    for _ in range(21):
        harness.advance(hours=1)
        await harness.poll()

    assert harness.new_keys == Counter([harness.provider.key(late)])


async def test_a_changed_row_is_a_change_once(harness: PollHarness) -> None:
    await harness.poll()
    harness.advance(seconds=90)
    call, other = harness.call(1), harness.call(2)
    await harness.poll()
    harness.provider.change(call, at=harness.now + timedelta(seconds=10))
    for _ in range(3):
        harness.advance(seconds=30)
        await harness.poll()

    assert harness.count(RowOutcome.CHANGED) == Counter([harness.provider.key(call)])
    assert harness.new_keys == Counter([harness.provider.key(call), harness.provider.key(other)])


async def test_a_row_that_is_deleted_takes_nothing_with_it(harness: PollHarness) -> None:
    await harness.poll()
    harness.advance(seconds=300)
    calls = [harness.call(rid, start_s=-rid * 10) for rid in range(4, 16)]
    await harness.poll()
    harness.provider.remove(calls[3])
    await harness.poll()
    harness.provider.add([calls[3]])
    await harness.poll()

    assert harness.new_keys == Counter(harness.provider.key(call) for call in calls)
    assert not harness.count(RowOutcome.CHANGED)


async def test_rows_that_come_while_pages_are_read_are_ingested(harness: PollHarness) -> None:
    """Each request finds one more call in front of the others, which pushes the rest down a place."""
    await harness.poll()
    harness.advance(seconds=600)
    calls = [harness.call(rid, start_s=-rid * 10) for rid in range(10, 35)]
    before = harness.budgets.requests

    def one_more(count: int) -> None:
        if count < before + 6:
            calls.append(harness.call(1000 + count, start_s=-50 + count - before, talk_s=1))

    harness.budgets.before_request = one_more
    await harness.poll()
    harness.budgets.before_request = None
    harness.advance(seconds=30)
    await harness.poll()

    assert harness.new_keys == Counter(harness.provider.key(call) for call in calls)


async def test_rows_deleted_while_pages_are_read_hide_no_others_for_long(harness: PollHarness) -> None:
    """A deleted row pulls the rest up a place; what slips through is found by the next poll."""
    await harness.poll()
    harness.advance(seconds=600)
    calls = [harness.call(rid, start_s=-rid * 10) for rid in range(10, 35)]
    going = [call for call in calls if call.rid % 5 == 0]
    before = harness.budgets.requests
    harness.budgets.before_request = lambda count: (
        harness.provider.remove(going.pop()) if count > before + 1 and going else None
    )
    await harness.poll()
    harness.budgets.before_request = None
    gone = {harness.provider.key(call) for call in calls if call.rid % 5 == 0}
    harness.advance(seconds=30)
    await harness.poll()

    stayed = {harness.provider.key(call) for call in calls} - gone
    assert stayed <= set(harness.new_keys)
    assert max(harness.new_keys.values()) == 1


async def test_ten_thousand_rows_are_listed_whole(
    make: MakeProvider, redis: Redis, http: aiohttp.ClientSession
) -> None:
    async with open_harness(make, redis, http) as harness:
        calls = [
            CallPlan(rid=rid, started_at=at, ended_at=at, visible_at=at)
            for rid in range(1, 10_001)
            for at in [harness.now - timedelta(seconds=7 * rid)]
        ]
        harness.provider.add(calls)

        rows = await listed(harness.source, Window(harness.now - timedelta(hours=26), harness.now))

        assert {row.key for row in rows if isinstance(row, Record)} == {harness.provider.key(call) for call in calls}


# -- what a row means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "disposition", "expected", "outcome"),
    [
        ("INCOMING", "ANSWERED", Direction.INBOUND, Outcome.ANSWERED),
        ("OUTGOING", "ANSWERED", Direction.OUTBOUND, Outcome.ANSWERED),
        ("INCOMING", "NO ANSWER", Direction.INBOUND, Outcome.NO_ANSWER),
    ],
)
async def test_who_called_whom_and_how_it_ended(
    harness: PollHarness, direction: str, disposition: str, expected: Direction, outcome: Outcome
) -> None:
    call = harness.call(1, direction=direction, disposition=disposition)

    record = (await records(harness))[harness.provider.key(call)]

    assert (record.direction, record.outcome, record.finished) == (expected, outcome, True)
    assert record.missed is (disposition == "NO ANSWER")
    assert record.external is not None
    assert record.external.number == "+12025550147"
    outside, inside = (
        (record.caller, record.callee) if expected is Direction.INBOUND else (record.callee, record.caller)
    )
    assert outside == record.external
    assert inside == record.internal
    assert (inside.internal, outside.internal) == (True, False)
    assert record.started_at == call.started_at


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"])
@pytest.mark.parametrize("month", [1, 3, 7, 11])
async def test_a_start_is_the_same_instant_whatever_zone_the_rows_are_in(
    make: MakeProvider, redis: Redis, http: aiohttp.ClientSession, zone: str, month: int
) -> None:
    async with open_harness(make, redis, http, zone=zone) as harness:
        harness.clock.at = datetime(2025, month, 15, 3, 30, 20, tzinfo=UTC)
        calls = [harness.call(rid, start_s=-rid * 5 * HOUR_S + 240) for rid in range(1, 6)]

        listed_records = await records(harness, days=2)

        assert {key: record.started_at for key, record in listed_records.items()} == {
            harness.provider.key(call): call.started_at for call in calls
        }


async def test_the_same_row_has_the_same_hash_each_time(harness: PollHarness) -> None:
    harness.call(1)

    first, second = await records(harness), await records(harness)

    assert [one.content_hash() for one in first.values()] == [one.content_hash() for one in second.values()]


async def test_the_raw_row_is_not_part_of_the_content(harness: PollHarness) -> None:
    call = harness.call(1)

    record = (await records(harness))[harness.provider.key(call)]

    assert record.raw
    assert "raw" not in record.content()


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "refusal"), REFUSALS)
async def test_a_documented_error_has_its_class_and_moves_no_cursor(
    make: MakeProvider, refusal: Refusal, redis: Redis, http: aiohttp.ClientSession
) -> None:
    async with open_harness(make, redis, http, page_size=5) as harness:
        await harness.poll()
        harness.advance(seconds=90)
        call = harness.call(1)
        cursor = await harness.cursor()
        harness.provider.refuse(refusal)
        with pytest.raises(refusal.error) as caught:
            await listed(harness.source, Window(harness.now - timedelta(hours=1), harness.now))
        assert_safe_to_show(str(caught.value), harness)

        harness.provider.refuse(refusal)
        await harness.poll()
        assert await harness.cursor() == cursor
        assert await harness.error()
        harness.advance(seconds=30)
        await harness.poll()

        assert harness.new_keys == Counter([harness.provider.key(call)])
        assert not await harness.error()


def assert_safe_to_show(message: str, harness: PollHarness) -> None:
    """A message names the host and nothing that is secret."""
    credential = harness.source.kind.credential(harness.source.options)
    assert credential not in message
    assert "http://" not in message
    assert not _LONG_NUMBER.search(message)


@pytest.mark.parametrize("what", [ListFault.DROP, ListFault.NOT_JSON, ListFault.PARTIAL])
async def test_a_fault_moves_no_cursor_and_loses_no_call(harness: PollHarness, what: ListFault) -> None:
    await harness.poll()
    harness.advance(seconds=90)
    call = harness.call(1)
    cursor = await harness.cursor()
    harness.provider.inject(what, times=None)

    for _ in range(3):
        await harness.poll()
        assert await harness.cursor() == cursor
        assert await harness.error()
        harness.advance(seconds=30)
    harness.provider.clear_faults()
    await harness.poll()

    assert harness.new_keys == Counter([harness.provider.key(call)])
    assert not await harness.error()


async def test_a_list_that_breaks_off_half_way_moves_no_cursor(harness: PollHarness) -> None:
    """The connection is lost at each request in turn; what came before it is ingested, and the rest is not lost."""
    await harness.poll()
    harness.advance(seconds=600)
    calls = [harness.call(rid, start_s=-rid * 10) for rid in range(10, 35)]
    cursor = await harness.cursor()
    for nth in range(1, 30):
        before = harness.budgets.requests
        harness.budgets.before_request = lambda count, last=before + nth: (
            harness.provider.inject(ListFault.DROP, times=None) if count == last else None
        )
        await harness.poll()
        harness.provider.clear_faults()
        if not await harness.error():
            break
        assert await harness.cursor() == cursor
    harness.budgets.before_request = None

    assert harness.new_keys == Counter(harness.provider.key(call) for call in calls)
    assert nth > 1


async def test_invalid_rows_hide_no_valid_ones(make: MakeProvider, redis: Redis, http: aiohttp.ClientSession) -> None:
    """Invalid rows are quarantined, masked; the ones between them are ingested."""
    async with open_harness(make, redis, http) as harness:
        await harness.poll()
        harness.advance(seconds=300)
        calls = [harness.call(rid, start_s=-rid * 10) for rid in range(4, 16)]
        harness.provider.inject(ListFault.GARBAGE, times=None)

        rows = await listed(harness.source, Window(harness.now - timedelta(hours=1), harness.now))
        await harness.poll()

        bad = [row for row in rows if isinstance(row, InvalidRow)]
        assert len(bad) >= 5
        assert all(row.reason for row in bad)
        assert not [row for row in bad if _LONG_NUMBER.search(row.excerpt)]
        assert {harness.provider.key(call) for call in calls} <= set(harness.new_keys)
        assert not await harness.error()


async def test_a_body_over_the_cap_is_an_error(harness: PollHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "MAX_BODY_BYTES", 1024 * 1024)
    await harness.poll()
    harness.advance(seconds=90)
    call = harness.call(1)
    harness.provider.inject(ListFault.HUGE)

    await harness.poll()

    assert "more than 1 MiB" in await harness.error()
    assert not harness.new_keys
    await harness.poll()
    assert harness.new_keys == Counter([harness.provider.key(call)])


async def test_wrong_credentials_are_named_without_the_credential(
    make: MakeProvider, redis: Redis, http: aiohttp.ClientSession
) -> None:
    async with open_harness(make, redis, http) as harness:
        base_url = str(getattr(harness.source.options, "base_url"))  # noqa: B009 - the base class has none
        for options in harness.provider.wrong_credentials(base_url):
            provider = harness.source.kind.connect(options, http, harness.source.budget)
            with pytest.raises(ProviderError) as caught:
                [page async for page in provider.calls.pages(Window(harness.now - timedelta(hours=1), harness.now))]
            assert type(caught.value).__name__ == "Unauthorized"
            assert harness.source.kind.credential(options) not in str(caught.value)
            health = await provider.health()
            assert not health.ok
            assert harness.source.kind.credential(options) not in " ".join(health.lines)


async def test_a_refused_credential_is_retried_much_later(harness: PollHarness) -> None:
    refusal = next(refusal for refusal in harness.provider.refusals if refusal.status == 401)
    harness.provider.refuse(refusal)

    wait_ms = await harness.poll()

    assert wait_ms >= 15 * 60 * 1000
    assert len(harness.operations.errors) == 1
    assert_safe_to_show(harness.operations.errors[0], harness)


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_every_request_is_counted_by_the_budget_before_it_is_sent(harness: PollHarness) -> None:
    for rid in range(10, 35):
        harness.call(rid, start_s=-rid * 10)
    assert harness.provider.requests == 0

    await harness.poll()
    await harness.source.provider.health()

    assert harness.budgets.requests == harness.provider.requests > 0


async def test_nothing_is_sent_beyond_the_budget(harness: PollHarness) -> None:
    harness.budgets.exhausted = True

    with pytest.raises(OverBudget):
        await listed(harness.source, Window(harness.now - timedelta(hours=1), harness.now, Purpose.BACKFILL))
    health = await harness.source.provider.health()

    assert harness.provider.requests == 0
    assert not health.ok


async def test_health_takes_at_most_two_requests(harness: PollHarness) -> None:
    health = await harness.source.provider.health()

    assert health.ok
    assert health.lines
    assert harness.provider.requests <= 2


async def test_a_provider_with_an_upper_bound_honours_it(harness: PollHarness) -> None:
    """A backfill reads a long range in steps; a step must not bring everything up to now."""
    recent = [harness.call(rid, start_s=-rid * 60) for rid in range(1, 30)]
    old = harness.call(100, start_s=-10 * 24 * HOUR_S)

    rows = await listed(harness.source, Window(harness.now - timedelta(days=11), harness.now - timedelta(days=9)))

    keys = {row.key for row in rows if isinstance(row, Record)}
    assert harness.provider.key(old) in keys
    assert keys.isdisjoint(harness.provider.key(call) for call in recent) is harness.source.kind.upper_bound
