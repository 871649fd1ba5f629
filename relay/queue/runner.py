"""The loop that claims from one lane and does the work. Each attempt is settled when it ends; none waits for another.

It streams: what is finished leaves with the next exchange, which claims as much as there is room for; what is claimed
starts at once. While the store is unavailable no work is cancelled: settlements are kept and sent again.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import groupby

import structlog
from redis.exceptions import RedisError

from relay.queue.claim import Claim
from relay.queue.lane import Lane, Room
from relay.queue.settlement import Retry, Settlement
from relay.tasks import cancel

log = structlog.get_logger(__name__)

# Reports how the work on a claim ended; it leaves with the next exchange.
Settle = Callable[[Claim, Settlement], None]
# Works on claims of one partition (one claim, unless the runner batches) and settles each of them.
Work = Callable[[Sequence[Claim], Settle], Awaitable[None]]

_SLEEP_S = 1.0
_GROUP_S = 0.002
_FULL_PARTITIONS_S = 0.05
_INTERRUPTED_RETRY_MS = 1000
_ERROR_RETRY_MS = 1000
_LONGEST_ERROR_RETRY_MS = 300_000
_SUSPECT_DEATHS = 3
_RECOUNT_AFTER_ERROR_S = 1.0


class Runner:
    """Does the work of one lane in this process.

    `concurrency` attempts run at the same time, at most half of them for partitions that are unproven. With `batch` > 1
    the work gets up to that many claims of one partition together. `on_settled` is called once the store has a
    settlement, `on_error` when work raises.
    """

    def __init__(
        self,
        lane: Lane,
        work: Work,
        *,
        concurrency: int,
        batch: int = 1,
        on_settled: Callable[[Claim, Settlement], None] | None = None,
        on_error: Callable[[str], None] | None = None,
    ) -> None:
        self.lane = lane
        self._work = work
        self._concurrency = concurrency
        self._batch = batch
        self._on_settled = on_settled
        self._on_error = on_error
        self._held: dict[tuple[str, str], Claim] = {}
        self._outbox: list[tuple[Claim, Settlement]] = []
        self._running: dict[asyncio.Task[None], Claim] = {}
        self._owners: Counter[str] = Counter()
        self._errors: dict[tuple[str, str], int] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._deadline = float("inf")
        self._store_unavailable = False
        self.recount_every_s = 60.0
        self._recount_at = 0.0
        self.settled = 0
        self.refused = 0

    @property
    def held(self) -> int:
        """Items under a lease of this runner."""
        return len(self._held)

    @property
    def full(self) -> bool:
        return self._room().slots <= 0

    def wake(self) -> None:
        """Look at the lane now: it has fresh work."""
        self._wake.set()

    def settle(self, claim: Claim, settlement: Settlement) -> None:
        """Report how the work on a claim ended. It leaves with the next exchange."""
        key = (claim.partition, claim.item)
        if self._held.get(key) is not claim:
            return
        del self._held[key]
        self._errors.pop(key, None)
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
                if len(self._running) * 4 > self._concurrency and not self._stopping:
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

    def _room(self) -> Room:
        slots = 0 if self._stopping else max(self._concurrency - len(self._running), 0)
        unproven = sum(not claim.proven for claim in self._running.values())
        return Room(
            slots=slots,
            unproven=max(max(self._concurrency // 2, 1) - unproven, 0),
            reserve=self._concurrency // 4,
            suspect=all(claim.deaths < _SUSPECT_DEATHS for claim in self._running.values()),
            batch=self._batch,
            owners=self._owners,
        )

    async def _turn(self) -> float:
        """Exchange once if there is a reason to; returns how long to wait for the next reason, 0 for not at all."""
        room = self._room()
        outbox, self._outbox = self._outbox, []
        if not outbox and room.slots <= 0:
            return self._until_deadline(_SLEEP_S)
        try:
            if time.monotonic() >= self._recount_at:
                await self._recount(outbox)
            reply = await self.lane.exchange(outbox, room=room)
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
        refused = {id(claim) for claim, _ in reply.refused}
        if self._on_settled is not None:
            for claim, settlement in outbox:
                if id(claim) not in refused:
                    self._on_settled(claim, settlement)
        for claim, _ in reply.refused:
            self.refused += 1
            log.warning("settlement_refused", lane=self.lane.name, item=claim.item, reason="its lease had ended")
        self._start(reply.claims)
        if self._outbox:
            return 0
        if reply.next_due_ms is None:
            return self._until_deadline(_SLEEP_S)
        due_s = (reply.next_due_ms - reply.now_ms) / 1000
        # What is due and was not claimed waits for room in its partition; another process may be the one to make it.
        return self._until_deadline(min(max(due_s, 0.001 if reply.claims else _FULL_PARTITIONS_S), _SLEEP_S))

    def _until_deadline(self, wait_s: float) -> float:
        return max(min(wait_s, self._deadline - time.monotonic()), 0.001)

    async def _keep(self, outbox: list[tuple[Claim, Settlement]], error: Exception) -> None:
        """Keep settlements: they are valid until another runner claims the item."""
        self._outbox = outbox + self._outbox
        self._recount_at = time.monotonic() + _RECOUNT_AFTER_ERROR_S
        if not self._store_unavailable:
            self._store_unavailable = True
            log.warning("store_unavailable", lane=self.lane.name, error=str(error), unsent=len(self._outbox))
        await asyncio.sleep(0.2)

    async def _recount(self, outbox: list[tuple[Claim, Settlement]]) -> None:
        """Give back what is leased to us without our knowledge: the reply that had it was lost."""
        count = await self.lane.give_back([*self._held.values(), *(claim for claim, _ in outbox)])
        self._recount_at = time.monotonic() + self.recount_every_s
        if count:
            log.warning("claims_given_back", lane=self.lane.name, count=count, reason="their claim's reply was lost")

    def _start(self, claims: Sequence[Claim]) -> None:
        for _, members in groupby(claims, key=lambda claim: claim.partition):
            batch = list(members)
            for at in range(0, len(batch), self._batch):
                self._launch(batch[at : at + self._batch])

    def _launch(self, claims: list[Claim]) -> None:
        for claim in claims:
            self._held[claim.partition, claim.item] = claim
        task = asyncio.create_task(self._attempt(claims))
        # The one most suspected stands for its batch.
        self._running[task] = max(claims, key=lambda claim: claim.deaths)
        if claims[0].owner:
            self._owners[claims[0].owner] += 1
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        owner = self._running.pop(task).owner
        if owner:
            self._owners[owner] -= 1
            if not self._owners[owner]:
                del self._owners[owner]
        self._wake.set()

    async def _attempt(self, claims: list[Claim]) -> None:
        try:
            await self._work(claims, self.settle)
        except Exception as error:
            causes = list(_causes(error))
            if any(isinstance(cause, RedisError) for cause in causes):
                log.warning("work_interrupted", lane=self.lane.name, error="; ".join(map(str, causes)))
                self._retry(claims, _INTERRUPTED_RETRY_MS)
                return
            log.exception("work_failed", lane=self.lane.name, items=[claim.item for claim in claims])
            if self._on_error is not None:
                self._on_error(self.lane.name)
            for claim in claims:
                self._retry_after_error(claim)
        finally:
            for claim in claims:
                if self._held.get((claim.partition, claim.item)) is claim:
                    del self._held[claim.partition, claim.item]

    def _retry(self, claims: Sequence[Claim], after_ms: int) -> None:
        for claim in claims:
            self.settle(claim, Retry(after_ms))

    def _retry_after_error(self, claim: Claim) -> None:
        key = (claim.partition, claim.item)
        if self._held.get(key) is not claim:
            return  # settled before the work raised
        errors = self._errors.get(key, 0)
        self._retry([claim], min(_ERROR_RETRY_MS * 2**errors, _LONGEST_ERROR_RETRY_MS))
        self._errors[key] = min(errors + 1, 30)

    async def _send_rest(self) -> None:
        if self._outbox:
            with contextlib.suppress(RedisError, OSError):
                await self.lane.exchange(self._outbox)
                self._outbox = []


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Walk over what an exception group holds; other exceptions are their own cause."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _causes(member)
    else:
        yield error
