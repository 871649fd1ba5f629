"""The demo finds each thing that must not happen, accepts duplicates, and fits what it shows into a terminal."""

import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import get_args
from unittest import mock

import pytest
from rich.console import Console
from rich.live import Live

from relay.cli.demo.command import ProviderName
from relay.cli.demo.measure import HOOK, DeliveredEvent, Measurements, SourceTotals, Summary, percentile
from relay.cli.demo.run import DemoOptions
from relay.cli.demo.screen import Lines, Note, Tables, open_screen
from relay.providers import PROVIDERS
from relay.simulator.accounts import PROVIDER_NAMES, open_account
from relay.simulator.hook_log import Arrival, HookReport
from relay.simulator.subscriber import VerifyingSubscriber

GOOD = HookReport(
    name=HOOK,
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
LINK = "http://127.0.0.1:8080/recordings/call_x?expires=1"


def summary(
    report: HookReport = GOOD,
    *,
    listed: Sequence[str] = ("1", "2"),
    latencies_s: Sequence[float] = (),
    transcripts: int = 0,
    sources: Sequence[SourceTotals] = (),
    interrupted: bool = False,
) -> Summary:
    return Summary(
        report=report,
        listed=listed,
        recordings=1,
        transcripts=transcripts,
        latencies_s=latencies_s,
        sources=sources,
        interrupted=interrupted,
    )


def test_a_run_without_problems_reports_that_nothing_was_lost() -> None:
    result = summary(latencies_s=[0.5, 1.5])

    assert list(result.problems) == []
    assert "calls        2 listed, 2 delivered" in result.lines()
    assert "recordings   1 of 1" in result.lines()
    assert "latency      p50 0.50 s, p99 1.50 s from listed to delivered" in result.lines()
    assert result.lines()[-1] == "✓ nothing was lost"


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (replace(GOOD, completed=frozenset({"1"})), "1 calls were lost: 2"),
        (replace(GOOD, signature_reasons={"x": 2}, signature_failures=2), "2 signatures did not verify"),
        (replace(GOOD, changed_ids=("call_a: evt_a, then evt_b",)), "ids changed: call_a: evt_a, then evt_b"),
        (replace(GOOD, order_violations=("call_a came early",)), "order per call was broken: call_a came early"),
        (replace(GOOD, changed_bodies=("evt_a",)), "bodies changed between deliveries: evt_a"),
        (replace(GOOD, mismatched_ids=("evt_a",)), "webhook-id and body differ: evt_a"),
        (replace(GOOD, unreadable=1), "1 bodies were not readable"),
    ],
)
def test_what_must_not_happen_is_a_problem(report: HookReport, sentence: str) -> None:
    result = summary(report)

    assert list(result.problems) == [sentence]
    assert f"✗ {sentence}" in result.lines()
    assert "✓ nothing was lost" not in result.lines()


def test_a_duplicate_is_counted_and_is_not_a_problem() -> None:
    result = summary(replace(GOOD, duplicates={"evt_a": 2}))

    assert list(result.problems) == []
    assert "duplicates   2" in result.lines()


def test_a_demo_without_calls_proves_nothing() -> None:
    silent = replace(GOOD, events=0, types={}, completed=frozenset())

    assert list(summary(silent, listed=[]).problems) != []


def test_a_provider_without_calls_proves_nothing() -> None:
    """With several, calls at one say nothing about the other."""
    sources = [SourceTotals("webfones", listed=2, delivered=2, p50_s=0.5), SourceTotals("nfon", listed=0, delivered=0)]
    result = summary(sources=sources)

    assert list(result.problems) == ["no call was made at nfon; use a longer --for"]
    assert "  webfones   2 listed, 2 delivered, p50 0.50 s" in result.lines()


def test_transcripts_and_streams_are_counted_where_there_are_any() -> None:
    report = replace(GOOD, types={**GOOD.types, "call.transcript.completed": 1})
    sources = [SourceTotals("nfon", listed=2, delivered=2, via_stream=1)]
    result = summary(report, transcripts=2, sources=sources)

    assert "transcripts  1 of 2" in result.lines()
    assert "  nfon       2 listed, 2 delivered, 1 by stream" in result.lines()
    assert not any("transcripts" in line for line in summary().lines())


def test_calls_that_were_not_awaited_do_not_count_as_lost() -> None:
    """A second Ctrl-C ends the wait: what was on its way is said to be not yet delivered."""
    result = summary(listed=["1", "2", "3"], interrupted=True)

    assert list(result.problems) == []
    assert "interrupted  1 calls were not yet delivered" in result.lines()
    assert "✓ nothing was lost" not in result.lines()


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([3.0], 99, 3.0), ([4.0, 1.0, 3.0, 2.0], 50, 2.0), ([float(n) for n in range(1, 101)], 99, 99.0)],
)
def test_percentiles_are_nearest_ranks(values: list[float], percent: float, expected: float | None) -> None:
    assert percentile(values, percent) == expected


@pytest.mark.parametrize(("for_s", "interval_s"), [(20, 1.0), (300, 1.0), (301, 2.0), (None, 2.0)])
def test_a_long_demo_polls_less_often(for_s: float | None, interval_s: float) -> None:
    """A poll each second for ever would use up the provider's limit, which applies in the demo too."""
    assert DemoOptions(for_s=for_s).poll_interval_s == interval_s


def measurements(*providers: str, calls: int = 1) -> Measurements:
    """Calls that each provider lists, and a recording that was delivered."""
    subscriber = VerifyingSubscriber()
    subscriber.add_hook(HOOK)
    accounts = [open_account(provider, "demo-key") for provider in providers]
    for account in accounts:
        for rid in range(7, 7 + calls):
            account.provider.appear("demo-key", rid=rid, disposition="NO ANSWER")
    return Measurements(accounts, subscriber)


def event(**fields: object) -> DeliveredEvent:
    return replace(DeliveredEvent(datetime.now(UTC), "call.recording.completed", "7", 0.5, "", LINK), **fields)  # type: ignore[arg-type]


def drawn(measured: Measurements, *, width: int, height: int, note: str = "") -> str:
    """What the tables look like on a terminal of this size, with its control sequences."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        tables = Tables(console, live)
        tables.add([Note(datetime.now(UTC), note, is_kill=True)])
        out.truncate(0)
        tables.refresh(measured, "for 20 seconds")
        live.refresh()
        return out.getvalue()


def test_every_provider_can_be_shown() -> None:
    assert set(PROVIDER_NAMES) == set(PROVIDERS)
    assert set(get_args(ProviderName)) == {*PROVIDER_NAMES, "all"}


def test_one_subscriber_keeps_the_calls_of_all_providers_apart() -> None:
    """The same number of a call names another call at each provider, and each line names its provider."""
    out = io.StringIO()
    measured = measurements(*PROVIDER_NAMES)
    Lines(Console(file=out, width=80)).add(measured.update())

    assert len(measured.calls) == len(PROVIDER_NAMES)
    assert [line.split()[-1] for line in out.getvalue().splitlines()] == list(PROVIDER_NAMES)
    totals = {totals.provider: (totals.listed, totals.delivered) for totals in measured.totals()}
    assert totals == dict.fromkeys(PROVIDER_NAMES, (1, 0))


def test_lines_show_each_call_once() -> None:
    out = io.StringIO()
    measured = measurements("webfones")
    lines = Lines(Console(file=out, width=80))

    lines.add(measured.update())
    lines.add(measured.update())

    assert out.getvalue().count(" call   ← (202) 555-0147  A WHITTAKER     no_answer") == 1


def test_the_tables_show_calls_events_and_a_link_to_click() -> None:
    measured = measurements("webfones")
    measured.update()
    measured.events.append(event())

    shown = drawn(measured, width=120, height=40)

    assert "A WHITTAKER" in shown
    assert "call.recording.completed" in shown
    assert "0 of 1 calls delivered" in shown
    assert "\x1b]8;" in shown  # a link that terminals make clickable
    assert LINK in shown


@pytest.mark.parametrize("providers", [("webfones",), PROVIDER_NAMES])
def test_the_tables_fit_a_small_terminal(providers: tuple[str, ...]) -> None:
    """On 80 × 24 no row wraps and nothing scrolls away, however much has happened."""
    measured = measurements(*providers, calls=40)
    measured.update()
    measured.kills = 12
    for call in measured.calls.values():
        call.contact, call.latency_s = "Bartholomew Featherstonehaugh, Foxglove Farms International", 0.25
    url = f"{LINK}&signature={'s' * 120}"
    measured.events += [event(detail="d" * 90, url="", provider="webfones", via_stream=True)] * 40 + [event(url=url)]

    shown = drawn(measured, width=80, height=24, note="kill -9: " + "n" * 100)

    # Rich cuts the end of a frame that is too high, so the end shows that nothing was.
    assert shown.count("\n") <= 23
    assert "kill -9: nnn" in shown
    assert "sss\x1b" in shown
    assert shown.count("no_answer") >= 5
    assert shown.count("by stream") >= 4


@pytest.mark.parametrize(
    ("terminal", "no_color", "kind"), [(True, "", Tables), (True, "1", Lines), (False, "", Lines), (False, "1", Lines)]
)
def test_tables_are_for_terminals_with_colours(
    terminal: bool, no_color: str, kind: type[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    with open_screen(Console(file=io.StringIO(), force_terminal=terminal)) as screen:
        assert isinstance(screen, kind)


def test_a_repeated_event_is_marked() -> None:
    """After a kill an answer may be lost: the repeated event is recognised by its id, and shown as what it is."""
    out = io.StringIO()
    measured = measurements("webfones")
    arrivals = [Arrival("evt_1", "call.completed", None, "7", 1, True, 0.0, datetime.now(UTC))] * 2
    with mock.patch.object(measured.subscriber, "arrivals", return_value=arrivals):
        Lines(Console(file=out, width=120)).add(measured.update())

    first, again = [line for line in out.getvalue().splitlines() if "call.completed" in line]
    assert ("✓" in first, "≡" in first) == (True, False)
    assert ("✓" in again, "≡" in again) == (False, True)
    assert "again, with the same id" in again
