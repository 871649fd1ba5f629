"""Cancels background tasks reliably.

Before Python 3.12 `asyncio.wait_for` can swallow a cancellation that arrives as its work completes, and redis-py sends
every command through it: a loop that uses the store may go on as if it had not been cancelled. So cancel again.
"""

import asyncio
from typing import Any

_CANCEL_AGAIN_S = 0.5


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks until they have ended. An error that one ended with stays in the task."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()
