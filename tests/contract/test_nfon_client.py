"""The NFON client: every answer ends in a value or a named error, the unit of `from` is found out safely, and nothing
is ever deleted."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.domain.call import InvalidRow
from relay.errors import OverBudget, RateLimited, SettingsError, Unauthorized, Unavailable, UnexpectedResponse
from relay.providers import http as http_module
from relay.providers.base import CallPage, Purpose, Window
from relay.providers.nfon import NFON
from relay.providers.nfon import client as client_module
from relay.providers.nfon.client import Nfon
from relay.providers.nfon.options import NfonOptions
from relay.simulator.nfon import NfonEndpoint
from relay.simulator.timeline import CallPlan
from tests.fakes.budget import FakeBudget
from tests.fakes.clock import ManualClock
from tests.fakes.faults import Fault, FaultKind
from tests.fakes.nfon import DELETE_ENDPOINT, TOKEN_ENDPOINT, FaultyNfon

TOKEN = "a-users-token"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
WINDOW = Window(NOW - timedelta(hours=2), NOW)


class MemoryCredentialStore:
    """A credential store for one process."""

    def __init__(self) -> None:
        self.stored: str | None = None
        self.writes = 0
        self._lock = asyncio.Lock()

    async def read(self) -> str | None:
        return self.stored

    async def write(self, text: str) -> None:
        self.stored = text
        self.writes += 1

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._lock:
            yield


class Bench:
    """A simulator on a clock that stands, and clients of it."""

    def __init__(self, base_url: str, simulator: FaultyNfon, clock: ManualClock, http: aiohttp.ClientSession) -> None:
        self.base_url = base_url
        self.simulator = simulator
        self.clock = clock
        self.http = http
        self.budget = FakeBudget()
        self.store = MemoryCredentialStore()

    def client(self, **options: Any) -> Nfon:
        settings = {"base_url": self.base_url, "token": TOKEN, **options}
        return Nfon(NfonOptions.model_validate(settings), self.http, self.budget, self.store, clock=self.clock)

    def with_login(self, refresh_token: str = "first-refresh", **options: Any) -> Nfon:
        oauth = {"client_id": "relay", "refresh_token": refresh_token, "token_url": f"{self.base_url}/token"}
        return self.client(token=None, oauth=oauth, **options)

    def calls(self, count: int, *, before: timedelta = timedelta(minutes=1), **fields: Any) -> list[CallPlan]:
        """Let calls be there, a second apart, the newest ended `before` now."""
        times = [NOW - before - timedelta(seconds=count - n) for n in range(count)]
        return [self.simulator.appear(TOKEN, ended_at=at, visible_at=at, **fields) for at in times]

    def asked(self, kind: NfonEndpoint = NfonEndpoint.RECORDS) -> int:
        return self.simulator.requests[TOKEN, kind]

    def key(self, plan: CallPlan) -> str:
        return self.simulator.uuid_of(TOKEN, plan.rid)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    clock = ManualClock(NOW)
    simulator = FaultyNfon(clock=clock.now)
    simulator.add_account(TOKEN)
    async with simulator.serve() as base_url, aiohttp.ClientSession() as http:
        bench = Bench(base_url, simulator, clock, http)
        yield bench
    assert not [kind for _key, kind in simulator.requests if kind is DELETE_ENDPOINT], "something was deleted"
    assert all(agent.startswith("call-relay/") for agent in simulator.agents)


async def listed(client: Nfon, window: Window = WINDOW) -> list[CallPage]:
    return [page async for page in client.pages(window)]


async def keys(client: Nfon, window: Window = WINDOW) -> list[str]:
    """The keys of all records, in their order; invalid rows have none."""
    return [row.key or "" for page in await listed(client, window) for row in page.rows]


# -- paging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_rows", [2, 3, 7, 10, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 20])
async def test_every_call_is_listed_once_however_few_rows_a_page_has(bench: Bench, most_rows: int, count: int) -> None:
    """NFON may give fewer rows than were asked for: a short page is not yet the end."""
    bench.simulator.max_limit = most_rows
    plans = bench.calls(count)

    assert await keys(bench.client()) == [bench.key(plan) for plan in plans]


async def test_a_limit_is_always_requested(bench: Bench) -> None:
    """What comes without one is unknown."""
    bench.simulator.default_limit = 1
    plans = bench.calls(30)

    assert len(await keys(bench.client(page_size=10))) == len(plans)


async def test_a_known_page_size_saves_requests(bench: Bench) -> None:
    bench.calls(5)
    client = bench.client()
    await keys(client)
    asked = bench.asked()
    for plan in list(bench.simulator.accounts[TOKEN].plans)[:2]:
        bench.simulator.remove(TOKEN, plan)
    await keys(client)

    assert bench.asked() == asked + 1


@pytest.mark.parametrize("page_size", [2, 3, 5])
async def test_a_call_deleted_while_reading_hides_no_other(bench: Bench, page_size: int) -> None:
    """A user deletes calls of the history; the offset would skip as many unseen ones."""
    plans = bench.calls(20)
    client = bench.client(page_size=page_size)
    seen: list[str] = []
    async for page in client.pages(WINDOW):
        seen += [row.key or "" for row in page.rows]
        left = sorted(bench.simulator.accounts[TOKEN].plans)
        if len(left) > 14:
            for rid in left[:2]:
                bench.simulator.remove(TOKEN, rid)

    assert {bench.key(plan) for plan in plans if plan.rid in bench.simulator.accounts[TOKEN].plans} <= set(seen)
    assert len(seen) == len(set(seen))


async def test_a_late_call_that_slips_in_while_reading_doubles_nothing(bench: Bench) -> None:
    plans = bench.calls(20)
    client = bench.client(page_size=4)
    seen: list[str] = []
    async for page in client.pages(WINDOW):
        if not seen:
            bench.simulator.appear(TOKEN, ended_at=NOW - timedelta(minutes=50), visible_at=NOW)
        seen += [row.key or "" for row in page.rows]

    assert {bench.key(plan) for plan in plans} <= set(seen)
    assert len(seen) == len(set(seen))


async def test_a_server_that_ignores_the_offset_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be unreadable calls behind its first page: better an error than a loss."""
    bench.calls(20)
    truly = bench.simulator.records

    def without_offset(key: str, query: Any, now: datetime) -> list[Any]:
        return truly(key, {name: value for name, value in query.items() if name != "offset"}, now)

    monkeypatch.setattr(bench.simulator, "records", without_offset)

    with pytest.raises(UnexpectedResponse, match="same page"):
        await keys(bench.client(page_size=5))
    assert len(await keys(bench.client(page_size=50))) == 20


async def test_unordered_rows_are_all_read(bench: Bench) -> None:
    plans = bench.calls(12)
    bench.simulator.inject(Fault(kind=FaultKind.SHUFFLE, on=NfonEndpoint.RECORDS, times=None, seed=7))

    assert sorted(await keys(bench.client())) == sorted(bench.key(plan) for plan in plans)


async def test_invalid_rows_between_valid_ones_are_reported(bench: Bench) -> None:
    plans = bench.calls(3)
    bench.simulator.inject(Fault(kind=FaultKind.GARBAGE, on=NfonEndpoint.RECORDS, times=None))

    rows = [row for page in await listed(bench.client()) for row in page.rows]

    assert [row.key for row in rows if not isinstance(row, InvalidRow)] == [bench.key(plan) for plan in plans]
    assert len([row for row in rows if isinstance(row, InvalidRow)]) == 9


async def test_only_the_configured_extension_is_read(bench: Bench) -> None:
    plans = bench.calls(2)

    assert await keys(bench.client(customer="K9999", extension="1001")) == [bench.key(plan) for plan in plans]
    assert await keys(bench.client(customer="K9999", extension="1002")) == []


async def test_calls_can_be_sorted_over_http(bench: Bench) -> None:
    """The simulator of a process of its own is controlled by `/_control`, as every other."""
    message = {"calls": [{"key": TOKEN, "rid": 7}], "faults": [{"kind": "status", "on": "records", "status": 503}]}
    async with bench.http.post(f"{bench.base_url}/_control", json=message) as done:
        state = await done.json()

    assert [plan["rid"] for plan in state["accounts"][TOKEN]["visible"]] == [7]
    with pytest.raises(Unavailable):
        await keys(bench.client())
    assert await keys(bench.client()) == [bench.simulator.uuid_of(TOKEN, 7)]


# -- the unit of `from` -----------------------------------------------------------------------------------------------


async def test_milliseconds_are_detected(bench: Bench) -> None:
    """Seconds read as milliseconds are 1970: too much comes back, which shows. After that only what was requested."""
    bench.simulator.from_unit = "milliseconds"
    old, new = bench.calls(3, before=timedelta(days=9)), bench.calls(4)
    client = bench.client()

    first = await keys(client)
    second = await keys(client)

    assert first == second == [bench.key(plan) for plan in new]
    assert not {bench.key(plan) for plan in old} & set(first)


async def test_seconds_stay_seconds_when_an_old_row_comes(bench: Bench) -> None:
    """A server whose filter is about something else sends an older call: no reason to ask for the year 57000."""
    [early] = bench.calls(1, before=timedelta(hours=1))
    window = Window(NOW - timedelta(minutes=30), NOW)
    new = bench.calls(3)
    real = bench.simulator.records

    def also_older(key: str, query: Any, now: datetime) -> list[Any]:
        rows = real(key, query, now)
        if float(query.get("from", 0)) < now.timestamp() and int(query.get("offset", 0)) == 0:
            rows = [bench.simulator.row(bench.simulator.accounts[key], early, now), *rows]
        return rows

    bench.simulator.records = also_older  # type: ignore[method-assign]
    client = bench.client()
    for _ in range(3):
        completed = await keys(client, window)

        assert [key for key in completed if key != bench.key(early)] == [bench.key(plan) for plan in new]


async def test_a_server_that_returns_to_seconds_is_detected(bench: Bench) -> None:
    """Milliseconds read as seconds return nothing: that is only accepted when the newest call confirms it."""
    bench.simulator.from_unit = "milliseconds"
    bench.calls(3, before=timedelta(days=9))
    new = bench.calls(2)
    client = bench.client()
    await keys(client)
    bench.simulator.from_unit = "seconds"

    assert await keys(client) == [bench.key(plan) for plan in new]


async def test_no_new_call_is_an_empty_list_in_either_unit(bench: Bench) -> None:
    bench.calls(3, before=timedelta(days=9))
    for unit in ("seconds", "milliseconds"):
        bench.simulator.from_unit = unit
        client = bench.client()

        assert [await keys(client), await keys(client)] == [[], []]


@pytest.mark.parametrize("unit", ["seconds", "milliseconds"])
async def test_a_configured_unit_is_not_probed(bench: Bench, unit: Any) -> None:
    bench.simulator.from_unit = unit
    bench.calls(2, before=timedelta(days=9))
    plans = bench.calls(2)

    assert await keys(bench.client(time_unit=unit)) == [bench.key(plan) for plan in plans]
    assert bench.asked() == 2


# -- refusals and budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(kind=FaultKind.STATUS, status=400), UnexpectedResponse),
        (Fault(kind=FaultKind.STATUS, status=401), Unauthorized),
        (Fault(kind=FaultKind.STATUS, status=403), Unauthorized),
        (Fault(kind=FaultKind.STATUS, status=404), UnexpectedResponse),
        (Fault(kind=FaultKind.STATUS, status=429), RateLimited),
        (Fault(kind=FaultKind.STATUS, status=500), Unavailable),
        (Fault(kind=FaultKind.DROP), Unavailable),
        (Fault(kind=FaultKind.NOT_JSON), UnexpectedResponse),
        (Fault(kind=FaultKind.PARTIAL), UnexpectedResponse),
        (Fault(kind=FaultKind.NOT_A_LIST), UnexpectedResponse),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else value.__name__,
)
async def test_every_other_response_is_an_error_without_the_token(
    bench: Bench, fault: Fault, error: type[Exception]
) -> None:
    bench.calls(1)
    # twice, since aiohttp asks again by itself when a connection is reset before an answer
    bench.simulator.inject(fault.model_copy(update={"times": 2}))

    with pytest.raises(error) as raised:
        await keys(bench.client())

    assert TOKEN not in str(raised.value)
    assert type(raised.value) is error


async def test_an_oversized_body_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "MAX_BODY_BYTES", 64 * 1024)
    bench.simulator.inject(Fault(kind=FaultKind.HUGE, on=NfonEndpoint.RECORDS))

    with pytest.raises(UnexpectedResponse, match="more than"):
        await keys(bench.client())


async def test_nothing_is_requested_beyond_the_budget(bench: Bench) -> None:
    [plan] = bench.calls(1)
    [page] = [page for page in await listed(bench.client()) if page.rows]
    bench.budget = FakeBudget(exhausted=True)
    client = bench.client()
    asked = bench.simulator.requests.total()

    with pytest.raises(OverBudget):
        await keys(client)
    with pytest.raises(OverBudget):
        async with client.listening():
            pass
    assert not (await client.health()).ok
    assert bench.simulator.requests.total() == asked
    assert page.rows[0].key == bench.key(plan)


async def test_a_stream_spends_one_request(bench: Bench) -> None:
    async with bench.client().listening():
        assert bench.budget.spent == [Purpose.POLL]


async def test_health_shows_whether_the_token_is_accepted(bench: Bench) -> None:
    accepted, rejected = await bench.client().health(), await bench.client(token="another").health()

    assert (accepted.ok, rejected.ok) == (True, False)
    assert "another" not in " ".join(rejected.lines)


# -- tokens -----------------------------------------------------------------------------------------------------------


async def test_a_token_file_is_read_for_each_request(bench: Bench, tmp_path: Path) -> None:
    plans = bench.calls(2)
    file = tmp_path / "token"
    file.write_text("too old\n")
    client = bench.client(token=None, token_file=file)
    with pytest.raises(SettingsError, match="must contain"):
        await keys(client)
    file.write_text("too-old\n")
    with pytest.raises(Unauthorized):
        await keys(client)
    file.write_text(f"{TOKEN}\n")

    assert await keys(client) == [bench.key(plan) for plan in plans]


async def test_a_login_gives_the_token(bench: Bench) -> None:
    bench.simulator.add_login(TOKEN, "first-refresh")
    plans = bench.calls(2)

    assert await keys(bench.with_login()) == [bench.key(plan) for plan in plans]
    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 1


async def test_a_token_is_renewed_before_it_ends(bench: Bench) -> None:
    """NFON never has to refuse one."""
    bench.simulator.add_login(TOKEN, "first-refresh")
    client = bench.with_login()
    for _ in range(4):
        await keys(client)
        await bench.clock.advance(200)

    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 2
    assert bench.simulator.statuses["", NfonEndpoint.RECORDS, 401] == 0


async def test_a_rejected_token_is_renewed_once(bench: Bench) -> None:
    bench.simulator.add_login(TOKEN, "first-refresh")
    plans = bench.calls(2)
    client = bench.with_login()
    await keys(client)
    bench.simulator.expire_tokens()

    assert await keys(client) == [bench.key(plan) for plan in plans]
    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 2


async def test_a_renewed_token_that_is_rejected_too_is_an_error(bench: Bench) -> None:
    bench.simulator.add_login(TOKEN, "first-refresh")
    client = bench.with_login()
    bench.simulator.inject(Fault(kind=FaultKind.STATUS, on=NfonEndpoint.RECORDS, status=401, times=None))

    with pytest.raises(Unauthorized):
        await keys(client)
    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 2


async def test_concurrent_requests_renew_the_token_once(bench: Bench) -> None:
    """A refresh token is good once: ten requests and two processes make one exchange."""
    bench.simulator.add_login(TOKEN, "first-refresh")
    clients = [bench.with_login() for _ in range(2)]

    await asyncio.gather(*(keys(client) for client in clients * 5))

    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 1
    assert bench.simulator.reused_refresh_tokens == 0


async def test_the_rotated_refresh_token_survives_a_restart(bench: Bench) -> None:
    bench.simulator.add_login(TOKEN, "first-refresh")
    await keys(bench.with_login())
    bench.simulator.expire_tokens()
    await bench.clock.advance(4000)

    await keys(bench.with_login())

    assert bench.simulator.reused_refresh_tokens == 0
    assert bench.store.writes == 2


async def test_a_new_login_replaces_the_stored_tokens(bench: Bench) -> None:
    bench.simulator.add_login(TOKEN, "first-refresh")
    await keys(bench.with_login())
    bench.simulator.expire_tokens()
    bench.simulator.add_login(TOKEN, "second-refresh")

    await keys(bench.with_login("second-refresh"))

    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 2


async def test_without_rotation_the_refresh_token_stays(bench: Bench) -> None:
    bench.simulator.rotate = False
    bench.simulator.add_login(TOKEN, "first-refresh")
    client = bench.with_login()
    for _ in range(3):
        await keys(client)
        await bench.clock.advance(400)

    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 3


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, Unauthorized),
        (401, Unauthorized),
        (429, RateLimited),
        (500, Unavailable),
        (302, UnexpectedResponse),
        (404, UnexpectedResponse),
    ],
)
async def test_a_login_that_is_rejected_has_its_error(bench: Bench, status: int, error: type[Exception]) -> None:
    bench.simulator.inject(Fault(kind=FaultKind.STATUS, on=TOKEN_ENDPOINT, status=status))

    with pytest.raises(error) as raised:
        await keys(bench.with_login())

    assert "first-refresh" not in str(raised.value)
    assert bench.store.stored is None


async def test_a_login_that_hangs_up_is_unavailable(bench: Bench) -> None:
    bench.simulator.inject(Fault(kind=FaultKind.DROP, on=TOKEN_ENDPOINT, times=None))

    with pytest.raises(Unavailable, match="login"):
        await keys(bench.with_login())


async def test_without_a_store_no_refresh_token_is_used(bench: Bench) -> None:
    """A rotated token that is not stored would end the login."""
    bench.simulator.add_login(TOKEN, "first-refresh")
    oauth = {"client_id": "relay", "refresh_token": "first-refresh", "token_url": f"{bench.base_url}/token"}
    options = NfonOptions.model_validate({"base_url": bench.base_url, "oauth": oauth})
    client = NFON.connect(options, bench.http, bench.budget)

    assert not (await client.health()).ok
    assert bench.simulator.requests["", TOKEN_ENDPOINT] == 0


# -- transcripts ------------------------------------------------------------------------------------------------------


async def transcribed(bench: Bench, count: int = 1) -> tuple[Nfon, Sequence[Any]]:
    """A client, and records whose transcripts are ready."""
    for plan in bench.calls(count):
        bench.simulator.transcribe(TOKEN, plan.rid)
    client = bench.client()
    return client, [row for page in await listed(client) for row in page.rows]


async def test_transcripts_are_fetched_for_the_records_that_have_one(bench: Bench) -> None:
    client, records = await transcribed(bench, 12)
    [plain] = [
        row
        for plan in bench.calls(1)
        for page in await listed(bench.client())
        for row in page.rows
        if row.key == bench.key(plan)
    ]
    assert not isinstance(plain, InvalidRow)

    completed = await client.complete([plain, *records])

    assert completed[0] is plain
    assert [record.key for record in completed[1:]] == [record.key for record in records]
    assert {record.transcription["transcript"] for record in completed[1:] if record.transcription} == {
        "Alice: Hello. Yes."
    }
    assert [each.content_hash() for each in completed[1:]] == [each.content_hash() for each in records]
    assert bench.asked(NfonEndpoint.DETAILS) == 12


async def test_records_without_a_transcript_request_no_details(bench: Bench) -> None:
    bench.calls(3)
    client = bench.client()
    rows = [row for page in await listed(client) for row in page.rows if not isinstance(row, InvalidRow)]

    assert await client.complete(rows) == rows
    assert bench.asked(NfonEndpoint.DETAILS) == 0


@pytest.mark.parametrize(("status", "later"), [(404, False), (403, False), (401, True), (429, True), (500, True)])
async def test_details_that_are_forbidden_are_not_requested_again(bench: Bench, status: int, later: bool) -> None:
    client, [record] = await transcribed(bench)
    bench.simulator.inject(Fault(kind=FaultKind.STATUS, on=NfonEndpoint.DETAILS, status=status, times=None))

    [completed] = await client.complete([record])

    assert completed.transcription is not None
    assert completed.transcription["available"] is not later
    assert (completed.content_hash() == record.content_hash()) is not later


async def test_details_that_hang_delay_calls_only_briefly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After that they are left alone for a while."""
    monkeypatch.setattr(client_module, "DETAILS_TIMEOUT_S", 0.1)
    client, records = await transcribed(bench, 20)
    bench.simulator.inject(Fault(kind=FaultKind.HANG, on=NfonEndpoint.DETAILS, times=None))
    loop = asyncio.get_running_loop()
    began = loop.time()

    completed = await client.complete(records)
    again = await client.complete(records)

    assert loop.time() - began < 2
    assert {record.transcription["available"] for record in [*completed, *again] if record.transcription} == {False}
    assert bench.asked(NfonEndpoint.DETAILS) <= 5


# -- listening --------------------------------------------------------------------------------------------------------


async def streamed(client: Nfon, count: int, act: Callable[[], object] = lambda: None) -> list[Any]:
    """Connect, act, and take rows until there are so many."""
    rows: list[Any] = []
    async with asyncio.timeout(10), client.listening() as batches:
        act()
        async for batch in batches:
            rows += batch
            if len(rows) >= count:
                break
    return rows


@pytest.fixture
def live(bench: Bench) -> Bench:
    """The same on a clock that goes, which streams need."""
    bench.simulator.clock = lambda: datetime.now(UTC)
    return bench


@pytest.mark.parametrize(
    ("what", "rows_of_one_call"),
    [
        (None, ["record"]),
        (FaultKind.SPLIT, ["record"]),
        (FaultKind.DUPLICATE, ["record", "record"]),
        (FaultKind.BAD_EVENTS, ["bad", "bad", "record"]),
        (FaultKind.HUGE_EVENT, ["bad", "record"]),
    ],
)
async def test_rows_arrive_however_they_are_sent(
    live: Bench, what: FaultKind | None, rows_of_one_call: list[str]
) -> None:
    if what:
        live.simulator.inject(Fault(kind=what, on=NfonEndpoint.STREAM, times=None))
    plans: list[CallPlan] = []

    rows = await streamed(live.client(), len(rows_of_one_call), lambda: plans.append(live.simulator.appear(TOKEN)))

    assert ["bad" if isinstance(row, InvalidRow) else "record" for row in rows] == rows_of_one_call
    assert {row.key for row in rows if not isinstance(row, InvalidRow)} == {live.key(plan) for plan in plans}


async def test_a_record_is_streamed_again_when_its_transcript_is_ready(live: Bench) -> None:
    plans: list[CallPlan] = []

    def act() -> None:
        plans.append(live.simulator.appear(TOKEN))
        asyncio.get_running_loop().call_later(0.1, lambda: live.simulator.transcribe(TOKEN, plans[0].rid))

    first, second = await streamed(live.client(), 2, act)

    assert first.key == second.key
    assert first.content_hash() != second.content_hash()


async def test_silence_and_a_cut_end_a_stream_without_an_error(live: Bench) -> None:
    client = live.client(stream_idle_s=5)
    object.__setattr__(client._options, "stream_idle_s", 0.2)
    async with asyncio.timeout(5), client.listening() as batches:
        assert [rows async for rows in batches] == []


async def test_a_heartbeat_keeps_a_stream_open(live: Bench) -> None:
    live.simulator.heartbeat_s = 0.1
    client = live.client(stream_idle_s=5)
    object.__setattr__(client._options, "stream_idle_s", 0.8)
    loop = asyncio.get_running_loop()
    loop.call_later(1.4, live.simulator.appear, TOKEN)

    assert len(await streamed(client, 1)) == 1


async def test_a_dropped_stream_is_unavailable(live: Bench) -> None:
    with pytest.raises(Unavailable):
        await streamed(
            live.client(), 1, lambda: asyncio.get_running_loop().call_later(0.1, live.simulator.drop_streams)
        )


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(kind=FaultKind.NO_STREAM), UnexpectedResponse),
        (Fault(kind=FaultKind.STATUS, status=401), Unauthorized),
        (Fault(kind=FaultKind.STATUS, status=429), RateLimited),
        (Fault(kind=FaultKind.STATUS, status=503), Unavailable),
        (Fault(kind=FaultKind.DROP), Unavailable),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else value.__name__,
)
async def test_a_rejected_stream_has_its_error(live: Bench, fault: Fault, error: type[Exception]) -> None:
    live.simulator.inject(fault.model_copy(update={"on": NfonEndpoint.STREAM, "times": 2}))

    with pytest.raises(error):
        await streamed(live.client(), 1)


async def test_a_stream_that_never_answers_is_unavailable(live: Bench) -> None:
    live.simulator.inject(Fault(kind=FaultKind.HANG, on=NfonEndpoint.STREAM))
    client = live.client(stream_idle_s=5)
    object.__setattr__(client._options, "stream_idle_s", 0.2)

    with pytest.raises(Unavailable, match="too long"):
        await streamed(client, 1)


async def test_the_stream_can_be_disabled(bench: Bench) -> None:
    assert bench.client(stream=False).stream is None
    assert bench.client().stream is not None
