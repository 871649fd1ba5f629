"""A note beside the recordings of where each source stands: an emptied store is then no silent first run."""

from dataclasses import dataclass
from datetime import datetime

import orjson
import structlog

from relay.errors import StorageError
from relay.model import from_iso, iso
from relay.recordings.storage import RecordingStorage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Marker:
    """When the relay began with a source, and its cursor at the time of writing."""

    started_at: datetime
    cursor: datetime


class Markers:
    """Reads and writes markers. Trouble with the storage is said and does not stop a poll."""

    def __init__(self, storage: RecordingStorage) -> None:
        self._storage = storage

    async def read(self, sid: str) -> Marker | None:
        """Read a source's marker. Raises StorageError: an unreadable storage must not look like a first run."""
        raw = await self._storage.get_small(f"markers/{sid}.json")
        if raw is None:
            return None
        try:
            fields = orjson.loads(raw)
            return Marker(from_iso(fields["started_at"]), from_iso(fields["cursor"]))
        except (ValueError, KeyError, TypeError):
            log.warning("marker_unreadable", source=sid)
            return None

    async def write(self, sid: str, marker: Marker) -> None:
        """Write a source's marker."""
        body = orjson.dumps({"started_at": iso(marker.started_at), "cursor": iso(marker.cursor)})
        try:
            await self._storage.put_small(f"markers/{sid}.json", body)
        except StorageError as error:
            log.warning("marker_not_written", source=sid, error=str(error))
