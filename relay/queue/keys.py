"""Every key of the queue: its shape, and how long it lives. The Lua files build the same names in `lane.lua`."""

TOKEN = "relay:token"  # noqa: S105 - a lease token, nothing secret
"""STR   the last lease token handed out; no TTL: no token is handed out twice."""
CLOCK = "relay:clock"
"""STR   the store's time at the last sweep, ms; no TTL: a step back shows as a smaller `TIME`."""


def lane(name: str) -> str:
    """ZSET  partition → earliest moment at which something can be claimed from it, ms (the lane's index)."""
    return f"relay:lane:{name}"


def waiting(name: str, partition: str) -> str:
    """ZSET  item → due, ms; items that are not leased."""
    return f"relay:lane:{name}:{partition}"


def leased(name: str, partition: str) -> str:
    """ZSET  item → end of its lease, ms."""
    return f"relay:leased:{name}:{partition}"


def leases(name: str, partition: str) -> str:
    """HASH  item → token, expired leases in a row, and the due of a put during the lease."""
    return f"relay:leases:{name}:{partition}"


def partition(name: str, part: str) -> str:
    """HASH  limits, pace and health of a partition; no TTL: a partition that is disabled must stay so. Of a deleted
    subscription it stays for a minute, so that a process that still knows it queues nothing."""
    return f"relay:partition:{name}:{part}"


def clock_step(name: str) -> str:
    """STR   by how many ms the store's clock stepped back; TTL 60 s, in which the lane is shifted once for all."""
    return f"relay:clock:{name}"


def quarantine(name: str) -> str:
    """ZSET  partition and item (U+001F between) → when it was quarantined, after five leases that ended without a
    settle. Trimmed with the calls; removed earlier when the call is published after all, or the event replayed."""
    return f"relay:quarantined:{name}"
