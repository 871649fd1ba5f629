"""A lab for each test of the fault suite; its seed is printed, and can be given again."""

import os
import random
import sys
from collections.abc import Generator, Iterator

import pytest

from tests.faults.harness import Lab


@pytest.fixture
def seed() -> int:
    """The seed of everything random: FAULT_SEED, or a new one."""
    found = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(1_000_000))
    sys.stdout.write(f"FAULT_SEED={found}\n")
    return found


@pytest.fixture
def lab(seed: int) -> Iterator[Lab]:
    """A lab that stops everything it started."""
    with Lab(seed=seed) as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Show the ends of all logs when a test fails."""
    try:
        yield
    except BaseException:
        found = getattr(item, "funcargs", {}).get("lab")
        if isinstance(found, Lab):
            sys.stdout.write(found.last_lines())
        raise
