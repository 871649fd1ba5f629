"""The loop that claims from one lane and does the work: each attempt is settled when it ends, none waits for another.

It streams: finished work leaves with the next exchange, which claims what there is room for. It holds at most twice
what it can start. Trouble with the store never cancels work: outcomes are kept and offered until the store is back.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby

import structlog
from redis.exceptions import RedisError

from relay.queue.lane import Claim, Lane, Settlement, Verb
from relay.tasks import end

log = structlog.get_logger(__name__)

Work = Callable[[Sequence[Claim]], Awaitable[None]]
"""Does the work on claims of one partition (one claim, unless the runner batches) and settles each of them."""

_SLEEP_S = 1.0
_GROUP_S = 0.002
_DOUBTED_WAIT_MS = 500


class Runner:
    """Runs the work of one lane in this process.

    `at_once` attempts run at the same time. An item with less lease left than `needs_s` when its turn comes is given
    back. With `batch` > 1 the work gets up to that many claims of one partition together. Claims of partitions that
    `doubtful` names (slow ones, and those nobody has heard from yet) share a fifth of the room. `settled` hears of each
    outcome once the store has it.
    """

    def __init__(
        self,
        lane: Lane,
        work: Work,
        *,
        at_once: int,
        needs_s: float,
        batch: int = 1,
        doubtful: Callable[[str], bool] | None = None,
        settled: Callable[[Settlement], None] | None = None,
    ) -> None:
        self.lane = lane
        self._work = work
        self._at_once = at_once
        self._needs_s = needs_s
        self._batch = batch
        self._doubtful = doubtful
        self._tell_settled = settled
        self._ready: deque[list[Claim]] = deque()
        self._doubted: deque[list[Claim]] = deque()
        self._doubted_running: set[asyncio.Task[None]] = set()
        self._suspect: Claim | None = None
        self._suspect_runs = False
        self._held: dict[bytes, Claim] = {}
        self._outbox: list[Settlement] = []
        self._running: set[asyncio.Task[None]] = set()
        self._something = asyncio.Event()
        self._stopping = False
        self._deadline = float("inf")
        self._store_is_away = False
        self.settled = 0
        self.refused = 0

    @property
    def held(self) -> int:
        """Items under a lease of this runner."""
        return len(self._held)

    @property
    def full(self) -> bool:
        """True while there is no room for more."""
        return self._room() <= 0

    def wake(self) -> None:
        """Say that the lane has fresh work."""
        self._something.set()

    def settle(self, claim: Claim, verb: Verb, *, wait_ms: int = 0, a: str = "", b: bytes = b"", c: str = "") -> None:
        """Report how the work on a claim ended. It leaves with the next exchange."""
        if claim.token not in self._held:
            return
        if verb != "renew":
            del self._held[claim.token]
        self._outbox.append(Settlement(claim, verb, wait_ms, a, b, c))
        self._something.set()

    def stop(self, *, within_s: float) -> None:
        """Claim nothing more; what runs may go on for `within_s`."""
        self._stopping = True
        self._deadline = time.monotonic() + within_s
        self._something.set()

    async def run(self) -> None:
        """Run until stopped and drained, or until the deadline of `stop`."""
        try:
            while not self._finished():
                wait_s = await self._turn()
                if wait_s > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait_s):
                            await self._something.wait()
                elif len(self._ready) * 4 > self._at_once:
                    await asyncio.sleep(_GROUP_S)  # enough to do meanwhile: let outcomes gather; else ask at once
                self._something.clear()
        finally:
            await end(*self._running)
            await self._hand_back()

    def _finished(self) -> bool:
        if not self._stopping:
            return False
        if time.monotonic() >= self._deadline:
            return True
        return not self._running and not self._outbox

    def _room(self) -> int:
        if self._stopping or self._suspect is not None:
            return 0
        return 2 * self._at_once * self._batch - len(self._held)

    async def _turn(self) -> float:
        """Exchange once if there is a reason to; returns how long to wait for the next reason, 0 for not at all."""
        if self._stopping:
            self._give_back_what_waits()
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
        if self._store_is_away:
            self._store_is_away = False
            log.info("store_is_back", lane=self.lane.name)
        self.settled += len(outbox) - len(reply.refused)
        if self._tell_settled is not None:
            for each in outbox:
                self._tell_settled(each)
        for each in reply.refused:
            self.refused += 1
            log.warning("settle_refused", lane=self.lane.name, item=each.claim.item, why="the lease had ended")
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

    async def _keep(self, outbox: list[Settlement], error: Exception) -> None:
        """Keep outcomes, past their lease too: they count until somebody else gets the item. Say once what is wrong."""
        kept = outbox + self._outbox
        renewals = {each.claim.token: each for each in kept if each.verb == "renew"}
        self._outbox = [*renewals.values(), *(each for each in kept if each.verb != "renew")]
        if not self._store_is_away:
            self._store_is_away = True
            log.warning("store_is_away", lane=self.lane.name, error=str(error), kept=len(self._outbox))
        await asyncio.sleep(0.2)

    def _take(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            self._held[claim.token] = claim
        if claims and claims[0].expiries >= 3:
            self._suspect = claims[0]
            return
        if self._batch == 1:
            for claim in claims:
                doubted = self._doubtful is not None and self._doubtful(claim.partition)
                (self._doubted if doubted else self._ready).append([claim])
            return
        for _, group in groupby(claims, key=lambda claim: claim.partition):
            members = list(group)
            self._ready.extend(members[at : at + self._batch] for at in range(0, len(members), self._batch))

    def _start(self) -> None:
        if self._suspect is not None and not self._suspect_runs and not self._stopping:
            busy = self._running or self._ready or self._doubted
            if not busy or self._suspect.left_s < self._needs_s + _SLEEP_S:
                self._suspect_runs = True
                self._launch([self._suspect])
            if not busy:
                return
        while self._ready and len(self._running) < self._at_once:
            self._launch_in_time(self._ready.popleft())
        fifth = max(self._at_once // 5, 1)
        while self._doubted and len(self._doubted_running) < fifth:
            task = self._launch_in_time(self._doubted.popleft())
            if task is not None:
                self._doubted_running.add(task)
                task.add_done_callback(self._doubted_running.discard)
        while len(self._doubted) > fifth:
            for claim in self._doubted.pop():
                self.settle(claim, "again", wait_ms=_DOUBTED_WAIT_MS)

    def _launch_in_time(self, claims: list[Claim]) -> "asyncio.Task[None] | None":
        if claims[0].left_s >= self._needs_s:
            return self._launch(claims)
        for claim in claims:
            self.settle(claim, "again")
        return None

    def _launch(self, claims: list[Claim]) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._attempt(claims))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._start()
        self._something.set()

    async def _attempt(self, claims: list[Claim]) -> None:
        try:
            await self._work(claims)
        except (RedisError, ConnectionError) as error:
            log.warning("work_met_store_trouble", lane=self.lane.name, error=str(error))
            for claim in claims:
                self.settle(claim, "again", wait_ms=1000)
        except Exception:
            # Left to the end of the lease on purpose: that is counted, and after five the item is put aside.
            log.exception("work_failed", lane=self.lane.name, items=[claim.item for claim in claims])
        finally:
            for claim in claims:
                self._held.pop(claim.token, None)
            if self._suspect in claims:
                self._suspect, self._suspect_runs = None, False

    def _give_back_what_waits(self) -> None:
        waiting = [claim for claims in (*self._ready, *self._doubted) for claim in claims]
        self._ready.clear()
        self._doubted.clear()
        if self._suspect is not None and not self._suspect_runs:
            waiting.append(self._suspect)
            self._suspect = None
        for claim in waiting:
            self.settle(claim, "again")

    async def _hand_back(self) -> None:
        """The last exchange: outcomes that are still here."""
        if self._outbox:
            with contextlib.suppress(RedisError, OSError):
                await self.lane.exchange(self._outbox)
                self._outbox = []
