"""The ports of a provider: what the stages ask of one account, and the values it answers with.

A provider folder has a pure `wire.py` (requests out, rows in) and a thin `client.py`. Failures are the ProviderErrors
of `relay.errors`; expected answers are the values below. A capability that a provider lacks is None.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import aiohttp
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from relay.domain.call import Contact, InvalidRow, Record
from relay.errors import RateLimited


class Purpose(IntEnum):
    """What a request is for. When the budget runs low, the highest value stops first."""

    POLL = 0
    CONTACTS = 1
    RECORDING = 2
    RETRY = 3
    BACKFILL = 4


class RequestBudget(Protocol):
    """What the HTTP client needs of the budget of the account it asks."""

    async def spend(self, purpose: Purpose) -> None:
        """Count a request that is about to be sent. Raises OverBudget when there is no room for it."""
        ...

    async def close(self, refusal: RateLimited, purpose: Purpose) -> None:
        """Stop requests after the provider refused one for `purpose`."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Calls that started after `since` and, where the provider can filter by it, not after `until`; aware UTC."""

    since: datetime
    until: datetime
    purpose: Purpose = Purpose.POLL


@dataclass(frozen=True, slots=True)
class CallPage:
    """One page of the call list. `server_time` is the response's `Date` header, where there was one."""

    rows: Sequence[Record | InvalidRow]
    server_time: datetime | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Audio:
    """A recording in transfer: `chunks` can be read once; `size_bytes` is None when the provider does not state it."""

    chunks: AsyncIterator[bytes]
    content_type: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class NoRecordingYet:
    """The provider has the call, and no recording of it, at least so far."""


@dataclass(frozen=True, slots=True)
class NoSuchCall:
    """The provider does not have the call, or it belongs to another account."""


class CallList(Protocol):
    """Lists calls. Yields pages as they arrive; an exception half way means that the rest was not read."""

    def pages(self, window: Window) -> AsyncIterator[CallPage]: ...


class RecordingSource(Protocol):
    """Streams the audio of a call.

    `key` is the record's `custom["call_id"]` where it has one, else its key: whatever the provider files audio under.
    """

    def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AbstractAsyncContextManager[Audio | NoRecordingYet | NoSuchCall]: ...


@dataclass(frozen=True, slots=True)
class ContactChanges:
    """The newest version of the address book, and whether it differs from the one asked about."""

    version: int
    changed: bool


class ContactSource(Protocol):
    """Looks up numbers. `batch` is how many numbers one request may carry."""

    batch: int

    async def search(self, numbers: Sequence[str]) -> Mapping[str, Sequence[Contact]]:
        """Find contacts by E.164 number with one request. Every requested number is a key of the result."""
        ...

    async def changes_after(self, version: int) -> ContactChanges:
        """Check with one request whether any contact changed after `version`."""
        ...


class CallStream(Protocol):
    """Delivers rows as calls end. Only ever a shortcut: polling continues and finds what the stream missed."""

    def listening(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Record | InvalidRow]]]:
        """Connect with one request, then yield rows until the stream ends, goes idle or its token expires.

        Raises ProviderError for failures, while connecting and while reading; the end of a stream is not one.
        """
        ...


class DetailSource(Protocol):
    """Adds to records what the call list only announces, such as a transcript."""

    async def complete(self, records: Sequence[Record]) -> Sequence[Record]:
        """Return the records with their details, in the same order; never raises a RelayError.

        One whose details are unavailable for now is returned as if it had none, so that a later poll sees a change.
        """
        ...


class CredentialStore(Protocol):
    """Persists a secret of one source, shared by all processes."""

    async def read(self) -> str | None:
        """Return the last written text."""
        ...

    async def write(self, text: str) -> None:
        """Store a text, encrypted."""
        ...

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Hold the lock that all processes share, for at most half a minute."""
        ...


@dataclass(frozen=True, slots=True)
class ProviderHealth:
    """What `relay check` shows of a provider: one line per service, and whether all of them work."""

    ok: bool
    lines: Sequence[str]


class Provider(Protocol):
    """One connected account. A client inherits from it and sets the ports that its provider has."""

    calls: CallList
    recordings: RecordingSource | None = None
    contacts: ContactSource | None = None
    stream: CallStream | None = None
    details: DetailSource | None = None

    async def health(self) -> ProviderHealth:
        """Check connection and credentials with at most two requests; never raises a RelayError."""
        ...


def _valid_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{name!r} is not a valid time zone; use a name such as UTC or America/New_York") from None
    return name


def _valid_proxy(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is not a valid proxy; use http://host:port or https://host:port")
    return text


ZoneName = Annotated[str, AfterValidator(_valid_zone)]


class SourceOptions(BaseModel):
    """Options that every source has; a provider's own options extend them in its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: str = Field(description="the kind of phone system")
    timezone: ZoneName = Field(
        "UTC", description="IANA zone of the times in the provider's rows, where they carry none"
    )
    region: str = Field(
        "US",
        pattern="^[A-Z]{2}$",
        description="country whose dialling rules national numbers follow: two capital letters, such as US",
    )
    poll_interval_s: float = Field(30, ge=1, le=86_400, description="seconds between two polls")
    hold_for_contact_s: float = Field(
        5, ge=0, le=300, description="longest wait for a contact before the event is published"
    )
    hold_for_recording_s: float = Field(
        30, ge=0, le=3600, description="longest wait for the audio before the event is published; 0 never waits"
    )
    recordings: bool = Field(True, description="fetch the audio of answered calls")
    contacts: bool = Field(True, description="look up callers in the provider's address book")
    budget_share: float = Field(0.6, gt=0, le=1, description="our share of the provider's request limit")
    proxy_url: Annotated[str, AfterValidator(_valid_proxy)] | None = Field(
        None, repr=False, description="HTTP proxy for all requests of this source"
    )
    enabled: bool = Field(True, description="false: not polled")

    @property
    def server(self) -> str:
        """What requests are counted by, beside the credential."""
        return self.provider


class HttpSourceOptions(SourceOptions):
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str

    @property
    def host(self) -> str:
        """The host of `base_url`: all that messages show of it."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def server(self) -> str:
        return urlsplit(self.base_url).netloc.lower()


@dataclass(frozen=True, slots=True)
class ProviderKind:
    """A provider as the registry knows it.

    `connect(options, http, budget, store)` opens one account on a shared aiohttp session and sends nothing yet; `store`
    is for providers whose credential changes while in use. Raise `mapping_version` when the mapping changes a record's
    content, so that an upgrade re-hashes rows silently. `credential(options)` identifies what the rate limit counts by.
    `upper_bound`: the list honours a window's end, so a long range can be read in steps.
    """

    name: str
    options: type[Any]
    connect: Callable[[Any, aiohttp.ClientSession, RequestBudget, CredentialStore | None], Provider]
    mapping_version: int
    credential: Callable[[Any], str]
    requests_per_window: int | None = None
    window_s: int | None = None
    upper_bound: bool = False
