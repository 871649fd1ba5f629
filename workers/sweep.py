"""The sweep: corrects what can drift. Every source is in the poll lane, nothing outlives its retention.

Runs from arq's cron and, in one process, beside it; two sweeps at once do no harm.
"""

import asyncio
import contextlib
import time
from datetime import timedelta
from zoneinfo import ZoneInfo

import structlog

from relay.completeness import examine
from relay.domain.time import from_ms, iso
from relay.errors import SettingsError, StorageError
from relay.polling.completeness import usual_days
from relay.polling.silence import same_stretches, too_quiet
from relay.providers.source import Source
from relay.runtime import DAY_S, Runtime
from relay.store.jobs import Job
from relay.store.lanes import LaneName

log = structlog.get_logger(__name__)

EVERY_S = 30
_COMPLETENESS_EVERY = timedelta(minutes=15)
_COMPLETENESS_BUDGET_S = 2.0
_OBJECTION_S = 2.0  # by then every process has reported a leap that contradicts its own clock
_QUIET_HINT = "polls succeed and return no calls, as never before at this time: can the key still see the account?"


async def sweep(runtime: Runtime) -> None:
    await runtime.reconciler.everything()
    await retire(runtime)
    await resume_removals(runtime)
    await restore(runtime)
    await _retry_changed_credentials(runtime)
    if await runtime.store.upkeep.claim_silence_check():
        await check_for_silence(runtime)
    if await runtime.store.upkeep.claim_trim():
        await trim(runtime)
        resealed = await runtime.registry.declarations.reseal()
        if resealed:
            log.info("secrets_reencrypted", count=resealed, reason="RELAY_SECRET_KEY has a newer key")
    if await runtime.store.completeness.claim_check():
        await check_completeness(runtime)


async def retire(runtime: Runtime) -> None:
    """End the work of sources and subscriptions that were removed from the configuration."""
    for kind, name in await runtime.store.configurations.retire():
        action = "add it again to continue with what is left; nothing of it is deleted before its retention ends"
        if kind == "source":
            log.warning("source_removed", source=name, action=action)
        else:
            log.warning("subscription_removed", subscription=name, action=action)


async def resume_removals(runtime: Runtime) -> None:
    """Resume removals of sources whose process has died: until they end, nothing is ingested under that id."""
    for sid, tenant in await runtime.store.sources.abandoned_removals():
        job = Job(f"forget_source-{sid}", "forget_source", tenant=tenant, source=sid)
        await runtime.store.jobs.create(job)
        await runtime.arq.enqueue_job(job.kind, sid, job.id, _job_id=job.id)
        log.warning("source_removal_resumed", source=sid)


async def restore(runtime: Runtime) -> None:
    """Put back what a lane has lost."""
    decides = runtime.registry.decides
    polled = [sid for sid, source in runtime.sources.items() if not source.paused and decides("source", sid)]
    restored = {LaneName.POLL: await runtime.store.upkeep.restore_polls(polled)}
    for lane in LaneName:
        if lane is not LaneName.POLL:
            restored[lane] = await runtime.store.upkeep.restore(lane)
    for lane, count in restored.items():
        if count:
            log.warning("lane_items_restored", lane=lane, count=count)
            runtime.wake_ups(lane)


async def _retry_changed_credentials(runtime: Runtime) -> None:
    """Poll a source at once when its credential has changed: the provider may have refused the former one."""
    credentials: dict[str, str] = {}
    for sid, source in runtime.sources.items():
        if not source.paused and runtime.registry.decides("source", sid):
            with contextlib.suppress(SettingsError):  # an empty key file is reported by the poll
                credentials[sid] = source.kind.credential(source.options)
    for sid in await runtime.store.sources.changed_credentials(credentials):
        log.info("credential_changed", source=sid)
        await runtime.lanes[LaneName.POLL].put(sid, sid)
        await runtime.store.sources.accept_credential(sid, credentials[sid])
        runtime.wake_ups(LaneName.POLL)


async def check_completeness(runtime: Runtime) -> None:
    """Find out what is missing of the sources that were not checked for longest, as far as a sweep has time for it."""
    began_s = time.monotonic()
    completeness = runtime.store.completeness
    checks = await completeness.checks()
    now = from_ms(await runtime.store.now_ms())
    due_ms = (now - _COMPLETENESS_EVERY).timestamp() * 1000
    last_ms = {sid: checks[sid].at_ms if sid in checks else 0 for sid in runtime.sources}
    for sid in sorted(last_ms, key=lambda sid: last_ms[sid]):
        source = runtime.sources.get(sid)
        if last_ms[sid] > due_ms or time.monotonic() - began_s > _COMPLETENESS_BUDGET_S:
            return
        if source is None:
            continue
        first, last = usual_days(now, zone=source.options.timezone)
        reports = await examine(runtime.store, source, runtime.subscriptions.values(), first=first, last=last)
        gaps = [gap for report in reports for gap in report.gaps]
        before = checks[sid].missing if sid in checks else 0
        if len(gaps) > before:
            log.warning(
                "completeness_gaps_found",
                source=sid,
                missing=len(gaps),
                example=f"call {gaps[-1].key} of {gaps[-1].day}: {gaps[-1].what}",
                action=gaps[-1].action,
            )
        elif before and not gaps:
            log.info("completeness_gaps_resolved", source=sid)
        await completeness.note_check(sid, len(gaps))


async def check_for_silence(runtime: Runtime) -> None:
    """Find the sources whose polls succeed but bring no calls at a time at which they always did."""
    sources = [source for source in runtime.sources.values() if not source.paused]
    source_ids = [source.id for source in sources]
    states = await runtime.store.sources.read_many(source_ids)
    newest = await runtime.store.calls.newest(source_ids)
    for source, state, entry in zip(sources, states, newest, strict=True):
        if state.poll_state.started_at is None or state.error:
            continue  # failing polls are reported already
        newest_ms = entry[0] if entry else 0
        began_ms = int(state.poll_state.started_at.timestamp() * 1000)
        usual_calls = await _calls_in_same_stretches(runtime, source, newest_ms, began_ms) if entry else []
        if too_quiet(usual_calls) and not state.quiet_since:
            quiet_since = from_ms(newest_ms)
            log.warning(
                "source_went_quiet",
                source=source.id,
                since=iso(quiet_since),
                usual_calls=min(usual_calls),
                action=_QUIET_HINT,
            )
            await runtime.store.sources.note(source.id, quiet_since=quiet_since)
        elif state.quiet_since and not too_quiet(usual_calls):
            log.info("source_quiet_resolved", source=source.id)
            await runtime.store.sources.note(source.id, quiet_since=None)


async def _calls_in_same_stretches(runtime: Runtime, source: Source, newest_ms: int, began_ms: int) -> list[int]:
    now_ms = runtime.process.clock.wall_ms
    known_since_ms = max(began_ms, now_ms - runtime.settings.retention.calls_days * DAY_S * 1000)
    zone = ZoneInfo(source.rules.timezone)
    stretches = same_stretches(from_ms(newest_ms), from_ms(now_ms), zone=zone, known_since=from_ms(known_since_ms))
    return await runtime.store.calls.count_first_seen(source.id, stretches)


def _longest_kept_ms(runtime: Runtime) -> int:
    retention = runtime.settings.retention
    return max(retention.calls_days, retention.events_days) * DAY_S * 1000


async def trim(runtime: Runtime) -> None:
    """Delete calls, events and recordings that are older than their retention, unless the store's clock is in doubt."""
    upkeep = runtime.store.upkeep
    await runtime.process.beat()
    if await upkeep.count_processes() > 1:
        await asyncio.sleep(_OBJECTION_S)
    if suspended_until_ms := await upkeep.deletion_suspended_until_ms():
        until = iso(from_ms(suspended_until_ms))
        log.warning("retention_suspended", until=until, reason="the store's clock has leapt", action="check it")
        return
    now_ms = runtime.process.clock.wall_ms
    await upkeep.trim(wall_ms=now_ms, sources=runtime.sources, subscriptions=runtime.subscriptions)
    for kind, name in await runtime.store.configurations.removed_before(now_ms - _longest_kept_ms(runtime)):
        if kind == "source":
            await runtime.store.erasure.source(name)
        else:
            await runtime.store.erasure.subscription(name)
        await runtime.store.configurations.forget_removed(kind, name)
    try:
        oldest = from_ms(now_ms) - timedelta(days=runtime.settings.retention.recordings_days)
        trimmed = await runtime.storage.trim(oldest)
    except StorageError as error:
        log.warning("recordings_trim_failed", error=str(error))
    else:
        if trimmed:
            log.info("recordings_trimmed", count=trimmed)
