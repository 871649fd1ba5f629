"""One attempt: the body in the subscriber's form, then signed and sent; what came of it is a value.

The body is the same on every attempt but for the recording link, which is minted anew so that it always works.
"""

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Final

import orjson

from relay.delivery import signature
from relay.delivery.egress import Egress
from relay.delivery.outcomes import AttemptOutcome
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.events.render import MAX_BODY_BYTES, render
from relay.store.calls import StoredCall
from relay.store.deliveries import ClaimedEvent

_MAP_THREADS: Final = ThreadPoolExecutor(max_workers=2, thread_name_prefix="field-map")
_HAS_AUDIO = b'"recording":{"status":"available"'


class Attempts:
    def __init__(
        self,
        egress: Egress,
        *,
        link: Callable[[Json], Awaitable[tuple[str, datetime] | None]],
        find_call: Callable[[str], Awaitable[StoredCall | None]],
        timeout_s: float,
    ) -> None:
        self._egress = egress
        self._link = link
        self._find_call = find_call
        self._timeout_s = timeout_s
        self._rendering: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def send(self, subscription: Subscription, eid: str, body: bytes, *, now_ms: int) -> AttemptOutcome:
        """Sign a body and send it. `now_ms` is the store's time, which becomes `webhook-timestamp`."""
        headers = signature.headers(eid, now_ms // 1000, body, subscription.keys_at(now_ms / 1000))
        if subscription.headers:
            # Ours last: a configured header must not replace the signature.
            headers = {**subscription.headers, **headers}
        return await self._egress.sender(subscription.tenant).send(
            subscription.url,
            body,
            headers,
            timeout_s=self._timeout_s,
            # A stale connection makes it unknown whether a request arrived, which ends an at-most-once delivery.
            reuse=subscription.options.delivery == "at_least_once",
        )

    async def body_for(self, subscription: Subscription, event: ClaimedEvent) -> bytes:
        """Build the body; reads the store where the provider's row or a recording link belongs in it.

        Raises MapTooCostly.
        """
        assert event.body is not None  # noqa: S101 - an event without a body is not attempted
        if subscription.plain and len(event.body) <= MAX_BODY_BYTES and _HAS_AUDIO not in event.body:
            return event.body  # the stored event is the body as it is: most deliveries parse nothing
        document: Json = orjson.loads(event.body)
        raw = None
        if subscription.options.include_raw and "call" in document["data"]:
            call = await self._find_call(document["data"]["call"]["id"])
            raw = call.raw if call else None
        link = await self._link(document)
        build = partial(
            render,
            document,
            payload=subscription.payload,
            include_raw=subscription.options.include_raw,
            raw=raw,
            recording_link=link,
        )
        if isinstance(subscription.payload, str):
            return build()
        # One at a time per owner, so that the maps of one owner do not keep others waiting.
        owner = subscription.tenant or f"/{subscription.id}"
        async with self._rendering.setdefault(owner, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(_MAP_THREADS, build)
