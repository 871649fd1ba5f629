"""Hosts the lanes in a process: how many attempts run at once, and how long one may take."""

from functools import partial

from relay.delivery.attempt import Attempts
from relay.events.publisher import Publisher
from relay.polling.poller import Poller
from relay.polling.reader import Reader
from relay.polling.stream import Streams
from relay.polling.window import Tier
from relay.queue.runner import Runner
from relay.runtime import Runtime
from relay.store.lanes import LaneName
from workers.contacts import LOOKUP_TIMEOUT_S, ContactWorker
from workers.deliver import DeliverWorker
from workers.enrich import EnrichWorker
from workers.poll import PollWorker
from workers.record import RecordWorker

POLL_CONCURRENCY = 100
ENRICH_CONCURRENCY = 20
ENRICH_BATCH = 50
CONTACTS_CONCURRENCY = 200
CONTACTS_BATCH = 50
RECORD_CONCURRENCY = 8
DELIVER_CONCURRENCY = 200


def add_poller(runtime: Runtime) -> Streams:
    """Host the poll lane, and the streams of sources that have one."""

    def wake() -> None:
        runtime.wake_ups(LaneName.ENRICH)
        runtime.wake_ups(LaneName.RECORD)

    async def poll_now(sid: str) -> None:
        await lane.put("", sid)
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
    runtime.add_runner(Runner(lane, worker.work, concurrency=POLL_CONCURRENCY, min_lease_s=70))
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
    """Host the enrich, contacts, record and deliver lanes."""
    _add_enrich(runtime)
    _add_contacts(runtime)
    _add_record(runtime)
    _add_deliver(runtime)


def add_poller_and_workers(runtime: Runtime) -> None:
    """Host every lane."""
    add_poller(runtime)
    add_workers(runtime)


def _add_enrich(runtime: Runtime) -> None:
    lane = runtime.lanes[LaneName.ENRICH]
    publisher = Publisher(
        runtime.store,
        runtime.subscriptions,
        now_ms=lambda: lane.store_now_ms,
        on_deliveries=lambda: runtime.wake_ups(LaneName.DELIVER),
    )
    worker = EnrichWorker(
        lane,
        lambda: runtime.sources,
        publisher,
        wake_contacts=lambda: runtime.wake_ups.wake_here(LaneName.CONTACTS),
    )
    runtime.add_runner(
        Runner(
            lane,
            worker.work,
            concurrency=ENRICH_CONCURRENCY,
            min_lease_s=15,
            batch=ENRICH_BATCH,
            on_settled=worker.on_settled,
        )
    )


def _add_contacts(runtime: Runtime) -> None:
    lane = runtime.lanes[LaneName.CONTACTS]
    worker = ContactWorker(
        lane,
        lambda: runtime.sources,
        runtime.book,
        runtime.store.sources,
        wake_enrich=lambda: runtime.wake_ups.wake_here(LaneName.ENRICH),
    )
    runtime.add_runner(
        Runner(
            lane,
            worker.work,
            concurrency=CONTACTS_CONCURRENCY,
            min_lease_s=LOOKUP_TIMEOUT_S + 5,
            batch=CONTACTS_BATCH,
            on_settled=worker.on_settled,
        )
    )


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
    runtime.add_runner(
        Runner(
            lane,
            worker.work,
            concurrency=RECORD_CONCURRENCY,
            min_lease_s=30,
            renews=True,
            on_settled=worker.on_settled,
        )
    )


def _add_deliver(runtime: Runtime) -> None:
    lane = runtime.lanes[LaneName.DELIVER]
    timeout_s = runtime.settings.delivery.timeout_s
    attempts = Attempts(
        runtime.sender, link=runtime.links.for_event, find_call=runtime.store.calls.get, timeout_s=timeout_s
    )
    worker = DeliverWorker(
        lane,
        runtime.subscriptions,
        attempts,
        health=runtime.store.subscriptions.health,
        disable=runtime.lifecycle.disable_unhealthy,
        warn_failing=runtime.lifecycle.warn_failing,
    )
    runtime.add_runner(
        Runner(
            lane,
            worker.work,
            concurrency=DELIVER_CONCURRENCY,
            min_lease_s=timeout_s + 5,
            unproven=worker.unproven,
        )
    )
