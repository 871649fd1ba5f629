"""What came of one attempt, as a value: what happened, in plain words, and whether the subscriber may have acted on it.

    Outcome
    ├── Delivered     2xx: heard
    ├── Gone          410: the subscriber asks for no more
    ├── Throttled     429, 503: not now, perhaps with a time
    ├── Rejected      any other answer; redirects too, which are not followed
    ├── TimedOut      connected and sent, no answer in time
    ├── Interrupted   connected, then reset, closed, or answered with what is not HTTP
    ├── Unreachable   nothing was sent: no address, no connection, no TLS
    └── Refused       nothing was dialled: the address guard says no

`known_not_received` is what at-most-once delivery asks: True where the request certainly never left.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

EXCERPT_CHARS: Final = 300
_UNPRINTABLE: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """What every attempt has. `duration_ms` runs from the first look-up to the last byte that was read."""

    kind: ClassVar[str]
    known_not_received: ClassVar[bool] = False
    duration_ms: int = 0

    @property
    def words(self) -> str:
        raise NotImplementedError

    @property
    def trips_breaker(self) -> bool:
        """Whether the subscriber looks unwell, so that sending it more is no use for now."""
        return True

    def to_json(self) -> dict[str, Any]:
        """Write it as the list of attempts keeps it; what is empty is left out."""
        return {"outcome": self.kind, "duration_ms": self.duration_ms, "words": self.words}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered(_Attempt):
    """An attempt with an HTTP answer. `excerpt` is the beginning of its body as one line of text."""

    status: int
    excerpt: str = ""

    @property
    def words(self) -> str:
        if 300 <= self.status < 400:
            return f"answered {self.status}, a redirect; redirects are not followed"
        return f"answered {self.status}"

    @property
    def trips_breaker(self) -> bool:
        return self.status >= 500

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "outcome": self.kind,
            "status": self.status,
            "duration_ms": self.duration_ms,
            "words": self.words,
        }
        if self.excerpt:
            document["excerpt"] = self.excerpt
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered(_Answered):
    """2xx. It holds as soon as the status has come, whatever becomes of the body."""

    kind: ClassVar[str] = "delivered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone(_Answered):
    """410."""

    kind: ClassVar[str] = "gone"
    status: int = 410

    @property
    def words(self) -> str:
        return "answered 410: it asks for nothing more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttled(_Answered):
    """429 or 503; `retry_after_s` is None when the answer named no believable time."""

    kind: ClassVar[str] = "throttled"
    retry_after_s: float | None = None

    @property
    def words(self) -> str:
        if self.retry_after_s is None:
            return f"answered {self.status}"
        return f"answered {self.status}, asking to wait {self.retry_after_s:.0f} s"

    def to_json(self) -> dict[str, Any]:
        document = _Answered.to_json(self)
        if self.retry_after_s is not None:
            document["retry_after_s"] = self.retry_after_s
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected(_Answered):
    """Any answer that is none of the others."""

    kind: ClassVar[str] = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut(_Attempt):
    """The request was sent, at least in part, and no answer came in time."""

    kind: ClassVar[str] = "timed_out"
    timeout_s: float

    @property
    def words(self) -> str:
        return f"did not answer within {self.timeout_s:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(_Attempt):
    """The request was sent, at least in part, and the connection gave no HTTP answer."""

    kind: ClassVar[str] = "interrupted"
    how: str

    @property
    def words(self) -> str:
        return self.how


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable(_Attempt):
    """The request was never sent; `stage` says where it ended."""

    kind: ClassVar[str] = "unreachable"
    known_not_received: ClassVar[bool] = True
    stage: Literal["dns", "connect", "tls", "send"]
    why: str

    @property
    def words(self) -> str:
        return self.why

    def to_json(self) -> dict[str, Any]:
        return {**_Attempt.to_json(self), "stage": self.stage}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(_Attempt):
    """The address guard refused; `why` prints the line that would allow it, where one can."""

    kind: ClassVar[str] = "refused"
    known_not_received: ClassVar[bool] = True
    why: str

    @property
    def words(self) -> str:
        return self.why

    @property
    def trips_breaker(self) -> bool:
        return False


Outcome = Delivered | Gone | Throttled | Rejected | TimedOut | Interrupted | Unreachable | Refused


def answered(status: int, *, duration_ms: int, excerpt: str = "", retry_after_s: float | None = None) -> Outcome:
    """Sort an HTTP answer by its status."""
    if 200 <= status < 300:
        return Delivered(status=status, duration_ms=duration_ms, excerpt=excerpt)
    if status == 410:
        return Gone(duration_ms=duration_ms, excerpt=excerpt)
    if status in (429, 503):
        return Throttled(status=status, duration_ms=duration_ms, excerpt=excerpt, retry_after_s=retry_after_s)
    return Rejected(status=status, duration_ms=duration_ms, excerpt=excerpt)


def excerpt(body: bytes) -> str:
    """Make one line of at most 300 characters of the beginning of a body, whatever is in it."""
    if not body:
        return ""
    text = _UNPRINTABLE.sub(" ", body[: 8 * EXCERPT_CHARS].decode("utf-8", "replace")).strip()
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"
