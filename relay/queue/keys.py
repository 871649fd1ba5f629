"""Every key of the queue: its shape, and how long it lives. The Lua files build the same names in `lane.lua`."""

# HASH  last: the last moment of the relay's clock, ms; offset: by how much it is ahead of TIME, which stepped back; no
# TTL: the clock must never go back.
CLOCK = "relay:clock"
# ZSET  process → its last heartbeat, ms. A process that leaves, or is found dead, is removed.
PROCESSES = "relay:processes"

# A partition is proven while its last success is less than a day old and fewer than three attempts failed since.
STANDINGS = ("proven", "unproven")


def held(process: str) -> str:
    """SET   lane and partition (U+001F between) in which a process may have leases; gone with the process."""
    return f"relay:held:{process}"


def index(lane: str, standing: str) -> str:
    """ZSET  group → earliest moment at which something can be claimed from it, ms. `standing` is one of
    STANDINGS, a group is standing:owner."""
    return f"relay:index:{lane}:{standing}"


def group(lane: str, name: str) -> str:
    """ZSET  partition → earliest moment at which something can be claimed from it, ms, of one group."""
    return f"relay:group:{lane}:{name}"


def turns(lane: str) -> str:
    """HASH  group → when it was served last, ms; a group leaves with its last partition that has something to claim."""
    return f"relay:turns:{lane}"


def waiting(name: str, partition: str) -> str:
    """ZSET  item → due, ms; items that are not leased."""
    return f"relay:lane:{name}:{partition}"


def leased(name: str, partition: str) -> str:
    """ZSET  item → +inf while its lease holds, afterwards when it ended, ms."""
    return f"relay:leased:{name}:{partition}"


def leases(name: str, partition: str) -> str:
    """HASH  item → token (process:exchange:number), how many processes in a row died with the item, and the due of a
    put during the lease."""
    return f"relay:leases:{name}:{partition}"


def partition(name: str, part: str) -> str:
    """HASH  owner, limits, pace and health of a partition, and the group that it is in; no TTL: a partition that is
    disabled must stay so. Of a deleted subscription it stays for a minute, so that a process that still knows it
    queues nothing."""
    return f"relay:partition:{name}:{part}"


def quarantine(name: str) -> str:
    """ZSET  partition and item (U+001F between) → when it was quarantined, after five processes died with
    it. Trimmed with the calls; removed earlier when the call is published after all, or the event replayed."""
    return f"relay:quarantined:{name}"
