"""The share of a provider's limit over all processes, in a real store, mostly on a clock that the test sets."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.asyncio import Redis

from relay.errors import OverBudget, RateLimited
from relay.providers.base import Purpose
from relay.providers.budget import Limit, SourceBudget
from relay.providers.source import connect_source
from relay.providers.webfones.options import WebfonesOptions
from relay.store.budget import BudgetStore, budget_script
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.webfones import FaultyWebFones

LIMIT = Limit(requests=1000, window_s=900, share=0.6)
SMALL = Limit(requests=20, window_s=60, share=0.5)
START_MS = 1_750_000_000_000
_TIME = "redis.call('TIME')"


class VirtualStore:
    """Budgets whose script asks a key for the time instead of the store."""

    def __init__(self, redis: Redis) -> None:
        assert budget_script().count(_TIME) == 1
        self._script = budget_script().replace(_TIME, "redis.call('HMGET', 'test:clock', 's', 'us')")
        self._redis = redis
        self.now_ms = START_MS

    def budget(self, limit: Limit | None = SMALL, *, key: str = "key", egress: str = "direct") -> SourceBudget:
        """The budget of a source with this key and way out, in a process of its own."""
        return SourceBudget(BudgetStore(self._redis, script=self._script), "webfones", lambda: key, egress, limit)

    async def at(self, now_ms: int) -> None:
        self.now_ms = now_ms
        await self._redis.hset("test:clock", mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})


@pytest.fixture
async def store(redis: Redis) -> VirtualStore:
    virtual = VirtualStore(redis)
    await virtual.at(START_MS)
    return virtual


async def spends(budget: SourceBudget, purpose: Purpose = Purpose.POLL) -> bool:
    """Whether there is room for a request."""
    try:
        await budget.spend(purpose)
    except OverBudget:
        return False
    return True


async def requests_at_once(budget: SourceBudget, purpose: Purpose, *, most: int = 1000) -> int:
    """Requests that can be sent at once until the budget is exhausted."""
    for count in range(most):
        if not await spends(budget, purpose):
            return count
    return most


def source_budget(
    redis: Redis, limit: Limit | None = LIMIT, *, key: str = "key", egress: str = "direct", provider: str = "webfones"
) -> SourceBudget:
    return SourceBudget(BudgetStore(redis), provider, lambda: key, egress, limit)


gaps = st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from(Purpose), st.booleans()), min_size=5, max_size=120)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gaps=gaps)
async def test_no_window_has_more_than_the_share(valkey_url: str, gaps: list[tuple[int, Purpose, bool]]) -> None:
    """Two processes with one key ask for all purposes at any times: any window, wherever it begins, holds the share."""
    async with Redis.from_url(valkey_url) as redis:
        await redis.flushall()
        store = VirtualStore(redis)
        budgets = store.budget(), store.budget()
        sent_ms: list[int] = []
        now_ms = START_MS
        for gap_ms, purpose, second in gaps:
            now_ms += gap_ms
            await store.at(now_ms)
            if await spends(budgets[second], purpose):
                sent_ms.append(now_ms)

    most = max(sum(at <= other < at + 60_000 for other in sent_ms) for at in sent_ms)
    assert most <= SMALL.requests * SMALL.share


async def test_the_whole_share_can_be_spent(store: VirtualStore) -> None:
    """It is a share, not less: continuous requests for 15 minutes get 599 of the 600."""
    budget = store.budget(LIMIT)
    sent = 0
    for step in range(0, 900_000, 500):
        await store.at(START_MS + step)
        sent += await spends(budget)

    assert sent == 599


async def test_recordings_and_backfills_never_starve_polls(store: VirtualStore) -> None:
    """A backfill and recordings send requests as fast as they can for an hour: each poll, every 30 s, is on time."""
    budget = store.budget(LIMIT)
    polled = 0
    for second in range(0, 3600, 2):
        await store.at(START_MS + second * 1000)
        await requests_at_once(budget, Purpose.RECORDING)
        await requests_at_once(budget, Purpose.BACKFILL)
        if second % 30 == 0:
            await budget.spend(Purpose.POLL)
            polled += 1

    assert polled == 120


async def test_each_purpose_leaves_room_for_those_that_matter_more(store: VirtualStore) -> None:
    """One after the other, each finds its own part of the burst of 300."""
    budget = store.budget(LIMIT)

    counts = [await requests_at_once(budget, purpose) for purpose in sorted(Purpose, reverse=True)]

    assert counts == [180, 30, 30, 30, 30]


async def test_two_sources_with_one_key_share_it(store: VirtualStore) -> None:
    """The provider counts by key, and so does the budget: what one source spent is gone for the other."""
    first, second, other = store.budget(), store.budget(), store.budget(key="another")

    assert await requests_at_once(first, Purpose.POLL) == 5
    assert not await spends(second)
    assert await spends(other)


async def test_a_credential_that_changes_has_a_budget_of_its_own(redis: Redis) -> None:
    """The key file has a new key: from then on that one is counted."""
    key = "old"
    budget = SourceBudget(BudgetStore(redis), "webfones", lambda: key, "direct", SMALL)
    assert await requests_at_once(budget, Purpose.POLL) == 5

    key = "new"

    assert await spends(budget)


async def test_two_processes_cannot_take_the_same_room(redis: Redis, valkey_url: str) -> None:
    """400 requests of two processes at the same moment: the burst is sent, and no more."""
    async with Redis.from_url(valkey_url) as other:
        started_s = time.monotonic()
        budgets = [source_budget(client) for client in (redis, other)]
        sent = await asyncio.gather(*(spends(budgets[number % 2]) for number in range(400)))

        elapsed_s = time.monotonic() - started_s

    assert 300 <= sum(sent) <= 301 + elapsed_s / 3, "one more every three seconds"


async def test_contacts_count_by_address_too_and_take_nothing_when_either_is_used_up(store: VirtualStore) -> None:
    """Many keys behind one address: the address is what runs out, and the key keeps its room."""
    for number in range(4):
        assert await spends(store.budget(key=f"key {number}"), Purpose.CONTACTS)
    budget = store.budget(key="fresh")

    assert not await spends(budget, Purpose.CONTACTS)
    assert await requests_at_once(budget, Purpose.POLL) == 5


async def refuse(budget: SourceBudget, bucket: str, hint_s: float | None, purpose: Purpose = Purpose.POLL) -> None:
    """Close the budget as the HTTP client does after a 429."""
    await budget.close(RateLimited("too many", bucket=bucket, retry_after_s=hint_s), purpose)  # type: ignore[arg-type]


async def wait_s(budget: SourceBudget, purpose: Purpose = Purpose.POLL) -> float:
    """How long a request has to wait."""
    try:
        await budget.spend(purpose)
    except OverBudget as error:
        return error.wait_s
    return 0.0


CLOSED = {
    "the key, with a hint": ("key", 40.0, Purpose.POLL, LIMIT, (40, 0, 40)),
    "the key, without one, to the end of the window": ("key", None, Purpose.RECORDING, LIMIT, (900, 0, 900)),
    "the key, and no limit is known": ("key", None, Purpose.POLL, None, (60, 0, 60)),
    "the address, for a poll": ("ip", 40.0, Purpose.POLL, LIMIT, (40, 40, 40)),
    "the address, for contacts": ("ip", 40.0, Purpose.CONTACTS, LIMIT, (0, 0, 40)),
    "the key, for hours": ("key", 20_000.0, Purpose.POLL, LIMIT, (20_000, 0, 20_000)),
    "a hint beyond reason": ("key", 1e9, Purpose.POLL, LIMIT, (86_400, 0, 86_400)),
}


@pytest.mark.parametrize(("bucket", "hint_s", "purpose", "limit", "waits"), CLOSED.values(), ids=CLOSED)
async def test_a_429_closes_what_it_names(
    redis: Redis, bucket: str, hint_s: float | None, purpose: Purpose, limit: Limit | None, waits: tuple[int, ...]
) -> None:
    """The key or the address; polls do not wait because contacts are refused by address."""
    ours, neighbours = source_budget(redis, limit), source_budget(redis, limit, key="another")

    await refuse(ours, bucket, hint_s, purpose)

    waited = [await wait_s(ours), await wait_s(neighbours), await wait_s(ours, Purpose.CONTACTS)]
    assert waited == pytest.approx(waits, abs=2)


async def test_another_way_out_is_not_closed_by_an_address(redis: Redis) -> None:
    """A source behind a proxy is counted by the proxy's address."""
    await refuse(source_budget(redis), "ip", 40.0)

    proxied = source_budget(redis, key="key 2", egress="http://proxy.example:3128")
    assert await wait_s(proxied) == 0


async def test_a_tenants_refusal_closes_no_budget_of_others(redis: Redis) -> None:
    """A tenant's own server answers 429 "this IP": the operator's source, and another tenant's, go on."""

    def budget(owner: str, *, server: str = "api.example:2343", key: str = "key") -> SourceBudget:
        return SourceBudget(BudgetStore(redis), server, lambda: key, "direct", LIMIT, owner=owner)

    await refuse(budget("mallory", server="mallory.example", key="m"), "ip", 3600.0)
    await refuse(budget("mallory", key="m"), "ip", 3600.0)
    await refuse(budget("mallory", server="mallory.example"), "key", 3600.0)

    assert await wait_s(budget("")) == 0
    assert await wait_s(budget("", key="m")) == 0
    assert await wait_s(budget("other", key="m")) == 0
    assert await wait_s(budget("mallory", key="m")) == pytest.approx(3600, abs=2)


async def test_a_429_on_a_recording_stops_the_requests_after_it(redis: Redis) -> None:
    """Thirty recordings are requested, and one request is sent; the API shows until when nothing else is."""
    simulator = FaultyWebFones()
    simulator.add_account("key")
    simulator.inject(Fault(kind=FaultKind.STATUS, status=429, on="recording", times=None))
    async with simulator.serve() as base_url, aiohttp.ClientSession() as http:
        options = WebfonesOptions(api_key=SecretStr("key"), base_url=base_url)
        source = connect_source("main", options, http, BudgetStore(redis), public_url=None)
        assert source.provider.recordings is not None
        errors: list[Exception] = []
        for number in range(30):
            try:
                async with source.provider.recordings.recording(str(number + 1)):
                    pass
            except (RateLimited, OverBudget) as error:
                errors.append(error)

    closed_until = await source.budget.closed_until()
    assert [type(error) for error in errors] == [RateLimited] + [OverBudget] * 29
    assert await source.budget.requests_left() == 0
    assert closed_until is not None
    assert closed_until > datetime.now(UTC) + timedelta(seconds=30)


async def test_a_closed_bucket_opens_again(store: VirtualStore, redis: Redis) -> None:
    """After the hint the next request is sent."""
    await redis.hset(BudgetStore.bucket("webfones", "key", "key"), "closed", START_MS + 40_000)
    budget = store.budget()

    await store.at(START_MS + 39_999)
    before = await spends(budget)
    await store.at(START_MS + 40_000)

    assert (before, await spends(budget)) == (False, True)


async def test_a_clock_that_is_set_back_does_not_close_a_budget_for_as_long(store: VirtualStore, redis: Redis) -> None:
    """The store's clock was a day ahead while the burst was spent and a 429 came; then it is corrected."""
    await store.at(START_MS + 86_400_000)
    budget = store.budget()
    await requests_at_once(budget, Purpose.POLL)
    await redis.hset(BudgetStore.bucket("webfones", "key", "key"), "closed", START_MS + 86_400_000 + 60_000)

    await store.at(START_MS)

    assert await wait_s(budget) == pytest.approx(SMALL.interval_ms / 1000, abs=0.1)
    await store.at(START_MS + int(SMALL.interval_ms) + 1)
    assert await spends(budget)


async def test_what_is_left_is_counted_without_spending_it(redis: Redis) -> None:
    """`relay check` and the API show it."""
    budget = source_budget(redis)
    assert await budget.requests_left() == 300

    for _ in range(10):
        await budget.spend(Purpose.POLL)

    assert await budget.requests_left() in (290, 291), "three seconds bring one back"
    await refuse(budget, "key", 40.0)
    assert await budget.requests_left() == 0


async def test_without_a_known_limit_nothing_waits(redis: Redis) -> None:
    """A provider that documents no limit is only paused by its refusals."""
    budget = source_budget(redis, None, provider="nfon")

    assert await requests_at_once(budget, Purpose.BACKFILL, most=50) == 50
    assert await budget.requests_left() is None
