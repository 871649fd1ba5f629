"""What the demo makes of what was heard: each thing that must not happen is found, and duplicates alone are none."""

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import get_args
from unittest import mock

import pytest
from rich.console import Console
from rich.live import Live

from relay.cli.demo import Board, EventLine, Lines, Plan, Share, Tables, percentile, screen_for, summarise
from relay.cli.main import Shown
from relay.providers import PROVIDERS
from relay.simulator.accounts import PROVIDER_NAMES, open_account
from relay.simulator.hook_log import Arrival, HookReport
from relay.simulator.subscriber import VerifyingSubscriber

GOOD = HookReport(
    name="crm",
    received=3,
    accepted=3,
    events=3,
    retries=0,
    duplicates={},
    types={"call.completed": 2, "call.recording.completed": 1},
    signature_failures=0,
    signature_reasons={},
    order_violations=(),
    overtaken=(),
    changed_ids=(),
    changed_bodies=(),
    mismatched_ids=(),
    unreadable=0,
    in_flight_peak=1,
    completed=frozenset({"1", "2"}),
)


def test_all_calls_told_is_well() -> None:
    summary = summarise(GOOD, expected=["1", "2"], recordings=1, latencies_s=[0.5, 1.5])

    assert summary.problems == ()
    assert (summary.made, summary.told, summary.recordings) == (2, 2, 1)
    assert "calls        2 made, 2 told" in summary.lines()
    assert "freshness    p50 0.50 s, p99 1.50 s from shown to heard" in summary.lines()
    assert summary.lines()[-1] == "✓ nothing was lost"


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (replace(GOOD, completed=frozenset({"1"})), "1 calls were lost: 2"),
        (replace(GOOD, signature_failures=2), "2 signatures did not verify"),
        (replace(GOOD, changed_ids=("call_a: evt_a, then evt_b",)), "ids changed: call_a: evt_a, then evt_b"),
        (replace(GOOD, order_violations=("call_a came early",)), "order per call was broken: call_a came early"),
        (replace(GOOD, changed_bodies=("evt_a",)), "1 bodies changed between attempts"),
        (replace(GOOD, mismatched_ids=("evt_a",)), "1 bodies carried another id than their webhook-id"),
        (replace(GOOD, unreadable=1), "1 bodies were not readable"),
    ],
)
def test_what_must_not_happen_is_a_problem(report: HookReport, sentence: str) -> None:
    summary = summarise(report, expected=["1", "2"], recordings=1, latencies_s=[])

    assert summary.problems == (sentence,)
    assert f"✗ {sentence}" in summary.lines()
    assert "✓ nothing was lost" not in summary.lines()


def test_a_duplicate_is_told_and_is_no_problem() -> None:
    summary = summarise(replace(GOOD, duplicates={"evt_a": 2}), expected=["1", "2"], recordings=1, latencies_s=[])

    assert summary.problems == ()
    assert "duplicates   2" in summary.lines()


def test_a_demo_without_calls_has_shown_nothing() -> None:
    silent = replace(GOOD, events=0, types={}, completed=frozenset())

    assert summarise(silent, expected=[], recordings=0, latencies_s=[]).problems != ()


def test_a_provider_without_calls_has_shown_nothing() -> None:
    """With several, calls at one say nothing of the other."""
    shares = [Share("webfones", made=2, told=2, p50_s=0.5), Share("nfon", made=0, told=0)]
    summary = summarise(GOOD, expected=["1", "2"], recordings=1, latencies_s=[], shares=shares)

    assert summary.problems == ("no call was made at nfon; play for longer",)
    assert "  webfones   2 made, 2 told, p50 0.50 s" in summary.lines()


def test_transcripts_and_streams_are_counted_where_there_are_any() -> None:
    heard = replace(GOOD, types={**GOOD.types, "call.transcript.completed": 1})
    shares = [Share("nfon", made=2, told=2, by_stream=1)]
    summary = summarise(heard, expected=["1", "2"], recordings=0, transcripts=2, latencies_s=[], shares=shares)

    assert "transcripts  1 of 2" in summary.lines()
    assert "  nfon       2 made, 2 told, 1 found by stream" in summary.lines()
    assert not any("transcripts" in line for line in summarise(GOOD, expected=[], recordings=0, latencies_s=[]).lines())


def test_an_impatient_person_is_not_told_that_calls_were_lost() -> None:
    """A second Ctrl-C ends the wait: what was on its way is said to be on its way."""
    summary = summarise(GOOD, expected=["1", "2", "3"], recordings=1, latencies_s=[], interrupted=True)

    assert summary.problems == ()
    assert "not awaited  1 calls were still on their way" in summary.lines()
    assert "✓ nothing was lost" not in summary.lines()


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([3.0], 99, 3.0), ([4.0, 1.0, 3.0, 2.0], 50, 2.0), ([float(n) for n in range(1, 101)], 99, 99.0)],
)
def test_percentiles_are_nearest_ranks(values: list[float], percent: float, expected: float | None) -> None:
    assert percentile(values, percent) == expected


@pytest.mark.parametrize(("for_s", "interval_s"), [(20, 1.0), (300, 1.0), (301, 2.0), (None, 2.0)])
def test_a_long_demo_polls_less_often(for_s: float | None, interval_s: float) -> None:
    """A poll each second for ever would use up the provider's limit, which holds in the demo too."""
    assert Plan(for_s=for_s).poll_interval_s == interval_s


def board(*providers: str) -> Board:
    """A board with a call that each provider shows, and a recording that was heard."""
    subscriber = VerifyingSubscriber()
    subscriber.add_hook("crm")
    offices = [open_account(provider, "demo-key") for provider in providers]
    for office in offices:
        office.provider.appear("demo-key", rid=7, disposition="NO ANSWER")
    board = Board(offices, subscriber)
    board.link = "http://127.0.0.1:8080/recordings/call_x?expires=1"
    board.events.append(EventLine(datetime.now(UTC), "call.recording.completed", "7", 0.5, "", board.link))
    return board


def test_every_provider_can_be_shown() -> None:
    assert set(PROVIDER_NAMES) == set(PROVIDERS)
    assert set(get_args(Shown)) == {*PROVIDER_NAMES, "all"}


def test_one_subscriber_keeps_the_calls_of_all_providers_apart() -> None:
    """The same number of a call names another call at each provider, and each line says whose it is."""
    out = io.StringIO()
    seen = board(*PROVIDER_NAMES)
    seen.look(Lines(Console(file=out, width=80)))

    assert len(seen.calls) == len(PROVIDER_NAMES)
    assert [line.split()[-1] for line in out.getvalue().splitlines()] == list(PROVIDER_NAMES)
    assert {share.provider: (share.made, share.told) for share in seen.shares()} == {
        name: (1, 0) for name in PROVIDER_NAMES
    }


def test_lines_show_each_call_once() -> None:
    out = io.StringIO()
    seen = board("webfones")
    lines = Lines(Console(file=out, width=80))

    seen.look(lines)
    seen.look(lines)

    assert out.getvalue().count(" call   ← (202) 555-0147  A WHITTAKER     no_answer") == 1


def test_the_tables_show_calls_events_and_a_link_to_click() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=40)
    seen = board("webfones")
    with Live(console=console, auto_refresh=False) as live:
        tables = Tables(console, live)
        seen.look(tables)
        tables.refresh(seen)
        live.refresh()

    shown = out.getvalue()
    assert "A WHITTAKER" in shown
    assert "call.recording.completed" in shown
    assert "0 of 1 calls told" in shown
    assert "\x1b]8;" in shown  # a link that terminals make clickable
    assert "http://127.0.0.1:8080/recordings/call_x?expires=1" in shown


@pytest.mark.parametrize(
    ("terminal", "no_color", "kind"), [(True, "", Tables), (True, "1", Lines), (False, "", Lines), (False, "1", Lines)]
)
def test_tables_are_for_terminals_that_like_colours(
    terminal: bool, no_color: str, kind: type[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    with screen_for(Console(file=io.StringIO(), force_terminal=terminal)) as screen:
        assert isinstance(screen, kind)


def test_an_event_that_was_sent_once_more_looks_like_it() -> None:
    """After a kill an answer may be lost: the repeated event is told apart by its id, and shown as what it is."""
    out = io.StringIO()
    seen = board("webfones")
    now = datetime.now(UTC)
    arrivals = [Arrival("evt_1", "call.completed", None, "7", 1, True, 0.0, now)] * 2
    with mock.patch.object(seen.subscriber, "arrivals", return_value=arrivals):
        seen.look(Lines(Console(file=out, width=120)))

    first, again = [line for line in out.getvalue().splitlines() if "call.completed" in line]
    assert ("✓" in first, "≡" in first) == (True, False)
    assert ("✓" in again, "≡" in again) == (False, True)
    assert "again, with the same id" in again
