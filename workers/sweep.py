"""What is looked at now and then: every source has its place in the lane, nothing outlives its retention, time goes on.

Runs from arq's cron and, in one process, beside it; twice at once does no harm.
"""

from datetime import UTC, datetime, timedelta

import structlog

from relay.errors import StorageError
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
    if await runtime.redis.set("relay:trimmed", 1, nx=True, ex=_TRIM_EVERY_S):
        await trim(runtime)


async def _time_went_back(runtime: Runtime) -> None:
    """The store's clock was set back: polls that now seem far off become due. Other dues are short or may wait."""
    seconds, micros = await runtime.redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    before = int(await runtime.redis.getset(keys.CLOCK, now_ms) or 0)
    if before - now_ms > _STEP_BACK_MS:
        log.warning("store_clock_stepped_back", by_s=(before - now_ms) / 1000)
        await runtime.lanes["poll"].change([("put", "", sid, 0) for sid in runtime.sources])


async def _credentials_changed(runtime: Runtime) -> None:
    """A source that was refused is tried at once when its credential is another one."""
    for sid, source in runtime.sources.items():
        credential = keys.bucket("credential", source.kind.credential(source.options))
        before = await runtime.redis.hget(keys.source(sid), "credential")  # type: ignore[misc]  # both clients
        if before is None or before.decode() != credential:
            await runtime.states.note(sid, credential=credential)
            if before is not None:
                log.info("credential_changed", source=sid)
                await runtime.lanes["poll"].put("", sid)


async def trim(runtime: Runtime) -> None:
    """Let go of what is older than its retention; bodies expire by themselves, this is about lists and audio."""
    retention = runtime.settings.retention
    now_ms = runtime.lanes["poll"].store_now_ms
    calls = [keys.CALLS, *map(keys.calls_of, runtime.sources)]
    events = [keys.EVENTS, keys.DEAD, *map(keys.events_of, runtime.sources)]
    events += map(keys.deliveries_of, runtime.subscriptions)
    for names, days in ((calls, retention.calls_days), (events, retention.events_days)):
        async with runtime.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zremrangebyscore(name, "-inf", now_ms - days * DAY_S * 1000)
            await pipe.execute()
    try:
        gone = await runtime.storage.trim(datetime.now(UTC) - timedelta(days=retention.recordings_days))
    except StorageError as error:
        log.warning("recordings_not_trimmed", error=str(error))
    else:
        if gone:
            log.info("recordings_trimmed", count=gone)
