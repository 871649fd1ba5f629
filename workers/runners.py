"""The three runners of a worker, built over a runtime."""

from relay.delivery.attempt import Attempts
from relay.queue.runner import Runner
from relay.runtime import Runtime
from relay.store.health import read_health
from relay.store.lanes import LaneName
from workers.deliver import Deliver
from workers.enrich import Enrich
from workers.record import RecordWorker

ENRICH_AT_ONCE = 20
ENRICH_BATCH = 50
RECORD_AT_ONCE = 8
DELIVER_AT_ONCE = 200


def add_runners(runtime: Runtime) -> None:
    """Host the enrich, record and deliver lanes in this process."""
    enrich = Enrich(lambda: runtime.sources, runtime.book, runtime.publisher(), runtime.states)
    enrich.runner = runtime.add_runner(
        Runner(runtime.lanes[LaneName.ENRICH], enrich.work, at_once=ENRICH_AT_ONCE, needs_s=15, batch=ENRICH_BATCH)
    )
    record = RecordWorker(
        lambda: runtime.sources,
        runtime.storage,
        runtime.states,
        wake_enrich=lambda: runtime.wake_ups(LaneName.ENRICH),
        find_call=runtime.ledger.call,
    )
    record.runner = runtime.add_runner(
        Runner(runtime.lanes[LaneName.RECORD], record.work, at_once=RECORD_AT_ONCE, needs_s=30, settled=record.settled)
    )
    timeout_s = runtime.settings.delivery.timeout_s
    attempts = Attempts(
        runtime.sender, link=runtime.links.for_event, find_call=runtime.ledger.call, timeout_s=timeout_s
    )
    deliver = Deliver(
        runtime.subscriptions,
        attempts,
        health=lambda sub: read_health(runtime.redis, sub),
        disable=runtime.disable,
        failing=runtime.failing,
    )
    deliver.runner = runtime.add_runner(
        Runner(
            runtime.lanes[LaneName.DELIVER],
            deliver.work,
            at_once=DELIVER_AT_ONCE,
            needs_s=timeout_s + 5,
            doubtful=deliver.doubtful,
        )
    )
