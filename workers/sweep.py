"""What is looked at now and then: every source has its place in the lane, nothing outlives its retention, time goes on.

Runs from arq's cron and, in one process, beside it; twice at once does no harm.
"""

import contextlib
from datetime import UTC, datetime, timedelta

import structlog

from relay.errors import SettingsError, StorageError
from relay.ledger import keys
from relay.runtime import DAY_S, Runtime

log = structlog.get_logger(__name__)

EVERY_S = 30
_TRIM_EVERY_S = 3600
_STEP_BACK_MS = 5000


async def sweep(runtime: Runtime) -> None:
    """Put right what can drift."""
    await _time_went_back(runtime)
    await runtime.arrange()
    await _credentials_changed(runtime)
    if await runtime.redis.set(keys.TRIMMED, 1, nx=True, ex=_TRIM_EVERY_S):
        await trim(runtime)
        resealed = await runtime.directory.declarations.reseal()
        if resealed:
            log.info("sealed_again", count=resealed, why="RELAY_SECRET_KEY has a newer key")


async def _time_went_back(runtime: Runtime) -> None:
    """The store's clock was set back: polls that now seem far off become due. Other dues are short or may wait."""
    seconds, micros = await runtime.redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    before = int(await runtime.redis.getset(keys.CLOCK, now_ms) or 0)
    if before - now_ms > _STEP_BACK_MS:
        log.warning("store_clock_stepped_back", by_s=(before - now_ms) / 1000)
        polled = [sid for sid, each in runtime.sources.items() if not each.paused]
        await runtime.lanes["poll"].change([("put", "", sid, 0) for sid in polled])


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
            await runtime.lanes["poll"].put("", sid)
            await runtime.states.note(sid, credential=credential, contacts_off="", recordings_off="")
            runtime.wakes("poll")


async def trim(runtime: Runtime) -> None:
    """Let go of what is older than its retention; bodies expire by themselves, this is about lists and audio."""
    retention = runtime.settings.retention
    now_ms = runtime.lanes["poll"].store_now_ms
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    calls = [keys.CALLS, *map(keys.calls_of, runtime.sources)]
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
        log.warning("recordings_not_trimmed", error=str(error))
    else:
        if gone:
            log.info("recordings_trimmed", count=gone)
