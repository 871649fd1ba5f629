"""Ends background tasks for good.

Before Python 3.12 `asyncio.wait_for` can swallow a cancellation that arrives as its work is done, and redis-py sends
every command through it: a loop that talks to the store may go on as if nobody had asked it to end. So ask again.
"""

import asyncio
from typing import Any

_ASK_AGAIN_S = 0.5


async def end(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks until they are gone. Errors they ended with are theirs: ask the task."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_ASK_AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()
