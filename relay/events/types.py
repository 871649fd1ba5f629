"""The event types, and the patterns by which a subscription selects them."""

import re
from collections.abc import Iterable
from typing import Final

DESCRIPTIONS: Final[dict[str, str]] = {
    "call.completed": "A call was seen finished for the first time, whatever its outcome. A missed call has "
    "`missed: true`.",
    "call.updated": "The provider changed the call, or its contact was found late. `revision` counts up and `changes` "
    "names what changed.",
    "call.recording.completed": "The recording of a call was stored. Follows `call.completed`, once.",
    "call.recording.failed": "A recording exists but could not be fetched; retries are exhausted.",
    "call.transcript.completed": "The provider's transcript of a call became available.",
    "webhook.test": "A test event was requested.",
    "source.error": "A source stopped answering or rejected its credentials.",
    "source.recovered": "A source answers again.",
    "subscription.failing": "A subscription has had no successful delivery for some time; `disables_at` is when it "
    "will be disabled.",
    "subscription.disabled": "A subscription was disabled.",
}
EVENT_TYPES: Final = tuple(DESCRIPTIONS)

# Events about the relay itself. `*` does not select them; a pattern that begins with the family does.
OPERATIONAL_FAMILIES: Final = ("source.", "subscription.", "webhook.")


def matches(patterns: Iterable[str], event_type: str) -> bool:
    """Whether any pattern selects the type; `*` stands for any characters, dots too: `call.*`, `*.completed`, `*`."""
    return any(
        re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), event_type, re.DOTALL) for pattern in patterns
    )
