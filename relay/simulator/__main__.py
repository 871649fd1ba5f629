"""`python -m relay.simulator`: a provider and the subscriber as a process of their own, for tests that kill things.

Prints one line of JSON with the URLs and the source for relay.yaml when both are ready, and ends on SIGTERM or SIGINT
with exit code 0.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import orjson

from relay.simulator.offices import NAMES, Office, open_office
from relay.simulator.subscriber import VerifyingSubscriber
from relay.simulator.timeline import Habits, calls, people

_DEMO_SECRET = "whsec_c2ltdWxhdG9yLXNlY3JldC0wMTIzNDU2Nzg5"  # noqa: S105  # signs simulated events on loopback only


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relay.simulator", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--provider", choices=NAMES, default="webfones")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="of the provider; 0 finds a free one")
    parser.add_argument("--subscriber-port", type=int, default=0, help="of the subscriber; 0 finds a free one")
    parser.add_argument("--key", default="simulated-key", help="API key or token of the account")
    parser.add_argument("--zone", default="UTC", help="zone of the account's rows; webfones only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls-per-minute", type=float, default=0.0, help="0: those of /_control")
    parser.add_argument("--hurry", type=float, default=30.0, help="divides the length of calls and all waits")
    parser.add_argument("--hooks", default="a", help="names of the subscriber's hooks, with commas")
    parser.add_argument("--secret", default=_DEMO_SECRET, help="of every hook")
    parser.add_argument("--verify-every", type=int, default=1, help="check one signature in so many")
    parser.add_argument("--lean", action="store_true", help="keep neither bodies nor arrivals")
    return parser


async def _serve(office: Office, subscriber: VerifyingSubscriber, arguments: argparse.Namespace) -> None:
    """Serve both until a signal comes."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    host: str = arguments.host
    async with (
        office.simulator.serve(host=host, port=arguments.port) as provider_url,
        subscriber.serve(host=host, port=arguments.subscriber_port) as subscriber_url,
    ):
        ready = {
            "provider": provider_url,
            "subscriber": subscriber_url,
            "key": arguments.key,
            "source": office.source(provider_url),
            "hooks": {name: f"{subscriber_url}/hook/{name}" for name in _names(arguments)},
        }
        sys.stdout.write(orjson.dumps(ready).decode() + "\n")
        sys.stdout.flush()
        await stop.wait()


def _names(arguments: argparse.Namespace) -> list[str]:
    return [name for name in arguments.hooks.split(",") if name]


def _subscriber(arguments: argparse.Namespace) -> VerifyingSubscriber:
    subscriber = VerifyingSubscriber(
        verify_every=arguments.verify_every,
        keep_bodies=not arguments.lean,
        keep_arrivals=not arguments.lean,
        seed=arguments.seed,
    )
    for name in _names(arguments):
        subscriber.add_hook(name, arguments.secret)
    return subscriber


def _office(arguments: argparse.Namespace) -> Office:
    if arguments.hurry <= 0 or arguments.calls_per_minute < 0 or arguments.verify_every < 1:
        raise ValueError("--hurry must be above 0, --calls-per-minute at least 0, --verify-every at least 1")
    habits = Habits().hurried(arguments.hurry)
    everyone = people(arguments.seed, habits=habits)
    try:
        office = open_office(arguments.provider, arguments.key, zone=arguments.zone, everyone=everyone)
    except ValueError as error:
        raise ValueError(f"--zone: {error}") from None
    if arguments.calls_per_minute > 0:
        habits = replace(habits, calls_per_hour=arguments.calls_per_minute * 60)
        office.feed(calls(datetime.now(UTC), seed=arguments.seed, habits=habits))
    return office


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        office, subscriber = _office(arguments), _subscriber(arguments)
    except ValueError as error:
        parser.error(str(error))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(office, subscriber, arguments))


def _loop_factory() -> "type[asyncio.AbstractEventLoop] | None":
    """The loop of uvloop, where there is one."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    main()
