"""`python -m benchmarks.baselines bare|arq|sender …`: what the relay is compared with, each in a process of its own.

bare  a loop that signs and posts the same bodies with aiohttp, as many at once as the relay: no store, no promises
arq   a plain relay: one arq job per delivery, with uvloop, JSON, max_jobs 100, poll delay 10 ms, no results kept
sender  the relay's own sender in a loop, in turns with its address guard and with one that checks nothing
"""

import argparse
import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from aiohttp.abc import AbstractResolver
from arq import Worker, func
from arq.connections import ArqRedis
from redis.asyncio.connection import ConnectionPool

from benchmarks.harness import SECRET
from relay.delivery import signature
from relay.delivery.guard import Guard
from relay.delivery.send import Sender
from relay.domain.url import IPAddress

QUEUE = "plain:queue"
_KEYS = (signature.decode_secret(SECRET),)


def to_json(job: dict[str, Any]) -> bytes:
    return orjson.dumps(job)


def plain_redis(url: str) -> ArqRedis:
    return ArqRedis(
        ConnectionPool.from_url(url), default_queue_name=QUEUE, job_serializer=to_json, job_deserializer=orjson.loads
    )


async def post(http: aiohttp.ClientSession, url: str, event_id: str, body: bytes) -> None:
    """Sign and post one event."""
    headers = signature.headers(event_id, int(time.time()), body, _KEYS)
    headers["Content-Type"] = "application/json"
    async with http.post(url, data=body, headers=headers) as response:
        await response.read()
        response.raise_for_status()


async def bare(arguments: argparse.Namespace) -> None:
    """Post every body to every URL."""
    lines: list[bytes] = arguments.bodies.read_bytes().splitlines()
    bodies: list[tuple[str, bytes]] = [(json.loads(line)["id"], line) for line in lines]
    urls: list[str] = arguments.urls.split(",")
    todo: Iterator[tuple[str, str, bytes]] = ((url, eid, body) for eid, body in bodies for url in urls)

    async def loop(http: aiohttp.ClientSession) -> None:
        for url, eid, body in todo:
            await post(http, url, eid, body)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False) as http:
        await asyncio.gather(*(loop(http) for _ in range(arguments.at_once)))


async def deliver(ctx: dict[str, Any], url: str, event_id: str, body: str) -> None:
    """The plain relay's job."""
    await post(ctx["http"], url, event_id, body.encode())


async def arq(arguments: argparse.Namespace) -> None:
    """Work off the queue until it is empty."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False) as http:
        worker = Worker(
            functions=[func(deliver, name="deliver", keep_result=0, max_tries=10)],
            redis_pool=plain_redis(arguments.redis),
            queue_name=QUEUE,
            ctx={"http": http},
            burst=True,
            max_jobs=100,
            poll_delay=0.01,
            keep_result=0,
            handle_signals=False,
            job_serializer=to_json,
            job_deserializer=orjson.loads,
        )
        await worker.main()
        await worker.close()


class OpenGuard(Guard):
    """A guard that leaves everything to the connector."""

    def check(self, host: str, ip: IPAddress, *, plain: bool = False) -> None:
        """Allow every address."""

    def resolver(self, *, plain: bool = False) -> AbstractResolver:
        return aiohttp.ThreadedResolver()

    def socket_factory(self, *, plain: bool = False) -> Callable[[Any], socket.socket]:
        return lambda info: socket.socket(info[0], info[1], info[2])


async def sender(arguments: argparse.Namespace) -> None:
    """Post through the relay's sender in turns, guarded and open; prints the seconds of each turn."""
    body = b'{"id":"evt","text":"' + b"x" * 1800 + b'"}'
    loopback = (ip_network("127.0.0.0/8"),)

    async def turn(through: Sender) -> float:
        todo = iter(range(arguments.posts))

        async def loop() -> None:
            for number in todo:
                headers = signature.headers(f"evt_{number}", int(time.time()), body, _KEYS)
                await through.send(arguments.url, body, headers)

        began = time.perf_counter()
        await asyncio.gather(*(loop() for _ in range(100)))
        return time.perf_counter() - began

    async with Sender(Guard(loopback)) as guarded, Sender(OpenGuard(loopback)) as unguarded:
        await turn(guarded), await turn(unguarded)
        turns: dict[str, list[float]] = {"guarded": [], "open": []}
        for number in range(arguments.turns):
            pair = [("guarded", guarded), ("open", unguarded)]
            for name, through in pair if number % 2 else reversed(pair):
                turns[name].append(await turn(through))
    sys.stdout.write(json.dumps(turns) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines")
    kinds = parser.add_subparsers(required=True)
    bare_parser = kinds.add_parser("bare")
    bare_parser.add_argument("--bodies", type=Path, required=True, help="file with a JSON event a line")
    bare_parser.add_argument("--urls", required=True, help="comma-separated")
    bare_parser.add_argument("--at-once", type=int, required=True)
    bare_parser.set_defaults(run=bare)
    arq_parser = kinds.add_parser("arq")
    arq_parser.add_argument("--redis", required=True)
    arq_parser.set_defaults(run=arq)
    sender_parser = kinds.add_parser("sender")
    sender_parser.add_argument("--url", required=True)
    sender_parser.add_argument("--posts", type=int, required=True, help="per turn")
    sender_parser.add_argument("--turns", type=int, required=True, help="of each kind")
    sender_parser.set_defaults(run=sender)
    arguments = parser.parse_args()
    uvloop.run(arguments.run(arguments))


if __name__ == "__main__":
    main()
