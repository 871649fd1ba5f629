"""Run `relay` commands as processes of their own, against a relay in the test."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.flow.api import ApiClient


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """The documents of a stream, one per line."""
        return [json.loads(line) for line in self.out.splitlines()]


def environ_for(url: str | None, token: str | None, **more: str) -> dict[str, str]:
    """The environment of a command, without RELAY_ variables of the developer."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    environ |= {"COLUMNS": "200"} | more
    if url is not None:
        environ["RELAY_URL"] = url
    if token is not None:
        environ["RELAY_TOKEN"] = token
    return environ


async def start(*arguments: str, environ: Mapping[str, str]) -> asyncio.subprocess.Process:
    """Start a command."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
    )


async def run(*arguments: str, environ: Mapping[str, str], stdin: str = "") -> CommandResult:
    """Run a command to its end; no error may be a traceback."""
    process = await start(*arguments, environ=environ)
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    ran = CommandResult(process.returncode, out.decode(), err.decode())
    assert "Traceback" not in ran.err, ran.err
    return ran


async def relay(
    api: ApiClient, *arguments: str, token: str | None = None, stdin: str = "", **more: str
) -> CommandResult:
    """Run a command against the relay of the test."""
    return await run(*arguments, environ=environ_for(api.base, token or api.token, **more), stdin=stdin)
