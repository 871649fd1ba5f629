"""The job that repairs what completeness finds missing; a run that was interrupted starts over with what is left.

Rows are read again and events keep their ids, so a subscriber gets nothing twice but what the store has no record of.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any, assert_never

import structlog

from relay.completeness import examine
from relay.domain.time import from_ms
from relay.events.publisher import Publisher
from relay.polling.completeness import Gap, GapKind, starts_between
from relay.providers.source import Source
from relay.queue.changes import Put
from relay.runtime import Runtime
from relay.store.codes import ReplayOutcome
from relay.store.jobs import Job, JobState
from relay.store.lanes import LaneName
from workers.jobs import Backfill, Cancelled, reason_against, resumable, wait_for_other_worker

log = structlog.get_logger(__name__)


async def heal(ctx: dict[str, Any], sid: str, first: str, last: str, job_id: str) -> None:
    """Repair what is missing of a source's days, as far as that is possible."""
    runtime: Runtime = ctx["runtime"]
    async with resumable(ctx, job_id) as job:
        if job is None:
            return
        await runtime.registry.load()
        source = runtime.sources.get(sid)
        poll_state = (await runtime.store.sources.read(sid)).poll_state
        if source is None and await runtime.store.configurations.is_declared("source", sid):
            await wait_for_other_worker(runtime.store.jobs, job_id, f"this worker does not know the source {sid}")
        if (reason := reason_against(sid, source, poll_state, force=True)) or source is None:
            await runtime.store.jobs.update(job_id, JobState.FAILED, error=reason)
            return
        healer = _Healer(runtime, source, job, date.fromisoformat(first), date.fromisoformat(last))
        gaps = await healer.gaps()
        rows_to_read = [gap for gap in gaps if gap.kind.is_row and gap.key is not None]
        if rows_to_read:
            backfill = Backfill(
                runtime,
                source,
                job,
                oldest=None,
                sleep=ctx["sleep"],
                only=frozenset(gap.key for gap in rows_to_read if gap.key is not None),
            )
            now = from_ms(await runtime.store.now_ms())
            if not await backfill.read(*starts_between({gap.day for gap in rows_to_read}, now=now)):
                return
        for gap in gaps:
            if await runtime.store.jobs.cancel_requested(job_id):
                raise Cancelled
            await healer.repair(gap)
        left = len(await healer.gaps())
        counts = {"gaps": len(gaps), "repaired": max(len(gaps) - left, 0), "left": left, **healer.steps}
        await runtime.store.jobs.update(job_id, JobState.DONE, share=1, counts=counts)
        log.info("source_healed", source=sid, **counts)


class _Healer:
    """Repairs gaps one by one; `steps` counts what it took."""

    def __init__(self, runtime: Runtime, source: Source, job: Job, first: date, last: date) -> None:
        self._runtime = runtime
        self._source = source
        self._tenant = job.tenant
        self._first, self._last = first, last
        self.steps: Counter[str] = Counter()
        self._publisher = Publisher(
            runtime.store,
            runtime.subscriptions,
            now_ms=lambda: runtime.lanes[LaneName.ENRICH].store_now_ms,
            on_deliveries=lambda: runtime.wake_ups(LaneName.DELIVER),
        )

    async def gaps(self) -> Sequence[Gap]:
        runtime = self._runtime
        subscriptions = [each for each in runtime.subscriptions.values() if self._tenant in (None, each.tenant)]
        reports = await examine(runtime.store, self._source, subscriptions, first=self._first, last=self._last)
        return [gap for report in reports for gap in report.gaps]

    async def repair(self, gap: Gap) -> None:
        """Repair what needs no row of the provider; such rows have been read before."""
        match gap.kind:
            case GapKind.NOT_INGESTED | GapKind.CALL_LOST | GapKind.TOO_OLD | GapKind.QUARANTINED:
                pass
            case GapKind.NOT_PUBLISHED:
                await self._put(LaneName.ENRICH, self._source.id, gap)
            case GapKind.EVENT_LOST:
                await self._publish_again(gap)
            case GapKind.DELIVERY_LOST | GapKind.NOT_QUEUED | GapKind.MISSED:
                await self._replay(gap)
            case _:
                assert_never(gap.kind)

    async def _put(self, lane: LaneName, partition: str, gap: Gap) -> None:
        assert gap.call_id is not None  # noqa: S101 - the call is stored
        await self._runtime.lanes[lane].apply(Put(partition, gap.call_id, keep_due=True))
        self._runtime.wake_ups(lane)
        self.steps["requeued"] += 1

    async def _publish_again(self, gap: Gap) -> None:
        assert gap.call_id is not None and gap.event_id is not None  # noqa: S101, PT018 - an event of a stored call
        call = await self._runtime.store.calls.get(gap.call_id)
        source = self._source
        if call is not None and await self._publisher.restore(call, source.rules, gap.event_id, tenant=source.tenant):
            self.steps["published"] += 1
            if gap.subscription is not None:
                await self._replay(gap)

    async def _replay(self, gap: Gap) -> None:
        assert gap.call_id and gap.event_id and gap.subscription  # noqa: S101, PT018 - a delivery of an event of a call
        runtime = self._runtime
        [outcome] = await runtime.store.deliveries.replay(
            gap.event_id, gap.call_id, [gap.subscription], at_ms=runtime.lanes[LaneName.DELIVER].wall_ms, force=False
        )
        match outcome:
            case ReplayOutcome.QUEUED:
                self.steps["replayed"] += 1
                runtime.wake_ups(LaneName.DELIVER)
            case ReplayOutcome.WAITING:
                await self._put(LaneName.DELIVER, gap.subscription, gap)
            case ReplayOutcome.DELIVERED | ReplayOutcome.DISABLED | ReplayOutcome.GONE:
                pass
            case _:
                assert_never(outcome)
