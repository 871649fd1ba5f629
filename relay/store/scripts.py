"""Loads the store's Lua files, and the hooks of its lanes."""

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from relay.queue import scripts

PACKAGE = "relay.store"


def load_script(redis: Redis, name: str) -> AsyncScript:
    """Register `<name>.lua` with the helpers of the queue and the key names of the store in front of it."""
    return scripts.load_script(redis, PACKAGE, name, prelude=scripts.read_lua(PACKAGE, "keys"))


def lane_hooks(name: str) -> str:
    """Read the hooks that a lane has in `<name>.lua`."""
    return scripts.read_lua(PACKAGE, "keys", name)
