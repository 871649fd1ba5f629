"""The course of the demo: start, wait for the first poll, make calls (and kill things), wait for the deliveries."""

import asyncio
import contextlib
import io
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from rich.console import Console

from relay.cli.demo.measure import HOOK, Measurements, Summary
from relay.cli.demo.process import RelayProcess, free_ports
from relay.cli.demo.screen import Note, Screen, open_screen
from relay.delivery.signature import new_secret
from relay.domain.json import Json
from relay.domain.time import format_duration
from relay.errors import RelayError
from relay.simulator.accounts import open_account
from relay.simulator.subscriber import VerifyingSubscriber
from relay.simulator.timeline import Habits, calls, people

_KEY: Final = "demo-key"
_STEP_S: Final = 0.2
_START_TIMEOUT_S: Final = 60.0
# After the last delivery that is due, a duplicate would still show within this.
_QUIET_S: Final = 1.0
_DELIVERY_TIMEOUT_S: Final = 45.0
# What failed while something was down is retried on its schedule: an event after 5 s, its recording after 15.
_CHAOS_DELIVERY_TIMEOUT_S: Final = 90.0
_CHAOS_EVERY_S: Final = (3.5, 6.5)
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoFailed(RelayError):
    """The demo could not run."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`for_s` is how long calls are made (None: until Ctrl-C). Each provider has calls of its own."""

    providers: tuple[str, ...] = ("webfones",)
    for_s: float | None = None
    calls_per_minute: float = 30.0
    chaos: bool = False
    seed: int = 1

    @property
    def poll_interval_s(self) -> float:
        """A poll each second is for short demos: the provider's 1,000 requests in 15 minutes apply here too."""
        return 1.0 if self.for_s is not None and self.for_s <= 300 else 2.0

    def habits(self) -> Habits:
        """Short calls, whose recordings are available when they are listed."""
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


@dataclass(frozen=True, slots=True)
class Interrupts:
    """The first Ctrl-C ends the calls; the second, or a closed terminal, ends the wait for deliveries too."""

    end_calls: asyncio.Event = field(default_factory=asyncio.Event)
    end_now: asyncio.Event = field(default_factory=asyncio.Event)

    def handle(self, number: signal.Signals) -> None:
        if self.end_calls.is_set() or number == signal.SIGHUP:
            self.end_now.set()
        self.end_calls.set()


async def run(options: DemoOptions, *, console: Console | None = None) -> bool:
    """Run the demo and print its summary; False when something happened that must not. Raises DemoFailed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = console or Console()
    folder = Path(tempfile.mkdtemp(prefix="relay-demo-"))
    keep_log = True
    try:
        summary = await _run_in(folder, options, console)
        keep_log = bool(summary.problems)
        for line in summary.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return not summary.problems
    finally:
        if keep_log:
            console.print(f"the relay's log: {folder / 'relay.log'}", highlight=False, soft_wrap=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


async def _run_in(folder: Path, options: DemoOptions, console: Console) -> Summary:
    interrupts = Interrupts()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, interrupts.handle, number)
    secret = new_secret()
    subscriber = VerifyingSubscriber()
    subscriber.add_hook(HOOK, secret)
    # Each provider has a seed of its own, and so people and calls of its own.
    accounts = [
        open_account(name, _KEY, people=people(options.seed + index, habits=options.habits()))
        for index, name in enumerate(options.providers)
    ]
    measurements = Measurements(accounts, subscriber)
    async with contextlib.AsyncExitStack() as stack:
        sources = [account.source(await stack.enter_async_context(account.provider.serve())) for account in accounts]
        subscriber_url = await stack.enter_async_context(subscriber.serve())
        relay = RelayProcess(folder, _config(options, sources, f"{subscriber_url}/hook/{HOOK}", secret))
        try:
            with open_screen(console) as screen:
                demo = Demo(options, relay, measurements, screen, interrupts)
                await demo.await_first_poll()
                await demo.make_calls()
                await demo.await_deliveries()
        finally:
            await asyncio.to_thread(relay.stop)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
    measurements.update()  # what was delivered while the relay stopped
    return measurements.summary(interrupted=interrupts.end_now.is_set())


def _config(options: DemoOptions, sources: Sequence[Json], hook_url: str, secret: str) -> Json:
    api_port, internal_port = free_ports(2)
    common = {"poll_interval_s": options.poll_interval_s, "hold_for_recording_s": 0, "budget_share": 1.0}
    return {
        "public_url": f"http://127.0.0.1:{api_port}",
        "data_dir": "data",
        "api": {"host": "127.0.0.1", "port": api_port},
        "internal": {"host": "127.0.0.1", "port": internal_port},
        "log": {"format": "json"},
        "delivery": {"allowed_networks": ["127.0.0.0/8"], "timeout_s": 3},
        "drain_s": 5,
        "sources": {source["provider"]: {**source, **common} for source in sources},
        "subscriptions": {HOOK: {"url": hook_url, "secret": secret}},
    }


class Demo:
    """A running demo, between its relay and its screen."""

    def __init__(
        self,
        options: DemoOptions,
        relay: RelayProcess,
        measurements: Measurements,
        screen: Screen,
        interrupts: Interrupts,
    ) -> None:
        self._options = options
        self._relay = relay
        self._measurements = measurements
        self._screen = screen
        self._interrupts = interrupts
        self._status = "starting"

    async def await_first_poll(self) -> None:
        """Wait until each source was polled: calls that start from then on are delivered, earlier ones are not."""
        self._note("the relay starts")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not all(account.polled for account in self._measurements.accounts):
            if self._relay.restart_if_ended() or time.monotonic() > deadline:
                raise DemoFailed(f"the relay did not start:\n{self._relay.log_tail()}")
            self._screen.refresh(self._measurements, self._status)
            if await _is_set_within_step(self._interrupts.end_calls):
                return

    async def make_calls(self) -> None:
        """Let the providers have calls until the time is over; with chaos, kill something now and then."""
        options, accounts = self._options, self._measurements.accounts
        for index, account in enumerate(accounts):
            account.feed(calls(account.provider.clock(), seed=options.seed + index, habits=options.habits()))
        self._status = "press Ctrl-C to end" if options.for_s is None else f"calls for {format_duration(options.for_s)}"
        self._note("the first poll is done; calls begin")
        ends_at = math.inf if options.for_s is None else time.monotonic() + options.for_s
        rng = random.Random(options.seed)  # noqa: S311 - when to kill, not cryptography
        kill_at = time.monotonic() + rng.uniform(*_CHAOS_EVERY_S) if options.chaos else math.inf
        while time.monotonic() < ends_at and not await _is_set_within_step(self._interrupts.end_calls):
            self._step()
            if time.monotonic() >= kill_at:
                await self._kill_something()
                kill_at = time.monotonic() + rng.uniform(*_CHAOS_EVERY_S)
        self._step()
        for account in accounts:
            account.feed(iter(()))

    async def await_deliveries(self) -> None:
        """Wait until every call is delivered and nothing more arrives, up to a timeout."""
        self._status = "no more calls; waiting for the last deliveries"
        self._note(self._status)
        timeout_s = _CHAOS_DELIVERY_TIMEOUT_S if self._options.chaos else _DELIVERY_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        quiet_since, events = time.monotonic(), -1
        while time.monotonic() < deadline and not await _is_set_within_step(self._interrupts.end_now):
            self._step()
            if not self._measurements.is_complete() or len(self._measurements.events) != events:
                quiet_since, events = time.monotonic(), len(self._measurements.events)
            elif time.monotonic() - quiet_since > _QUIET_S:
                return

    async def _kill_something(self) -> None:
        if self._measurements.kills % 2:
            if not await asyncio.to_thread(self._relay.kill_store):
                return
            self._note("kill -9: the store; the relay restarts it", is_kill=True)
        else:
            self._relay.kill()
            self._note("kill -9: the relay, with its poller and worker; it is restarted", is_kill=True)
        self._measurements.kills += 1

    def _step(self) -> None:
        if self._relay.restart_if_ended():
            if self._relay.crashed:
                raise DemoFailed(f"the relay exited unexpectedly:\n{self._relay.log_tail()}")
            self._note("the relay starts again")
        self._screen.add(self._measurements.update())
        self._screen.refresh(self._measurements, self._status)

    def _note(self, text: str, *, is_kill: bool = False) -> None:
        self._screen.add([Note(datetime.now().astimezone(), text, is_kill)])


async def _is_set_within_step(event: asyncio.Event) -> bool:
    """Wait for one step, or less when the event comes first."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), _STEP_S)
    return event.is_set()
