"""`python -m relay.simulator`: a fake provider and a verifying subscriber in a process of their own.

Prints one line of JSON with the URLs and the source for relay.yaml when both listen. SIGTERM or SIGINT ends it, with
exit code 0.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import orjson

from relay.simulator.accounts import FAKES, PROVIDER_NAMES, Fakes, SimulatedAccount, open_account
from relay.simulator.subscriber import VerifyingSubscriber
from relay.simulator.timeline import Habits, calls, people

_DEMO_SECRET = "whsec_c2ltdWxhdG9yLXNlY3JldC0wMTIzNDU2Nzg5"  # noqa: S105  # signs simulated events on loopback only


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relay.simulator", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--provider", choices=PROVIDER_NAMES, default="webfones")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="the provider's port; 0: any free one")
    parser.add_argument("--subscriber-port", type=int, default=0, help="the subscriber's port; 0: any free one")
    parser.add_argument("--key", default="simulated-key", help="API key or token of the account")
    parser.add_argument("--zone", default="UTC", help="time zone of the account's rows; webfones only")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other calls")
    parser.add_argument(
        "--calls-per-minute", type=float, default=0.0, help="0: only the calls that are posted to /_control"
    )
    parser.add_argument("--hurry", type=float, default=30.0, help="divides the duration of calls and all delays")
    parser.add_argument("--hooks", default="a", help="names of the subscriber's hooks, comma-separated")
    parser.add_argument("--secret", default=_DEMO_SECRET, help="signing secret of every hook")
    parser.add_argument("--verify-every", type=int, default=1, help="verify one signature in so many")
    parser.add_argument("--lean", action="store_true", help="keep neither bodies nor arrivals")
    return parser


async def _serve(account: SimulatedAccount, subscriber: VerifyingSubscriber, arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    host: str = arguments.host
    async with (
        account.provider.serve(host=host, port=arguments.port) as provider_url,
        subscriber.serve(host=host, port=arguments.subscriber_port) as subscriber_url,
    ):
        ready = {
            "provider": provider_url,
            "subscriber": subscriber_url,
            "key": arguments.key,
            "source": account.source(provider_url),
            "hooks": {name: f"{subscriber_url}/hook/{name}" for name in subscriber.hooks},
        }
        sys.stdout.write(orjson.dumps(ready).decode() + "\n")
        sys.stdout.flush()
        await stop.wait()


def _account(arguments: argparse.Namespace, fakes: Fakes) -> SimulatedAccount:
    if arguments.hurry <= 0 or arguments.calls_per_minute < 0 or arguments.verify_every < 1:
        raise ValueError("--hurry must be above 0, --calls-per-minute at least 0, --verify-every at least 1")
    habits = Habits().hurried(arguments.hurry)
    callers = people(arguments.seed, habits=habits)
    try:
        account = open_account(arguments.provider, arguments.key, zone=arguments.zone, people=callers, fakes=fakes)
    except ValueError as error:
        raise ValueError(f"--zone: {error}") from None
    if arguments.calls_per_minute > 0:
        habits = replace(habits, calls_per_hour=arguments.calls_per_minute * 60)
        account.feed(calls(datetime.now(UTC), seed=arguments.seed, habits=habits))
    return account


def _loop_factory() -> "type[asyncio.AbstractEventLoop] | None":
    """The event loop of uvloop, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def main(
    argv: Sequence[str] | None = None,
    *,
    fakes: Fakes = FAKES,
    subscriber_type: type[VerifyingSubscriber] = VerifyingSubscriber,
) -> None:
    """Run until a signal comes; the tests run fakes that inject faults in the same way."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    keep = not arguments.lean
    subscriber = subscriber_type(verify_every=arguments.verify_every, keep_bodies=keep, keep_arrivals=keep)
    try:
        account = _account(arguments, fakes)
        for name in filter(None, arguments.hooks.split(",")):
            subscriber.add_hook(name, arguments.secret)
    except ValueError as error:
        parser.error(str(error))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(account, subscriber, arguments))


if __name__ == "__main__":
    main()
