"""What is CINNOX's own: two lists of the same calls, ranges that are split, conferences, recordings."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import aiohttp
import pytest
from redis.asyncio import Redis

from relay.domain.call import Record
from relay.errors import RateLimited, UnexpectedResponse
from relay.providers.base import Audio, NoRecordingYet, NoSuchCall, Purpose, Window
from relay.simulator.audio import audio_chunks
from relay.simulator.cinnox import CONFERENCES, DETAIL, LOG, RECORDING, RECORDING_PATH, call_id
from relay.simulator.timeline import CallPlan
from relay.store.codes import RowOutcome
from tests.contract.providers.cinnox import CinnoxUnderTest
from tests.contract.providers.harness import PollHarness, open_harness
from tests.fakes.cinnox import FaultyCinnox
from tests.fakes.faults import Fault, FaultKind

KEY = "the-suite"


@pytest.fixture
async def cinnox(redis: Redis, http: aiohttp.ClientSession) -> AsyncIterator[PollHarness]:
    async with open_harness(
        CinnoxUnderTest, redis, http, page_size=5, recordings=True, recording_path=RECORDING_PATH
    ) as harness:
        yield harness


def simulator(harness: PollHarness) -> FaultyCinnox:
    assert isinstance(harness.provider, CinnoxUnderTest)
    return harness.provider.simulator


async def records(harness: PollHarness) -> list[Record]:
    window = Window(harness.now - timedelta(hours=24), harness.now)
    return [
        row
        async for page in harness.source.provider.calls.pages(window)
        for row in page.rows
        if isinstance(row, Record)
    ]


async def test_the_lists_are_merged_into_one_call(cinnox: PollHarness) -> None:
    cinnox.call(1, direction="OUTGOING")

    [read] = await records(cinnox)

    assert (read.caller.user_id, read.callee.name) == ("staff-3203", "A WHITTAKER")
    assert (read.custom["room_id"], read.end_reason, read.ended_by) == ("room-1", "hangup", "caller")


@pytest.mark.parametrize("newest_first", [True, False])
async def test_the_order_of_rows_does_not_matter(cinnox: PollHarness, newest_first: bool) -> None:
    simulator(cinnox).newest_first = newest_first
    plans = [cinnox.call(rid, start_s=-rid * 60) for rid in range(1, 24)]

    assert {read.key for read in await records(cinnox)} == {cinnox.provider.key(plan) for plan in plans}


async def test_a_call_log_that_requires_a_call_id_is_skipped(cinnox: PollHarness) -> None:
    """Its document marks callID as required; then the other list has to do, and calls go on."""
    simulator(cinnox).log_needs_call_id = True
    await cinnox.poll()
    cinnox.advance(seconds=90)
    call = cinnox.call(1)
    await cinnox.poll()
    await cinnox.poll()

    assert cinnox.new_keys == Counter([cinnox.provider.key(call)])
    assert simulator(cinnox).requests[KEY, LOG] == 1
    assert not cinnox.count(RowOutcome.CHANGED)


async def test_a_list_that_fails_moves_no_cursor(cinnox: PollHarness) -> None:
    """Half of the columns now and the rest later would publish each call twice."""
    await cinnox.poll()
    cinnox.advance(seconds=90)
    call = cinnox.call(1)
    simulator(cinnox).inject(Fault(kind=FaultKind.STATUS, on=LOG, status=500))
    await cinnox.poll()
    assert not cinnox.new_keys
    await cinnox.poll()

    assert cinnox.new_keys == Counter([cinnox.provider.key(call)])
    assert not cinnox.count(RowOutcome.CHANGED)


async def test_calls_that_just_began_are_left_to_the_next_poll(redis: Redis, http: aiohttp.ClientSession) -> None:
    async with open_harness(CinnoxUnderTest, redis, http, settle_s=60) as harness:
        await harness.poll()
        harness.advance(seconds=50)
        call = harness.call(1, start_s=-20, talk_s=5)
        await harness.poll()
        assert not harness.new_keys
        harness.advance(seconds=60)
        await harness.poll()

        assert harness.new_keys == Counter([harness.provider.key(call)])


async def test_the_steps_of_a_backfill_leave_no_gap(redis: Redis, http: aiohttp.ClientSession) -> None:
    """A step ends where the next one begins: nothing may wait there for a poll that never comes."""
    async with open_harness(CinnoxUnderTest, redis, http, settle_s=60) as harness:
        plans = [harness.call(rid, start_s=-rid * 10, talk_s=1) for rid in range(1, 61)]
        keys: set[str] = set()
        for step in range(10, 0, -1):
            window = Window(
                harness.now - timedelta(minutes=step), harness.now - timedelta(minutes=step - 1), Purpose.BACKFILL
            )
            async for page in harness.source.provider.calls.pages(window):
                keys |= {row.key for row in page.rows if isinstance(row, Record)}

        assert keys == {harness.provider.key(plan) for plan in plans}


async def test_a_range_with_too_many_rows_is_read_in_halves(redis: Redis, http: aiohttp.ClientSession) -> None:
    async with open_harness(CinnoxUnderTest, redis, http, merge_other_list=False) as harness:
        plans = [
            CallPlan(rid=rid, started_at=at, ended_at=at, visible_at=at)
            for rid in range(1, 6001)
            for at in [harness.now - timedelta(seconds=5 * rid)]
        ]
        harness.provider.add(plans)

        keys = {read.key for read in await records(harness)}

        assert keys == {harness.provider.key(plan) for plan in plans}
        assert 20 < simulator(harness).requests[KEY, DETAIL] < 40


async def test_a_server_that_ignores_the_offset_is_detected(cinnox: PollHarness) -> None:
    provider = simulator(cinnox)
    for rid in range(1, 24):
        cinnox.call(rid, start_s=-rid * 60)
    answer = provider.answer
    provider.answer = lambda request, now: answer(  # type: ignore[method-assign]
        replace(request, query={**request.query, "offset": "0"}), now
    )

    with pytest.raises(UnexpectedResponse, match="same page"):
        await records(cinnox)


async def test_a_conference_is_one_call_with_its_participants(cinnox: PollHarness) -> None:
    await cinnox.poll()
    cinnox.advance(seconds=300)
    conference, legs = cinnox.call(1, start_s=-100), [cinnox.call(rid, start_s=-90) for rid in (2, 3)]
    simulator(cinnox).add_conference(KEY, conference, legs)
    other = cinnox.call(4)
    await cinnox.poll()

    assert cinnox.new_keys == Counter([cinnox.provider.key(conference), cinnox.provider.key(other)])
    [read] = [read for read in await records(cinnox) if read.kind == "conference"]
    assert [one["id"] for one in read.participants] == ["hid-2", "hid-3"]
    assert simulator(cinnox).requests[KEY, CONFERENCES] >= 1


async def test_without_a_conference_its_details_are_not_requested(cinnox: PollHarness) -> None:
    cinnox.call(1)
    await cinnox.poll()

    assert simulator(cinnox).requests[KEY, CONFERENCES] == 0


async def test_a_recording_is_fetched_by_its_call_id(cinnox: PollHarness) -> None:
    plan = cinnox.call(1, recording_at=cinnox.now)
    recordings = cinnox.source.provider.recordings
    assert recordings is not None

    async with recordings.recording(call_id(plan)) as audio:
        assert isinstance(audio, Audio)
        content = b"".join([chunk async for chunk in audio.chunks])

    assert content == b"".join(audio_chunks(1, plan.recording_bytes))
    assert (audio.content_type, audio.size_bytes) == ("audio/wav", plan.recording_bytes)


async def test_a_missing_recording(cinnox: PollHarness) -> None:
    plan = cinnox.call(1)
    recordings = cinnox.source.provider.recordings
    assert recordings is not None

    async with recordings.recording(call_id(plan)) as answer:
        assert answer == NoRecordingYet()
    async with recordings.recording("call\n1") as answer:
        assert answer == NoSuchCall()
    simulator(cinnox).inject(Fault(kind=FaultKind.NOT_JSON, on=RECORDING))
    with pytest.raises(UnexpectedResponse, match="recording_path"):
        async with recordings.recording(call_id(plan)):
            pass
    body = '{"code":6451010,"message":"Too many requests"}'
    simulator(cinnox).inject(Fault(kind=FaultKind.STATUS, on=RECORDING, status=400, body=body))
    with pytest.raises(RateLimited):
        async with recordings.recording(call_id(plan)):
            pass


async def test_without_a_path_there_are_no_recordings(redis: Redis, http: aiohttp.ClientSession) -> None:
    async with open_harness(CinnoxUnderTest, redis, http) as harness:
        assert harness.source.provider.recordings is None
