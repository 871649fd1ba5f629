"""Wake-ups: hints, in this process and to the workers of others, that a lane has fresh work.

They only save waiting: a runner looks at its lane at least once a second.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable

from arq.connections import ArqRedis

_SEND_EVERY_S = 0.005


class WakeUps:
    def __init__(self) -> None:
        self._local: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)
        self._arq: ArqRedis | None = None
        self._sending: dict[str, asyncio.Task[None]] = {}

    def listen(self, lane: str, wake: Callable[[], None]) -> None:
        self._local[lane].append(wake)

    def send_through(self, arq: ArqRedis) -> None:
        """Wake the workers of other processes too."""
        self._arq = arq

    def wake_here(self, lane: str) -> None:
        for wake in self._local[lane]:
            wake()

    def __call__(self, lane: str) -> None:
        """Wake the runners of a lane, wherever they are."""
        self.wake_here(lane)
        if self._arq is not None and (lane not in self._sending or self._sending[lane].done()):
            self._sending[lane] = asyncio.create_task(self._send(self._arq, lane))

    async def _send(self, arq: ArqRedis, lane: str) -> None:
        await asyncio.sleep(_SEND_EVERY_S)  # many at once become one
        with contextlib.suppress(Exception):  # the lane is looked at every second in any case
            # A fixed id: without a worker that takes them, jobs would pile up. The second one is for what becomes due
            # while the first is being run: arq accepts no job whose id is in use.
            for slot in (0, 1):
                if await arq.enqueue_job("wake", lane, _job_id=f"wake:{lane}:{slot}") is not None:
                    return

    async def aclose(self) -> None:
        await asyncio.gather(*self._sending.values(), return_exceptions=True)
