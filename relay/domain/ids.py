"""One id for ever: ids are made of what the provider says, so a lost store, a replay or a backfill finds them again."""

import base64
import hashlib


def _digest(parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return base64.b32encode(digest).decode().lower()[:26]


def call_id(source_id: str, record_key: str) -> str:
    """Name a call. Renaming a source makes new calls."""
    return "call_" + _digest((source_id, record_key))


def event_id(source_id: str, record_key: str, event_type: str, *also: str) -> str:
    """Name an event. `call.updated` adds its revision and content hash; operational events add what makes them one."""
    return "evt_" + _digest((source_id, record_key, event_type, *also))
