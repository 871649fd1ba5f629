"""A provider under test: what the suite has to know about one provider and its simulator, and nothing more.

The suite speaks of calls as `CallPlan`s; a subject says them in its provider's words. Its simulator shows a call from
`visible_at` on, at the time that the handed-in clock tells. A provider joins with a subject and an entry in
`tests/contract/providers/subjects.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from relay.errors import ProviderError
from relay.providers.base import ProviderKind, SourceOptions
from relay.simulator.timeline import CallPlan

Now = Callable[[], datetime]


class Trouble(StrEnum):
    """What a simulator can be told to do to a request for calls, whatever its own name for it is."""

    DROP = "drop"
    """The connection is reset: `Unavailable`."""
    NOT_JSON = "not_json"
    """A page of HTML with status 200: `UnexpectedResponse`."""
    PARTIAL = "partial"
    """Status 206 with a message: `UnexpectedResponse`."""
    GARBAGE = "garbage"
    """Rows nobody should believe between the good ones: each becomes a `InvalidRow`, the good ones stay."""
    HUGE = "huge"
    """A body of more than the client's cap, with status 200: `UnexpectedResponse`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error that the provider's document knows, and what it has to become."""

    name: str
    status: int
    body: str
    error: type[ProviderError]


class Subject(Protocol):
    """One provider with one account on its simulator. `zone` is that of the account, as its rows show it."""

    kind: ProviderKind
    refusals: Sequence[Refusal]

    def serve(self) -> AbstractAsyncContextManager[str]:
        """Listen on the loopback interface until the block ends; gives what `options` takes as `base_url`."""
        ...

    def options(self, base_url: str, **changes: Any) -> SourceOptions:
        """The source's options with the credential that the simulator accepts; `changes` are other options."""
        ...

    def wrong_credentials(self, base_url: str) -> Sequence[SourceOptions]:
        """Options that are well-formed, and that the simulator refuses: each has to end in `Unauthorized`."""
        ...

    def add(self, plans: Iterable[CallPlan]) -> None:
        """Let the provider have calls; each shows from its `visible_at` on, or again when it was removed."""
        ...

    def change(self, plan: CallPlan, *, at: datetime) -> None:
        """Let the row of a call differ from `at` on, in something that a subscriber can see."""
        ...

    def remove(self, plan: CallPlan) -> None:
        """Let the provider forget a call."""
        ...

    def key(self, plan: CallPlan) -> str:
        """The key that the call's record must have."""
        ...

    def trouble(self, what: Trouble, *, times: int | None = 1) -> None:
        """Spoil the next `times` answers to requests for calls (None: all)."""
        ...

    def refuse(self, refusal: Refusal, *, times: int | None = 1) -> None:
        """Refuse the next `times` requests for calls like this."""
        ...

    def behave(self) -> None:
        """Take all trouble and refusals back."""
        ...

    @property
    def requests(self) -> int:
        """Requests that arrived so far, of any kind, refused ones too."""
        ...


MakeSubject = Callable[[Now, str], Subject]
"""A subject on a clock, whose account has this zone; a provider whose rows carry their zone may ignore it."""
