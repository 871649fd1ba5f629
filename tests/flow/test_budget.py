"""The share of a provider's limit over all processes, in a real store, mostly on a clock that the test sets."""

import asyncio
import time
from collections.abc import Awaitable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from relay.errors import OverBudget, RateLimited
from relay.providers.base import Pay, Purpose
from relay.store import keys
from relay.store.budget import Budget, Limit, budget_script

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

    def pay(self, limit: Limit | None = SMALL, *, key: str = "key", egress: str = "direct") -> Pay:
        """A process of its own, for a source with this key and way out."""
        return Budget(self._redis, script=self._script).pay_for("webfones", lambda: key, egress, limit)

    async def at(self, now_ms: int) -> None:
        self.now_ms = now_ms
        await self._redis.hset("test:clock", mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})


@pytest.fixture
async def store(redis: Redis) -> VirtualStore:
    virtual = VirtualStore(redis)
    await virtual.at(START_MS)
    return virtual


async def goes(paid: Awaitable[None]) -> bool:
    """Whether a request is let go."""
    try:
        await paid
    except OverBudget:
        return False
    return True


async def how_many(pay: Pay, purpose: Purpose, *, of: int = 1000) -> int:
    """Requests that go at once before one is held up."""
    for count in range(of):
        if not await goes(pay(purpose)):
            return count
    return of


gaps = st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from(Purpose), st.booleans()), min_size=5, max_size=120)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gaps=gaps)
async def test_no_window_has_more_than_the_share(valkey_url: str, gaps: list[tuple[int, Purpose, bool]]) -> None:
    """Two processes with one key ask for all purposes at any times: any window, wherever it begins, holds the share."""
    async with Redis.from_url(valkey_url) as redis:
        await redis.flushall()
        store = VirtualStore(redis)
        pays = store.pay(), store.pay()
        gone: list[int] = []
        now_ms = START_MS
        for gap_ms, purpose, second in gaps:
            now_ms += gap_ms
            await store.at(now_ms)
            if await goes(pays[second](purpose)):
                gone.append(now_ms)

    most = max(sum(at <= other < at + 60_000 for other in gone) for at in gone)
    assert most <= SMALL.requests * SMALL.share


async def test_the_share_is_used_where_it_is_wanted(store: VirtualStore) -> None:
    """It is a share, not less: asking all the time for 15 minutes brings 599 of the 600."""
    pay = store.pay(LIMIT)
    gone = 0
    for step in range(0, 900_000, 500):
        await store.at(START_MS + step)
        gone += await goes(pay(Purpose.POLL))

    assert gone == 599


async def test_recordings_and_backfills_never_starve_polls(store: VirtualStore) -> None:
    """A backfill and recordings ask as fast as they can, for an hour: each poll, every 30 s, goes at its time."""
    pay = store.pay(LIMIT)
    polled = 0
    for second in range(0, 3600, 2):
        await store.at(START_MS + second * 1000)
        await how_many(pay, Purpose.RECORDING)
        await how_many(pay, Purpose.BACKFILL)
        if second % 30 == 0:
            await pay(Purpose.POLL)
            polled += 1

    assert polled == 120


async def test_each_purpose_leaves_room_for_those_that_matter_more(store: VirtualStore) -> None:
    """One after the other, each finds its own part of the burst of 300."""
    pay = store.pay(LIMIT)

    counts = [await how_many(pay, purpose) for purpose in sorted(Purpose, reverse=True)]

    assert counts == [180, 30, 30, 30, 30]


async def test_two_sources_with_one_key_share_it(store: VirtualStore) -> None:
    """The provider counts by key, so we do: what one source used is gone for the other."""
    first, second, other = store.pay(), store.pay(), store.pay(key="another")

    assert await how_many(first, Purpose.POLL) == 5
    assert not await goes(second(Purpose.POLL))
    assert await goes(other(Purpose.POLL))


async def test_a_credential_that_changes_has_a_budget_of_its_own(redis: Redis) -> None:
    """The key file has a new key: from then on that one is counted."""
    key = "old"
    pay = Budget(redis).pay_for("webfones", lambda: key, "direct", SMALL)
    assert await how_many(pay, Purpose.POLL) == 5

    key = "new"

    assert await goes(pay(Purpose.POLL))


async def test_two_processes_cannot_take_the_same_room(redis: Redis, valkey_url: str) -> None:
    """Forty requests of two processes at the same moment: the burst goes, and no more."""
    async with Redis.from_url(valkey_url) as other:
        began = time.monotonic()
        pays = [Budget(each).pay_for("webfones", lambda: "key", "direct", LIMIT) for each in (redis, other)]
        went = await asyncio.gather(*(goes(pays[number % 2](Purpose.POLL)) for number in range(400)))

        took_s = time.monotonic() - began

    assert 300 <= sum(went) <= 301 + took_s / 3, "every three seconds one more may go"


async def test_contacts_count_by_address_too_and_take_nothing_when_either_is_used_up(store: VirtualStore) -> None:
    """Many keys behind one address: the address is what runs out, and the key keeps its room."""
    for number in range(4):
        assert await goes(store.pay(key=f"key {number}")(Purpose.CONTACTS))
    pay = store.pay(key="fresh")

    assert not await goes(pay(Purpose.CONTACTS))
    assert await how_many(pay, Purpose.POLL) == 5


async def refused(budget: Budget, bucket: str, hint_s: float | None, purpose: Purpose, limit: Limit | None) -> None:
    """Let the provider refuse a request."""
    with pytest.raises(RateLimited):
        async with budget.heeding("webfones", "key", "direct", limit, purpose=purpose):
            raise RateLimited("too many", bucket=bucket, retry_after_s=hint_s)  # type: ignore[arg-type]


async def wait_s(pay: Pay, purpose: Purpose = Purpose.POLL) -> float:
    """How long a request is held up."""
    try:
        await pay(purpose)
    except OverBudget as error:
        return error.wait_s
    return 0.0


CLOSED = {
    "the key, with a hint": ("key", 40.0, Purpose.POLL, LIMIT, (40, 0, 40)),
    "the key, without one, to the end of the window": ("key", None, Purpose.RECORDING, LIMIT, (900, 0, 900)),
    "the key, and no limit is known": ("key", None, Purpose.POLL, None, (60, 0, 60)),
    "the address, for a poll": ("ip", 40.0, Purpose.POLL, LIMIT, (40, 40, 40)),
    "the address, for contacts": ("ip", 40.0, Purpose.CONTACTS, LIMIT, (0, 0, 40)),
    "a hint beyond reason": ("key", 1e9, Purpose.POLL, LIMIT, (3600, 0, 3600)),
}


@pytest.mark.parametrize(("bucket", "hint_s", "purpose", "limit", "waits"), CLOSED.values(), ids=CLOSED)
async def test_a_429_closes_what_it_names(
    redis: Redis, bucket: str, hint_s: float | None, purpose: Purpose, limit: Limit | None, waits: tuple[int, ...]
) -> None:
    """The key or the address; polls do not wait because contacts are refused by address."""
    budget = Budget(redis)
    ours = budget.pay_for("webfones", lambda: "key", "direct", limit)
    neighbours = budget.pay_for("webfones", lambda: "another", "direct", limit)

    await refused(budget, bucket, hint_s, purpose, limit)

    found = [await wait_s(ours), await wait_s(neighbours), await wait_s(ours, Purpose.CONTACTS)]
    assert found == pytest.approx(waits, abs=2)


async def test_another_way_out_is_not_closed_by_an_address(redis: Redis) -> None:
    """A source behind a proxy is counted by the proxy's address."""
    budget = Budget(redis)

    await refused(budget, "ip", 40.0, Purpose.POLL, LIMIT)

    proxied = budget.pay_for("webfones", lambda: "key 2", "http://proxy.example:3128", LIMIT)
    assert await wait_s(proxied) == 0


async def test_a_closed_bucket_opens_again(store: VirtualStore, redis: Redis) -> None:
    """After the hint the next request goes."""
    bucket = keys.budget(keys.bucket("webfones", "key", "key"))
    await redis.hset(bucket, "closed", START_MS + 40_000)
    pay = store.pay()

    await store.at(START_MS + 39_999)
    before = await goes(pay(Purpose.POLL))
    await store.at(START_MS + 40_000)

    assert (before, await goes(pay(Purpose.POLL))) == (False, True)


async def test_a_clock_that_is_set_back_does_not_close_a_budget_for_as_long(store: VirtualStore, redis: Redis) -> None:
    """The store's clock was a day ahead while the burst was used, and a 429 came: then it is set right."""
    await store.at(START_MS + 86_400_000)
    pay = store.pay()
    await how_many(pay, Purpose.POLL)
    await redis.hset(keys.budget(keys.bucket("webfones", "key", "key")), "closed", START_MS + 86_400_000 + 60_000)

    await store.at(START_MS)

    assert await wait_s(pay) == pytest.approx(SMALL.interval_ms / 1000, abs=0.1)
    await store.at(START_MS + int(SMALL.interval_ms) + 1)
    assert await goes(pay(Purpose.POLL))


async def test_what_is_left_is_counted_without_using_it(redis: Redis) -> None:
    """`relay check` and the API show it."""
    budget = Budget(redis)
    pay = budget.pay_for("webfones", lambda: "key", "direct", LIMIT)
    assert await budget.left("webfones", "key", LIMIT) == 300

    for _ in range(10):
        await pay(Purpose.POLL)

    assert await budget.left("webfones", "key", LIMIT) in (290, 291), "three seconds bring one back"
    await refused(budget, "key", 40.0, Purpose.POLL, LIMIT)
    assert await budget.left("webfones", "key", LIMIT) == 0


async def test_without_a_known_limit_everything_goes(redis: Redis) -> None:
    """Providers that say nothing of a limit are heeded when they refuse, not before."""
    pay = Budget(redis).pay_for("nfon", lambda: "token", "direct", None)

    assert await how_many(pay, Purpose.BACKFILL, of=50) == 50
