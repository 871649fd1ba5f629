"""`python -m benchmarks.provider`: the simulated provider as a process that also notes when it was asked what.

It makes accounts with the keys `key-0000`, `key-0001`, …; `--calls-per-second` spreads calls over them, each visible
the moment it ends. `GET /_notes` tells, by the machine's monotonic clock: when each account's list was asked for
(`polls`), and when an answer began that showed a call for the first time (`shown`, by account and rid).
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta

import orjson
import uvloop
from aiohttp import web

from relay.simulator.loopback import Line, json_response, listening
from relay.simulator.switchboard import Answer, Asked, Fault, Mischief
from relay.simulator.timeline import CallPlan
from relay.simulator.webfones import Kind, WebfonesSimulator


class NotingProvider(WebfonesSimulator):
    """A simulator that writes down when it was asked."""

    def __init__(self) -> None:
        super().__init__(limit=1_000_000)
        self.polls: dict[str, list[float]] = {}
        self.shown: dict[str, float] = {}

    def answer(self, asked: Asked, now: datetime) -> Answer:
        """Answer, and note."""
        began = time.monotonic()
        answer = super().answer(asked, now)
        if asked.kind == Kind.RECORDS:
            self.polls.setdefault(asked.key, []).append(began)
            if isinstance(answer.body, dict):
                for row in answer.body.get("records", ()):
                    self.shown.setdefault(f"{asked.key} {row['rid']}", began)
        return answer

    def serve_noting(self) -> AbstractAsyncContextManager[str]:
        """Listen on loopback."""
        return listening(self._noting)

    async def _noting(self, request: web.BaseRequest, line: Line) -> web.StreamResponse:
        if request.path == "/_notes":
            return json_response({"polls": self.polls, "shown": self.shown})
        return await self._handle(request, line)


def steady(per_s: float, *, talk_s: float, prefix: int) -> Iterator[CallPlan]:
    """Calls one after the other, every number another one, that show as soon as they end."""
    start = datetime.now(UTC)
    number = 0
    while True:
        began = start + timedelta(seconds=number / per_s)
        ended = began + timedelta(seconds=talk_s)
        line = (prefix * 7919 + number) % 10_000_000
        yield CallPlan(
            rid=211_159 + number,
            started_at=began.replace(microsecond=0),
            ended_at=ended,
            visible_at=ended,
            outside_number=f"(212) {200 + line // 10_000 % 700}-{line % 10_000:04d}",
        )
        number += 1


async def serve(arguments: argparse.Namespace) -> None:
    """Listen until told to stop; the URL is the first line of stdout."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    provider = NotingProvider()
    for index in range(arguments.accounts):
        key = f"key-{index:04d}"
        provider.add_account(key)
        if arguments.calls_per_second:
            provider.feed(key, steady(arguments.calls_per_second / arguments.accounts, talk_s=0, prefix=index))
    if arguments.contacts_delay_s:
        provider.misbehave(
            *(
                Fault(what=Mischief.SLOW, on=kind, times=None, delay_s=arguments.contacts_delay_s)
                for kind in (Kind.SEARCH, Kind.CHANGES)
            )
        )
    async with provider.serve_noting() as url:
        sys.stdout.write(orjson.dumps({"url": url}).decode() + "\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provider")
    parser.add_argument("--accounts", type=int, default=1)
    parser.add_argument("--calls-per-second", type=float, default=0.0)
    parser.add_argument("--contacts-delay-s", type=float, default=0.0)
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
