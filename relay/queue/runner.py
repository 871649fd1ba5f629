"""The loop that claims from one lane and does the work. Each attempt is settled when it ends; none waits for another.

It streams: what is finished leaves with the next exchange, which claims as much as there is room for. It holds at most
twice what it can start. While the store is unavailable no work is cancelled: settlements are kept and sent again.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import groupby

import structlog
from redis.exceptions import RedisError

from relay.queue.claim import Claim
from relay.queue.lane import Lane
from relay.queue.settlement import Renew, Retry, Settlement
from relay.tasks import cancel

log = structlog.get_logger(__name__)

Settle = Callable[[Claim, Settlement], None]
"""Reports how the work on a claim ended; it leaves with the next exchange."""
Work = Callable[[Sequence[Claim], Settle], Awaitable[None]]
"""Works on claims of one partition (one claim, unless the runner batches) and settles each of them."""

_SLEEP_S = 1.0
_GROUP_S = 0.002
_UNPROVEN_RETRY_MS = 500
_INTERRUPTED_RETRY_MS = 1000
_SUSPECT_EXPIRIES = 3


class Runner:
    """Does the work of one lane in this process.

    `concurrency` attempts run at the same time. An item with less than `min_lease_s` of lease left when its turn comes
    is returned. With `batch` > 1 the work gets up to that many claims of one partition together. Claims of partitions
    that are `unproven` (slow, or without a successful attempt so far) share a fifth of the room. With `renews` leases
    are renewed for as long as the work goes on. `on_settled` is called once the store has a settlement.
    """

    def __init__(
        self,
        lane: Lane,
        work: Work,
        *,
        concurrency: int,
        min_lease_s: float,
        batch: int = 1,
        renews: bool = False,
        unproven: Callable[[str], bool] | None = None,
        on_settled: Callable[[Claim, Settlement], None] | None = None,
    ) -> None:
        self.lane = lane
        self._work = work
        self._concurrency = concurrency
        self._min_lease_s = min_lease_s
        self._batch = batch
        self._renews = renews
        self._unproven = unproven
        self._on_settled = on_settled
        self._ready: deque[list[Claim]] = deque()
        self._unproven_ready: deque[list[Claim]] = deque()
        self._unproven_running: set[asyncio.Task[None]] = set()
        self._suspect: Claim | None = None
        self._suspect_runs = False
        self._held: dict[bytes, Claim] = {}
        self._outbox: list[tuple[Claim, Settlement]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        self._deadline = float("inf")
        self._store_unavailable = False
        self.settled = 0
        self.refused = 0

    @property
    def held(self) -> int:
        """Items under a lease of this runner."""
        return len(self._held)

    @property
    def full(self) -> bool:
        """Whether there is no room for more."""
        return self._room() <= 0

    def wake(self) -> None:
        """Look at the lane now: it has fresh work."""
        self._wake.set()

    def settle(self, claim: Claim, settlement: Settlement) -> None:
        """Report how the work on a claim ended. It leaves with the next exchange."""
        if claim.token not in self._held:
            return
        if not isinstance(settlement, Renew):
            del self._held[claim.token]
        self._outbox.append((claim, settlement))
        self._wake.set()

    def stop(self, *, within_s: float) -> None:
        """Claim nothing more; running work may go on for `within_s`."""
        self._stopping = True
        self._deadline = time.monotonic() + within_s
        self._wake.set()

    async def run(self) -> None:
        """Run until stopped and drained, or until the deadline of `stop`."""
        try:
            while not self._finished():
                wait_s = await self._turn()
                if wait_s > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait_s):
                            await self._wake.wait()
                elif len(self._ready) * 4 > self._concurrency:
                    await asyncio.sleep(_GROUP_S)  # there is enough to do: let settlements gather for one exchange
                self._wake.clear()
        finally:
            await cancel(*self._running)
            await self._send_rest()

    def _finished(self) -> bool:
        if not self._stopping:
            return False
        if time.monotonic() >= self._deadline:
            return True
        return not self._running and not self._outbox

    def _room(self) -> int:
        if self._stopping or self._suspect is not None:
            return 0
        return 2 * self._concurrency * self._batch - len(self._held)

    async def _turn(self) -> float:
        """Exchange once if there is a reason to; returns how long to wait for the next reason, 0 for not at all."""
        if self._stopping:
            self._return_unstarted()
        room = self._room()
        outbox, self._outbox = self._outbox, []
        if not outbox and room <= 0:
            self._start()  # a suspect waits only so long for the others to end
            return self._until_deadline(_SLEEP_S)
        try:
            reply = await self.lane.exchange(outbox, want=max(room, 0))
        except (RedisError, OSError) as error:
            await self._keep(outbox, error)
            return 0
        except asyncio.CancelledError:
            self._outbox = outbox + self._outbox
            raise
        if self._store_unavailable:
            self._store_unavailable = False
            log.info("store_recovered", lane=self.lane.name)
        self.settled += len(outbox) - len(reply.refused)
        if self._on_settled is not None:
            for claim, settlement in outbox:
                self._on_settled(claim, settlement)
        for claim, _ in reply.refused:
            self.refused += 1
            log.warning("settlement_refused", lane=self.lane.name, item=claim.item, reason="the lease had ended")
        self._take(reply.claims)
        self._start()
        if self._outbox:
            return 0
        if reply.claims and len(reply.claims) >= room > 0:
            return 0
        if reply.next_due_ms is None:
            return self._until_deadline(_SLEEP_S)
        return self._until_deadline(min(max((reply.next_due_ms - reply.now_ms) / 1000, 0.001), _SLEEP_S))

    def _until_deadline(self, wait_s: float) -> float:
        return max(min(wait_s, self._deadline - time.monotonic()), 0.001)

    async def _keep(self, outbox: list[tuple[Claim, Settlement]], error: Exception) -> None:
        """Keep settlements, past their leases too: they are valid until another runner claims the item."""
        unsent = outbox + self._outbox
        renewals = {claim.token: (claim, renew) for claim, renew in unsent if isinstance(renew, Renew)}
        self._outbox = [*renewals.values(), *(pair for pair in unsent if not isinstance(pair[1], Renew))]
        if not self._store_unavailable:
            self._store_unavailable = True
            log.warning("store_unavailable", lane=self.lane.name, error=str(error), unsent=len(self._outbox))
        await asyncio.sleep(0.2)

    def _take(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            self._held[claim.token] = claim
        if claims and claims[0].expiries >= _SUSPECT_EXPIRIES:
            self._suspect = claims[0]  # it may have killed the processes that held it: it runs alone
            return
        if self._batch == 1:
            for claim in claims:
                unproven = self._unproven is not None and self._unproven(claim.partition)
                (self._unproven_ready if unproven else self._ready).append([claim])
            return
        for _, group in groupby(claims, key=lambda claim: claim.partition):
            members = list(group)
            self._ready.extend(members[at : at + self._batch] for at in range(0, len(members), self._batch))

    def _start(self) -> None:
        if self._suspect is not None and not self._suspect_runs and not self._stopping:
            busy = self._running or self._ready or self._unproven_ready
            if not busy or self._suspect.left_s < self._min_lease_s + _SLEEP_S:
                self._suspect_runs = True
                self._launch([self._suspect])
            if not busy:
                return
        while self._ready and len(self._running) < self._concurrency:
            self._launch_in_time(self._ready.popleft())
        fifth = max(self._concurrency // 5, 1)
        while self._unproven_ready and len(self._unproven_running) < fifth:
            task = self._launch_in_time(self._unproven_ready.popleft())
            if task is not None:
                self._unproven_running.add(task)
                task.add_done_callback(self._unproven_running.discard)
        while len(self._unproven_ready) > fifth:
            for claim in self._unproven_ready.pop():
                self.settle(claim, Retry(_UNPROVEN_RETRY_MS))

    def _launch_in_time(self, claims: list[Claim]) -> "asyncio.Task[None] | None":
        if claims[0].left_s >= self._min_lease_s:
            return self._launch(claims)
        for claim in claims:
            self.settle(claim, Retry())
        return None

    def _launch(self, claims: list[Claim]) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._attempt(claims))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._start()
        self._wake.set()

    async def _attempt(self, claims: list[Claim]) -> None:
        try:
            async with self._renewed(claims):
                await self._work(claims, self.settle)
        except (RedisError, ConnectionError) as error:
            log.warning("work_interrupted", lane=self.lane.name, error=str(error))
            for claim in claims:
                self.settle(claim, Retry(_INTERRUPTED_RETRY_MS))
        except Exception:
            # Left to the end of the lease on purpose: that is counted, and after five the item is quarantined.
            log.exception("work_failed", lane=self.lane.name, items=[claim.item for claim in claims])
        finally:
            for claim in claims:
                self._held.pop(claim.token, None)
            if self._suspect in claims:
                self._suspect, self._suspect_runs = None, False

    @contextlib.asynccontextmanager
    async def _renewed(self, claims: list[Claim]) -> AsyncIterator[None]:
        async def renew() -> None:
            while True:
                await asyncio.sleep(self.lane.lease_s / 4)
                for claim in claims:
                    self.settle(claim, Renew())

        renewing = [asyncio.create_task(renew())] if self._renews else []
        try:
            yield
        finally:
            await cancel(*renewing)

    def _return_unstarted(self) -> None:
        unstarted = [claim for claims in (*self._ready, *self._unproven_ready) for claim in claims]
        self._ready.clear()
        self._unproven_ready.clear()
        if self._suspect is not None and not self._suspect_runs:
            unstarted.append(self._suspect)
            self._suspect = None
        for claim in unstarted:
            self.settle(claim, Retry())

    async def _send_rest(self) -> None:
        if self._outbox:
            with contextlib.suppress(RedisError, OSError):
                await self.lane.exchange(self._outbox)
                self._outbox = []
