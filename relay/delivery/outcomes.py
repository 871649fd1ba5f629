"""What came of one attempt to deliver, as a value.

    AttemptOutcome
    ├── Delivered        2xx: acknowledged
    ├── Gone             410: the subscriber wants no more events
    ├── Throttled        429, 503: not now, perhaps with a Retry-After
    ├── Rejected         any other status; redirects too, which are not followed
    ├── TimedOut         the request was sent, no answer came in time
    ├── Interrupted      the request was sent, then the connection was reset, closed, or answered with no HTTP
    ├── Unreachable      nothing was sent: no address, no connection, no TLS
    ├── AddressRefused   nothing was dialled: the address guard refused
    ├── NotRendered      nothing was dialled: the subscription's field map exceeds its time budget
    └── Postponed        nothing was dialled: this process is out of descriptors; no attempt is counted

`never_sent` decides whether an at-most-once delivery may be retried: it is True only where the subscriber cannot have
received the request.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

EXCERPT_CHARS: Final = 300
# Control, zero-width and bidirectional characters: an excerpt is shown in terminals and web pages.
_UNPRINTABLE: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """What every attempt has. `duration_ms` runs from the look-up to the last byte that was read."""

    kind: ClassVar[str]
    never_sent: ClassVar[bool] = False
    duration_ms: int = 0

    @property
    def message(self) -> str:
        raise NotImplementedError

    @property
    def trips_circuit(self) -> bool:
        """Whether the endpoint looks broken, rather than this one event unacceptable to it."""
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the delivery's list of attempts, without what is empty."""
        return {"outcome": self.kind, "duration_ms": self.duration_ms, "words": self.message}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered(_Attempt):
    """An attempt with an HTTP answer. `excerpt` is the beginning of its body as one line of text."""

    status: int
    excerpt: str = ""

    @property
    def message(self) -> str:
        if 300 <= self.status < 400:
            return f"answered {self.status}, a redirect; redirects are not followed"
        return f"answered {self.status}"

    @property
    def trips_circuit(self) -> bool:
        return self.status >= 500

    def to_json(self) -> dict[str, Any]:
        excerpt = {"excerpt": self.excerpt} if self.excerpt else {}
        return {**_Attempt.to_json(self), "status": self.status, **excerpt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered(_Answered):
    """2xx. The status alone decides, whatever becomes of the body."""

    kind: ClassVar[str] = "delivered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone(_Answered):
    kind: ClassVar[str] = "gone"
    status: int = 410

    @property
    def message(self) -> str:
        return "answered 410 Gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttled(_Answered):
    """429 or 503; `retry_after_s` is None when the answer had no valid Retry-After."""

    kind: ClassVar[str] = "throttled"
    retry_after_s: float | None = None

    @property
    def message(self) -> str:
        if self.retry_after_s is None:
            return f"answered {self.status}"
        return f"answered {self.status} with Retry-After: {self.retry_after_s:.0f} s"

    def to_json(self) -> dict[str, Any]:
        waits = {} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}
        return {**_Answered.to_json(self), **waits}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected(_Answered):
    kind: ClassVar[str] = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut(_Attempt):
    """The request was sent, at least in part, and no answer came in time."""

    kind: ClassVar[str] = "timed_out"
    timeout_s: float

    @property
    def message(self) -> str:
        return f"did not answer within {self.timeout_s:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unanswered(_Attempt):
    reason: str

    @property
    def message(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(_Unanswered):
    """The request was sent, at least in part, and the connection gave no HTTP answer."""

    kind: ClassVar[str] = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable(_Unanswered):
    """The request was never sent; `stage` is where the attempt ended."""

    kind: ClassVar[str] = "unreachable"
    never_sent: ClassVar[bool] = True
    stage: Literal["dns", "connect", "tls", "send"]

    def to_json(self) -> dict[str, Any]:
        return {**_Attempt.to_json(self), "stage": self.stage}


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRefused(_Unanswered):
    """The address guard refused; `reason` has the setting that would allow the address, if any would."""

    kind: ClassVar[str] = "refused"
    never_sent: ClassVar[bool] = True

    @property
    def trips_circuit(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRendered(_Attempt):
    """The body could not be built."""

    kind: ClassVar[str] = "not_rendered"
    never_sent: ClassVar[bool] = True
    reason: str

    @property
    def message(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Postponed(_Attempt):
    """The relay itself had no resources for an attempt, which says nothing about the subscriber."""

    kind: ClassVar[str] = "postponed"
    never_sent: ClassVar[bool] = True

    @property
    def message(self) -> str:
        return "the relay has no free file descriptor; raise the limit of open files"

    @property
    def trips_circuit(self) -> bool:
        return False


AttemptOutcome = (
    Delivered
    | Gone
    | Throttled
    | Rejected
    | TimedOut
    | Interrupted
    | Unreachable
    | AddressRefused
    | NotRendered
    | Postponed
)


def answered(status: int, *, duration_ms: int, excerpt: str = "", retry_after_s: float | None = None) -> AttemptOutcome:
    if 200 <= status < 300:
        return Delivered(status=status, duration_ms=duration_ms, excerpt=excerpt)
    if status == 410:
        return Gone(duration_ms=duration_ms, excerpt=excerpt)
    if status in (429, 503):
        return Throttled(status=status, duration_ms=duration_ms, excerpt=excerpt, retry_after_s=retry_after_s)
    return Rejected(status=status, duration_ms=duration_ms, excerpt=excerpt)


def excerpt(body: bytes) -> str:
    """Return the beginning of a body as one line of at most 300 printable characters, whatever its bytes are."""
    if not body:
        return ""
    text = _UNPRINTABLE.sub(" ", body[: 8 * EXCERPT_CHARS].decode("utf-8", "replace")).strip()
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"
