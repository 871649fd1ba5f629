"""A relay that serves its API on loopback, and a client of it, for the tests of the API and the command line."""

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
"""The URL of an external hook; tests send nothing to it."""
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
    """Resolve a few names without DNS."""
    if name not in NAMES:
        raise OSError(f"no such name: {name}")
    return NAMES[name]


@dataclass
class ApiClient:
    """A client of one relay's API."""

    relay: RelayHarness
    base: str
    http: aiohttp.ClientSession
    token: str = TOKEN
    requests_sent: int = field(default=0)

    async def request(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, **options: Any
    ) -> Any:
        """Send a request; returns the status and the body, parsed if it is JSON."""
        self.requests_sent += 1
        headers = {"Authorization": f"Bearer {token or self.token}"} | options.pop("headers", {})
        if body is not None:
            options["json"] = body
        async with self.http.request(method, self.base + path, headers=headers, **options) as response:
            raw = await response.read()
            if raw and response.content_type.endswith("json"):
                return response.status, await response.json(content_type=None)
            return response.status, raw.decode() or None

    async def get(self, path: str, **options: Any) -> Any:
        """GET, which must succeed."""
        status, body = await self.request("GET", path, **options)
        assert status == 200, body
        return body

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """POST, which must succeed."""
        status, answer = await self.request("POST", path, body, **options)
        assert status in (200, 201, 202), answer
        return answer

    async def problem(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, str]:
        """Send a request that must fail; returns the status and the problem code."""
        status, problem = await self.request(method, path, body, **options)
        assert isinstance(problem, dict), (status, problem)
        assert problem["status"] == status
        assert problem["detail"]
        return status, problem["code"]

    async def issue_token(self, role: str, tenant: str | None = None) -> str:
        """Issue a token."""
        made = await self.post("/v1/tokens", {"name": f"{role} of {tenant}", "role": role, "tenant": tenant})
        return str(made["token"])

    @property
    def subscriber_url(self) -> str:
        """The base URL of the verifying subscriber."""
        return self.relay.runtime.subscriptions["a"].url.removesuffix("/hook/a")

    async def subscribe(self, name: str, *, token: str | None = None, **options: Any) -> Any:
        """Create a subscription of the verifying subscriber."""
        made = await self.post(
            "/v1/subscriptions", {"id": name, "url": f"{self.subscriber_url}/hook/{name}", **options}, token=token
        )
        self.relay.subscriber.add_hook(name, made["secret"])
        return made

    async def ingest_call(self, sid: str, key: str, **fields: Any) -> str:
        """Ingest a finished call of a source; returns its id."""
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
        """Wait for the next millisecond of the store's clock, so that what comes next is newer."""
        before = (await self.relay.redis.time())[1] // 1000
        await eventually(self.relay.redis.time, lambda now: now[1] // 1000 != before)

    async def publish_call(self, sid: str, key: str, event_type: str = "call.completed", **fields: Any) -> str:
        """Ingest a call and wait for its event; returns the event's id."""
        await self.ingest_call(sid, key, **fields)
        eid = ids.event_id(sid, key, event_type)
        await eventually(lambda: self.relay.runtime.store.events.get(eid), lambda event: event is not None)
        return eid

    async def wait_for_job(self, job: str) -> Any:
        """Wait for the end of a job."""
        return await eventually(
            lambda: self.get(f"/v1/jobs/{job}"), lambda view: view["state"] in ("done", "failed", "cancelled")
        )


@contextlib.asynccontextmanager
async def open_api(
    redis: Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **top: Any
) -> AsyncIterator[ApiClient]:
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
            yield ApiClient(relay, f"http://127.0.0.1:{port}", http)
        finally:
            await cancel(hosting)


async def _host(relay: RelayHarness) -> None:
    await host(relay.runtime, poll_delay_s=0.05)
