"""`relay up`, `poller`, `worker` and `api`: the processes of a relay."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from relay import config_file, processes
from relay.cli.terminal import ConfigOption, new_app
from relay.log import configure
from relay.settings import Settings, load
from workers.runners import add_poller, add_poller_and_workers, add_workers
from workers.settings import host

app = new_app()
log = structlog.get_logger(__name__)

_EXIT_S = 1.0


@app.command()
def up(config: ConfigOption = None) -> None:
    """Without RELAY_REDIS_URL it runs an embedded store in data_dir."""
    settings = _settings(config)

    async def serve() -> None:
        stop = processes.stop_on_signals(settings.drain_s)
        await processes.up(
            settings,
            add_poller_and_workers,
            lambda runtime: host(runtime, poll_delay_s=0.5),
            stop,
            read=lambda: _read(config),
        )

    run(serve())


@app.command()
def poller(config: ConfigOption = None) -> None:
    _run_role(config, "poller")


@app.command()
def worker(config: ConfigOption = None) -> None:
    _run_role(config, "worker")


@app.command()
def api(config: ConfigOption = None) -> None:
    _run_role(config, "api")


def _run_role(config: Path | None, name: str) -> None:
    settings = _settings(config)
    processes.require_connection(settings)

    async def serve() -> None:
        stop = processes.stop_on_signals(settings.drain_s)
        await processes.role(
            settings,
            name,
            stop,
            add_runners={"poller": add_poller, "worker": add_workers}.get(name),
            host=host if name == "worker" else None,
            read=lambda: _read(config),
        )

    run(serve())


def run(serve: Coroutine[Any, Any, None]) -> None:
    async def serve_and_exit() -> None:
        await serve
        processes.exit_within(_EXIT_S, code=0)

    if sys.platform == "win32":
        asyncio.run(serve_and_exit())
        return
    import uvloop  # not on Windows

    uvloop.run(serve_and_exit())


def _read(config: Path | None) -> Settings:
    return load(config, os.environ)


def _settings(config: Path | None) -> Settings:
    settings = _read(config)
    configure(settings.log.level, settings.log.format)
    path = config_file.locate(config, os.environ)
    if path is not None and config_file.exposes_secrets(path):
        log.warning("configuration_readable_by_others", path=str(path), action=f"run chmod 600 {path}")
    return settings
