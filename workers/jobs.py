"""What arq runs: wake-ups, which return at once, and the operator's long work. Each may run twice without harm."""

from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from relay.errors import OverBudget, ProviderError
from relay.ledger.lane import LANES
from relay.ledger.sources import Progress
from relay.model import from_iso
from relay.poll.poller import Reader, Tally
from relay.poll.window import FLOOR
from relay.providers.base import Purpose, Window
from relay.runtime import Runtime

log = structlog.get_logger(__name__)

_STEP = timedelta(hours=6)


async def wake(ctx: dict[str, Any], lane: str) -> None:
    """Have this process look at a lane now."""
    for known in LANES:
        if known == lane:
            ctx["runtime"].wakes.hear(known)


async def backfill(ctx: dict[str, Any], sid: str, since: str, until: str, job: str, force: bool = False) -> None:
    """Read a range of a source again and tell what was never told. Never moves the cursor.

    Rows older than what can be told apart from known ones are only taken with `force`.
    """
    runtime: Runtime = ctx["runtime"]
    progress = Progress(runtime.redis, job)
    source = runtime.sources.get(sid)
    if source is None:
        await progress.write(state="failed", error=f"there is no source {sid}")
        return
    now = datetime.fromtimestamp(runtime.lanes["poll"].store_now_ms / 1000, UTC)
    state = await runtime.states.read(sid)
    reader = Reader(runtime.ledger, runtime.states)
    floor = None if force or state.standing.cursor is None else state.standing.cursor - FLOOR
    at, end = from_iso(since), from_iso(until)
    total = Tally()
    await progress.write(state="running", done=0)
    first = at
    while at < end:
        upto = min(at + _STEP, end) if source.kind.upper_bound else end
        try:
            tally = await reader.read(
                source, Window(at, upto, Purpose.BACKFILL), now=now, via="backfill", floor=floor, until=end
            )
        except OverBudget as error:
            await progress.write(state="waiting", wait_s=round(error.wait_s))
            await ctx["sleep"](min(error.wait_s, 60))
            continue
        except ProviderError as error:
            await progress.write(state="failed", error=str(error))
            return
        total.add(tally)
        at = upto
        await progress.write(state="running", done=round((at - first) / (end - first), 3), **total.counts())
        runtime.wakes("enrich")
    await progress.write(state="done", done=1, **total.counts())
    log.info("backfill_done", source=sid, **total.counts())
