"""The poll lane: one claim is one poll of one source."""

from collections.abc import Callable, Mapping, Sequence

import structlog

from relay import metrics
from relay.polling.poller import Poller
from relay.providers.source import Source
from relay.queue.claim import Claim
from relay.queue.runner import Settle
from relay.queue.settlement import Done, PartitionHealth, Retry
from relay.store.sources import LeaseLost

log = structlog.get_logger(__name__)

_UNKNOWN_RETRY_MS = 2000
# What matters to others is whether the provider answers, not what: a refusal takes no time. A poll that our own budget
# or another process stopped shows nothing.
_HEALTH: Mapping[str, PartitionHealth | None] = {
    "failed": PartitionHealth.FAILING,
    "over_budget": None,
    "overtaken": None,
}


class PollWorker:
    """Polls sources, each when its turn comes."""

    def __init__(
        self,
        sources: Callable[[], Mapping[str, Source]],
        poller: Poller,
        *,
        decides: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """`decides` says whether this process's configuration of a source is the newest."""
        self._sources = sources
        self._decides = decides
        self._poller = poller

    async def work(self, batch: Sequence[Claim], settle: Settle) -> None:
        [claim] = batch
        source = self._sources().get(claim.item)
        if source is None or (source.paused and not self._decides(source.id)):
            settle(claim, Retry(_UNKNOWN_RETRY_MS))
            return
        if source.paused:
            settle(claim, Done())
            return
        try:
            outcome, wait_s = await self._poller.poll(
                source, token=claim.token, is_current=lambda: self._sources().get(claim.item) is source
            )
        except LeaseLost:
            log.warning("poll_lease_lost", source=source.id, reason="its lease ended and another process polls it")
            outcome, wait_s = "overtaken", source.options.poll_interval_s
        metrics.POLLS.labels(outcome).inc()
        settle(claim, Retry(int(wait_s * 1000) + 1, health=_HEALTH.get(outcome, PartitionHealth.HEALTHY)))
