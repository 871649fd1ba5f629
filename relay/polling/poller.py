"""Polls one source: plan how far back to look, read, move the cursor last. Promise: no call is missed.

The rules are in window.py. A poll that fails half way moves no cursor: what it ingested is known to the next one, and
the rest is requested again.
"""

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import structlog

from relay.domain.polling import Delays, PollState
from relay.errors import OverBudget, RateLimited, RelayError, SettingsError, Unauthorized, UnexpectedResponse
from relay.events.operations import Operations
from relay.polling.clock_skew import NOTABLE_SKEW_S, apparent_zone
from relay.polling.reader import Ingestion, PollStats, Reader
from relay.polling.window import Plan, Tier, days_to_forget, floor, heavy_after, next_cursor, plan
from relay.providers.base import Window
from relay.providers.source import Source
from relay.recordings.markers import Marker, Markers
from relay.store.sources import CursorUpdate, SourceNote, SourceState
from relay.store.store import Store

log = structlog.get_logger(__name__)

# Wait after a credential was rejected.
PAUSE_S = 900
# So many failures in a row are published as `source.error`; what needs a person is published at once.
LASTING_FAILURES = 5
_LONGEST_BACKOFF_S = 300
_LONGEST_RETRY_AFTER_S = 3600
_MARKER_EVERY = timedelta(hours=1)
_MARKER_RETRY = timedelta(minutes=5)
_STEADY = timedelta(minutes=10)


class Poller:
    """Polls sources, each under a lease of the poll lane.

    `now` is the store's clock; `wake` is called when calls were ingested.
    """

    def __init__(
        self,
        store: Store,
        operations: Operations,
        markers: Markers,
        *,
        tiers: Sequence[Tier],
        wake: Callable[[], None],
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._operations = operations
        self._markers = markers
        self._tiers = tiers
        self._wake = wake
        self._now = now
        self._reader = Reader(store, clock=now)

    async def poll(self, source: Source, *, token: bytes) -> tuple[str, float]:
        """Poll once; return the outcome (a label of `relay_polls_total`) and the seconds until the next poll.

        Raises LeaseLost when another process polls the source by now.
        """
        started_s = time.monotonic()
        state = await self._store.sources.read(source.id)
        try:
            await self._poll(source, state, token)
        except OverBudget as error:
            return "over_budget", error.wait_s
        except RelayError as error:
            return _outcome(error), await self._failed(source, token, error)
        if state.error:
            log.info("source_recovered", source=source.id)
        if state.error_published:
            await self._operations.source_recovered(source, since_ms=state.error_since_ms)
            await self._store.sources.note(source.id, error_published=False)
        return "ok", max(source.options.poll_interval_s - (time.monotonic() - started_s), 0.05)

    async def _poll(self, source: Source, state: SourceState, token: bytes) -> None:
        now = self._now()
        poll_state = state.poll_state
        if poll_state.started_at is None:
            poll_state = await self._begin(source, now)
        planned = plan(poll_state, self._tiers, now=now)

        def cursor_update(stats: PollStats) -> CursorUpdate:
            cursor = next_cursor(poll_state, stats.newest, poll_started=now)
            heavy = heavy_after(poll_state, planned, self._tiers, rows=stats.rows, size_bytes=stats.size_bytes)
            forget_days = days_to_forget(poll_state.cursor, cursor)
            return CursorUpdate(cursor, now, planned.depths, heavy=heavy, forget_days=forget_days)

        stats = await self._reader.read(
            source,
            Window(planned.since, now),
            Ingestion(
                now=now,
                via="poll",
                token=token,
                floor=floor(poll_state, now=now),
                seed_before=poll_state.started_at if planned.seeds else None,
                deep=max(planned.depths) > self._tiers[0].depth_s or len(self._tiers) == 1,
            ),
            cursor_update=cursor_update,
        )
        if stats.new or stats.changed:
            self._wake()
        if planned.seeds:
            log.info("source_first_polled", source=source.id, text=summarise_first_poll(planned, stats))
        note = self._note_clock_skew(source, state, stats) | self._note_zone(source, state, planned, stats, now)
        await self._store.sources.poll_succeeded(
            source.id, rows=stats.rows, invalid=stats.bad, too_old=stats.too_old, new=stats.new, note=note
        )
        await self._write_marker(
            source, poll_state, next_cursor(poll_state, stats.newest, poll_started=now), state, now
        )

    async def _begin(self, source: Source, now: datetime) -> PollState:
        """Start polling a source: from its marker when the store was lost, else from now on."""
        marker = await self._markers.read(source.id)
        if marker is None:
            poll_state = await self._store.sources.begin(source.id, now)
            started_at = poll_state.started_at or now
            await self._markers.write(source.id, Marker(started_at, started_at))
            return poll_state
        log.warning(
            "source_recovery_started", source=source.id, cursor=marker.cursor.isoformat(), reason="the store was empty"
        )
        return await self._store.sources.begin(source.id, marker.started_at, cursor=marker.cursor)

    async def _write_marker(
        self, source: Source, poll_state: PollState, cursor: datetime, state: SourceState, now: datetime
    ) -> None:
        """Write the marker when it is due; after a failure it is due again soon, but not at each poll."""
        due = state.marker_due
        if poll_state.started_at is None or (due is not None and now < due <= now + _MARKER_EVERY):
            return
        written = await self._markers.write(source.id, Marker(poll_state.started_at, cursor))
        await self._store.sources.note(source.id, marker_due=now + (_MARKER_EVERY if written else _MARKER_RETRY))

    def _note_clock_skew(self, source: Source, state: SourceState, stats: PollStats) -> SourceNote:
        """Report once that the provider's clock is wrong, and once that it is right again."""
        ahead = stats.server_ahead_s
        if ahead is None or (abs(ahead) > NOTABLE_SKEW_S) == bool(state.clock_ahead_s):
            return {}
        if state.clock_ahead_s:
            log.info("clock_skew_resolved", source=source.id)
            return {"clock_ahead_s": None}
        log.warning("clock_skew_detected", source=source.id, provider_ahead_s=round(ahead))
        return {"clock_ahead_s": round(ahead)}

    def _note_zone(
        self, source: Source, state: SourceState, planned: Plan, stats: PollStats, now: datetime
    ) -> SourceNote:
        """Judge the time zone by how late calls are seen while polls follow each other; report when that changes."""
        steady = not planned.seeds and state.last_poll and now - state.last_poll <= _STEADY
        if not steady or not stats.found_late_s:
            return {}
        ahead = stats.server_ahead_s or 0.0
        delays = state.delays.plus(late_s + ahead for late_s in stats.found_late_s)
        off_s = delays.off_s()
        if off_s is None:
            return {"delays": delays}
        if off_s and off_s != state.zone_off_s:
            offset = now.astimezone(ZoneInfo(source.options.timezone)).utcoffset() or timedelta()
            log.warning(
                "timezone_mismatch_detected",
                source=source.id,
                configured=source.options.timezone,
                rows_look_like=apparent_zone(offset, off_s),
                action="set the source's timezone to the account's; `relay check` shows the age of its newest call",
            )
        elif not off_s and state.zone_off_s:
            log.info("timezone_mismatch_resolved", source=source.id)
        return {"delays": Delays(), "zone_off_s": off_s}

    async def _failed(self, source: Source, token: bytes, error: RelayError) -> float:
        """Record the failure, publish it when it lasts or needs a person; return the seconds until the next poll."""
        failing = await self._store.sources.poll_failed(source.id, str(error), token=token)
        wait_s = _wait_s(error, failing.failures, source.options.poll_interval_s)
        if failing.new:
            log.error("source_poll_failed", source=source.id, error=str(error), retry_in_s=round(wait_s))
        needs_a_person = isinstance(error, Unauthorized | UnexpectedResponse | SettingsError)
        if (needs_a_person or failing.failures >= LASTING_FAILURES) and not failing.published:
            await self._operations.source_error(source, str(error), since_ms=failing.since_ms)
            await self._store.sources.note(source.id, error_published=True)
        return wait_s


def summarise_first_poll(planned: Plan, stats: PollStats) -> str:
    """Describe the first poll to the person who started the relay."""
    calls = "1 call" if stats.known == 1 else f"{stats.known} calls"
    if planned.recovery:
        return f"{calls} from before the relay recorded, {stats.new} published since then (again); waiting for calls."
    if stats.new:
        return f"{calls} of the 78 h before the relay recorded, {stats.new} since then published; waiting for calls."
    return f"{calls} of the last 78 h recorded, none published; waiting for calls."


def _outcome(error: RelayError) -> str:
    match error:
        case Unauthorized():
            return "unauthorized"
        case RateLimited():
            return "rate_limited"
        case UnexpectedResponse():
            return "odd_answer"
        case _:
            return "failed"


def _wait_s(error: RelayError, failures: int, interval_s: float) -> float:
    match error:
        case Unauthorized():
            return PAUSE_S
        case RateLimited(retry_after_s=hint):
            return min(hint or interval_s, _LONGEST_RETRY_AFTER_S)
        case _:
            return float(min(interval_s * 2 ** min(failures - 1, 10), max(_LONGEST_BACKOFF_S, interval_s)))
