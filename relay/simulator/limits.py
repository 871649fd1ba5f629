"""Two ways to count requests: as a provider's limiter does, and as nobody can dodge."""

import math
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(slots=True)
class FixedWindow:
    """A limiter as Express middleware has it: so many requests from the first one on, then none until the end."""

    limit: int
    window_s: float
    opened_at: datetime | None = None
    used: int = 0

    def hit(self, now: datetime) -> bool:
        """Count a request; whether it is let through."""
        if self.opened_at is None or (now - self.opened_at).total_seconds() >= self.window_s:
            self.opened_at, self.used = now, 0
        self.used += 1
        return self.used <= self.limit

    def headers(self, now: datetime) -> dict[str, str]:
        elapsed_s = (now - self.opened_at).total_seconds() if self.opened_at else 0.0
        reset_s = str(max(0, math.ceil(self.window_s - elapsed_s)))
        return {
            "RateLimit-Policy": f"{self.limit};w={self.window_s:.0f}",
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(max(0, self.limit - self.used)),
            "RateLimit-Reset": reset_s,
            **({"Retry-After": reset_s} if self.used > self.limit else {}),
        }


@dataclass(slots=True)
class Meter:
    """Counts requests and remembers the most that any window of `window_s`, wherever it begins, has held."""

    window_s: float
    peak: int = 0
    recent: deque[datetime] = field(default_factory=deque)

    def hit(self, now: datetime) -> None:
        self.recent.append(now)
        while (now - self.recent[0]).total_seconds() >= self.window_s:
            self.recent.popleft()
        self.peak = max(self.peak, len(self.recent))
