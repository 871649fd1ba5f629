"""The fake WebFones keeps to its documents, and each injected fault is one that a client notices."""

import asyncio
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from relay.simulator.__main__ import main
from relay.simulator.audio import audio_chunks
from relay.simulator.provider import FakeRequest, FakeResponse
from relay.simulator.timeline import CallPlan, Habits, calls, people
from relay.simulator.webfones import WebFonesEndpoint, normalised
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.timeline import calls_between
from tests.fakes.webfones import FaultyWebFones

NOW = datetime(2025, 7, 1, 20, 57, tzinfo=UTC)
LONG_AGO = "2000-01-01 00:00:00"
LIST = "/call_log/records_after_timestamp"
KEY = {"x-api-key": "k"}


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def step(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def simulator(clock: Clock) -> FaultyWebFones:
    simulator = FaultyWebFones(clock=clock)
    simulator.add_account("k")
    return simulator


@pytest.fixture
async def http(simulator: FaultyWebFones) -> AsyncIterator[aiohttp.ClientSession]:
    async with simulator.serve() as base_url, aiohttp.ClientSession(base_url) as session:
        yield session


async def _list(
    http: aiohttp.ClientSession, *, since: str = LONG_AGO, headers: dict[str, str] = KEY
) -> tuple[int, dict[str, Any]]:
    async with http.get(LIST, params={"timestamp": since}, headers=headers) as answer:
        return answer.status, await answer.json()


def _rids(body: dict[str, Any]) -> list[int]:
    return [row["rid"] for row in body["records"]]


def _search(simulator: FaultyWebFones, body: bytes) -> FakeResponse:
    return simulator.respond(FakeRequest(WebFonesEndpoint.SEARCH, "k", body=body), NOW)


def _plan(rid: int, *, start: datetime = NOW, visible_s: float = 0, **fields: Any) -> CallPlan:
    visible_at = start + timedelta(seconds=visible_s)
    return CallPlan(rid=rid, started_at=start, ended_at=start, visible_at=visible_at, **fields)


# As documented


async def test_a_row_has_the_documented_fields(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    plan = _plan(211159, direction="OUTGOING", outside_name="B WHITTAKER", outside_number="(111) 111-1111")
    simulator.add_calls("k", [plan])

    status, body = await _list(http)

    assert status == 200
    assert body == {
        "success": True,
        "count": 1,
        "records": [
            {
                "rid": 211159,
                "call_timestamp": "2025-07-01 20:57:00",
                "cidname_outside": "B WHITTAKER",
                "cidext_inside": "3203",
                "direction": "OUTGOING",
                "cidnumber_outside": "(111) 111-1111",
                "cidnumber_inside": "(202) 555-0100, x3203",
                "disposition": "ANSWERED",
            }
        ],
    }


async def test_no_calls_is_an_empty_success(http: aiohttp.ClientSession) -> None:
    assert await _list(http) == (200, {"success": True, "count": 0, "records": []})


@pytest.mark.parametrize("headers", [{"x-api-key": "k"}, {"Authorization": "Bearer k"}, {"Authorization": "bearer k"}])
async def test_both_headers_carry_the_key(http: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    assert (await _list(http, headers=headers))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status", "error"),
    [
        ({}, 401, "Missing API key"),
        ({"Authorization": "Basic k"}, 401, "Missing API key"),
        ({"x-api-key": "other"}, 403, "Invalid API key"),
    ],
)
async def test_a_missing_or_wrong_key_is_refused(
    http: aiohttp.ClientSession, headers: dict[str, str], status: int, error: str
) -> None:
    assert await _list(http, headers=headers) == (status, {"error": error})


async def test_the_contacts_refuse_keys_in_their_own_words(http: aiohttp.ClientSession) -> None:
    for headers, status in (({}, 401), ({"x-api-key": "other"}, 403)):
        async with http.get("/contacts/contactsAfterVersion/0", headers=headers) as answer:
            body = await answer.json()

        assert answer.status == status
        assert set(body) == {"error", "message"}


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", "Missing timestamp in query"),
        ("?timestamp=", "Missing timestamp in query"),
        ("?timestamp=yesterday", "Invalid timestamp format"),
    ],
)
async def test_a_missing_or_malformed_timestamp_is_refused(http: aiohttp.ClientSession, query: str, error: str) -> None:
    async with http.get(LIST + query, headers=KEY) as answer:
        assert (answer.status, await answer.json()) == (400, {"error": error})


async def test_a_revoked_key_is_refused_until_it_is_given_back(
    simulator: FaultyWebFones, http: aiohttp.ClientSession
) -> None:
    simulator.accounts["k"].revoked = True
    assert (await _list(http))[0] == 403

    simulator.accounts["k"].revoked = False
    assert (await _list(http))[0] == 200


def test_the_list_is_strict_about_the_second_unless_inclusive(simulator: FaultyWebFones) -> None:
    simulator.add_calls("k", [_plan(1), _plan(2, start=NOW + timedelta(seconds=1))])
    later = NOW + timedelta(minutes=1)

    strict = simulator.records("k", "2025-07-01 20:57:00", later).body
    simulator.inclusive = True
    inclusive = simulator.records("k", "2025-07-01 20:57:00", later).body

    assert isinstance(strict, dict)
    assert isinstance(inclusive, dict)
    assert _rids(strict) == [2]
    assert _rids(inclusive) == [1, 2]


def test_a_call_shows_when_its_time_has_come_and_not_before(simulator: FaultyWebFones) -> None:
    """A late row of a long call comes up behind the newest start that was seen."""
    long_call = _plan(1, start=NOW, visible_s=3_600)
    short_call = _plan(2, start=NOW + timedelta(minutes=5), visible_s=30)
    simulator.add_calls("k", [long_call, short_call])

    before = simulator.records("k", LONG_AGO, NOW + timedelta(minutes=10)).body
    after = simulator.records("k", LONG_AGO, NOW + timedelta(hours=1)).body

    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert _rids(before) == [2]
    assert _rids(after) == [1, 2]
    assert [plan.rid for plan in simulator.visible("k", NOW + timedelta(minutes=10))] == [2]


def test_times_are_naive_and_in_the_zone_of_the_account(simulator: FaultyWebFones) -> None:
    """In the autumn an hour comes twice: the rows say the same, whichever it was."""
    simulator.add_account("ny", zone="America/New_York")
    first = datetime(2025, 11, 2, 5, 30, tzinfo=UTC)
    second = first + timedelta(hours=1)
    simulator.add_calls("ny", [_plan(1, start=first), _plan(2, start=second)])

    body = simulator.records("ny", "2025-11-02 01:00:00", second).body

    assert isinstance(body, dict)
    assert [row["call_timestamp"] for row in body["records"]] == ["2025-11-02 01:30:00"] * 2
    assert simulator.records("ny", "2025-11-02 01:30:00", second).body == {"success": True, "count": 0, "records": []}


def test_a_row_changes_when_it_was_planned_to(simulator: FaultyWebFones) -> None:
    simulator.add_calls("k", [_plan(1, disposition="NO ANSWER")])
    simulator.change("k", 1, {"disposition": "ANSWERED", "cost": 3}, at=NOW + timedelta(seconds=60))

    before = simulator.records("k", LONG_AGO, NOW + timedelta(seconds=59)).body
    after = simulator.records("k", LONG_AGO, NOW + timedelta(seconds=60)).body

    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert before["records"][0]["disposition"] == "NO ANSWER"
    assert (after["records"][0]["disposition"], after["records"][0]["cost"]) == ("ANSWERED", 3)


def test_a_call_put_again_replaces_the_first(simulator: FaultyWebFones) -> None:
    simulator.add_calls("k", [_plan(1), _plan(1, start=NOW - timedelta(hours=1), outside_name="MOVED")])

    body = simulator.records("k", LONG_AGO, NOW).body

    assert isinstance(body, dict)
    assert [row["cidname_outside"] for row in body["records"]] == ["MOVED"]


def test_a_fed_timeline_shows_what_the_whole_of_it_would(simulator: FaultyWebFones) -> None:
    """Calls taken from an endless feed as time goes by are the same as those put in beforehand."""
    habits = Habits(calls_per_hour=600)
    end = NOW + timedelta(hours=2)
    simulator.feed("k", calls(NOW, seed=4, habits=habits))
    simulator.add_account("whole")
    simulator.add_calls("whole", calls_between(NOW, end, seed=4, habits=habits))

    for minutes in range(0, 119, 7):
        now = NOW + timedelta(minutes=minutes)
        assert simulator.records("k", LONG_AGO, now) == simulator.records("whole", LONG_AGO, now)

    assert len(simulator.visible("k", end)) > 800


async def test_a_recording_is_a_wav_with_the_documented_headers(
    simulator: FaultyWebFones, http: aiohttp.ClientSession
) -> None:
    simulator.add_calls("k", [_plan(7, recording_at=NOW, recording_bytes=300_001)])

    async with http.get("/call_log/recording/7", headers=KEY) as answer:
        audio = await answer.read()

    assert answer.status == 200
    assert answer.headers["Content-Type"] == "audio/wav"
    assert answer.headers["Content-Length"] == "300001"
    assert answer.headers["Content-Disposition"] == 'inline; filename="recording-7.wav"'
    assert len(audio) == 300_001
    assert audio[:4] == b"RIFF"
    assert audio[8:16] == b"WAVEfmt "
    assert audio == b"".join(audio_chunks(7, 300_001))
    assert audio != b"".join(audio_chunks(8, 300_001))


def test_audio_of_any_size_comes_in_small_pieces() -> None:
    """Hundreds of megabytes cost no more memory than a second of sound."""
    pieces = itertools.islice(audio_chunks(1, 4_000_000_000), 1_000)

    assert max(len(piece) for piece in pieces) <= 16_000
    assert sum(len(piece) for piece in audio_chunks(1, 44)) == 44


@pytest.mark.parametrize(
    ("rid", "status", "error"),
    [
        ("abc", 400, "Invalid record ID"),
        ("-1", 400, "Invalid record ID"),
        ("404", 404, "Recording not found"),
        ("1", 404, "No recording available"),
        ("2", 404, "No recording available"),
        ("3", 404, "Recording not found"),
    ],
)
async def test_a_missing_recording_has_its_documented_error(
    simulator: FaultyWebFones, http: aiohttp.ClientSession, rid: str, status: int, error: str
) -> None:
    """1 has none, 2 has none yet, 3 is not visible yet; another account's call is not found."""
    later = NOW + timedelta(minutes=1)
    simulator.add_account("other")
    simulator.add_calls("other", [_plan(404, recording_at=NOW)])
    simulator.add_calls("k", [_plan(1), _plan(2, recording_at=later), _plan(3, visible_s=60, recording_at=NOW)])

    async with http.get(f"/call_log/recording/{rid}", headers=KEY) as answer:
        assert (answer.status, await answer.json()) == (status, {"error": error})


async def test_audio_may_come_later(simulator: FaultyWebFones, http: aiohttp.ClientSession, clock: Clock) -> None:
    simulator.add_calls("k", [_plan(1, recording_at=NOW + timedelta(seconds=30))])

    async with http.get("/call_log/recording/1", headers=KEY) as early:
        assert early.status == 404
    clock.step(30)
    async with http.get("/call_log/recording/1", headers=KEY) as late:
        assert late.status == 200


@pytest.mark.parametrize(
    ("number", "bare"),
    [
        ("+1 (202) 555-0147", "2025550147"),
        ("12025550147", "2025550147"),
        ("2025550147", "2025550147"),
        ("3203", "3203"),
        ("101", "01"),
        ("", ""),
    ],
)
def test_numbers_are_normalised_as_documented_and_extensions_suffer(number: str, bare: str) -> None:
    assert normalised(number) == bare


async def test_contacts_are_found_by_any_of_their_numbers(
    simulator: FaultyWebFones, http: aiohttp.ClientSession
) -> None:
    simulator.put_contact("k", firstname="John", lastname="Doe", mobile_phone="+1 555-555-9999", external_id="CRM-1")
    simulator.put_contact("k", firstname="Jane", phone_numbers=("(555) 555-1234", "5555559999"))
    asked = {"phone_numbers": ["+15555559999", "5555551234", "5550000000"]}

    async with http.post("/contacts/contacts/search/phones", json=asked, headers=KEY) as answer:
        matches = await answer.json()

    names = {number: [card["firstname"] for card in cards] for number, cards in matches.items()}
    assert answer.status == 200
    assert names == {"5555559999": ["John", "Jane"], "5555551234": ["Jane"], "5550000000": []}
    assert matches["5555559999"][0]["external_id"] == "CRM-1"


def test_a_search_may_answer_with_the_numbers_as_they_were_asked(simulator: FaultyWebFones) -> None:
    simulator.reply_keys = "requested"

    answer = _search(simulator, b'{"phone_numbers": ["+15555559999"]}')

    assert answer.body == {"+15555559999": []}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"phone_numbers": "5559999"}', b'{"phone_numbers": [5559999]}'])
def test_a_search_that_makes_no_sense_is_refused(simulator: FaultyWebFones, body: bytes) -> None:
    assert _search(simulator, body).status == 400


async def test_contact_changes_are_counted_by_version(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    john = simulator.put_contact("k", firstname="John", mobile_phone="5555559999")
    jane = simulator.put_contact("k", firstname="Jane")
    simulator.put_contact("k", uuid=john.uuid, firstname="Johnny")
    simulator.delete_contact("k", jane.uuid)

    async with http.get("/contacts/contactsAfterVersion/2", headers=KEY) as answer:
        changes = await answer.json()
    async with http.get("/contacts/contactsAfterVersion/4", headers=KEY) as answer:
        nothing = await answer.json()
    async with http.get("/contacts/contactsAfterVersion/new", headers=KEY) as wrong:
        assert wrong.status == 400

    updated = [{"uuid": john.uuid, "firstname": "Johnny", "lastname": "", "version": 3, "groups": []}]
    assert changes["updated"] == updated
    assert changes["deleted"] == [{"uuid": jane.uuid, "version": 4, "deleted_at": "2025-07-01T20:57:00.000Z"}]
    assert nothing == {"updated": [], "deleted": []}
    assert simulator.accounts["k"].contacts[john.uuid].mobile_phone == "5555559999"


async def test_the_people_of_a_timeline_are_in_the_address_book(simulator: FaultyWebFones) -> None:
    simulator.put_people("k", people(1))

    numbers = {card.mobile_phone for card in simulator.accounts["k"].contacts.values()}
    assert numbers == {person.number for person in people(1) if not person.stranger}


async def test_health_needs_no_key_and_status_does(http: aiohttp.ClientSession) -> None:
    async with http.get("/health") as health:
        assert (await health.json())["status"] == "healthy"
    async with http.get("/status") as refused:
        assert refused.status == 401
    async with http.get("/status", headers=KEY) as status:
        assert (await status.json())["services"]["contacts"]["status"] == "online"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nothing"), ("POST", LIST), ("GET", "/call_log/recording/"), ("GET", "/call_log/recording/1/2")],
)
async def test_other_paths_are_not_found(http: aiohttp.ClientSession, method: str, path: str) -> None:
    async with http.request(method, path, headers=KEY) as answer:
        assert answer.status == 404


# Limits


async def test_a_key_has_so_many_requests_in_a_fixed_window(
    simulator: FaultyWebFones, http: aiohttp.ClientSession, clock: Clock
) -> None:
    """Polls and recordings share the key's limit; when the window ends there is room again."""
    simulator.limit, simulator.rate_limit_headers = 3, True
    simulator.add_account("other")

    assert [(await _list(http))[0] for _ in range(2)] == [200, 200]
    async with http.get("/call_log/recording/1", headers=KEY) as answer:
        assert answer.status == 404
    clock.step(100)
    async with http.get(LIST, params={"timestamp": LONG_AGO}, headers=KEY) as refused:
        body = await refused.json()

    assert refused.status == 429
    assert body == {"error": "Too many requests for this API key, please try again later."}
    assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"] == "800"
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert (await _list(http, headers={"x-api-key": "other"}))[0] == 200
    clock.step(800)
    assert (await _list(http))[0] == 200


async def test_contacts_and_requests_without_a_key_are_limited_by_address(
    simulator: FaultyWebFones, http: aiohttp.ClientSession
) -> None:
    simulator.limit = 2
    await _list(http, headers={})
    async with http.get("/contacts/contactsAfterVersion/0", headers=KEY) as allowed:
        assert allowed.status == 200

    async with http.get("/contacts/contactsAfterVersion/0", headers=KEY) as refused:
        body = await refused.json()

    assert refused.status == 429
    assert body == {"error": "Too many requests from this IP, please try again later."}
    assert not [name for name in refused.headers if name.lower().startswith(("ratelimit", "retry-after"))]
    assert (await _list(http))[0] == 200


async def test_the_limit_of_the_documents_is_a_thousand(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.spend("k", 999)

    assert [(await _list(http))[0] for _ in range(2)] == [200, 429]
    simulator.reset_limits()
    assert (await _list(http))[0] == 200


async def test_the_peak_is_that_of_any_window_not_of_the_limiters(
    simulator: FaultyWebFones, http: aiohttp.ClientSession, clock: Clock
) -> None:
    """Two bursts round the edge of a fixed window are let through, and are seen all the same."""
    simulator.limit = 5
    for step_s in (0, 880, 1, 1, 1, 18, 1, 1, 1):
        clock.step(step_s)
        assert (await _list(http))[0] == 200

    assert simulator.peak("k") == 8
    assert simulator.requests["k", WebFonesEndpoint.RECORDS] == 9
    assert simulator.peak("unknown") == 0


# Faults


def _fault(kind: FaultKind, **fields: Any) -> Fault:
    return Fault(kind=kind, **fields)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503])
async def test_a_status_comes_as_often_as_injected_with_its_documented_body(
    simulator: FaultyWebFones, http: aiohttp.ClientSession, status: int
) -> None:
    simulator.inject(_fault(FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, status=status, times=2))

    answers = [await _list(http) for _ in range(3)]

    assert [answer[0] for answer in answers] == [status, status, 200]
    assert isinstance(answers[0][1]["error"], str)


async def test_a_fault_of_one_kind_or_key_spares_the_others(
    simulator: FaultyWebFones, http: aiohttp.ClientSession
) -> None:
    simulator.add_account("other")
    simulator.inject(_fault(FaultKind.STATUS, on=WebFonesEndpoint.RECORDS, key="k", times=None))

    async with http.get("/status", headers=KEY) as status:
        assert status.status == 200
    assert (await _list(http, headers={"x-api-key": "other"}))[0] == 200
    assert [(await _list(http))[0] for _ in range(2)] == [500, 500]
    simulator.clear_faults(WebFonesEndpoint.RECORDING)
    assert (await _list(http))[0] == 500
    simulator.clear_faults(WebFonesEndpoint.RECORDS)
    assert (await _list(http))[0] == 200


async def test_it_can_accept_and_never_answer(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.inject(_fault(FaultKind.HANG))

    with pytest.raises(TimeoutError):
        async with http.get("/health", timeout=aiohttp.ClientTimeout(total=0.1)):
            pass
    async with http.get("/health") as answer:
        assert answer.status == 200


async def test_a_hanging_request_does_not_hold_up_the_end(simulator: FaultyWebFones) -> None:
    simulator.inject(_fault(FaultKind.HANG))
    arrived = asyncio.Event()

    def clock() -> datetime:
        arrived.set()
        return NOW

    simulator.clock = clock
    async with aiohttp.ClientSession() as session:
        async with simulator.serve() as base_url:
            hanging = asyncio.create_task(session.get(f"{base_url}/health").__aenter__())
            await arrived.wait()
        with pytest.raises(aiohttp.ClientError):
            await hanging


async def test_it_can_be_slow(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.inject(_fault(FaultKind.SLOW, delay_s=0.1))
    loop = asyncio.get_running_loop()

    started = loop.time()
    async with http.get("/health") as answer:
        await answer.read()

    assert answer.status == 200
    assert loop.time() - started >= 0.1


async def test_it_can_drop_the_connection(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.inject(_fault(FaultKind.DROP, on=WebFonesEndpoint.SEARCH))

    with pytest.raises(aiohttp.ClientConnectionError):
        async with http.post("/contacts/contacts/search/phones", json={"phone_numbers": []}, headers=KEY):
            pass
    assert (await _list(http))[0] == 200


async def test_it_can_answer_something_that_is_not_json(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.inject(_fault(FaultKind.NOT_JSON))

    async with http.get(LIST, params={"timestamp": LONG_AGO}, headers=KEY) as answer:
        text = await answer.text()

    assert (answer.status, answer.content_type) == (200, "text/html")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


_ODD: list[tuple[FaultKind, Callable[[int, dict[str, Any]], bool]]] = [
    (FaultKind.PARTIAL, lambda status, body: status == 206 and "records" not in body),
    (FaultKind.SUCCESS_FALSE, lambda status, body: status == 200 and body["success"] is False),
    (FaultKind.WRONG_COUNT, lambda status, body: status == 200 and body["count"] == len(body["records"]) + 1),
    (FaultKind.SHUFFLE, lambda status, body: _rids(body) != sorted(_rids(body)) and body["count"] == 20),
]


@pytest.mark.parametrize(("kind", "seen"), _ODD, ids=[kind.value for kind, _ in _ODD])
async def test_it_can_answer_with_malformed_bodies(
    simulator: FaultyWebFones,
    http: aiohttp.ClientSession,
    kind: FaultKind,
    seen: Callable[[int, dict[str, Any]], bool],
) -> None:
    simulator.add_calls("k", [_plan(rid, start=NOW + timedelta(seconds=rid), visible_s=-30) for rid in range(20)])
    simulator.inject(_fault(kind))

    assert seen(*await _list(http))
    status, body = await _list(http)
    assert status == 200
    assert _rids(body) == list(range(20))
    assert body["count"] == 20


async def test_it_can_mix_garbage_between_good_rows(
    simulator: FaultyWebFones, http: aiohttp.ClientSession, clock: Clock
) -> None:
    """The garbage is the same in each answer, so that a client which copes does so once."""
    simulator.add_calls("k", [_plan(1), _plan(2)])
    simulator.inject(_fault(FaultKind.GARBAGE, times=None))

    _, body = await _list(http)
    clock.step(60)
    _, again = await _list(http)
    _, recent = await _list(http, since="2025-07-01 20:57:30")

    rows = body["records"]
    assert body == again
    assert body["count"] == len(rows) > 10
    assert rows.index(next(row for row in rows if isinstance(row, dict) and row.get("rid") == 2)) > 2
    assert any(not isinstance(row, dict) for row in rows)
    assert any(isinstance(row, dict) and "rid" not in row for row in rows)
    assert any(isinstance(row, dict) and len(row.get("cidname_outside") or "") == 100_000 for row in rows)
    assert not any(isinstance(row, dict) and row.get("rid") == 900_000_102 for row in recent["records"])


async def test_it_can_send_a_huge_body(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.add_calls("k", [_plan(1)])
    simulator.inject(_fault(FaultKind.HUGE, size_bytes=4 * 1024 * 1024))

    async with http.get(LIST, params={"timestamp": LONG_AGO}, headers=KEY) as answer:
        text = await answer.read()

    assert len(text) > 4 * 1024 * 1024
    assert _rids(json.loads(text)) == [1]


async def test_it_can_cut_audio_short(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.add_calls("k", [_plan(1, recording_at=NOW, recording_bytes=200_000)])
    simulator.inject(_fault(FaultKind.TRUNCATE, share=0.25))
    got = bytearray()

    async def read_on(answer: aiohttp.ClientResponse) -> None:
        async for chunk in answer.content.iter_any():
            got.extend(chunk)

    async with http.get("/call_log/recording/1", headers=KEY) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await read_on(answer)
    async with http.get("/call_log/recording/1", headers=KEY) as whole:
        audio = await whole.read()

    assert answer.headers["Content-Length"] == "200000"
    assert 0 < len(got) <= 50_000
    assert len(audio) == 200_000


async def test_it_can_have_no_recording_now_and_one_later(
    simulator: FaultyWebFones, http: aiohttp.ClientSession
) -> None:
    simulator.add_calls("k", [_plan(1, recording_at=NOW)])
    simulator.inject(_fault(FaultKind.NO_RECORDING, times=2))

    statuses = []
    for _ in range(3):
        async with http.get("/call_log/recording/1", headers=KEY) as answer:
            statuses.append(answer.status)

    assert statuses == [404, 404, 200]


async def test_its_clock_can_be_wrong(simulator: FaultyWebFones, http: aiohttp.ClientSession) -> None:
    simulator.add_calls("k", [_plan(1)])
    simulator.clock_skew_s = 300
    simulator.add_calls("k", [_plan(2)])

    async with http.get(LIST, params={"timestamp": "2025-07-01 21:01:59"}, headers=KEY) as answer:
        body = await answer.json()

    assert [row["call_timestamp"] for row in body["records"]] == ["2025-07-01 21:02:00"] * 2
    assert answer.headers["Date"] == "Tue, 01 Jul 2025 21:02:00 GMT"


def test_the_pure_answers_have_only_the_faults_they_are_given(simulator: FaultyWebFones) -> None:
    """A test on a virtual clock decides itself when something goes wrong."""
    simulator.inject(_fault(FaultKind.SUCCESS_FALSE, times=None))

    good = simulator.records("k", LONG_AGO, NOW)
    bad = simulator.records("k", LONG_AGO, NOW, faults=[_fault(FaultKind.SUCCESS_FALSE)])

    assert good.body == {"success": True, "count": 0, "records": []}
    assert json.loads(bad.encoded())["success"] is False
    assert simulator.peak("k") == 0


# Control from another process


async def test_the_provider_can_be_controlled_over_http(
    simulator: FaultyWebFones, http: aiohttp.ClientSession, clock: Clock
) -> None:
    message = {
        "accounts": [{"key": "ny", "zone": "America/New_York"}],
        "calls": [
            {"key": "ny", "rid": 5, "disposition": "BUSY", "extra": {"queue": "sales"}},
            {"key": "ny", "visible_at": "2025-07-01T20:58:00Z", "talk_s": 60},
        ],
        "changes": [{"key": "ny", "rid": 5, "fields": {"cidname_outside": "RENAMED"}}],
        "contacts": [{"key": "ny", "fields": {"firstname": "John", "mobile_phone": "2025550147"}}],
        "faults": [{"kind": "status", "on": "records", "key": "k", "status": 503}],
        "limit": 10,
        "spend": {"ny": 8},
    }

    async with http.post("/_control", json=message) as done:
        assert done.status == 200, await done.text()
    body = (await _list(http, headers={"x-api-key": "ny"}))[1]
    row = body["records"][0]
    clock.step(60)
    async with http.get("/_control") as answer:
        state = await answer.json()

    assert (row["rid"], row["disposition"], row["queue"]) == (5, "BUSY", "sales")
    assert (row["cidname_outside"], row["call_timestamp"]) == ("RENAMED", "2025-07-01 16:56:30")
    assert [plan["rid"] for plan in state["accounts"]["ny"]["visible"]] == [5, 6]
    assert state["accounts"]["ny"]["requests"]["records"] == 1
    assert state["accounts"]["ny"]["statuses"] == {"records 200": 1}
    assert state["accounts"]["ny"]["contacts"] == 1
    assert state["faults"][0]["status"] == 503
    assert [(await _list(http, headers={"x-api-key": "ny"}))[0] for _ in range(2)] == [200, 429]
    async with http.post("/_control", json={"clear_faults": True, "reset_limits": True}) as done:
        assert (await done.json())["faults"] == []


@pytest.mark.parametrize(
    "message",
    [
        "nonsense",
        {"unknown": 1},
        {"accounts": [{"key": "x", "zone": "Mars/Olympus"}]},
        {"calls": [{"key": "unknown"}]},
        {"calls": [{"key": "k", "started_at": "2025-07-01T20:58:00"}]},
        {"calls": [{"key": "k", "recording_bytes": 3}]},
        {"changes": [{"key": "k", "rid": 404, "fields": {}}]},
        {"contacts": [{"key": "k", "fields": {"hat": "red"}}]},
        {"faults": [{"kind": "explode"}]},
        {"faults": [{"kind": "status", "times": 0}]},
    ],
)
async def test_an_invalid_control_message_is_refused(http: aiohttp.ClientSession, message: object) -> None:
    async with http.post("/_control", json=message) as answer:
        assert answer.status == 400
        assert len((await answer.json())["error"]) > 10


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--zone", "Mars/Olympus"], "is not a valid time zone"),
        (["--secret", "whsec_c2hvcnQ="], "24 to 64 bytes"),
        (["--hurry", "0"], "--hurry must be above 0"),
        (["--port", "http"], "invalid int value"),
    ],
)
def test_wrong_arguments_stop_the_start_with_a_sentence(
    wrong: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)

    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_both_run_as_a_process_of_their_own_and_exit_cleanly(number: signal.Signals) -> None:
    arguments = ["-m", "relay.simulator", "--calls-per-minute", "6000", "--hurry", "1000", "--hooks", "a,b"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    ready = json.loads(await process.stdout.readline())

    async with aiohttp.ClientSession() as session:
        async with session.get(f"{ready['provider']}/health") as health:
            assert health.status == 200
        async with session.post(ready["hooks"]["b"], data=b"{}") as unsigned:
            assert unsigned.status == 401
        seen = 0
        while not seen:
            async with session.get(f"{ready['provider']}/_control") as answer:
                seen = len((await answer.json())["accounts"][ready["key"]]["visible"])
        process.send_signal(number)
        _, errors = await process.communicate()

    assert process.returncode == 0
    assert errors == b""
