"""Keeps a copy of each source's cursor beside the recordings.

A source whose store was emptied then resumes from its marker instead of treating every call as old history.
"""

from dataclasses import dataclass
from datetime import datetime

import orjson
import structlog

from relay.domain.time import from_iso, iso
from relay.errors import StorageError
from relay.recordings.storage import RecordingStorage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Marker:
    """When the relay began polling a source, and its cursor at the time of writing."""

    started_at: datetime
    cursor: datetime


class Markers:
    def __init__(self, storage: RecordingStorage) -> None:
        self._storage = storage

    async def read(self, sid: str) -> Marker | None:
        """Read a source's marker. Raises StorageError: an unreadable marker must not look like a first run."""
        name = _name(sid)
        raw = await self._storage.get_small(name)
        if raw is None:
            return None
        try:
            fields = orjson.loads(raw)
            return Marker(from_iso(fields["started_at"]), from_iso(fields["cursor"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{name} in the recording storage (the cursor of source {sid}) is damaged; restore it from a backup, "
                "or delete it to start over without publishing earlier calls"
            ) from error

    async def delete(self, sid: str) -> None:
        await self._storage.delete_small(_name(sid))

    async def write(self, sid: str, marker: Marker) -> bool:
        """Write a source's marker. Return False, and log why, when the storage failed."""
        body = orjson.dumps({"started_at": iso(marker.started_at), "cursor": iso(marker.cursor)})
        try:
            await self._storage.put_small(_name(sid), body)
        except StorageError as error:
            log.warning("marker_write_failed", source=sid, error=str(error))
            return False
        return True


def _name(sid: str) -> str:
    return f"markers/{sid}.json"
