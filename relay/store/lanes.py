"""The lanes of the relay: which kinds of work there are."""

from enum import StrEnum


class LaneName(StrEnum):
    """A kind of work that waits in the queue."""

    POLL = "poll"
    ENRICH = "enrich"
    RECORD = "record"
    DELIVER = "deliver"
