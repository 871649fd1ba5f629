"""Who listens to a source's stream: one process, for as long as it renews its lease."""

from collections.abc import Sequence
from importlib import resources

from redis.asyncio import Redis

from relay.store import keys


class StreamLeases:
    """Leases of one process, which `holder` names."""

    def __init__(self, redis: Redis, *, holder: str) -> None:
        self._holder = holder
        script = resources.files("relay.store").joinpath("stream_lease.lua").read_text()
        self._script = redis.register_script(script)

    async def acquire(self, source_ids: Sequence[str], *, lease_s: float) -> set[str]:
        """Acquire or renew leases; returns the sources that are ours now."""
        return await self._run(source_ids, int(lease_s * 1000))

    async def release(self, source_ids: Sequence[str]) -> None:
        await self._run(source_ids, 0)

    async def _run(self, source_ids: Sequence[str], lease_ms: int) -> set[str]:
        if not source_ids:
            return set()
        names = [keys.listener(source_id) for source_id in source_ids]
        replies = await self._script(keys=names, args=[self._holder, lease_ms])
        return {source_id for source_id, ours in zip(source_ids, replies, strict=True) if ours}
