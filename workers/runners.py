"""Hosts the lanes in a process, and decides how many attempts run at once."""

from functools import partial
from typing import Any

from relay import metrics
from relay.delivery.attempt import Attempts
from relay.events.publisher import Publisher
from relay.polling.poller import Poller
from relay.polling.reader import Reader
from relay.polling.stream import Streams
from relay.polling.window import Tier
from relay.queue.lane import Lane
from relay.queue.runner import Runner, Work
from relay.runtime import Runtime
from relay.store.lanes import LaneName
from workers.contacts import ContactWorker
from workers.deliver import DeliverWorker
from workers.enrich import EnrichWorker
from workers.poll import PollWorker
from workers.record import RecordWorker

# Waiting on a network is cheap, so each lane has room for hundreds: half of it for partitions that are unproven, which
# may all hang at once.
POLL_CONCURRENCY = 500
ENRICH_CONCURRENCY = 100
ENRICH_BATCH = 50
CONTACTS_CONCURRENCY = 400
CONTACTS_BATCH = 50
RECORD_CONCURRENCY = 100
DELIVER_CONCURRENCY = 400


def add_poller(runtime: Runtime) -> Streams:
    """Host the poll lane, and the streams of sources that have one."""

    def wake() -> None:
        runtime.wake_ups(LaneName.ENRICH)
        runtime.wake_ups(LaneName.RECORD)

    async def poll_now(sid: str) -> None:
        await lane.put(sid, sid)
        runtime.wake_ups.wake_here(LaneName.POLL)

    lane = runtime.lanes[LaneName.POLL]
    poller = Poller(
        runtime.store,
        runtime.operations,
        runtime.markers,
        tiers=[Tier(int(tier.every_s), int(tier.depth_s)) for tier in runtime.settings.poll.tiers],
        wake=wake,
        now=runtime.store_now,
    )
    worker = PollWorker(lambda: runtime.sources, poller, decides=partial(runtime.registry.decides, "source"))
    _add_runner(runtime, lane, worker.work, concurrency=POLL_CONCURRENCY)
    streams = Streams(
        runtime.store.stream_leases,
        Reader(runtime.store),
        runtime.store.sources,
        lambda: runtime.sources,
        now=runtime.store_now,
        catch_up=poll_now,
        calls_ingested=wake,
    )
    runtime.add_service("streams", streams.run)
    return streams


def add_workers(runtime: Runtime) -> None:
    lane = runtime.lanes[LaneName.ENRICH]
    publisher = Publisher(
        runtime.store,
        runtime.subscriptions,
        now_ms=lambda: lane.store_now_ms,
        wall_ms=lambda: lane.wall_ms,
        on_deliveries=lambda: runtime.wake_ups(LaneName.DELIVER),
        elsewhere=runtime.registry.subscriptions_elsewhere,
    )
    _add_enrich(runtime, publisher)
    _add_contacts(runtime, publisher)
    _add_record(runtime)
    _add_deliver(runtime)


def add_poller_and_workers(runtime: Runtime) -> None:
    add_poller(runtime)
    add_workers(runtime)


def _add_enrich(runtime: Runtime, publisher: Publisher) -> None:
    lane = runtime.lanes[LaneName.ENRICH]
    worker = EnrichWorker(
        lane,
        lambda: runtime.sources,
        publisher,
        wake_contacts=lambda: runtime.wake_ups.wake_here(LaneName.CONTACTS),
    )
    _add_runner(
        runtime,
        lane,
        worker.work,
        concurrency=ENRICH_CONCURRENCY,
        batch=ENRICH_BATCH,
        on_settled=worker.on_settled,
    )


def _add_contacts(runtime: Runtime, publisher: Publisher) -> None:
    lane = runtime.lanes[LaneName.CONTACTS]
    worker = ContactWorker(lane, lambda: runtime.sources, runtime.book, publisher, runtime.store.sources)
    _add_runner(runtime, lane, worker.work, concurrency=CONTACTS_CONCURRENCY, batch=CONTACTS_BATCH)


def _add_record(runtime: Runtime) -> None:
    lane = runtime.lanes[LaneName.RECORD]
    worker = RecordWorker(
        lane,
        lambda: runtime.sources,
        runtime.storage,
        runtime.store.sources,
        wake_enrich=lambda: runtime.wake_ups(LaneName.ENRICH),
        find_call=runtime.store.calls.get,
        decides=partial(runtime.registry.decides, "source"),
    )
    _add_runner(runtime, lane, worker.work, concurrency=RECORD_CONCURRENCY, on_settled=worker.on_settled)


def _add_deliver(runtime: Runtime) -> None:
    lane = runtime.lanes[LaneName.DELIVER]
    timeout_s = runtime.settings.delivery.timeout_s
    attempts = Attempts(
        runtime.egress, link=runtime.links.for_event, find_call=runtime.store.calls.get, timeout_s=timeout_s
    )
    worker = DeliverWorker(
        lane,
        runtime.subscriptions,
        attempts,
        health=runtime.store.subscriptions.health,
        disable=runtime.lifecycle.disable_unhealthy,
        warn_failing=runtime.lifecycle.warn_failing,
        may_receive=runtime.registry.may_receive,
    )
    _add_runner(runtime, lane, worker.work, concurrency=DELIVER_CONCURRENCY)


def _add_runner(runtime: Runtime, lane: Lane, work: Work, *, concurrency: int, **options: Any) -> None:
    runner = Runner(
        lane, work, concurrency=concurrency, on_error=lambda lane: metrics.WORK_ERRORS.labels(lane).inc(), **options
    )
    runtime.add_runner(runner)
