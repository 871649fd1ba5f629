"""Completeness: what is missing is found and named, healed under the same ids, and no false alarm is raised."""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from relay.completeness import examine
from relay.domain import ids
from relay.domain.polling import TierFailure
from relay.gauges import measure
from relay.polling.completeness import usual_days
from relay.queue import keys as queue_keys
from relay.queue.changes import DisablePartition, Drop, EnablePartition, Pause
from relay.simulator.timeline import CallPlan, Habits
from relay.store import keys
from relay.store.lanes import LaneName
from tests.fakes.clock import ManualClock
from tests.fakes.timeline import calls_between
from tests.flow.api import SOURCE, ApiClient, open_api
from tests.flow.cli import relay as run_command
from tests.flow.harness import eventually
from tests.flow.polling import KEY, SID, TIERS, PollFault, PollHarness
from tests.flow.test_promise_1 import RUN, Story, live_through, stories
from workers.sweep import check_completeness

HOUR = timedelta(hours=1)
SUBSCRIPTIONS: dict[str, dict[str, Any]] = {"a": {}, "answered": {"outcome": ["answered"]}, "off": {}}


@dataclass
class CompletenessHarness:
    """A relay with its API and workers, and an account whose virtual time the test moves. Each poll is a deep look."""

    api: ApiClient
    account: PollHarness
    redis: Redis
    clock: ManualClock
    rids: Iterable[int] = field(default_factory=lambda: iter(range(1, 10_000)))

    def add(self, count: int, **fields: Any) -> list[str]:
        """Let calls appear that started 10 to 50 minutes ago, every other one answered; returns their keys."""
        plans = []
        for number in range(count):
            ended_at = self.clock.now() - timedelta(minutes=9, seconds=number)
            values: dict[str, Any] = {
                "started_at": ended_at - timedelta(minutes=1),
                "ended_at": ended_at,
                "visible_at": self.clock.now(),
                "disposition": "ANSWERED" if number % 2 else "NO ANSWER",
            }
            plans.append(CallPlan(rid=next(iter(self.rids)), **values | fields))
        self.account.simulator.add_calls(KEY, plans)
        return [str(plan.rid) for plan in plans]

    async def look(self) -> None:
        """Let so much time pass that every tier is due, and poll."""
        await self.clock.advance(6.1 * 3600, turns=0)
        await self.account.poll()
        self.api.relay.runtime.wake_ups.wake_here(LaneName.ENRICH)

    async def add_and_publish(self, count: int, hook: str = "a", **fields: Any) -> list[str]:
        """Let calls appear, be ingested, and be delivered to a hook."""
        before = len(self.api.relay.subscriber.completed(hook))
        record_keys = self.add(count, **fields)
        await self.look()
        await self.api.relay.subscriber.until(lambda: len(self.api.relay.subscriber.completed(hook)) >= before + count)
        await eventually(self.settled, bool)
        return record_keys

    async def add_and_publish_to_others(self, count: int) -> list[str]:
        """Let calls be published while hook `a` gets nothing, so that its deliveries wait."""
        return await self.add_and_publish(count, "off")

    async def backfill(self, *, hours: float) -> None:
        since = (self.clock.now() - timedelta(hours=hours)).isoformat()
        job = await self.api.post(f"/v1/sources/{SID}/backfill", {"from": since.replace("+00:00", "Z")})
        await self.api.wait_for_job(job["id"])

    async def settled(self) -> bool:
        """Whether no lane has anything left to do, but for what is paused."""
        for lane, partition in (("enrich", SID), *(("deliver", name) for name in SUBSCRIPTIONS)):
            items = (queue_keys.waiting(lane, partition), queue_keys.leased(lane, partition))
            paused = await self.redis.hget(queue_keys.partition(lane, partition), "paused_until")  # type: ignore[misc]
            if paused is None and await self.redis.exists(*items):
                return False
        return True

    async def report(self, **options: Any) -> Any:
        first = (self.clock.now() - timedelta(days=6)).date()
        return await self.api.get(f"/v1/sources/{SID}/completeness?from={first}", **options)

    async def gaps(self) -> Counter[tuple[str, str, str | None]]:
        """The gaps by kind, provider's id of the call, and subscription."""
        report = await self.report()
        assert report["missing"] == len(report["gaps"])
        return Counter((gap["kind"], gap["provider_call_id"], gap["subscription_id"]) for gap in report["gaps"])

    async def heal(self) -> Any:
        first = (self.clock.now() - timedelta(days=6)).date()
        job = await self.api.post(f"/v1/sources/{SID}/heal", {"from": str(first)})
        ended = await self.api.wait_for_job(job["id"])
        assert ended["state"] == "done", ended
        return ended["counts"]

    async def lose_call(self, record_key: str, *, with_mark: bool = False) -> None:
        """The store loses a call, and with it perhaps that its row was ever seen."""
        await self.redis.delete(keys.call(ids.call_id(SID, record_key)))
        if with_mark:
            async for name in self.redis.scan_iter(match=keys.seen(SID, "*")):
                await self.redis.hdel(name, record_key)

    async def lose_items(self, lane: LaneName, partition: str, record_keys: Iterable[str]) -> None:
        """A lane loses items, and the store forgets that they are owed, so that no sweep puts them back."""
        for record_key in record_keys:
            call_id = ids.call_id(SID, record_key)
            await self.redis.zrem(keys.owed_items(lane, partition), call_id)
            await self.api.relay.runtime.lanes[lane].apply(Drop(partition, call_id))

    def event(self, record_key: str) -> str:
        return ids.event_id(SID, record_key, "call.completed")


@contextlib.asynccontextmanager
async def _open(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, days_ago: int = 4
) -> AsyncIterator[CompletenessHarness]:
    clock = ManualClock(datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - days_ago * 24 * HOUR)
    account = PollHarness(redis, clock)
    async with account.simulator.serve() as base_url:
        source = {"provider": "webfones", "base_url": base_url, "api_key": KEY, "contacts": False, "recordings": False}
        async with open_api(
            redis, valkey_url, tmp_path, monkeypatch, sources={SID: source}, subscriptions=SUBSCRIPTIONS
        ) as api:
            await account.poll()
            yield CompletenessHarness(api, account, redis, clock)


@pytest.fixture
async def complete(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[CompletenessHarness]:
    async with _open(redis, valkey_url, tmp_path, monkeypatch) as harness:
        yield harness


async def test_every_gap_is_found_named_and_healed(complete: CompletenessHarness) -> None:
    """29 gaps of nine kinds: each is named with its call, and all but a row that stays invalid are healed."""
    redis, runtime = complete.redis, complete.api.relay.runtime
    deliver = runtime.lanes[LaneName.DELIVER]
    fine = await complete.add_and_publish(6)
    assert await complete.gaps() == Counter()

    never_ingested, lost, bodiless, forgotten = [await complete.add_and_publish(4) for _ in range(4)]
    for record_key in lost:
        await complete.lose_call(record_key)
    for record_key in bodiless:
        await redis.delete(keys.event(complete.event(record_key)))
    for sub, noted in (await redis.hgetall(keys.FILTERS)).items():  # type: ignore[misc]  # both clients
        await redis.hset(keys.FILTERS, sub, noted.split(b" ")[0] + b" 0")  # type: ignore[misc]  # in force for long
    for record_key in forgotten:
        await redis.hdel(keys.event(complete.event(record_key)), "a")  # type: ignore[misc]  # both clients

    await runtime.lanes[LaneName.ENRICH].apply(Pause(SID, "inf"))
    unpublished = complete.add(3)
    await complete.look()
    await complete.lose_items(LaneName.ENRICH, SID, unpublished)
    await runtime.lanes[LaneName.ENRICH].apply(Pause(SID, None))

    await deliver.apply(Pause("a", "inf"))
    undelivered = await complete.add_and_publish_to_others(3)
    await complete.lose_items(LaneName.DELIVER, "a", undelivered)
    await redis.delete(keys.pending("a", ids.call_id(SID, undelivered[0])))
    expired = await complete.add_and_publish_to_others(2)
    for record_key in expired:
        await redis.hdel(keys.event(complete.event(record_key)), keys.BODY)  # type: ignore[misc]  # both clients
    await deliver.apply(Pause("a", None))

    await deliver.apply(DisablePartition("off", "closed for the weekend"))
    missed = await complete.add_and_publish(3)
    assert {kind for kind, _, sub in await complete.gaps() if sub == "off"} == set()
    await deliver.apply(EnablePartition("off"))

    wrong_time = f"{complete.clock.now().date()} 25:61:00"
    invalid = complete.add(2, extra={"call_timestamp": wrong_time})
    await complete.look()
    [late] = complete.add(1, started_at=complete.clock.now() - 125 * HOUR, ended_at=complete.clock.now() - 124.9 * HOUR)
    await complete.backfill(hours=130)
    for record_key in never_ingested:  # last, since the next deep look would ingest them
        await complete.lose_call(record_key, with_mark=True)

    gaps = await complete.gaps()
    expected = [
        *(("not_ingested", record_key, None) for record_key in never_ingested),
        *(("call_lost", record_key, None) for record_key in lost),
        *(("event_lost", record_key, None) for record_key in bodiless),
        *(("not_queued", record_key, "a") for record_key in forgotten),
        *(("not_published", record_key, None) for record_key in unpublished),
        *(("delivery_lost", record_key, "a") for record_key in undelivered),
        *(("event_lost", record_key, "a") for record_key in expired),
        *(("missed_while_disabled", record_key, "off") for record_key in missed),
        *(("quarantined", record_key, None) for record_key in invalid),
        ("too_old", late, None),
    ]
    assert gaps == Counter(expected)
    assert len(expected) >= 20
    assert all(gap["what"] and gap["action"] and gap["call_id"] for gap in (await complete.report())["gaps"])

    complete.account.simulator.change(
        KEY, int(invalid[0]), {"call_timestamp": f"{complete.clock.now().date()} 01:00:00"}
    )
    counts = await complete.heal()
    every = [*fine, *never_ingested, *lost, *bodiless, *forgotten, *unpublished, *undelivered, *expired, *missed]
    wanted = {*every, invalid[0], late}
    subscriber = complete.api.relay.subscriber
    await subscriber.until(lambda: all(subscriber.completed(hook) >= wanted for hook in ("a", "off")))
    await eventually(complete.settled, bool)

    assert await complete.gaps() == Counter({("quarantined", invalid[1], None): 1})
    assert (counts["gaps"], counts["left"]) == (len(expected), 1)
    for hook in ("a", "off"):
        completed = [event for event in subscriber.events(hook) if event["type"] == "call.completed"]
        assert {event["id"] for event in completed} == {complete.event(record_key) for record_key in wanted}
        repeated = Counter(event["id"] for event in completed)
        states_lost = {complete.event(record_key) for record_key in (*bodiless, *(forgotten if hook == "a" else ()))}
        assert {event_id for event_id, count in repeated.items() if count > 1} <= states_lost


async def test_a_clean_source_has_nothing_missing(complete: CompletenessHarness) -> None:
    """Counts per day and subscription: calls in progress, filtered events, and a disabled subscription."""
    deliver = complete.api.relay.runtime.lanes[LaneName.DELIVER]
    await deliver.apply(DisablePartition("off", "closed"))
    await complete.add_and_publish(4)
    started_at = complete.clock.now()
    complete.add(
        1, started_at=started_at, ended_at=started_at + 20 * HOUR, visible_at=started_at, disposition="IN PROGRESS"
    )
    await complete.look()
    await eventually(complete.settled, bool)

    report = await complete.report()

    days = [day for day in report["days"] if day["shown"]]
    assert (report["missing"], report["gaps"]) == (0, [])
    assert sum(day["shown"] for day in days) == sum(day["ingested"] for day in days) == 5
    assert sum(day["in_progress"] for day in days) == 1
    by_subscription: dict[str, Counter[str]] = {name: Counter() for name in SUBSCRIPTIONS}
    for day in days:
        for counts in day["subscriptions"]:
            by_subscription[counts.pop("subscription_id")].update(counts)
    assert +by_subscription["a"] == Counter(delivered=4)
    assert +by_subscription["answered"] == Counter(delivered=2, filtered=2)
    assert +by_subscription["off"] == Counter(disabled=4)


async def test_a_clean_week_raises_no_alarm(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 calls, many late, long or changed; polls fail and die; one subscription filters, one is disabled."""
    quiet = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    async with _open(redis, valkey_url, tmp_path, monkeypatch, days_ago=7) as complete:
        await complete.api.relay.runtime.lanes[LaneName.DELIVER].apply(DisablePartition("off", "not in use"))
        begin, habits = complete.clock.now(), Habits(calls_per_hour=6, late=0.05, changed=0.1, talk_sigma=2)
        plans = calls_between(begin - 8 * HOUR, begin + 6.9 * 24 * HOUR, seed=7, habits=habits)
        complete.account.simulator.add_calls(KEY, plans)
        faults = itertools.cycle([*[PollFault.NONE] * 5, *PollFault])
        found: list[Any] = []
        shown = 0

        while complete.clock.now() < begin + 7 * 24 * HOUR:
            await complete.account.poll(next(faults))
            complete.api.relay.runtime.wake_ups.wake_here(LaneName.ENRICH)
            report = await complete.api.get(f"/v1/sources/{SID}/completeness?from={_remembered(complete)}")
            found += report["gaps"]
            shown = max(shown, sum(day["shown"] for day in report["days"]))
            await complete.clock.advance(1800, turns=0)
        await eventually(complete.settled, bool, timeout_s=60)
        found += (await complete.api.get(f"/v1/sources/{SID}/completeness?from={_remembered(complete)}"))["gaps"]
    structlog.configure(**quiet)

    assert found == []
    assert shown > 500
    assert len(complete.api.relay.subscriber.completed("a")) > 900


def _remembered(complete: CompletenessHarness) -> str:
    return str((complete.clock.now() - timedelta(days=5)).date())


@settings(RUN, max_examples=10)
@given(story=stories())
async def test_no_story_of_an_account_raises_an_alarm(valkey_url: str, story: Story) -> None:
    """Late and long calls, DST, wrong zones, outages, polls that are refused, killed or overtaken: never a gap."""
    quiet = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    async with Redis.from_url(valkey_url) as redis:
        await redis.flushdb()
        clock = ManualClock(story.start)
        account = PollHarness(redis, clock, zone=story.zone, timezone=story.configured)

        async def look_for_gaps() -> None:
            first, last = usual_days(clock.now(), zone=story.configured)
            reports = await examine(account.store, account.source, [], first=first, last=last)
            assert [gap for report in reports for gap in report.gaps] == []

        await live_through(story, account, clock, after_poll=look_for_gaps)
    structlog.configure(**quiet)


async def test_what_was_erased_is_not_missing_and_is_not_healed(complete: CompletenessHarness) -> None:
    """A person who was erased does not come back."""
    await complete.add_and_publish(2, outside_number="(202) 555-0111")
    await complete.api.post("/v1/erase", {"number": "+12025550111"})
    await complete.look()

    report = await complete.report()
    counts = await complete.heal()
    since = (complete.clock.now() - 60 * HOUR).isoformat()
    job = await complete.api.post(f"/v1/sources/{SID}/backfill", {"from": since})
    await complete.api.wait_for_job(job["id"])

    assert report["missing"] == 0
    assert sum(day["erased"] for day in report["days"]) == 2
    assert counts["gaps"] == 0
    assert await complete.account.calls_stored() == 0


async def test_a_call_whose_start_was_corrected_counts_on_its_new_day(complete: CompletenessHarness) -> None:
    """The deep look of its former day, which still names it, is no reason for an alarm."""
    [record_key] = await complete.add_and_publish(1)
    before = await complete.report()
    [day] = [each["day"] for each in before["days"] if each["ingested"]]
    following = (date.fromisoformat(day) + timedelta(days=1)).isoformat()
    complete.account.simulator.change(KEY, int(record_key), {"call_timestamp": f"{following} 00:00:01"})
    shown = await complete.redis.hget(keys.shown(SID), day)  # type: ignore[misc]  # both clients
    await complete.look()
    await complete.redis.hset(keys.shown(SID), day, shown)  # type: ignore[misc]  # the day was not read again since

    after = await complete.report()

    assert (before["missing"], after["missing"]) == (0, 0)
    assert [each["day"] for each in after["days"] if each["ingested"]] == [following]


async def test_a_lost_call_that_the_provider_has_no_more_stays_named(complete: CompletenessHarness) -> None:
    """Healing does not hide what it cannot repair."""
    [record_key] = await complete.add_and_publish(1)
    await complete.lose_call(record_key)
    complete.account.simulator.accounts[KEY].remove(int(record_key))

    counts = await complete.heal()

    assert (counts["gaps"], counts["left"]) == (1, 1)
    assert await complete.gaps() == Counter({("call_lost", record_key, None): 1})


async def test_the_sweep_measures_what_is_missing(complete: CompletenessHarness) -> None:
    """A metric and one log line, until it is healed."""
    runtime = complete.api.relay.runtime
    await complete.clock.advance(48 * 3600, turns=0)
    record_keys = await complete.add_and_publish(2)
    for record_key in record_keys:
        await complete.lose_call(record_key)

    async def check() -> list[str]:
        with capture_logs() as logs:
            await check_completeness(runtime)
        await measure(runtime)
        return [log["event"] for log in logs if log["event"].startswith("completeness_")]

    found = await check()
    missing = REGISTRY.get_sample_value("relay_completeness_missing", {"source": SID})
    await complete.heal()
    soon = await check()
    await complete.redis.hset(keys.COMPLETENESS, SID, "2 0")  # type: ignore[misc]  # both clients; checked long ago
    later = await check()

    assert (found, missing) == (["completeness_gaps_found"], 2)
    assert (soon, later) == ([], ["completeness_gaps_resolved"])
    assert REGISTRY.get_sample_value("relay_completeness_missing", {"source": SID}) == 0


@pytest.mark.parametrize(
    ("query", "field"),
    [("from=2026-01-01", "from"), ("from=yesterday", "from"), ("from=2999-01-01", "from"), ("until=1", "until")],
)
async def test_days_that_cannot_be_examined_are_refused(complete: CompletenessHarness, query: str, field: str) -> None:
    """Too long ago, no date, in the future, unknown parameter."""
    status, problem = await complete.api.request("GET", f"/v1/sources/{SID}/completeness?{query}")

    assert (status, problem["code"], problem["errors"][0]["field"]) == (422, "invalid", field)


async def test_what_could_not_be_read_is_shown_beside_what_is_missing(complete: CompletenessHarness) -> None:
    """Whether something is missing there is not known so far, so it is not counted."""
    now = complete.clock.now()
    failure = TierFailure(now - 2 * HOUR, now - HOUR, "WebFones answered 504", now, 3, 7200, now + HOUR)
    await complete.account.store.sources.tier_failed(SID, TIERS[-1].depth_s, failure)

    report = await complete.report()
    printed = await run_command(complete.api, "completeness", SID, "--from", str(now.date()))

    assert (report["missing"], report["unread"]) == (0, [failure.text])
    assert (printed.code, "could not be read: WebFones answered 504" in printed.err) == (0, True)


async def test_a_paused_source_is_examined_but_not_healed(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Healing would have to ask its provider."""
    source = {**SOURCE, "enabled": False}
    async with open_api(redis, valkey_url, tmp_path, monkeypatch, sources={SID: source}) as api:
        report = await api.get(f"/v1/sources/{SID}/completeness")

        assert (report["missing"], len(report["days"])) == (0, 4)
        assert await api.problem("POST", f"/v1/sources/{SID}/heal") == (409, "source_paused")


async def test_a_tenant_sees_its_own_sources_and_subscriptions_only(complete: CompletenessHarness) -> None:
    """Another one's source is not found, for reading and for healing; healing needs an admin."""
    api = complete.api
    stranger, viewer = await api.issue_token("admin", "other"), await api.issue_token("viewer")
    path = f"/v1/sources/{SID}"

    assert await api.problem("GET", f"{path}/completeness", token=stranger) == (404, "not_found")
    assert await api.problem("POST", f"{path}/heal", {}, token=stranger) == (404, "not_found")
    assert await api.problem("POST", f"{path}/heal", {}, token=viewer) == (403, "forbidden")
    assert await api.problem("POST", f"{path}/heal", {"from": "2026-01-01"}) == (422, "invalid")


async def test_the_command_names_gaps_and_heals_them(complete: CompletenessHarness) -> None:
    """Exit code 1 while something is missing; `--json` is the API's document."""
    [fine, lost] = await complete.add_and_publish(2)
    first = str((complete.clock.now() - timedelta(days=2)).date())
    clean = await run_command(complete.api, "completeness", "--from", first)
    await complete.lose_call(lost)

    found = await run_command(complete.api, "completeness", SID, "--from", first)
    as_json = await run_command(complete.api, "completeness", SID, "--from", first, "--json")
    healed = await run_command(complete.api, "completeness", "--from", first, "--heal")

    assert (clean.code, found.code, as_json.code, healed.code) == (0, 1, 1, 0), (clean, found, healed)
    assert lost in found.out
    assert "the store has lost it" in found.out
    assert "--heal" in found.err
    assert [gap["provider_call_id"] for gap in as_json.json["gaps"]] == [lost]
    assert await complete.account.call(int(fine)) is not None
    assert await complete.account.call(int(lost)) is not None
