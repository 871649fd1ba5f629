"""Loads the Lua files: whatever must be one step of the store is one of them."""

from importlib import resources

from redis.asyncio import Redis
from redis.commands.core import AsyncScript


def read_lua(package: str, *names: str) -> str:
    """Read Lua files of a package, one after the other."""
    return "\n".join(resources.files(package).joinpath(f"{name}.lua").read_text() for name in names)


def load_script(redis: Redis, package: str, name: str, *, prelude: str = "") -> AsyncScript:
    """Register `<package>/<name>.lua` with `lane.lua`, then `prelude`, in front of it.

    The shebang of a script (`#!lua flags=…`) must stay its first line, so it moves to the front.
    """
    script = read_lua(package, name)
    shebang = ""
    if script.startswith("#!"):
        shebang, script = script.split("\n", 1)
        shebang += "\n"
    return redis.register_script(f"{shebang}{read_lua('relay.queue', 'lane')}\n{prelude}\n{script}")
