"""Ending background tasks, also such that do not hear it the first time."""

import asyncio

import pytest

from relay.tasks import cancel


async def test_a_task_that_swallows_a_cancellation_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may eat one cancellation; the process still ends."""
    monkeypatch.setattr("relay.tasks._CANCEL_AGAIN_S", 0.01)
    swallowed = 0

    async def deaf() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)

    async with asyncio.timeout(5):
        await cancel(task)

    assert task.cancelled()
    assert swallowed == 3


async def test_ending_what_has_ended_does_nothing() -> None:
    """A task that ended by itself, with an error even, keeps what it ended with."""

    async def wrong() -> None:
        raise ValueError("wrong")

    well, badly = asyncio.create_task(asyncio.sleep(0, "well")), asyncio.create_task(wrong())
    await asyncio.wait([well, badly])

    await cancel(well, badly)

    assert well.result() == "well"
    assert isinstance(badly.exception(), ValueError)
