"""The events that exist, by name: what a subscription may ask for and what it hears.

| type | when |
|---|---|
| `call.completed` | first sight of a finished call, whatever its outcome |
| `call.updated` | its content changed, or a contact was found late |
| `call.recording.completed` | its audio is stored |
| `call.recording.failed` | its audio exists but cannot be had |
| `call.transcript.completed` | its transcription became available |
| `webhook.test` | a person asked for it |
| `source.error`, `source.recovered` | a source stopped answering, or answers again |
| `subscription.failing`, `subscription.disabled` | a subscriber is not heard, or has been switched off |

The last three rows are operations: a subscription hears them only when it names them, for `call.*` is the default.
"""

import re
from collections.abc import Iterable

EVENT_TYPES: tuple[str, ...] = (
    "call.completed",
    "call.updated",
    "call.recording.completed",
    "call.recording.failed",
    "call.transcript.completed",
    "webhook.test",
    "source.error",
    "source.recovered",
    "subscription.failing",
    "subscription.disabled",
)


def matches(patterns: Iterable[str], event_type: str) -> bool:
    """Say whether any pattern names the type; `*` stands for any characters, dots too: `call.*`, `*.completed`, `*`."""
    return any(
        re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), event_type, re.DOTALL) for pattern in patterns
    )
