"""A note beside the recordings of where each source stands: an emptied store is then no silent first run."""

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
    """When the relay began with a source, and its cursor at the time of writing."""

    started_at: datetime
    cursor: datetime


class Markers:
    """Reads and writes markers."""

    def __init__(self, storage: RecordingStorage) -> None:
        self._storage = storage

    async def read(self, sid: str) -> Marker | None:
        """Read a source's marker. Raises StorageError: what cannot be read must not look like a first run."""
        name = _name(sid)
        raw = await self._storage.get_small(name)
        if raw is None:
            return None
        try:
            fields = orjson.loads(raw)
            return Marker(from_iso(fields["started_at"]), from_iso(fields["cursor"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{name} beside the recordings says where source {sid} stood and is damaged; restore it from a "
                "backup, or delete it to begin anew without telling the calls of before"
            ) from error

    async def forget(self, sid: str) -> None:
        """Delete a source's marker. Raises StorageError."""
        await self._storage.delete_small(f"markers/{sid}.json")

    async def write(self, sid: str, marker: Marker) -> bool:
        """Write a source's marker; whether that could be done. Trouble is said and stops nothing."""
        body = orjson.dumps({"started_at": iso(marker.started_at), "cursor": iso(marker.cursor)})
        try:
            await self._storage.put_small(_name(sid), body)
        except StorageError as error:
            log.warning("marker_not_written", source=sid, error=str(error))
            return False
        return True


def _name(sid: str) -> str:
    return f"markers/{sid}.json"
