"""A provider under test: what the suite has to know about one provider and its fake, and nothing more.

The suite describes calls as `CallPlan`s; each provider's fake writes them in its own columns and lists a call from
`visible_at` on, at the time of the given clock. A provider joins with a `ProviderUnderTest` and an entry in
`tests/contract/providers/registry.py`.
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


class ListFault(StrEnum):
    """A fault of the call list that every fake can inject."""

    DROP = "drop"
    """The connection is reset: `Unavailable`."""
    NOT_JSON = "not_json"
    """A page of HTML with status 200: `UnexpectedResponse`."""
    PARTIAL = "partial"
    """Status 206 with a message: `UnexpectedResponse`."""
    GARBAGE = "garbage"
    """Invalid rows between valid ones: each becomes an `InvalidRow`, the others stay."""
    HUGE = "huge"
    """A body of more than the client's cap, with status 200: `UnexpectedResponse`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error that the provider's document knows, and what it has to become."""

    name: str
    status: int
    body: str
    error: type[ProviderError]


class ProviderUnderTest(Protocol):
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

    def inject(self, what: ListFault, *, times: int | None = 1) -> None:
        """Spoil the next `times` answers to requests for calls (None: all)."""
        ...

    def refuse(self, refusal: Refusal, *, times: int | None = 1) -> None:
        """Refuse the next `times` requests for calls like this."""
        ...

    def clear_faults(self) -> None:
        """Take all trouble and refusals back."""
        ...

    @property
    def requests(self) -> int:
        """Requests that arrived so far, of any kind, refused ones too."""
        ...


MakeProvider = Callable[[Now, str], ProviderUnderTest]
"""A provider on a clock, whose account has this zone; a provider whose rows carry their zone may ignore it."""
