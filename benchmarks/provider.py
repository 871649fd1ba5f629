"""`python -m benchmarks.provider`: a fake WebFones in a process of its own that also records when it was asked.

It has accounts with the keys `key-0000`, `key-0001`, …; `--calls-per-second` spreads calls over them, each visible the
moment it ends. `GET /_observed` gives, by the machine's monotonic clock: when each account's list was requested
(`polls`), and when the response began that listed a call for the first time (`shown`, by account and rid).
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import orjson
import uvloop
from aiohttp import web

from relay.simulator.provider import FakeRequest, FakeResponse
from relay.simulator.server import Listener, json_response
from relay.simulator.timeline import CallPlan
from relay.simulator.webfones import WebFonesEndpoint
from tests.fakes.webfones import FaultyWebFones


class ObservedWebFones(FaultyWebFones):
    """A WebFones that records when its call list was requested, and when each call was first listed."""

    def __init__(self, *, contacts_delay_s: float) -> None:
        super().__init__(limit=1_000_000)
        self.contacts_delay_s = contacts_delay_s
        self.polls: dict[str, list[float]] = {}
        self.shown: dict[str, float] = {}

    def answer(self, request: FakeRequest, now: datetime) -> FakeResponse:
        began = time.monotonic()
        response = super().answer(request, now)
        if request.endpoint == WebFonesEndpoint.RECORDS:
            self.polls.setdefault(request.key, []).append(began)
            if isinstance(response.body, dict):
                for row in response.body.get("records", ()):
                    self.shown.setdefault(f"{request.key} {row['rid']}", began)
        return response

    async def reply(self, http: web.BaseRequest, request: FakeRequest, listener: Listener) -> web.StreamResponse:
        if request.endpoint in (WebFonesEndpoint.SEARCH, WebFonesEndpoint.CHANGES):
            await listener.wait(self.contacts_delay_s)
        return await super().reply(http, request, listener)

    async def handle(self, http: web.BaseRequest, listener: Listener) -> web.StreamResponse:
        if http.path == "/_observed":
            return json_response({"polls": self.polls, "shown": self.shown})
        return await super().handle(http, listener)


def steady(per_s: float, *, talk_s: float, prefix: int) -> Iterator[CallPlan]:
    """Calls at an even rate, each from another number and visible as soon as it ends."""
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
    """Listen until a signal comes; the URL is the first line of stdout."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    provider = ObservedWebFones(contacts_delay_s=arguments.contacts_delay_s)
    for index in range(arguments.accounts):
        key = f"key-{index:04d}"
        provider.add_account(key)
        if arguments.calls_per_second:
            provider.feed(key, steady(arguments.calls_per_second / arguments.accounts, talk_s=0, prefix=index))
    async with provider.serve() as url:
        sys.stdout.write(orjson.dumps({"url": url}).decode() + "\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provider")
    parser.add_argument("--accounts", type=int, default=1)
    parser.add_argument("--calls-per-second", type=float, default=0.0)
    parser.add_argument("--contacts-delay-s", type=float, default=0.0)
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
