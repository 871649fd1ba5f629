"""`relay.yaml` and `RELAY_…` become one immutable value, or one error that lists every problem.

- The environment wins over the file and merges into its maps: `RELAY_SOURCES__MAIN__API_KEY` is `sources.main.api_key`.
  Names are split at `__` and lower-cased; lists and maps are written as JSON; an empty variable counts as not set.
- An id with `-` in the file also matches its name with `_`: `RELAY_SOURCES__NEW_YORK__API_KEY` sets it in `new-york`.
- Relative paths start at the folder of the file; without a file, at the working directory.
- A secret can be in a file of its own: `api_key_file` instead of `api_key`. No message ever repeats either.
"""

from relay.settings.loader import load
from relay.settings.messages import error_messages
from relay.settings.options import (
    ID_PATTERN,
    ApiOptions,
    DeliveryOptions,
    FieldMap,
    InternalOptions,
    LogOptions,
    PollOptions,
    RetentionOptions,
    Settings,
    SubscriptionOptions,
    TierOptions,
    changed_outside_maps,
    reveal,
)

__all__ = [
    "ID_PATTERN",
    "ApiOptions",
    "DeliveryOptions",
    "FieldMap",
    "InternalOptions",
    "LogOptions",
    "PollOptions",
    "RetentionOptions",
    "Settings",
    "SubscriptionOptions",
    "TierOptions",
    "changed_outside_maps",
    "error_messages",
    "load",
    "reveal",
]
