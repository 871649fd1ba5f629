"""A recording's link, made when an event is sent: ours and signed, or presigned by the object store, or none."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Literal

from relay.domain.json import Json
from relay.recordings import links
from relay.recordings.storage import RecordingStorage
from relay.store.calls import StoredCall


class LinkMint:
    """Makes links that work for seven days. Without `public_url`, and without presigning, there are none."""

    def __init__(
        self,
        storage: RecordingStorage,
        find: Callable[[str], Awaitable[StoredCall | None]],
        *,
        kind: Literal["relay", "presigned"],
        public_url: str | None,
        key: bytes,
    ) -> None:
        self._storage = storage
        self._find = find
        self._kind = kind
        self._public_url = public_url
        self._key = key

    async def for_event(self, document: Json) -> tuple[str, datetime] | None:
        """Make the link that goes into an event, where it tells of a stored recording."""
        call = document["data"].get("call")
        if call is None or call["recording"]["status"] != "available":
            return None
        return await self.for_call(call["id"])

    async def for_call(self, call_id: str) -> tuple[str, datetime] | None:
        """Make a link to a stored recording."""
        now = datetime.now(UTC)
        if self._kind == "presigned":
            call = await self._find(call_id)
            if call is None or call.recording is None or "path" not in call.recording:
                return None
            url = await self._storage.presign(call.recording["path"], links.DEFAULT_TTL_S)
            if url is not None:
                return url, datetime.fromtimestamp(int(now.timestamp()) + links.DEFAULT_TTL_S, UTC)
        if self._public_url is None:
            return None
        return links.link(self._public_url, call_id, now=now, key=self._key)
