"""Timelines with an end."""

import itertools
from datetime import datetime

from relay.simulator.timeline import CallPlan, Habits, calls


def calls_between(start: datetime, end: datetime, *, seed: int, habits: Habits | None = None) -> list[CallPlan]:
    """List the calls that start before `end`."""
    return list(itertools.takewhile(lambda plan: plan.started_at < end, calls(start, seed=seed, habits=habits)))
