"""`relay demo`: simulated providers, the whole relay, and a subscriber that verifies, live and on loopback only.

The relay is the very `relay up` that an operator starts, a process of its own with an embedded store in a temporary
directory. Chaos kills it or its store with SIGKILL, and it goes on. What the subscriber heard is compared with what the
providers have shown; the summary says what was lost.
"""

import asyncio
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

from redis import Redis as BlockingRedis
from redis.exceptions import RedisError
from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from relay.delivery.signature import new_secret
from relay.domain.json import Json
from relay.domain.time import format_duration
from relay.errors import RelayError
from relay.simulator.accounts import SimulatedAccount, open_account
from relay.simulator.hook_log import Arrival, HookReport
from relay.simulator.nfon import FakeNfon
from relay.simulator.subscriber import VerifyingSubscriber
from relay.simulator.timeline import CallPlan, Habits, calls, people
from relay.store.embedded import EmbeddedStore

_KEY: Final = "demo-key"
_HOOK: Final = "crm"
_LOOK_EVERY_S: Final = 0.2
_START_S: Final = 60.0
_STOP_S: Final = 20.0
_QUIET_S: Final = 1.0
_LONGEST_QUIET_S: Final = 45.0
_LONGEST_QUIET_IN_CHAOS_S: Final = 90.0
"""What failed while something was dead is tried again on its schedule: an event after 5 s, its audio after 15."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CHAOS_EVERY_S: Final = (3.5, 6.5)


class DemoFailed(RelayError):
    """The demo could not be played."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to play: with which providers, for how long (None: until Ctrl-C), how busy, and with how much trouble.

    Each provider has a source of its own in the one relay, and calls of its own.
    """

    providers: tuple[str, ...] = ("webfones",)
    for_s: float | None = None
    calls_per_minute: float = 30.0
    chaos: bool = False
    seed: int = 1

    @property
    def poll_interval_s(self) -> float:
        """A poll each second is for the short demo: the provider's 1,000 requests in 15 minutes hold here too."""
        return 1.0 if self.for_s is not None and self.for_s <= 300 else 2.0

    def habits(self) -> Habits:
        """Short calls of a busy office, whose audio is there when they are shown."""
        return Habits(
            calls_per_hour=self.calls_per_minute * 60,
            ring_s=(0.5, 2.0),
            talk_median_s=2.0,
            talk_sigma=0.7,
            talk_max_s=4.0,
            visible_after_s=(0.2, 0.8),
            late=0.0,
            changed=0.08,
            change_after_s=(2.0, 5.0),
            recording_after_s=(0.0, 0.0),
        )


# -- what is seen -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CallLine:
    """A call that a provider shows; `contact` and `via` are what the relay has found out, once it was heard.

    `key` is its id at the provider, and `where` the provider where there are several.
    """

    at: datetime
    key: str
    incoming: bool
    number: str
    name: str
    outcome: str
    where: str = ""
    contact: str = ""
    via: str = ""
    heard_after_s: float | None = None

    def text(self) -> str:
        """Write it as a line."""
        arrow = "←" if self.incoming else "→"
        where = f"  {self.where}" if self.where else ""
        return f"{_clock(self.at)} call   {arrow} {self.number:<15} {self.name:<15} {self.outcome:<9}{where}".rstrip()


@dataclass(frozen=True, slots=True)
class EventLine:
    """An event that the subscriber has heard; its signature was right, or it would not be here."""

    at: datetime
    type: str
    key: str
    after_s: float | None
    about: str
    url: str = ""
    where: str = ""
    again: bool = False
    """The same event once more, under the same id: whoever sent it was killed before the answer was kept."""

    @property
    def mark(self) -> str:
        """One that was heard for the first time, or once more."""
        return "≡" if self.again else "✓"

    def text(self) -> str:
        """Write it as a line."""
        after = "" if self.after_s is None else f"{self.after_s:.2f} s"
        words = "".join(f"  {word}" for word in (self.about, self.where, self.url) if word)
        return f"{_clock(self.at)} event  {self.mark} {self.type:<25} {after:>8}{words}"


@dataclass(slots=True)
class Board:
    """All that was seen so far, and what is new since the last look."""

    offices: Sequence[SimulatedAccount]
    subscriber: VerifyingSubscriber
    calls: dict[str, CallLine] = field(default_factory=dict)
    events: list[EventLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    link: str = ""
    kills: int = 0
    status: str = "starting"
    _found: dict[str, tuple[SimulatedAccount, int]] = field(default_factory=dict)
    _arrivals: int = 0
    _ids: set[str] = field(default_factory=set)

    @property
    def several(self) -> bool:
        """Whether it has to be said of which provider a call is."""
        return len(self.offices) > 1

    def look(self, screen: "Screen") -> None:
        """Take in what happened at both ends."""
        fresh = [(plan, key, office) for office in self.offices for plan, key in self._fresh(office)]
        for plan, key, office in sorted(fresh, key=lambda found: found[0].visible_at):
            line = _call_line(plan, key, where=office.name if self.several else "")
            self.calls[key] = line
            self._found[key] = office, plan.rid
            if isinstance(office.provider, FakeNfon) and plan.answered:
                office.provider.transcribe(office.key, plan.rid)
            screen.call(line)
        arrivals = self.subscriber.arrivals(_HOOK)
        for arrival in arrivals[self._arrivals :]:
            event = self._heard(arrival)
            self._ids.add(arrival.event_id)
            self.events.append(event)
            screen.event(event)
        self._arrivals = len(arrivals)

    def note(self, text: str, screen: "Screen") -> None:
        """Say what is being done to the relay."""
        self.notes.append(text)
        screen.note(text)

    def _fresh(self, office: SimulatedAccount) -> list[tuple[CallPlan, str]]:
        """The calls that a provider shows and that no look has seen."""
        keyed = [(plan, office.call_id(plan)) for plan in office.visible()]
        return [(plan, key) for plan, key in keyed if key not in self.calls]

    def _heard(self, arrival: Arrival) -> EventLine:
        document = self.subscriber.event(_HOOK, arrival.event_id) or {}
        call: Json = document.get("data", {}).get("call") or {}
        key = arrival.provider_call_id or ""
        line, found = self.calls.get(key), self._found.get(key)
        after_s = _after_s(arrival, found[0].plans.get(found[1]) if found else None)
        contact = _contact(call)
        via = str(document.get("context", {}).get("via") or "")
        if line is not None:
            line.contact = contact or line.contact
            line.via = line.via or via
            if arrival.type == "call.completed" and line.heard_after_s is None:
                line.heard_after_s = after_s
        url = ""
        about = contact or (line.number if line else "")
        if arrival.type == "call.recording.completed":
            url = str(call.get("recording", {}).get("url") or "")
            self.link = url or self.link
        if arrival.type == "call.updated":
            about = ", ".join(document.get("data", {}).get("changes", {}))
        if arrival.type == "call.transcript.completed":
            about = str((call.get("transcription") or {}).get("summary") or about)
        again = arrival.event_id in self._ids
        if again:
            about = "again, with the same id"
        where = " ".join(filter(None, (line.where if line else "", "by stream" if via == "stream" else "")))
        return EventLine(arrival.at, arrival.type, key, after_s, about, url, where, again)

    def latencies_s(self, office: SimulatedAccount | None = None) -> list[float]:
        """From a call's being shown by the provider (any, or this one) to its being heard."""
        return [
            line.heard_after_s
            for key, line in self.calls.items()
            if line.heard_after_s is not None and (office is None or self._found[key][0] is office)
        ]

    def all_heard(self) -> bool:
        """Whether every call that was made has been shown and told, with its recording and its transcript."""
        if any(plan.visible_at > each.provider.clock() for each in self.offices for plan in each.plans.values()):
            return False
        return (
            not self.report().lost(self.calls)
            and self._recorded() <= self._keys("call.recording.completed", "call.recording.failed")
            and self._transcribed() <= self._keys("call.transcript.completed")
        )

    def _recorded(self) -> set[str]:
        """The calls that have audio."""
        plans = ((key, office, office.plans[rid]) for key, (office, rid) in self._found.items())
        return {key for key, office, plan in plans if office.provider.has_recordings and plan.recording_at is not None}

    def _transcribed(self) -> set[str]:
        """The calls that have a transcript."""
        plans = ((key, office, office.plans[rid]) for key, (office, rid) in self._found.items())
        return {key for key, office, plan in plans if isinstance(office.provider, FakeNfon) and plan.answered}

    def _keys(self, *types: str) -> set[str]:
        """The calls of which such an event was heard."""
        return {event.key for event in self.events if event.type in types}

    def report(self) -> HookReport:
        """What the subscriber makes of it."""
        return self.subscriber.report().hooks[_HOOK]

    def shares(self) -> tuple["Share", ...]:
        """What it came to at each provider."""
        report = self.report()
        shares: list[Share] = []
        for office in self.offices:
            keys = {office.call_id(plan) for plan in office.visible()}
            shares.append(
                Share(
                    provider=office.name,
                    made=len(keys),
                    told=len(keys) - len(report.lost(keys)),
                    by_stream=sum(self.calls[key].via == "stream" for key in keys & self.calls.keys()),
                    p50_s=percentile(self.latencies_s(office), 50),
                )
            )
        return tuple(shares)

    def summary(self, *, interrupted: bool = False) -> "Summary":
        """Compare both ends."""
        return summarise(
            self.report(),
            expected=[office.call_id(plan) for office in self.offices for plan in office.visible()],
            recordings=len(self._recorded()),
            transcripts=len(self._transcribed()),
            latencies_s=self.latencies_s(),
            shares=self.shares(),
            kills=self.kills,
            interrupted=interrupted,
        )


def _call_line(plan: CallPlan, key: str, *, where: str) -> CallLine:
    outcome = plan.disposition.lower().replace(" ", "_")
    incoming = plan.direction == "INCOMING"
    return CallLine(plan.visible_at, key, incoming, plan.outside_number, plan.outside_name, outcome, where)


def _after_s(arrival: Arrival, plan: CallPlan | None) -> float | None:
    """How long after the provider showed it; an update and a transcript count from the change."""
    if plan is None:
        return None
    since = plan.visible_at
    if arrival.type in ("call.updated", "call.transcript.completed"):
        since = max((change.at for change in plan.changes if change.at <= arrival.at), default=since)
    return max((arrival.at - since).total_seconds(), 0.0)


def _contact(call: Json) -> str:
    contact = call.get("contact") or {}
    if contact.get("lookup_status") != "matched":
        return ""
    return ", ".join(str(contact[name]) for name in ("name", "organization") if contact.get(name))


def _clock(at: datetime) -> str:
    return at.astimezone().strftime("%H:%M:%S")


# -- what it came to --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """What one provider has of it: calls that it has shown, and how they were found."""

    provider: str
    made: int
    told: int
    by_stream: int = 0
    p50_s: float | None = None

    def line(self) -> str:
        """Write it for a person."""
        p50 = "" if self.p50_s is None else f", p50 {self.p50_s:.2f} s"
        stream = f", {self.by_stream} found by stream" if self.by_stream else ""
        return f"  {self.provider:<10} {self.made} made, {self.told} told{p50}{stream}"


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo came to. Lost are calls that a provider has shown and nobody has heard of."""

    made: int
    told: int
    lost: tuple[str, ...]
    events: int
    recordings: int
    recordings_made: int
    duplicates: int
    signature_failures: int
    order: tuple[str, ...]
    changed_ids: tuple[str, ...]
    others: tuple[str, ...]
    p50_s: float | None
    p99_s: float | None
    transcripts: int = 0
    transcripts_made: int = 0
    shares: tuple[Share, ...] = ()
    kills: int = 0
    interrupted: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What must not happen, a sentence each. Duplicates are none: a kill between sending and noting makes one."""
        found: list[str] = []
        if self.lost and not self.interrupted:
            found.append(f"{len(self.lost)} calls were lost: {', '.join(self.lost[:5])}")
        if not self.made and not self.interrupted:
            found.append("no call was made, so nothing was shown; play for longer, or with more calls a minute")
        elif not self.interrupted:
            found += [
                f"no call was made at {share.provider}; play for longer" for share in self.shares if not share.made
            ]
        if self.signature_failures:
            found.append(f"{self.signature_failures} signatures did not verify")
        if self.changed_ids:
            found.append(f"ids changed: {'; '.join(self.changed_ids[:3])}")
        if self.order:
            found.append(f"order per call was broken: {'; '.join(self.order[:3])}")
        return (*found, *self.others)

    def lines(self) -> list[str]:
        """Write it for a person."""
        lines = [
            f"calls        {self.made} made, {self.told} told",
            *(share.line() for share in self.shares if len(self.shares) > 1 or share.by_stream),
            f"events       {self.events}",
            f"recordings   {self.recordings} of {self.recordings_made}",
            *([f"transcripts  {self.transcripts} of {self.transcripts_made}"] if self.transcripts_made else []),
            f"duplicates   {self.duplicates}",
            f"order        {'broken' if self.order else 'kept for every call'}",
            f"ids          {'changed' if self.changed_ids else 'one for each event'}",
            f"signatures   {f'{self.signature_failures} wrong' if self.signature_failures else 'all verified'}",
        ]
        if self.p50_s is not None and self.p99_s is not None:
            lines.append(f"freshness    p50 {self.p50_s:.2f} s, p99 {self.p99_s:.2f} s from shown to heard")
        if self.kills:
            lines.append(f"chaos        {self.kills} × kill -9, each followed by a restart")
        if self.interrupted and self.lost:
            lines.append(f"not awaited  {len(self.lost)} calls were still on their way")
        lines += [f"✗ {problem}" for problem in self.problems]
        if not self.problems and not self.interrupted:
            lines.append("✓ nothing was lost")
        return lines


def summarise(
    report: HookReport,
    *,
    expected: Sequence[str],
    recordings: int,
    latencies_s: Sequence[float],
    transcripts: int = 0,
    shares: Sequence[Share] = (),
    kills: int = 0,
    interrupted: bool = False,
) -> Summary:
    """Judge what a subscriber heard against what the provider has shown."""
    lost = report.lost(expected)
    others = {
        f"{len(report.changed_bodies)} bodies changed between attempts": report.changed_bodies,
        f"{len(report.mismatched_ids)} bodies carried another id than their webhook-id": report.mismatched_ids,
        f"{report.unreadable} bodies were not readable": report.unreadable,
    }
    return Summary(
        made=len(set(expected)),
        told=len(set(expected)) - len(lost),
        lost=lost,
        events=report.events,
        recordings=report.types.get("call.recording.completed", 0),
        recordings_made=recordings,
        duplicates=sum(report.duplicates.values()),
        signature_failures=report.signature_failures,
        order=report.order_violations,
        changed_ids=report.changed_ids,
        others=tuple(sentence for sentence, wrong in others.items() if wrong),
        p50_s=percentile(latencies_s, 50),
        p99_s=percentile(latencies_s, 99),
        transcripts=report.types.get("call.transcript.completed", 0),
        transcripts_made=transcripts,
        shares=tuple(shares),
        kills=kills,
        interrupted=interrupted,
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Give the value that `percent` of them do not exceed (nearest rank); None when there are none."""
    if not values:
        return None
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


# -- how it is shown --------------------------------------------------------------------------------------------------


class Screen(Protocol):
    """Shows what happens."""

    def call(self, line: CallLine) -> None: ...

    def event(self, line: EventLine) -> None: ...

    def note(self, text: str) -> None: ...

    def refresh(self, board: Board) -> None: ...


class Lines:
    """A line for each thing: for logs, CI, and who does not like colours."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def call(self, line: CallLine) -> None:
        self._write(line.text())

    def event(self, line: EventLine) -> None:
        self._write(line.text())

    def note(self, text: str) -> None:
        self._write(f"{_clock(datetime.now().astimezone())} demo   {text}")

    def refresh(self, board: Board) -> None:
        """Nothing to redraw."""

    def _write(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Tables:
    """Two tables that move, calls above and events below."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console = console
        self._live = live

    def call(self, line: CallLine) -> None:
        """Shown with the next redraw."""

    def event(self, line: EventLine) -> None:
        """Shown with the next redraw."""

    def note(self, text: str) -> None:
        """Shown with the next redraw."""

    def refresh(self, board: Board) -> None:
        """Draw all of it anew."""
        rows = max(min((self._console.size.height - 12 - board.several) // 2, 20), 3)
        self._live.update(
            Group(
                _head(board),
                *([_sources(board)] if board.several else []),
                Rule("calls at the providers" if board.several else "calls at the provider", style="dim"),
                _calls_table(list(board.calls.values())[-rows:]),
                Rule("events at the subscriber", style="dim"),
                _events_table(board.events[-rows:]),
                _foot(board),
            )
        )


def _head(board: Board) -> Text:
    report = board.report()
    told = f"{len(report.completed)} of {len(board.calls)} calls told"
    wrong = report.signature_failures + len(report.order_violations) + len(report.changed_ids)
    text = Text.assemble(
        ("call relay ", "bold"), f"{board.status} · {told} · {report.events} events · ", f"{wrong} wrong"
    )
    p50 = percentile(board.latencies_s(), 50)
    if p50 is not None:
        text.append(f" · p50 {p50:.2f} s")
    if board.kills:
        text.append(f" · {board.kills} × kill -9", style="red")
    return text


def _sources(board: Board) -> Text:
    """Say of each provider how many calls were told, and how fresh."""
    parts: list[str] = []
    for share in board.shares():
        fresh = "" if share.p50_s is None else f" {share.p50_s:.2f} s"
        parts.append(f"{share.provider} {share.told}/{share.made}{fresh}")
    return Text(" · ".join(parts), "dim", no_wrap=True, overflow="ellipsis")


def _calls_table(lines: Sequence[CallLine]) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    for line in lines:
        style = "green" if line.outcome == "answered" else "yellow"
        heard = Text("✓", "green") if line.heard_after_s is not None else Text("…", "dim")
        arrow = "←" if line.incoming else "→"
        who = line.contact or Text(line.name, "dim")
        table.add_row(_clock(line.at), arrow, line.number, who, Text(line.outcome, style), line.where, heard)
    return table


def _events_table(lines: Sequence[EventLine]) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    for line in lines:
        after = "" if line.after_s is None else f"{line.after_s:.2f} s"
        about = Text("listen", f"link {line.url} underline blue") if line.url else Text(line.about)
        mark = Text(line.mark, "yellow" if line.again else "green")
        table.add_row(_clock(line.at), mark, line.type, after, about, Text(line.where, "dim"))
    return table


def _foot(board: Board) -> Group:
    parts: list[Rule | Text] = [Rule(style="dim")]
    if board.link:
        parts.append(Text.assemble("newest recording: ", (board.link, f"link {board.link} blue")))
    if board.notes:
        parts.append(Text(board.notes[-1], "red" if "kill" in board.notes[-1] else "dim"))
    return Group(*parts)


@contextlib.contextmanager
def screen_for(console: Console) -> Iterator[Screen]:
    """Give tables to a terminal, lines to everything else."""
    if not console.is_terminal or os.environ.get("NO_COLOR"):
        yield Lines(console)
        return
    with Live(console=console, refresh_per_second=5, transient=True) as live:
        yield Tables(console, live)


# -- the relay, a process of its own ----------------------------------------------------------------------------------


class RelayProcess:
    """`relay up` in a directory, started again whenever it ends before it is told to."""

    def __init__(self, folder: Path, config: Json) -> None:
        self._folder = folder
        self._config = folder / "relay.yaml"
        self._config.write_text(json.dumps(config, indent=1), encoding="utf-8")
        self._log = (folder / "relay.log").open("ab")
        self._store = EmbeddedStore(folder / "data")
        self._process = self._start()
        self.ended_by_itself = False
        self._killed = False

    def alive(self) -> bool:
        """Whether it runs; when it does not, start it again."""
        if self._process.poll() is None:
            return True
        self.ended_by_itself |= not self._killed
        self._killed = False
        self._process = self._start()
        return False

    def kill(self) -> None:
        """Kill -9: the store outlives it, and whoever comes next takes that over."""
        self._killed = True
        self._process.kill()
        self._process.wait()

    def kill_store(self) -> bool:
        """Kill -9 the store; False when it is not there just now."""
        client = BlockingRedis(unix_socket_path=str(self._store.socket), socket_timeout=2)
        try:
            os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)  # type: ignore[index]  # both clients
        except (RedisError, OSError):
            return False
        finally:
            client.close()
        return True

    def stop(self) -> None:
        """Let it finish and end, and its store with it."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        client = BlockingRedis(unix_socket_path=str(self._store.socket), socket_timeout=2)
        with contextlib.suppress(RedisError, OSError):  # gone, as it should be
            client.shutdown(nosave=True, now=True, force=True)
        client.close()

    def log_tail(self) -> str:
        """Its last lines, for a failure."""
        return "\n".join((self._folder / "relay.log").read_text(errors="replace").splitlines()[-15:])

    def _start(self) -> "subprocess.Popen[bytes]":
        environ = {name: value for name, value in os.environ.items() if not name.upper().startswith("RELAY_")}
        return subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "relay", "up", "--config", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environ,
            start_new_session=True,
        )


def _config(plan: Plan, sources: Sequence[Json], hook_url: str, secret: str, ports: tuple[int, int]) -> Json:
    api_port, internal_port = ports
    common = {"poll_interval_s": plan.poll_interval_s, "hold_for_recording_s": 0, "budget_share": 1.0}
    return {
        "public_url": f"http://127.0.0.1:{api_port}",
        "data_dir": "data",
        "api": {"host": "127.0.0.1", "port": api_port},
        "internal": {"host": "127.0.0.1", "port": internal_port},
        "log": {"format": "json"},
        "delivery": {"allowed_networks": ["127.0.0.0/8"], "timeout_s": 3},
        "drain_s": 5,
        "sources": {source["provider"]: {**source, **common} for source in sources},
        "subscriptions": {_HOOK: {"url": hook_url, "secret": secret}},
    }


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


# -- the play ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Signals:
    """Ctrl-C once: make no more calls. Twice, or when the terminal goes away: wait for nothing."""

    enough: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)

    def told(self, number: signal.Signals) -> None:
        if self.enough.is_set() or number == signal.SIGHUP:
            self.now.set()
        self.enough.set()


async def run(plan: Plan, *, console: Console | None = None) -> bool:
    """Play, and say what it came to; False when something happened that must not. Raises DemoFailed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = console or Console()
    folder = Path(tempfile.mkdtemp(prefix="relay-demo-"))
    keep = False
    try:
        summary = await _play(plan, folder, console)
        keep = bool(summary.problems)
        for line in summary.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return not summary.problems
    except DemoFailed:
        keep = True
        raise
    finally:
        if keep:
            console.print(f"the relay's log is kept: {folder / 'relay.log'}", highlight=False, soft_wrap=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


async def _play(plan: Plan, folder: Path, console: Console) -> Summary:
    signals = _Signals()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, signals.told, number)
    secret = new_secret()
    subscriber = VerifyingSubscriber()
    subscriber.add_hook(_HOOK, secret)
    board = Board([_office(plan, index) for index in range(len(plan.providers))], subscriber)
    async with contextlib.AsyncExitStack() as stack:
        sources = [each.source(await stack.enter_async_context(each.provider.serve())) for each in board.offices]
        subscriber_url = await stack.enter_async_context(subscriber.serve())
        config = _config(plan, sources, f"{subscriber_url}/hook/{_HOOK}", secret, _free_ports())
        relay = RelayProcess(folder, config)
        try:
            with screen_for(console) as screen:
                await _until_polled(relay, board, screen, signals)
                await _make_calls(plan, relay, board, screen, signals)
                await _until_quiet(plan, relay, board, screen, signals)
                board.look(screen)
        finally:
            await asyncio.to_thread(relay.stop)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
    return board.summary(interrupted=signals.now.is_set())


def _office(plan: Plan, index: int) -> SimulatedAccount:
    """Open the office of one provider; each has its own people."""
    return open_account(plan.providers[index], _KEY, people=people(plan.seed + index, habits=plan.habits()))


async def _until_polled(relay: RelayProcess, board: Board, screen: Screen, signals: _Signals) -> None:
    """Wait for the first poll of each source: what starts after it is told, what was there before is only known."""
    board.note("the relay starts", screen)
    deadline = time.monotonic() + _START_S
    while not all(office.polled for office in board.offices):
        if not relay.alive() or time.monotonic() > deadline:
            raise DemoFailed(f"the relay did not start:\n{relay.log_tail()}")
        screen.refresh(board)
        if await _happens(signals.enough):
            return


async def _make_calls(plan: Plan, relay: RelayProcess, board: Board, screen: Screen, signals: _Signals) -> None:
    """Let the offices make calls until the time is over; with chaos, kill something now and then."""
    for index, office in enumerate(board.offices):
        office.feed(calls(office.provider.clock(), seed=plan.seed + index, habits=plan.habits()))
    ends_at = math.inf if plan.for_s is None else time.monotonic() + plan.for_s
    board.status = "Ctrl-C ends it" if plan.for_s is None else f"for {format_duration(plan.for_s)}"
    board.note("it has looked once, and now people make calls", screen)
    rng = random.Random(plan.seed)  # noqa: S311 - when to kill, nothing secret
    kill_at = time.monotonic() + rng.uniform(*_CHAOS_EVERY_S) if plan.chaos else math.inf
    while time.monotonic() < ends_at and not await _happens(signals.enough):
        _step(relay, board, screen)
        if time.monotonic() >= kill_at:
            await _kill_something(relay, board, screen)
            kill_at = time.monotonic() + rng.uniform(*_CHAOS_EVERY_S)
    board.look(screen)
    for office in board.offices:
        office.feed(iter(()))


async def _kill_something(relay: RelayProcess, board: Board, screen: Screen) -> None:
    """Kill the relay and its store in turn."""
    if board.kills % 2:
        if not await asyncio.to_thread(relay.kill_store):
            return
        board.note("kill -9: the store; the relay starts it again", screen)
    else:
        relay.kill()
        board.note("kill -9: the relay, with its poller and its worker; it is started again", screen)
    board.kills += 1


async def _until_quiet(plan: Plan, relay: RelayProcess, board: Board, screen: Screen, signals: _Signals) -> None:
    """Wait until every call is told and nothing more comes, or for as long as can be waited."""
    board.status = "no more calls; waiting for the last to be told"
    board.note(board.status, screen)
    deadline = time.monotonic() + (_LONGEST_QUIET_IN_CHAOS_S if plan.chaos else _LONGEST_QUIET_S)
    quiet_since = time.monotonic()
    heard = -1
    while time.monotonic() < deadline and not await _happens(signals.now):
        _step(relay, board, screen)
        if not board.all_heard() or len(board.events) != heard:
            heard = len(board.events)
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > _QUIET_S:
            return


def _step(relay: RelayProcess, board: Board, screen: Screen) -> None:
    if not relay.alive():
        if relay.ended_by_itself:
            raise DemoFailed(f"the relay ended by itself:\n{relay.log_tail()}")
        board.note("the relay starts again", screen)
    board.look(screen)
    screen.refresh(board)


async def _happens(event: asyncio.Event) -> bool:
    """Wait a moment; whether it has happened."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), _LOOK_EVERY_S)
    return event.is_set()
