"""What stands in the store, measured when somebody asks for the metrics: lanes, sources, subscriptions, memory."""

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from relay import metrics
from relay.queue import keys as queue_keys
from relay.runtime import Runtime
from relay.store import keys
from relay.store.health import read_health
from relay.store.lanes import LaneName

MOST_SOURCES = 50
"""With more sources than this, only those furthest behind have series of their own: labels stay bounded."""
_MOST_PARTITIONS = 1000


async def measure(runtime: Runtime) -> None:
    """Set every gauge."""
    seconds, micros = await runtime.redis.time()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    for lane in LaneName:
        await _measure_lane(runtime.redis, lane, now_ms)
    await _measure_sources(runtime, now_ms)
    await _measure_subscriptions(runtime)
    memory = await runtime.redis.info("memory")
    metrics.STORE_MEMORY.set(memory["used_memory"])
    metrics.STORE_LIMIT.set(await _limit(runtime.redis))


async def _limit(redis: Redis) -> int:
    try:
        return int((await redis.config_get("maxmemory")).get("maxmemory", 0))
    except ResponseError:
        return 0  # managed stores hide their configuration


async def _measure_lane(redis: Redis, lane: LaneName, now_ms: int) -> None:
    """Count what is due by schedule and may run: what waits behind a gate is not late."""
    partitions = await redis.zrangebyscore(queue_keys.lane(lane), "-inf", now_ms, start=0, num=_MOST_PARTITIONS)
    async with redis.pipeline(transaction=False) as pipe:
        for partition in partitions:
            name = queue_keys.waiting(lane, partition.decode())
            pipe.zcount(name, "-inf", now_ms)
            pipe.zrange(name, 0, 0, withscores=True)
        answers = await pipe.execute()
    heads = [head[0][1] for head in answers[1::2] if head]
    metrics.LANE_DUE.labels(lane).set(sum(answers[::2]))
    metrics.LANE_OLDEST.labels(lane).set(max((now_ms - min(heads, default=now_ms)) / 1000, 0))


async def _measure_sources(runtime: Runtime, now_ms: int) -> None:
    lags: dict[str, float] = {}
    asked = [sid for sid, source in runtime.sources.items() if not source.paused]
    async with runtime.redis.pipeline(transaction=False) as pipe:
        for sid in asked:
            pipe.hmget(keys.source(sid), ["last_poll", "started_at", "quiet_since"])
        answers = await pipe.execute()
    metrics.QUIET.set(sum(bool(quiet_since) for _, _, quiet_since in answers))
    for sid, (last_poll, started_at, _) in zip(asked, answers, strict=True):
        since_ms = int(last_poll or started_at or now_ms)
        lags[sid] = max((now_ms - since_ms) / 1000, 0)
    worst = sorted(lags, key=lambda sid: lags[sid], reverse=True)[:MOST_SOURCES]
    metrics.POLL_LAG.clear()
    metrics.BUDGET_LEFT.clear()
    for sid in worst:
        source = runtime.sources[sid]
        metrics.POLL_LAG.labels(sid).set(lags[sid])
        left = await source.budget.requests_left()
        if left is not None:
            metrics.BUDGET_LEFT.labels(source.kind.name, sid).set(left)


async def _measure_subscriptions(runtime: Runtime) -> None:
    states = {"working": 0, "failing": 0, "disabled": 0}
    breakers = {"closed": 0, "open": 0}
    for sid in runtime.subscriptions:
        health = await read_health(runtime.redis, sid)
        states["disabled" if health.off else "failing" if health.failing_since_ms else "working"] += 1
        breakers["open" if health.breaker_open else "closed"] += 1
    for state, count in states.items():
        metrics.SUBSCRIPTIONS.labels(state).set(count)
    for state, count in breakers.items():
        metrics.BREAKERS.labels(state).set(count)
