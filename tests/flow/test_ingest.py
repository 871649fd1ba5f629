"""A row becomes a call once, whatever returns it, whenever and however often; against a real Valkey."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from relay.domain import ids
from relay.domain.call import Outcome, Record
from relay.queue import keys as queue_keys
from relay.queue.lane import Lane
from relay.queue.settlement import Done, Retry, Settlement
from relay.store import keys
from relay.store.calls import CHUNK, Row, StoredCall
from relay.store.codes import RowOutcome
from relay.store.documents import pack
from relay.store.lanes import FetchProgress, LaneName, RecordingStored, open_lane
from relay.store.sources import CursorUpdate, LeaseLost
from relay.store.store import Store
from tests.store import open_store

NOON = datetime(2025, 7, 1, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=1)
CALL_TTL_S = 30 * 86_400
NEW, CHANGED, KNOWN, SEEDED, REHASHED = RowOutcome


def make_record(key: str = "7", *, start: datetime = NOON, **fields: Any) -> Record:
    return Record(key=key, started_at=start, local_date=start.date().isoformat(), **fields)


def ms(at: datetime) -> bytes:
    return b"%d" % (at.timestamp() * 1000)


def row(record: Record, *, seed: bool = False) -> Row:
    return Row(record, record.content_hash(), seed)


def store_of(redis: Redis, *, keep_raw: bool = False) -> Store:
    return open_store(redis, calls_ttl_s=CALL_TTL_S, keep_raw=keep_raw)


async def ingested(
    redis: Redis,
    *rows: Row,
    token: bytes = b"",
    mapping: int = 1,
    via: str = "poll",
    cursor_update: CursorUpdate | None = None,
) -> list[RowOutcome]:
    return await store_of(redis).calls.ingest(
        "main", rows, token=token, mapping=mapping, via=via, cursor_update=cursor_update
    )


async def stored_call(redis: Redis, key: str = "7") -> StoredCall:
    call = await store_of(redis).calls.get(ids.call_id("main", key))
    assert call is not None
    return call


async def waiting(redis: Redis, lane: LaneName) -> list[str]:
    return sorted(item.decode() for item in await redis.zrange(queue_keys.waiting(lane, "main"), 0, -1))


async def poll_token(redis: Redis) -> tuple[Lane, bytes]:
    """Claim the poll of `main`."""
    lane = Lane(redis, "poll")
    await lane.put("main", "main")
    [claim] = (await lane.exchange(want=1)).claims
    return lane, claim.token


async def seen_days(redis: Redis) -> list[str]:
    return sorted(name.decode().removeprefix("relay:seen:main:") for name in await redis.keys("relay:seen:*"))


async def dump(redis: Redis) -> dict[bytes, Any]:
    """Everything in the store but expiries and the time."""
    names = sorted(name for name in await redis.keys("*") if name.decode() != queue_keys.CLOCK)
    return {name: await redis.dump(name) for name in names}


# New, known, changed


async def test_a_new_row_becomes_a_call_in_the_enrich_and_record_lanes(redis: Redis) -> None:
    """It has everything that the next stages need."""
    record = make_record(audio=True, outcome=Outcome.ANSWERED)

    assert await ingested(redis, row(record), via="backfill") == [NEW]

    call = await stored_call(redis)
    assert (call.id, call.source_id, call.key, call.version) == (ids.call_id("main", "7"), "main", "7", 1)
    assert (call.finished, call.via) == (True, "backfill")
    assert (call.published, call.contact, call.recording) == (None, None, None)
    assert call.record == record.content()
    assert call.started_ms == int(NOON.timestamp() * 1000)
    assert call.ready_ms == call.first_seen_ms
    assert await waiting(redis, "enrich") == await waiting(redis, "record") == [call.id]
    assert await redis.zrange(keys.CALLS, 0, -1) == [call.id.encode()]
    assert CALL_TTL_S - 60 < await redis.ttl(keys.call(call.id)) - keys.FALLBACK_TTL_S <= CALL_TTL_S


async def test_a_known_row_changes_nothing(redis: Redis) -> None:
    """Overlapping polls return the same call over and over: not a byte of the store changes."""
    await ingested(redis, row(make_record(audio=True)))
    before = await dump(redis)

    assert await ingested(redis, row(make_record(audio=True)), row(make_record(audio=True))) == [KNOWN, KNOWN]
    assert await dump(redis) == before


async def test_a_row_twice_in_one_page_is_one_call(redis: Redis) -> None:
    """Providers repeat themselves within a page."""
    assert await ingested(redis, row(make_record()), row(make_record())) == [NEW, KNOWN]
    assert await redis.zcard(keys.CALLS) == 1


async def test_a_changed_row_is_a_new_version(redis: Redis) -> None:
    """The record is replaced, the other parts stay, and the call is due in the enrich lane."""
    await ingested(redis, row(make_record(outcome=Outcome.NO_ANSWER)))
    first = await stored_call(redis)
    await redis.hset(keys.call(first.id), mapping={"contact": pack({"lookup_status": "none"})})  # type: ignore[misc]
    await redis.delete(queue_keys.waiting("enrich", "main"))
    changed = make_record(outcome=Outcome.BUSY)

    assert await ingested(redis, row(changed)) == [CHANGED]

    call = await stored_call(redis)
    assert (call.version, call.record, call.contact) == (2, changed.content(), {"lookup_status": "none"})
    assert (call.ready_ms, call.first_seen_ms) == (first.ready_ms, first.first_seen_ms)
    assert await waiting(redis, "enrich") == [call.id]
    assert await ingested(redis, row(changed)) == [KNOWN]


async def test_a_recording_is_fetched_once_a_call_turns_out_answered(redis: Redis) -> None:
    """A later row says so; a recording that is stored already is not fetched again."""
    await ingested(redis, row(make_record(outcome=Outcome.NO_ANSWER)))
    assert await waiting(redis, "record") == []
    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True)))
    assert len(await waiting(redis, "record")) == 1

    call = await stored_call(redis)
    await redis.delete(queue_keys.waiting("record", "main"))
    await redis.hset(keys.call(call.id), mapping={"recording": pack({"status": "available"})})  # type: ignore[misc]
    assert await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True, status_raw="x"))) == [CHANGED]

    assert await waiting(redis, "record") == []


async def test_a_recording_wanted_while_its_lease_is_being_settled_is_fetched(redis: Redis) -> None:
    """The worker saw `busy` and settles `Done`; meanwhile the row turned back to `answered`."""
    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True)))
    record = open_lane(redis, LaneName.RECORD)
    await ingested(redis, row(make_record(outcome=Outcome.BUSY)))
    [claim] = (await record.exchange(want=1)).claims
    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True)))

    reply = await record.exchange([(claim, Done())], want=1)

    assert [claimed.item for claimed in reply.claims] == [claim.item]


@pytest.mark.parametrize(
    "settlement", [Done(RecordingStored({"status": "none"})), Retry(60_000, FetchProgress({"status": "none"}))]
)
async def test_a_change_during_a_fetch_neither_repeats_nor_hastens_it(redis: Redis, settlement: Settlement) -> None:
    """A stored recording stays stored, a backoff stays as it is."""
    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True)))
    record = open_lane(redis, LaneName.RECORD)
    [claim] = (await record.exchange(want=1)).claims
    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True, status_raw="x")))

    reply = await record.exchange([(claim, settlement)], want=1)

    assert reply.claims == []


async def test_a_change_between_two_attempts_at_a_recording_does_not_hasten_the_next(redis: Redis) -> None:
    """The provider needs its time to make the audio, whatever else it corrects in the row."""
    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True)))
    record = open_lane(redis, LaneName.RECORD)
    [claim] = (await record.exchange(want=1)).claims
    await record.exchange([(claim, Retry(60_000, FetchProgress({"status": "none"})))])

    await ingested(redis, row(make_record(outcome=Outcome.ANSWERED, audio=True, status_raw="x")))

    assert (await record.exchange(want=1)).claims == []


async def test_raw_rows_are_kept_only_when_a_subscription_asks_for_them(redis: Redis) -> None:
    """Otherwise the provider's row is not stored."""
    await ingested(redis, row(make_record("plain", raw={"rid": 7})))
    await store_of(redis, keep_raw=True).calls.ingest(
        "main", [row(make_record("raw", raw={"rid": 8}))], token=b"", mapping=1, via="poll"
    )

    assert (await stored_call(redis, "plain")).raw is None
    assert (await stored_call(redis, "raw")).raw == {"rid": 8}


async def test_rows_of_two_sources_never_mix(redis: Redis) -> None:
    """Two accounts count their calls from 1."""
    store = store_of(redis)
    for sid in ("a", "b"):
        assert await store.calls.ingest(sid, [row(make_record("1"))], token=b"", mapping=1, via="poll") == [NEW]

    assert await redis.zcard(keys.CALLS) == 2


# Calls that go on


async def test_an_unfinished_call_is_ready_when_it_finishes(redis: Redis) -> None:
    """Its holds count from then."""
    await ingested(redis, row(make_record(finished=False)))
    going_on = await stored_call(redis)
    await redis.hset(keys.call(going_on.id), mapping={"ready": 5, "first_seen": 5})  # type: ignore[misc]  # both clients

    assert await ingested(redis, row(make_record(finished=True))) == [CHANGED]

    call = await stored_call(redis)
    assert (going_on.finished, call.finished) == (False, True)
    assert call.first_seen_ms == 5
    assert call.ready_ms >= going_on.ready_ms


async def test_a_change_after_the_end_starts_no_new_hold(redis: Redis) -> None:
    """Only the end of a call starts its holds."""
    await ingested(redis, row(make_record()))
    await redis.hset(keys.call(ids.call_id("main", "7")), mapping={"ready": 5})  # type: ignore[misc]

    assert await ingested(redis, row(make_record(status_raw="x"))) == [CHANGED]
    assert (await stored_call(redis)).ready_ms == 5


# Seeding


async def test_seeded_rows_are_known_and_never_published(redis: Redis) -> None:
    """The first poll of an account with a thousand calls publishes nothing, then or later."""
    old = make_record("old")
    assert await ingested(redis, row(old, seed=True)) == [SEEDED]
    assert await ingested(redis, row(old)) == [KNOWN]
    assert await ingested(redis, row(replace(old, status_raw="corrected"))) == [SEEDED]
    assert await ingested(redis, row(replace(old, status_raw="corrected"))) == [KNOWN]

    assert await redis.keys("relay:call*") == []
    assert await waiting(redis, "enrich") == []


async def test_a_seeded_unfinished_call_is_published_when_it_finishes(redis: Redis) -> None:
    """It began before the relay and ended after it."""
    going_on = make_record("long", finished=False)
    assert await ingested(redis, row(going_on, seed=True)) == [SEEDED]
    assert await ingested(redis, row(replace(going_on, status_raw="RINGING"))) == [SEEDED]
    assert await redis.keys("relay:call*") == []

    assert await ingested(redis, row(replace(going_on, finished=True, audio=True), seed=True)) == [NEW]

    call = await stored_call(redis, "long")
    assert call.finished
    assert await waiting(redis, "enrich") == await waiting(redis, "record") == [call.id]
    assert await ingested(redis, row(replace(going_on, finished=True, audio=True))) == [KNOWN]


async def test_a_seeded_unfinished_call_survives_an_upgrade(redis: Redis) -> None:
    """The mapping changed while it went on, or with the very row that ends it."""
    for key, mappings in (("between", (1, 2, 2)), ("with", (1, 1, 2))):
        going_on = make_record(key, finished=False)
        for mapping, record in zip(
            mappings,
            (going_on, replace(going_on, status_raw="x"), replace(going_on, status_raw="x", finished=True)),
            strict=True,
        ):
            outcomes = await ingested(redis, row(record, seed=record is going_on), mapping=mapping)

        assert outcomes == [NEW], key


# Midnight


@pytest.mark.parametrize("days", [-1, 1])
async def test_a_start_that_moves_across_midnight_is_the_same_call(redis: Redis, days: int) -> None:
    """A corrected clock or time zone moves a row to another date; it stays one call, with one mark in `seen`."""
    await ingested(redis, row(make_record()))
    moved = make_record(start=NOON + timedelta(days=days))

    assert await ingested(redis, row(moved)) == [CHANGED]
    assert await ingested(redis, row(moved)) == [KNOWN]

    assert await redis.zcard(keys.CALLS) == 1
    assert await seen_days(redis) == [moved.local_date]


@pytest.mark.parametrize(("seed_finished", "then"), [(True, SEEDED), (False, NEW)])
async def test_a_seeded_start_that_moves_across_midnight_stays_seeded(
    redis: Redis, seed_finished: bool, then: RowOutcome
) -> None:
    """A finished one is not published by mistake, an unfinished one not missed."""
    await ingested(redis, row(make_record(finished=seed_finished), seed=True))
    moved = make_record(start=NOON + timedelta(days=1), status_raw="x")

    assert await ingested(redis, row(moved)) == [then]


async def test_a_start_that_moves_by_a_week_is_the_same_call(redis: Redis) -> None:
    """Too far for `seen`, but the call itself is known as long as it is kept."""
    await ingested(redis, row(make_record()))

    assert await ingested(redis, row(make_record(start=NOON + timedelta(days=7)))) == [CHANGED]
    assert await redis.zcard(keys.CALLS) == 1


async def test_a_call_is_known_after_its_day_of_seen_was_dropped(redis: Redis) -> None:
    """A backfill of last week publishes nothing twice: the call itself is still known."""
    await ingested(
        redis, row(make_record()), cursor_update=CursorUpdate(polled_at=NOON, cursor=NOON, forget_days=["2025-07-01"])
    )
    assert await seen_days(redis) == []

    assert await ingested(redis, row(make_record()), via="backfill") == [KNOWN]
    assert await seen_days(redis) == ["2025-07-01"]
    await redis.delete(keys.seen("main", "2025-07-01"))
    assert await ingested(redis, row(make_record(status_raw="x")), via="backfill") == [CHANGED]


# Upgrades


async def test_a_new_mapping_version_publishes_no_updates(redis: Redis) -> None:
    """Rows that a new release writes differently are corrected silently; the next real change is published."""
    old, new = make_record(end_reason="hangup"), make_record(end_reason="caller_hangup")
    await ingested(redis, row(old))
    before = await stored_call(redis)
    await redis.delete(queue_keys.waiting("enrich", "main"))

    assert await ingested(redis, row(new), mapping=2) == [REHASHED]
    corrected = await stored_call(redis)
    assert (corrected.record["end_reason"], corrected.ready_ms) == ("caller_hangup", before.ready_ms)
    assert await waiting(redis, "enrich") == []
    assert await ingested(redis, row(new), mapping=2) == [KNOWN]
    await redis.delete(keys.seen("main", "2025-07-01"))
    assert await ingested(redis, row(new), mapping=2) == [KNOWN]

    moved = replace(new, status_raw="x", started_at=new.started_at + timedelta(seconds=30))
    assert await ingested(redis, row(moved), mapping=2) == [CHANGED]
    assert await waiting(redis, "enrich") == [before.id]
    after = await stored_call(redis)
    assert (after.started_ms, after.via) == (before.started_ms + 30_000, before.via)
    assert not await redis.hexists(keys.call(before.id), "published_record")  # type: ignore[misc]  # nothing was published


async def test_a_change_after_a_new_mapping_version_is_a_change(redis: Redis) -> None:
    """Whether `seen` or the call itself is compared."""
    await ingested(redis, row(make_record()))
    assert await ingested(redis, row(make_record()), mapping=2) == [KNOWN]
    await redis.delete(keys.seen("main", "2025-07-01"))

    assert await ingested(redis, row(make_record(status_raw="x")), mapping=2) == [CHANGED]


@pytest.mark.parametrize("end_reason", ["caller_hangup", ""])
async def test_a_new_mapping_version_does_not_swallow_the_end_of_a_call(redis: Redis, end_reason: str) -> None:
    """The release changed during the call, and the call has ended, by its age perhaps: the row is as it was then."""
    await ingested(redis, row(make_record(finished=False, end_reason="")))
    await redis.hdel(keys.call((await stored_call(redis)).id), "words")  # type: ignore[misc]  # a release without them
    await redis.delete(queue_keys.waiting("enrich", "main"))

    assert await ingested(redis, row(make_record(finished=True, end_reason=end_reason)), mapping=2) == [CHANGED]

    call = await stored_call(redis)
    assert call.finished
    assert call.record["end_reason"] == end_reason
    assert await waiting(redis, "enrich") == [call.id]


async def test_a_rolling_upgrade_publishes_no_updates(redis: Redis) -> None:
    """Both versions run side by side for a while and rehash to and fro."""
    old, new = make_record(end_reason="hangup"), make_record(end_reason="caller_hangup")
    await ingested(redis, row(old))

    outcomes = [
        await ingested(redis, row(record), mapping=mapping) for record, mapping in ((new, 2), (old, 1), (new, 2))
    ]

    assert outcomes == [[REHASHED], [REHASHED], [REHASHED]]
    assert (await stored_call(redis)).record["end_reason"] == "caller_hangup"


async def test_a_real_change_during_a_rolling_upgrade_is_published(redis: Redis) -> None:
    """The provider's own words differ, not only the way in which a version writes them; and it is published once."""
    old = make_record(end_reason="hangup", status_raw="ANSWERED")
    await ingested(redis, row(old))
    await redis.delete(queue_keys.waiting("enrich", "main"))

    by_new = replace(old, end_reason="caller_hangup", status_raw="TRANSFERRED")
    by_old = replace(old, status_raw="TRANSFERRED")
    outcomes = [await ingested(redis, row(record), mapping=n) for record, n in ((by_new, 2), (by_old, 1), (by_new, 2))]

    assert outcomes == [[CHANGED], [REHASHED], [REHASHED]]
    assert len(await waiting(redis, "enrich")) == 1


async def test_content_that_a_call_had_before_is_no_change(redis: Redis) -> None:
    """A row that flaps between three contents is published with each once, and stored as it was last."""
    contents = [row(make_record(status_raw=status)) for status in ("a", "b", "c")]

    outcomes = [(await ingested(redis, contents[number % 3]))[0] for number in range(30)]

    assert outcomes == [NEW, CHANGED, CHANGED] + [REHASHED] * 27
    assert (await stored_call(redis)).record["status_raw"] == "c"
    assert len(await redis.hget(keys.call(ids.call_id("main", "7")), "former")) == 3 * 16  # type: ignore[misc, arg-type]


async def test_former_contents_are_bounded(redis: Redis) -> None:
    """A row that always changes costs no more than eight of its hashes."""
    for number in range(20):
        await ingested(redis, row(make_record(status_raw=str(number))))

    assert len(await redis.hget(keys.call(ids.call_id("main", "7")), "former")) == 8 * 16  # type: ignore[misc, arg-type]


# Two at once, and dying half way


async def test_a_poller_whose_lease_was_taken_over_ingests_nothing(redis: Redis) -> None:
    """Another poller has the source: no row is ingested and no cursor moves."""
    lane, old_token = await poll_token(redis)
    await redis.zadd(queue_keys.leased("poll", "main"), {"main": 1})
    await lane.drop("main", "unknown")
    [heir] = (await lane.exchange(want=1)).claims
    before = await dump(redis)

    update = CursorUpdate(polled_at=NOON, cursor=NOON, forget_days=["2025-06-01"])
    with pytest.raises(LeaseLost):
        await ingested(redis, row(make_record()), token=old_token, cursor_update=update)
    assert await dump(redis) == before

    assert await ingested(
        redis, row(make_record()), token=heir.token, cursor_update=CursorUpdate(polled_at=NOON, cursor=NOON)
    ) == [NEW]


async def test_a_settled_poll_ingests_nothing(redis: Redis) -> None:
    """Its lease is gone."""
    lane, token = await poll_token(redis)
    await lane.drop("main", "main")

    with pytest.raises(LeaseLost):
        await ingested(redis, row(make_record()), token=token)


async def test_an_expired_lease_that_was_not_taken_over_still_ingests(redis: Redis) -> None:
    """No other poller has the source, so its rows are not lost."""
    _, token = await poll_token(redis)
    await redis.zadd(queue_keys.leased("poll", "main"), {"main": 1})

    assert await ingested(redis, row(make_record()), token=token) == [NEW]


async def test_a_backfill_and_a_poll_ingest_the_same_row_once(redis: Redis) -> None:
    """A backfill has no lease, runs beside the polls, and moves no cursor."""
    _, token = await poll_token(redis)
    update = CursorUpdate(polled_at=NOON, cursor=NOON)

    outcomes = [
        await ingested(redis, row(make_record("1")), row(make_record("2")), via="backfill"),
        await ingested(redis, row(make_record("2")), row(make_record("3")), token=token, cursor_update=update),
        await ingested(redis, row(make_record("3")), via="backfill"),
    ]

    assert outcomes == [[NEW, NEW], [KNOWN, NEW], [KNOWN]]
    assert await redis.zcard(keys.CALLS) == 3
    assert (await stored_call(redis, "2")).via == "backfill"


async def test_the_cursor_moves_with_the_last_rows_and_only_then(redis: Redis) -> None:
    """A poll that dies half way has ingested rows and moved no cursor; the next one finds them known."""
    _, token = await poll_token(redis)
    rows = [row(make_record(str(n))) for n in range(CHUNK + 2)]
    await ingested(redis, *rows[:CHUNK], token=token)
    assert await redis.hgetall(keys.source("main")) == {}  # type: ignore[misc]  # both clients

    again = await ingested(
        redis, *rows[2:], token=token, cursor_update=CursorUpdate(polled_at=LATER, cursor=NOON, reached={7200: LATER})
    )

    assert again == [KNOWN] * (CHUNK - 2) + [NEW, NEW]
    source = await redis.hgetall(keys.source("main"))  # type: ignore[misc]  # both clients
    assert (source[b"cursor"], source[b"tier:7200"], source[b"last_poll"]) == (ms(NOON), ms(LATER), ms(LATER))


async def test_an_empty_poll_moves_the_cursor_too(redis: Redis) -> None:
    """Also without new rows."""
    _, token = await poll_token(redis)

    assert await ingested(redis, token=token, cursor_update=CursorUpdate(polled_at=NOON, cursor=NOON)) == []
    assert await redis.hget(keys.source("main"), "cursor") == ms(NOON)  # type: ignore[misc]  # both clients


async def test_days_below_the_floor_are_dropped_with_the_last_rows(redis: Redis) -> None:
    """`seen` does not grow for ever; other days stay."""
    for day in (1, 2, 3):
        await ingested(redis, row(make_record(str(day), start=NOON + timedelta(days=day))))
    assert await seen_days(redis) == ["2025-07-02", "2025-07-03", "2025-07-04"]

    days = ["2025-07-01", "2025-07-02", "2025-07-03"]
    await ingested(redis, cursor_update=CursorUpdate(polled_at=NOON, cursor=NOON, forget_days=days))

    assert await seen_days(redis) == ["2025-07-04"]


async def test_seen_expires_after_its_source_was_removed(redis: Redis) -> None:
    """90 days after the last ingest; each ingest renews it."""
    await ingested(redis, row(make_record()))
    await redis.expire(keys.seen("main", "2025-07-01"), 5)
    await ingested(redis, row(make_record("8")))

    assert await redis.ttl(keys.seen("main", "2025-07-01")) > 89 * 86_400


# Leaving out what is known


async def test_only_rows_that_are_known_exactly_are_left_out(redis: Redis) -> None:
    """Repeats cost one read per day; what differs in content, date or mapping is ingested."""
    known = make_record("known")
    await ingested(
        redis, row(known), row(make_record("seeded"), seed=True), row(make_record("on", finished=False), seed=True)
    )
    rows = [
        row(known),
        row(make_record("seeded")),
        row(make_record("on", finished=False)),
        row(replace(known, status_raw="x")),
        row(make_record("on", finished=True)),
        row(make_record("new")),
        row(make_record("known", start=NOON + timedelta(days=1))),
    ]
    store = store_of(redis)

    assert await store.calls.unseen("main", rows, mapping=1) == rows[3:]
    assert len(await store.calls.unseen("main", rows, mapping=2)) == len(rows)
    assert len(await store.calls.unseen("main", rows, mapping=11)) == len(rows)
    assert await store.calls.unseen("main", [], mapping=1) == []


@given(st.text(min_size=1, max_size=20), st.integers(1, 120))
def test_a_mark_of_seen_is_parsed_as_it_was_written(status: str, mapping: int) -> None:
    """Mapping, flag and hash are written without separators: a flag is a letter, a hash 16 hex digits."""
    digest = make_record(status_raw=status).content_hash()

    assert len(digest) == 16
    assert not f"{mapping}e{digest}"[:-17].strip("0123456789")
