"""A relay whose API listens on loopback, and a client that asks it: what the tests of the API share."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from relay.api.server import serve_api
from relay.delivery.guard import Guard
from relay.domain import ids
from relay.domain.call import Direction, Outcome, Party, Record
from relay.store.calls import Row
from relay.store.lanes import LaneName
from relay.tasks import cancel
from tests.flow.harness import RelayHarness, eventually, relay_harness
from workers.settings import host

TOKEN = "test-token-of-the-operator"
OUTSIDE = "https://hooks.example.com/hook/secret-path"
"""A hook outside; nothing is sent to it in a test that does not say so."""
NAMES: dict[str, Sequence[str]] = {
    "hooks.example.com": ["93.184.216.34"],
    "hooks.zapier.com": ["93.184.216.35"],
    "api.webfones.com": ["93.184.216.36"],
    "inside.example.com": ["10.1.2.3"],
    "metadata.example.com": ["169.254.169.254"],
}
SOURCE: dict[str, Any] = {
    "provider": "webfones",
    "base_url": "http://127.0.0.1:9",
    "api_key": "the-key-of-the-account",
    "contacts": False,
    "recordings": False,
}


async def look_up(name: str) -> Sequence[str]:
    """Know a few names; nobody outside is asked."""
    if name not in NAMES:
        raise OSError(f"no such name: {name}")
    return NAMES[name]


@dataclass
class Desk:
    """A client of one relay's API."""

    relay: RelayHarness
    base: str
    http: aiohttp.ClientSession
    token: str = TOKEN
    asked: int = field(default=0)

    async def ask(self, method: str, path: str, body: Any = None, *, token: str | None = None, **options: Any) -> Any:
        """Ask; gives the status and the body, read as JSON where there is one."""
        self.asked += 1
        headers = {"Authorization": f"Bearer {token or self.token}"} | options.pop("headers", {})
        if body is not None:
            options["json"] = body
        async with self.http.request(method, self.base + path, headers=headers, **options) as answer:
            raw = await answer.read()
            if raw and answer.content_type.endswith("json"):
                return answer.status, await answer.json(content_type=None)
            return answer.status, raw.decode() or None

    async def get(self, path: str, **options: Any) -> Any:
        """Read what must be there."""
        status, body = await self.ask("GET", path, **options)
        assert status == 200, body
        return body

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """Do what must be possible."""
        status, answer = await self.ask("POST", path, body, **options)
        assert status in (200, 201, 202), answer
        return answer

    async def code(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, str]:
        """Ask for what must be refused; gives status and code."""
        status, problem = await self.ask(method, path, body, **options)
        assert isinstance(problem, dict), (status, problem)
        assert problem["status"] == status
        assert problem["detail"]
        return status, problem["code"]

    async def token_for(self, role: str, tenant: str | None = None) -> str:
        """Have a token made."""
        made = await self.post("/v1/tokens", {"name": f"{role} of {tenant}", "role": role, "tenant": tenant})
        return str(made["token"])

    @property
    def hooks(self) -> str:
        """Where the verifying subscriber listens."""
        return self.relay.runtime.subscriptions["a"].url.removesuffix("/hook/a")

    async def subscribe(self, name: str, *, token: str | None = None, **options: Any) -> Any:
        """Make a subscription that a hook of the verifying subscriber hears."""
        made = await self.post(
            "/v1/subscriptions", {"id": name, "url": f"{self.hooks}/hook/{name}", **options}, token=token
        )
        self.relay.subscriber.add_hook(name, made["secret"])
        return made

    async def call_of(self, sid: str, key: str, **fields: Any) -> str:
        """Admit a finished call of a source; gives its id."""
        values: dict[str, Any] = {
            "key": key,
            "started_at": datetime(2026, 11, 20, 12, tzinfo=UTC),
            "local_date": "2026-11-20",
            "direction": Direction.INBOUND,
            "outcome": Outcome.NO_ANSWER,
            "external": Party(number="+12025550123", raw="(202) 555-0123"),
        }
        record = Record(**values | fields)
        await self.relay.runtime.store.calls.ingest(
            sid, [Row(record, record.content_hash())], token=b"", mapping=1, via="poll"
        )
        self.relay.runtime.wake_ups(LaneName.ENRICH)
        await self._next_ms()
        return ids.call_id(sid, key)

    async def _next_ms(self) -> None:
        """Wait until the store's clock has gone on, so that what comes next is newer."""
        before = (await self.relay.redis.time())[1] // 1000
        await eventually(self.relay.redis.time, lambda now: now[1] // 1000 != before)

    async def told(self, sid: str, key: str, event_type: str = "call.completed", **fields: Any) -> str:
        """Admit a call and wait for its event; gives the event's id."""
        await self.call_of(sid, key, **fields)
        eid = ids.event_id(sid, key, event_type)
        await eventually(lambda: self.relay.runtime.store.events.get(eid), lambda event: event is not None)
        return eid

    async def until_over(self, job: str) -> Any:
        """Wait until a job has ended."""
        return await eventually(
            lambda: self.get(f"/v1/jobs/{job}"), lambda view: view["state"] in ("done", "failed", "cancelled")
        )


@contextlib.asynccontextmanager
async def open_desk(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **top: Any
) -> AsyncIterator[Desk]:
    """Run a relay with a worker, and its API on a free port."""
    monkeypatch.setattr("relay.runtime.Guard", partial(Guard, lookup=look_up))
    options = {"api": {"port": 0, "tokens": [TOKEN]}, **top}
    async with (
        relay_harness(redis, valkey_url, tmp_path, **options) as relay,
        serve_api(relay.runtime) as port,
        aiohttp.ClientSession() as http,
    ):
        hosting = asyncio.create_task(_host(relay))
        try:
            yield Desk(relay, f"http://127.0.0.1:{port}", http)
        finally:
            await cancel(hosting)


async def _host(relay: RelayHarness) -> None:
    await host(relay.runtime, poll_delay_s=0.05)
