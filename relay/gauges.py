"""Gauges that are read from the store whenever the metrics are scraped."""

from relay import metrics
from relay.runtime import Runtime
from relay.store.lanes import LaneName

# With more sources than this, only those furthest behind, and those with most missing, have their own series: labels
# stay bounded.
MOST_SOURCES = 50


async def measure(runtime: Runtime) -> None:
    for lane in LaneName:
        backlog = await runtime.store.upkeep.backlog(lane)
        metrics.LANE_DUE.labels(lane).set(backlog.due)
        metrics.LANE_OLDEST.labels(lane).set(backlog.oldest_s)
    await _measure_sources(runtime)
    await _measure_completeness(runtime)
    await _measure_subscriptions(runtime)
    memory = await runtime.store.upkeep.memory()
    metrics.STORE_MEMORY.set(memory.used_bytes)
    metrics.STORE_LIMIT.set(memory.limit_bytes)
    metrics.RETENTION_SUSPENDED.set(await runtime.store.upkeep.deletion_suspended_until_ms() > 0)
    metrics.STORE_UNSUITABLE.set(await runtime.store.unsuitable() is not None)


async def _measure_sources(runtime: Runtime) -> None:
    now_s = await runtime.store.wall_ms() / 1000
    polled = [sid for sid, source in runtime.sources.items() if not source.paused]
    lags_s: dict[str, float] = {}
    gaps_s: dict[str, float] = {}
    quiet = 0
    for sid, state in zip(polled, await runtime.store.sources.read_many(polled), strict=True):
        quiet += state.quiet_since is not None
        if gaps := state.poll_state.gaps:
            gaps_s[sid] = (max(gap.until for gap in gaps) - min(gap.since for gap in gaps)).total_seconds()
        since = state.last_poll or state.poll_state.started_at
        lags_s[sid] = max(now_s - since.timestamp(), 0) if since else 0
    metrics.QUIET.set(quiet)
    metrics.POLL_LAG.clear()
    metrics.SOURCE_GAP.clear()
    for sid, gap_s in sorted(gaps_s.items(), key=lambda entry: entry[1], reverse=True)[:MOST_SOURCES]:
        metrics.SOURCE_GAP.labels(sid).set(gap_s)
    metrics.BUDGET_LEFT.clear()
    for sid in sorted(lags_s, key=lambda sid: lags_s[sid], reverse=True)[:MOST_SOURCES]:
        source = runtime.sources[sid]
        metrics.POLL_LAG.labels(sid).set(lags_s[sid])
        left = await source.budget.requests_left()
        if left is not None:
            metrics.BUDGET_LEFT.labels(source.kind.name, sid).set(left)


async def _measure_completeness(runtime: Runtime) -> None:
    checks = await runtime.store.completeness.checks()
    missing = {sid: check.missing for sid, check in checks.items() if sid in runtime.sources}
    metrics.MISSING.clear()
    for sid in sorted(missing, key=lambda sid: missing[sid], reverse=True)[:MOST_SOURCES]:
        metrics.MISSING.labels(sid).set(missing[sid])


async def _measure_subscriptions(runtime: Runtime) -> None:
    states = {"working": 0, "failing": 0, "disabled": 0}
    circuits = {"closed": 0, "open": 0}
    for health in await runtime.store.subscriptions.healths(list(runtime.subscriptions)):
        states["disabled" if health.disabled_reason else "failing" if health.failing_since_ms else "working"] += 1
        circuits["open" if health.circuit_open else "closed"] += 1
    for state, count in states.items():
        metrics.SUBSCRIPTIONS.labels(state).set(count)
    for state, count in circuits.items():
        metrics.BREAKERS.labels(state).set(count)
