"""Clocks: the machine's is aware UTC; the virtual one moves only by `advance`, and wakes sleepers in order."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import pytest

from relay.domain.clock import Clock, SystemClock
from tests.fakes.clock import ManualClock

NOON = datetime(2025, 7, 1, 12, tzinfo=UTC)


async def test_the_system_clock_is_aware_and_goes_forward() -> None:
    clock: Clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(-1)

    assert clock.now().tzinfo is UTC
    assert clock.monotonic() >= before


async def test_sleepers_wake_in_the_order_of_their_times() -> None:
    """Each one sees its own instant, however far the clock is moved in one go, and may sleep again."""
    clock = ManualClock(NOON)
    woken: list[tuple[str, float, datetime]] = []

    async def sleeper(name: str, *waits_s: float) -> None:
        for wait_s in waits_s:
            await clock.sleep(wait_s)
            woken.append((name, clock.monotonic(), clock.now()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("a", 30, 30))
        group.create_task(sleeper("b", 40))
        group.create_task(sleeper("c", 0))
        await clock.advance(100)

    assert woken == [
        ("c", 0, NOON),
        ("a", 30, NOON + timedelta(seconds=30)),
        ("b", 40, NOON + timedelta(seconds=40)),
        ("a", 60, NOON + timedelta(seconds=60)),
    ]
    assert clock.monotonic() == 100


async def test_no_sleeper_wakes_too_early() -> None:
    clock = ManualClock(NOON)
    task = asyncio.create_task(clock.sleep(10))
    await clock.advance(9.5)

    assert not task.done()
    assert clock.next_due_s() == 0.5
    await clock.advance(0.5)
    assert task.done()
    assert clock.next_due_s() is None


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = ManualClock(NOON)
    task = asyncio.create_task(clock.sleep(10))
    await clock.advance(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert clock.next_due_s() is None
    await clock.advance(20)
    assert clock.monotonic() == 21


async def test_a_step_moves_the_wall_clock_alone() -> None:
    """NTP sets the clock back an hour; what was waited for is not waited for again."""
    clock = ManualClock(NOON)
    task = asyncio.create_task(clock.sleep(10))
    await clock.advance(5)
    clock.step(-3600)
    await clock.advance(5)

    assert task.done()
    assert clock.now() == NOON + timedelta(seconds=10 - 3600)
    assert clock.monotonic() == 10


async def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="time only advances"):
        await ManualClock(NOON).advance(-1)


def test_a_clock_starts_at_an_aware_instant() -> None:
    assert ManualClock(NOON.astimezone(timezone(timedelta(hours=2)))).now().tzinfo is UTC
    with pytest.raises(ValueError, match="aware"):
        ManualClock(NOON.replace(tzinfo=None))
