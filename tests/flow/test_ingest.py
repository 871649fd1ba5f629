"""A row becomes a call once, whoever brings it, whenever, and however often; against a real Valkey."""

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


def a_record(key: str = "7", *, start: datetime = NOON, **fields: Any) -> Record:
    return Record(key=key, started_at=start, local_date=start.date().isoformat(), **fields)


def ms(at: datetime) -> bytes:
    return b"%d" % (at.timestamp() * 1000)


def row(record: Record, *, seed: bool = False) -> Row:
    return Row(record, record.content_hash(), seed)


def store_of(redis: Redis, *, keep_raw: bool = False) -> Store:
    return open_store(redis, calls_ttl_s=CALL_TTL_S, keep_raw=keep_raw)


async def admitted(
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


async def the_call(redis: Redis, key: str = "7") -> StoredCall:
    call = await store_of(redis).calls.get(ids.call_id("main", key))
    assert call is not None
    return call


async def waiting(redis: Redis, lane: LaneName) -> list[str]:
    return sorted(item.decode() for item in await redis.zrange(queue_keys.waiting(lane, "main"), 0, -1))


async def poll_token(redis: Redis) -> tuple[Lane, bytes]:
    """Claim the poll of `main`."""
    lane = Lane(redis, "poll", lease_s=60)
    await lane.put("", "main")
    [claim] = (await lane.exchange(want=1)).claims
    return lane, claim.token


async def seen_days(redis: Redis) -> list[str]:
    return sorted(name.decode().removeprefix("relay:seen:main:") for name in await redis.keys("relay:seen:*"))


async def dump(redis: Redis) -> dict[bytes, Any]:
    """Everything in the store but expiries."""
    return {name: await redis.dump(name) for name in sorted(await redis.keys("*"))}


# New, known, changed


async def test_a_new_row_becomes_a_call_that_is_looked_at(redis: Redis) -> None:
    """Everything that the next stages need is there, and they have it to do."""
    record = a_record(audio=True, outcome=Outcome.ANSWERED)

    assert await admitted(redis, row(record), via="backfill") == [NEW]

    call = await the_call(redis)
    assert (call.id, call.source_id, call.key, call.version) == (ids.call_id("main", "7"), "main", "7", 1)
    assert (call.finished, call.via) == (True, "backfill")
    assert (call.published, call.contact, call.recording) == (None, None, None)
    assert call.record == record.content()
    assert call.started_ms == int(NOON.timestamp() * 1000)
    assert call.ready_ms == call.first_seen_ms
    assert await waiting(redis, "enrich") == await waiting(redis, "record") == [call.id]
    assert await redis.zrange(keys.CALLS, 0, -1) == [call.id.encode()]
    assert CALL_TTL_S - 60 < await redis.ttl(keys.call(call.id)) <= CALL_TTL_S


async def test_a_row_that_is_seen_again_changes_nothing(redis: Redis) -> None:
    """Overlapping polls return the same call over and over: not a byte of the store moves."""
    await admitted(redis, row(a_record(audio=True)))
    before = await dump(redis)

    assert await admitted(redis, row(a_record(audio=True)), row(a_record(audio=True))) == [KNOWN, KNOWN]
    assert await dump(redis) == before


async def test_a_row_twice_in_one_answer_is_one_call(redis: Redis) -> None:
    """Providers repeat themselves within a page."""
    assert await admitted(redis, row(a_record()), row(a_record())) == [NEW, KNOWN]
    assert await redis.zcard(keys.CALLS) == 1


async def test_a_changed_row_is_a_new_version(redis: Redis) -> None:
    """The record is replaced, what others found out stays, and the call is looked at again."""
    await admitted(redis, row(a_record(outcome=Outcome.NO_ANSWER)))
    first = await the_call(redis)
    await redis.hset(keys.call(first.id), mapping={"contact": pack({"lookup_status": "none"})})  # type: ignore[misc]
    await redis.delete(queue_keys.waiting("enrich", "main"), queue_keys.lane("enrich"))
    changed = a_record(outcome=Outcome.BUSY)

    assert await admitted(redis, row(changed)) == [CHANGED]

    call = await the_call(redis)
    assert (call.version, call.record, call.contact) == (2, changed.content(), {"lookup_status": "none"})
    assert (call.ready_ms, call.first_seen_ms) == (first.ready_ms, first.first_seen_ms)
    assert await waiting(redis, "enrich") == [call.id]
    assert await admitted(redis, row(changed)) == [KNOWN]


async def test_audio_is_wanted_when_a_call_turns_out_answered(redis: Redis) -> None:
    """The row said so only later; a recording that is known already is not fetched again."""
    await admitted(redis, row(a_record(outcome=Outcome.NO_ANSWER)))
    assert await waiting(redis, "record") == []
    await admitted(redis, row(a_record(outcome=Outcome.ANSWERED, audio=True)))
    assert len(await waiting(redis, "record")) == 1

    call = await the_call(redis)
    await redis.delete(queue_keys.waiting("record", "main"), queue_keys.lane("record"))
    await redis.hset(keys.call(call.id), mapping={"recording": pack({"status": "available"})})  # type: ignore[misc]
    assert await admitted(redis, row(a_record(outcome=Outcome.ANSWERED, audio=True, status_raw="x"))) == [CHANGED]

    assert await waiting(redis, "record") == []


async def test_audio_that_is_wanted_while_the_holder_lets_go_is_fetched(redis: Redis) -> None:
    """The holder saw `busy` and will settle `done`; meanwhile the row turned back to `answered`."""
    await admitted(redis, row(a_record(outcome=Outcome.ANSWERED, audio=True)))
    record = open_lane(redis, LaneName.RECORD, lease_s=60)
    await admitted(redis, row(a_record(outcome=Outcome.BUSY)))
    [claim] = (await record.exchange(want=1)).claims
    await admitted(redis, row(a_record(outcome=Outcome.ANSWERED, audio=True)))

    reply = await record.exchange([(claim, Done())], want=1)

    assert [each.item for each in reply.claims] == [claim.item]


@pytest.mark.parametrize(
    "settlement", [Done(RecordingStored({"status": "none"})), Retry(60_000, FetchProgress({"status": "none"}))]
)
async def test_a_change_while_audio_is_fetched_neither_repeats_nor_hastens_it(
    redis: Redis, settlement: Settlement
) -> None:
    """The fetch goes its own way: stored audio stays stored, a wait stays a wait."""
    await admitted(redis, row(a_record(outcome=Outcome.ANSWERED, audio=True)))
    record = open_lane(redis, LaneName.RECORD, lease_s=60)
    [claim] = (await record.exchange(want=1)).claims
    await admitted(redis, row(a_record(outcome=Outcome.ANSWERED, audio=True, status_raw="x")))

    reply = await record.exchange([(claim, settlement)], want=1)

    assert reply.claims == []


async def test_raw_rows_are_kept_only_where_somebody_wants_them(redis: Redis) -> None:
    """Most relays never store a provider's row as it came."""
    await admitted(redis, row(a_record("plain", raw={"rid": 7})))
    await store_of(redis, keep_raw=True).calls.ingest(
        "main", [row(a_record("raw", raw={"rid": 8}))], token=b"", mapping=1, via="poll"
    )

    assert (await the_call(redis, "plain")).raw is None
    assert (await the_call(redis, "raw")).raw == {"rid": 8}


async def test_rows_of_two_sources_never_mix(redis: Redis) -> None:
    """Two accounts count their calls from 1."""
    store = store_of(redis)
    for sid in ("a", "b"):
        assert await store.calls.ingest(sid, [row(a_record("1"))], token=b"", mapping=1, via="poll") == [NEW]

    assert await redis.zcard(keys.CALLS) == 2


# Calls that go on


async def test_a_call_that_goes_on_is_ready_when_it_finishes(redis: Redis) -> None:
    """Its holds count from then."""
    await admitted(redis, row(a_record(finished=False)))
    going_on = await the_call(redis)
    await redis.hset(keys.call(going_on.id), mapping={"ready": 5, "first_seen": 5})  # type: ignore[misc]  # both clients

    assert await admitted(redis, row(a_record(finished=True))) == [CHANGED]

    call = await the_call(redis)
    assert (going_on.finished, call.finished) == (False, True)
    assert call.first_seen_ms == 5
    assert call.ready_ms >= going_on.ready_ms


async def test_a_change_after_the_end_does_not_hold_a_call_up_again(redis: Redis) -> None:
    """Only the end of a call starts its holds."""
    await admitted(redis, row(a_record()))
    await redis.hset(keys.call(ids.call_id("main", "7")), mapping={"ready": 5})  # type: ignore[misc]

    assert await admitted(redis, row(a_record(status_raw="x"))) == [CHANGED]
    assert (await the_call(redis)).ready_ms == 5


# Seeding


async def test_what_was_there_before_the_relay_is_known_and_not_told(redis: Redis) -> None:
    """The first poll of an account with a thousand calls sends nothing, then or later."""
    old = a_record("old")
    assert await admitted(redis, row(old, seed=True)) == [SEEDED]
    assert await admitted(redis, row(old)) == [KNOWN]
    assert await admitted(redis, row(replace(old, status_raw="corrected"))) == [SEEDED]
    assert await admitted(redis, row(replace(old, status_raw="corrected"))) == [KNOWN]

    assert await redis.keys("relay:call*") == []
    assert await waiting(redis, "enrich") == []


async def test_a_seeded_call_that_was_going_on_is_told_when_it_finishes(redis: Redis) -> None:
    """It began before the relay and ended after: its end is news."""
    going_on = a_record("long", finished=False)
    assert await admitted(redis, row(going_on, seed=True)) == [SEEDED]
    assert await admitted(redis, row(replace(going_on, status_raw="RINGING"))) == [SEEDED]
    assert await redis.keys("relay:call*") == []

    assert await admitted(redis, row(replace(going_on, finished=True, audio=True), seed=True)) == [NEW]

    call = await the_call(redis, "long")
    assert call.finished
    assert await waiting(redis, "enrich") == await waiting(redis, "record") == [call.id]
    assert await admitted(redis, row(replace(going_on, finished=True, audio=True))) == [KNOWN]


async def test_a_seeded_call_that_went_on_over_an_upgrade_is_told_when_it_finishes(redis: Redis) -> None:
    """The mapping changed while it went on, or with the very row that ends it."""
    for key, mappings in (("between", (1, 2, 2)), ("with", (1, 1, 2))):
        going_on = a_record(key, finished=False)
        for mapping, each in zip(
            mappings,
            (going_on, replace(going_on, status_raw="x"), replace(going_on, status_raw="x", finished=True)),
            strict=True,
        ):
            outcomes = await admitted(redis, row(each, seed=each is going_on), mapping=mapping)

        assert outcomes == [NEW], key


# Midnight


@pytest.mark.parametrize("days", [-1, 1])
async def test_a_start_that_moves_across_midnight_is_the_same_call(redis: Redis, days: int) -> None:
    """A corrected clock or a zone change puts a row under another date; it stays one call, remembered once."""
    await admitted(redis, row(a_record()))
    moved = a_record(start=NOON + timedelta(days=days))

    assert await admitted(redis, row(moved)) == [CHANGED]
    assert await admitted(redis, row(moved)) == [KNOWN]

    assert await redis.zcard(keys.CALLS) == 1
    assert await seen_days(redis) == [moved.local_date]


@pytest.mark.parametrize(("seed_finished", "then"), [(True, SEEDED), (False, NEW)])
async def test_a_seeded_start_that_moves_across_midnight_stays_seeded(
    redis: Redis, seed_finished: bool, then: RowOutcome
) -> None:
    """Neither told by mistake, nor forgotten when it was still going on."""
    await admitted(redis, row(a_record(finished=seed_finished), seed=True))
    moved = a_record(start=NOON + timedelta(days=1), status_raw="x")

    assert await admitted(redis, row(moved)) == [then]


async def test_a_start_that_moves_by_a_week_is_the_same_call(redis: Redis) -> None:
    """Too far for `seen`; the call itself is remembered as long as it is kept."""
    await admitted(redis, row(a_record()))

    assert await admitted(redis, row(a_record(start=NOON + timedelta(days=7)))) == [CHANGED]
    assert await redis.zcard(keys.CALLS) == 1


async def test_a_call_whose_day_is_forgotten_is_known_by_itself(redis: Redis) -> None:
    """A backfill of last week tells nothing twice: `seen` has let go, the call has not."""
    await admitted(redis, row(a_record()), cursor_update=CursorUpdate(NOON, NOON, forget_days=["2025-07-01"]))
    assert await seen_days(redis) == []

    assert await admitted(redis, row(a_record()), via="backfill") == [KNOWN]
    assert await seen_days(redis) == ["2025-07-01"]
    await redis.delete(keys.seen("main", "2025-07-01"))
    assert await admitted(redis, row(a_record(status_raw="x")), via="backfill") == [CHANGED]


# Upgrades


async def test_an_upgrade_of_the_mapping_does_not_shout(redis: Redis) -> None:
    """The same calls, written otherwise by a new release: re-hashed in silence; the next real change is told."""
    old, new = a_record(end_reason="hangup"), a_record(end_reason="caller_hangup")
    await admitted(redis, row(old))
    before = await the_call(redis)
    await redis.delete(queue_keys.waiting("enrich", "main"), queue_keys.lane("enrich"))

    assert await admitted(redis, row(new), mapping=2) == [REHASHED]
    assert await the_call(redis) == before
    assert await waiting(redis, "enrich") == []
    assert await admitted(redis, row(new), mapping=2) == [KNOWN]
    await redis.delete(keys.seen("main", "2025-07-01"))
    assert await admitted(redis, row(new), mapping=2) == [KNOWN]

    moved = replace(new, status_raw="x", started_at=new.started_at + timedelta(seconds=30))
    assert await admitted(redis, row(moved), mapping=2) == [CHANGED]
    assert await waiting(redis, "enrich") == [before.id]
    after = await the_call(redis)
    assert (after.started_ms, after.via) == (before.started_ms + 30_000, before.via)
    assert not await redis.hexists(keys.call(before.id), "published_record")  # type: ignore[misc]  # nothing was published


async def test_an_upgrade_that_writes_a_call_alike_still_counts(redis: Redis) -> None:
    """Whatever remembers the call afterwards, a change under the new mapping is a change."""
    await admitted(redis, row(a_record()))
    assert await admitted(redis, row(a_record()), mapping=2) == [KNOWN]
    await redis.delete(keys.seen("main", "2025-07-01"))

    assert await admitted(redis, row(a_record(status_raw="x")), mapping=2) == [CHANGED]


async def test_an_upgrade_does_not_swallow_the_end_of_a_call(redis: Redis) -> None:
    """The release was changed while people talked: the row is written otherwise and the call is over."""
    await admitted(redis, row(a_record(finished=False, end_reason="")))
    await redis.delete(queue_keys.waiting("enrich", "main"), queue_keys.lane("enrich"))

    assert await admitted(redis, row(a_record(finished=True, end_reason="caller_hangup")), mapping=2) == [CHANGED]

    call = await the_call(redis)
    assert call.finished
    assert call.record["end_reason"] == "caller_hangup"
    assert await waiting(redis, "enrich") == [call.id]


async def test_a_rolled_back_release_does_not_shout_either(redis: Redis) -> None:
    """Versions run side by side during a rolling restart: to and fro, in silence."""
    old, new = a_record(end_reason="hangup"), a_record(end_reason="caller_hangup")
    await admitted(redis, row(old))

    answers = [await admitted(redis, row(each), mapping=mapping) for each, mapping in ((new, 2), (old, 1), (new, 2))]

    assert answers == [[REHASHED], [REHASHED], [REHASHED]]
    assert (await the_call(redis)).version == 1


# Two at once, and dying half way


async def test_a_poller_that_was_thought_dead_takes_nothing_in(redis: Redis) -> None:
    """Its lease ended and another has the source: not a row, and no cursor, of its answer counts."""
    lane, old_token = await poll_token(redis)
    await redis.zadd(queue_keys.leased("poll", ""), {"main": 1})
    await lane.drop("", "nobody")
    [heir] = (await lane.exchange(want=1)).claims
    before = await dump(redis)

    update = CursorUpdate(NOON, NOON, forget_days=["2025-06-01"])
    with pytest.raises(LeaseLost):
        await admitted(redis, row(a_record()), token=old_token, cursor_update=update)
    assert await dump(redis) == before

    assert await admitted(redis, row(a_record()), token=heir.token, cursor_update=CursorUpdate(NOON, NOON)) == [NEW]


async def test_a_poll_that_was_settled_takes_nothing_in(redis: Redis) -> None:
    """No lease at all is no lease of ours."""
    lane, token = await poll_token(redis)
    await lane.drop("", "main")

    with pytest.raises(LeaseLost):
        await admitted(redis, row(a_record()), token=token)


async def test_a_poll_whose_lease_ended_unnoticed_still_counts(redis: Redis) -> None:
    """Nobody else has the source: what was asked was not asked in vain."""
    _, token = await poll_token(redis)
    await redis.zadd(queue_keys.leased("poll", ""), {"main": 1})

    assert await admitted(redis, row(a_record()), token=token) == [NEW]


async def test_a_backfill_and_a_poll_bring_the_same_row_once(redis: Redis) -> None:
    """A backfill has no lease, runs beside the polls, and moves no cursor."""
    _, token = await poll_token(redis)
    update = CursorUpdate(NOON, NOON)

    answers = [
        await admitted(redis, row(a_record("1")), row(a_record("2")), via="backfill"),
        await admitted(redis, row(a_record("2")), row(a_record("3")), token=token, cursor_update=update),
        await admitted(redis, row(a_record("3")), via="backfill"),
    ]

    assert answers == [[NEW, NEW], [KNOWN, NEW], [KNOWN]]
    assert await redis.zcard(keys.CALLS) == 3
    assert (await the_call(redis, "2")).via == "backfill"


async def test_the_cursor_moves_with_the_last_rows_and_only_then(redis: Redis) -> None:
    """A poll that dies half way has taken rows in and moved nothing; the next one finds them known."""
    _, token = await poll_token(redis)
    rows = [row(a_record(str(n))) for n in range(CHUNK + 2)]
    await admitted(redis, *rows[:CHUNK], token=token)
    assert await redis.hgetall(keys.source("main")) == {}  # type: ignore[misc]  # both clients

    again = await admitted(redis, *rows[2:], token=token, cursor_update=CursorUpdate(NOON, LATER, depths=[7200]))

    assert again == [KNOWN] * (CHUNK - 2) + [NEW, NEW]
    source = await redis.hgetall(keys.source("main"))  # type: ignore[misc]  # both clients
    assert (source[b"cursor"], source[b"tier:7200"], source[b"last_poll"]) == (ms(NOON), ms(LATER), ms(LATER))


async def test_an_empty_poll_moves_the_cursor_too(redis: Redis) -> None:
    """Nothing new is an answer as well."""
    _, token = await poll_token(redis)

    assert await admitted(redis, token=token, cursor_update=CursorUpdate(NOON, NOON)) == []
    assert await redis.hget(keys.source("main"), "cursor") == ms(NOON)  # type: ignore[misc]  # both clients


async def test_days_below_the_floor_are_forgotten_with_the_last_rows(redis: Redis) -> None:
    """`seen` does not grow for ever; what is not named stays."""
    for day in (1, 2, 3):
        await admitted(redis, row(a_record(str(day), start=NOON + timedelta(days=day))))
    assert await seen_days(redis) == ["2025-07-02", "2025-07-03", "2025-07-04"]

    days = ["2025-07-01", "2025-07-02", "2025-07-03"]
    await admitted(redis, cursor_update=CursorUpdate(NOON, NOON, forget_days=days))

    assert await seen_days(redis) == ["2025-07-04"]


async def test_what_is_remembered_clears_itself_up_after_a_source_that_was_removed(redis: Redis) -> None:
    """90 days without an admission and the day is gone; each admission renews it."""
    await admitted(redis, row(a_record()))
    await redis.expire(keys.seen("main", "2025-07-01"), 5)
    await admitted(redis, row(a_record("8")))

    assert await redis.ttl(keys.seen("main", "2025-07-01")) > 89 * 86_400


# The shortcut for what is known


async def test_the_shortcut_leaves_out_only_what_is_known_exactly(redis: Redis) -> None:
    """Repeats cost one read a day; anything that differs in content, date or mapping goes through admission."""
    known = a_record("known")
    await admitted(
        redis, row(known), row(a_record("seeded"), seed=True), row(a_record("on", finished=False), seed=True)
    )
    rows = [
        row(known),
        row(a_record("seeded")),
        row(a_record("on", finished=False)),
        row(replace(known, status_raw="x")),
        row(a_record("on", finished=True)),
        row(a_record("new")),
        row(a_record("known", start=NOON + timedelta(days=1))),
    ]
    store = store_of(redis)

    assert await store.calls.unseen("main", rows, mapping=1) == rows[3:]
    assert len(await store.calls.unseen("main", rows, mapping=2)) == len(rows)
    assert len(await store.calls.unseen("main", rows, mapping=11)) == len(rows)
    assert await store.calls.unseen("main", [], mapping=1) == []


@given(st.text(min_size=1, max_size=20), st.integers(1, 120))
def test_what_is_remembered_of_a_row_can_be_told_from_every_other(status: str, mapping: int) -> None:
    """Mapping, flag and hash are written without separators: a flag is a letter, a hash 16 hex digits."""
    digest = a_record(status_raw=status).content_hash()

    assert len(digest) == 16
    assert not f"{mapping}e{digest}"[:-17].strip("0123456789")
