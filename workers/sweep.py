"""What is looked at now and then: every source has its place in the lane, nothing outlives its retention, time goes on.

Runs from arq's cron and, in one process, beside it; twice at once does no harm.
"""

import contextlib
from datetime import timedelta
from zoneinfo import ZoneInfo

import structlog

from relay.domain.time import from_ms, iso
from relay.errors import SettingsError, StorageError
from relay.polling.silence import same_stretches, too_quiet
from relay.providers.source import Source
from relay.queue import keys as queue_keys
from relay.queue.changes import Put
from relay.runtime import DAY_S, Runtime
from relay.store import keys
from relay.store.lanes import LaneName

log = structlog.get_logger(__name__)

EVERY_S = 30
_TRIM_EVERY_S = 3600
_LISTEN_EVERY_S = 300
_STEP_BACK_MS = 5000
_QUIET_HINT = "polls go well and bring no call, as never before at this time: does the key still see the account?"


async def sweep(runtime: Runtime) -> None:
    """Put right what can drift."""
    await _time_went_back(runtime)
    await runtime.reconciler.everything()
    await _credentials_changed(runtime)
    if await runtime.redis.set(keys.LISTENED, 1, nx=True, ex=_LISTEN_EVERY_S):
        await listen_for_silence(runtime)
    if await runtime.redis.set(keys.TRIMMED, 1, nx=True, ex=_TRIM_EVERY_S):
        await trim(runtime)
        resealed = await runtime.registry.declarations.reseal()
        if resealed:
            log.info("secrets_reencrypted", count=resealed, why="RELAY_SECRET_KEY has a newer key")


async def _time_went_back(runtime: Runtime) -> None:
    """The store's clock was set back: polls that now seem far off become due. Other dues are short or may wait."""
    seconds, micros = await runtime.redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    before = int(await runtime.redis.getset(queue_keys.CLOCK, now_ms) or 0)
    if before - now_ms > _STEP_BACK_MS:
        log.warning("store_clock_stepped_back", by_s=(before - now_ms) / 1000)
        polled = [sid for sid, each in runtime.sources.items() if not each.paused]
        await runtime.lanes[LaneName.POLL].apply(*(Put("", sid) for sid in polled))


async def _credentials_changed(runtime: Runtime) -> None:
    """A source that was refused is tried at once when its credential is another one, its extras too."""
    credentials: dict[str, str] = {}
    for sid, source in runtime.sources.items():
        if not source.paused:
            with contextlib.suppress(SettingsError):  # its poll says that the key file holds no key
                credentials[sid] = keys.bucket("credential", source.kind.credential(source.options))
    async with runtime.redis.pipeline(transaction=False) as pipe:
        for sid in credentials:
            pipe.hget(keys.source(sid), "credential")
        known = await pipe.execute()
    for (sid, credential), before in zip(credentials.items(), known, strict=True):
        if before is None:
            await runtime.states.note(sid, credential=credential)
        elif before.decode() != credential:
            log.info("credential_changed", source=sid)
            await runtime.lanes[LaneName.POLL].put("", sid)
            await runtime.states.note(sid, credential=credential, contacts_off="", recordings_off="")
            runtime.wake_ups(LaneName.POLL)


async def listen_for_silence(runtime: Runtime) -> None:
    """Find the sources that are polled well and yet have no calls when they always have some."""
    asked = [source for source in runtime.sources.values() if not source.paused]
    async with runtime.redis.pipeline(transaction=False) as pipe:
        for source in asked:
            pipe.hmget(keys.source(source.id), ["started_at", "error", "quiet_since"])
            pipe.zrevrange(keys.calls_of(source.id), 0, 0, withscores=True)
        answers = await pipe.execute()
    for source, (began, error, noted), newest in zip(asked, answers[::2], answers[1::2], strict=True):
        if not began or error:
            continue  # one whose polls fail is spoken of already
        quiet_since_ms = int(newest[0][1]) if newest else 0
        calls = await _calls_in_same_stretches(runtime, source, quiet_since_ms, int(began)) if newest else []
        if too_quiet(calls) and not noted:
            since = iso(from_ms(quiet_since_ms))
            log.warning("source_went_quiet", source=source.id, since=since, usual_calls=min(calls), hint=_QUIET_HINT)
            await runtime.states.note(source.id, quiet_since=quiet_since_ms)
        elif noted and not too_quiet(calls):
            log.info("source_quiet_resolved", source=source.id)
            await runtime.states.note(source.id, quiet_since="")


async def _calls_in_same_stretches(runtime: Runtime, source: Source, newest_ms: int, began_ms: int) -> list[int]:
    now_ms = runtime.lanes[LaneName.POLL].store_now_ms
    known_since_ms = max(began_ms, now_ms - runtime.settings.retention.calls_days * DAY_S * 1000)
    zone = ZoneInfo(source.rules.timezone)
    stretches = same_stretches(from_ms(newest_ms), from_ms(now_ms), zone=zone, known_since=from_ms(known_since_ms))
    async with runtime.redis.pipeline(transaction=False) as pipe:
        for begin, end in stretches:
            pipe.zcount(keys.calls_of(source.id), begin.timestamp() * 1000, end.timestamp() * 1000)
        return [int(count) for count in await pipe.execute()]


async def trim(runtime: Runtime) -> None:
    """Let go of what is older than its retention; bodies expire by themselves, this is about lists and audio."""
    retention = runtime.settings.retention
    now_ms = runtime.lanes[LaneName.POLL].store_now_ms
    now = from_ms(now_ms)
    calls = [keys.CALLS, *map(keys.calls_of, runtime.sources), *map(queue_keys.quarantine, LaneName)]
    events = [keys.EVENTS, keys.DEAD, *map(keys.events_of, runtime.sources)]
    events += map(keys.deliveries_of, runtime.subscriptions)
    for names, days in ((calls, retention.calls_days), (events, retention.events_days)):
        async with runtime.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zremrangebyscore(name, "-inf", now_ms - days * DAY_S * 1000)
                pipe.expire(name, (days + 1) * DAY_S)  # nobody trims the list of a source that was removed
            await pipe.execute()
    try:
        gone = await runtime.storage.trim(now - timedelta(days=retention.recordings_days))
    except StorageError as error:
        log.warning("recordings_trim_failed", error=str(error))
    else:
        if gone:
            log.info("recordings_trimmed", count=gone)
