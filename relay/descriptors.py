"""Shares out the file descriptors of the process, so that clients of the API never take those that work needs."""

import contextlib
import errno
import sys
from typing import Final

import structlog

log = structlog.get_logger(__name__)

_ENOUGH: Final = 65_536
# Kept for polls, deliveries, recordings, the store and files.
_FOR_WORK: Final = 512
_LOW: Final = 1024
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def raise_limit() -> None:
    """Raise the soft limit of open files towards the hard one: many systems start processes with 1024 or 256."""
    if sys.platform == "win32":
        return
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if limit() < _LOW:
        log.warning("open_files_limit_low", limit=limit(), action=f"raise the limit of open files to {_LOW} or more")


def limit() -> int:
    """Return how many files and connections this process may have open."""
    if sys.platform == "win32":
        return _ENOUGH
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH if soft == resource.RLIM_INFINITY else soft


def for_clients() -> int:
    """Return how many connections clients of the API may have open; the other descriptors are for work."""
    return limit() - min(_FOR_WORK, limit() // 2)


def exhausted(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that this machine is out of descriptors, ports or memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
            return True
        cause = cause.__cause__ or cause.__context__
    return False
