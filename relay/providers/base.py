"""The ports of a provider: what the stages ask of one, and what it may answer.

A provider folder has pure `wire.py` (requests out, rows in) and a thin `client.py`. Errors are those of
`relay.errors` (ProviderError and its children); expected answers are the values below. What a provider can do is read
off its `Provider`: a port that it lacks is None.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Annotated, Any, Protocol
from zoneinfo import ZoneInfo

import aiohttp
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from relay.domain.call import Contact, Record
from relay.domain.json import Json


class Purpose(IntEnum):
    """What a request to a provider is for: the order in which the budget's room is given out, first come the lowest."""

    POLL = 0
    CONTACTS = 1
    RECORDING = 2
    RETRY = 3
    BACKFILL = 4


Pay = Callable[[Purpose], Awaitable[None]]
"""Awaited before each request; raises `OverBudget` instead of letting a request go."""


@dataclass(frozen=True, slots=True)
class Window:
    """Ask for calls that started after `since` and, where the provider can say so, not after `until`; aware UTC."""

    since: datetime
    until: datetime
    purpose: Purpose = Purpose.POLL


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that cannot be believed: why, in a sentence, and a short piece of it without full phone numbers."""

    reason: str
    key: str | None = None
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of the call list. `server_time` is the answer's `Date`, where there was one."""

    rows: Sequence[Record | InvalidRow]
    server_time: datetime | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Audio:
    """A recording that is being sent: `chunks` may be read once; `size_bytes` is None when the provider did not say."""

    chunks: AsyncIterator[bytes]
    content_type: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class NoRecordingYet:
    """The call is known and has no recording, or none so far."""


@dataclass(frozen=True, slots=True)
class NoSuchCall:
    """The provider does not know the call, or not as ours."""


class CallList(Protocol):
    """Lists calls. Yields pages as they arrive; raising in the middle means that the rest was not read."""

    def pages(self, window: Window) -> AsyncIterator[Page]: ...


class RecordingSource(Protocol):
    """Sends the audio of a call.

    `key` is the record's `custom["call_id"]` where it has one, which is by what its provider keeps audio; else its key.
    """

    def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AbstractAsyncContextManager[Audio | NoRecordingYet | NoSuchCall]: ...


@dataclass(frozen=True, slots=True)
class ContactChanges:
    """What changed in the address book: the newest version seen (the one asked about when nothing changed)."""

    version: int
    changed: bool


class ContactSource(Protocol):
    """Looks numbers up. `batch` is the most numbers that one request may carry."""

    batch: int

    async def search(self, numbers: Sequence[str]) -> Mapping[str, Sequence[Contact]]:
        """Find contacts by E.164 number, one request. Every number asked for is a key of the answer."""
        ...

    async def changes_after(self, version: int) -> ContactChanges:
        """Ask whether any contact changed after `version`, one request."""
        ...


class CallStream(Protocol):
    """Is told of calls as they come. Only ever a shortcut: polling goes on, and finds whatever the stream lost."""

    def listening(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Record | InvalidRow]]]:
        """Connect, one request; then rows as they arrive, until the stream ends, falls silent or needs a new token.

        Trouble is a ProviderError, before and while rows come; the end of a stream is none.
        """
        ...


class DetailSource(Protocol):
    """Adds to records what the call list only announces, such as a transcript."""

    async def complete(self, records: Sequence[Record]) -> Sequence[Record]:
        """Complete records, in their order; never raises ProviderError.

        One that could not be completed now comes back as if there were nothing more yet, and will be found changed.
        """
        ...


class CredentialStore(Protocol):
    """Keeps what one source must remember in secret, over restarts and for all processes."""

    async def read(self) -> str | None:
        """Read what was written last."""
        ...

    async def write(self, text: str) -> None:
        """Keep a text, encrypted."""
        ...

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Wait until no other process is inside, then keep the others out, for at most half a minute."""
        ...


@dataclass(frozen=True, slots=True)
class Health:
    """What `relay check` shows: a line a service, and whether all is well."""

    ok: bool
    lines: Sequence[str]


class Provider(Protocol):
    """One connected account. A port that the provider lacks is None."""

    calls: CallList
    recordings: RecordingSource | None
    contacts: ContactSource | None
    stream: CallStream | None
    details: DetailSource | None

    async def health(self) -> Health:
        """Ask the provider how it is, in at most two requests; never raises ProviderError."""
        ...


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone; use a name such as UTC or America/New_York") from None
    return name


ZoneName = Annotated[str, AfterValidator(_known_zone)]


class SourceOptions(BaseModel):
    """What every source has, whatever its provider; a provider's own options extend it in its folder."""

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
    hold_for_contact_s: float = Field(5, ge=0, le=300, description="longest wait for a contact before the call is told")
    hold_for_recording_s: float = Field(30, ge=0, le=3600, description="longest wait for the audio; 0 never waits")
    recordings: bool = Field(True, description="fetch the audio of answered calls")
    contacts: bool = Field(True, description="look callers up in the provider's address book")
    budget_share: float = Field(0.6, gt=0, le=1, description="our share of the provider's request limit")
    proxy_url: str | None = Field(None, repr=False, description="HTTP proxy through which this source is asked")
    enabled: bool = Field(True, description="false: not polled")


@dataclass(frozen=True, slots=True)
class ProviderKind:
    """A provider as the registry knows it.

    `options` is the pydantic model of a source of this kind; `connect(options, http, pay)` opens one account on a
    shared aiohttp session, without asking anything yet. `mapping_version` is raised when the normalising changes
    content, so that an upgrade re-hashes in silence. `credential(options)` is what the rate limit is keyed by.
    `upper_bound` says that a window's end is heeded, so that a long range can be read in steps. Where a credential
    changes while it is used, `connect_with_store` opens the account with a store for it; `connect` never changes it.
    """

    name: str
    options: type[Any]
    connect: Callable[[Any, aiohttp.ClientSession, Pay], Provider]
    mapping_version: int
    credential: Callable[[Any], str]
    requests_per_window: int | None
    window_s: int | None
    upper_bound: bool = False
    connect_with_store: Callable[[Any, aiohttp.ClientSession, Pay, CredentialStore], Provider] | None = None


def excerpt(row: Json, *, keep: int = 120) -> str:
    """Cut a row down to something that may be logged: digits beyond the last two of each run are masked."""
    masked: list[str] = []
    text = str(row)[: 4 * keep]
    for index, char in enumerate(text):
        hidden = char.isdigit() and index + 2 < len(text) and text[index + 1].isdigit() and text[index + 2].isdigit()
        masked.append("•" if hidden else char)
    return "".join(masked)[:keep]
