"""Loads the Lua files: whatever must be one step of the store is one of them."""

from importlib import resources

from redis.asyncio import Redis
from redis.commands.core import AsyncScript


def load_script(redis: Redis, package: str, name: str) -> AsyncScript:
    """Register `<package>/<name>.lua` with the helpers of `lane.lua` in front of it.

    The shebang of a script (`#!lua flags=…`) must stay its first line, so it moves in front of the helpers.
    """
    helpers = resources.files("relay.queue").joinpath("lane.lua").read_text()
    own = resources.files(package).joinpath(f"{name}.lua").read_text()
    shebang = ""
    if own.startswith("#!"):
        first, own = own.split("\n", 1)
        shebang = first + "\n"
    return redis.register_script(shebang + helpers + own)
