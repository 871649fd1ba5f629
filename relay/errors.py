"""All errors, as one tree. A message is what an operator reads: what happened, to what, what to do.

RelayError
├── SettingsError             the start stops, exit code 2
├── StoreError
│   ├── StoreInUse            another relay owns this database or directory
│   └── StoreTooNew           the database was written by a newer release
├── ForeignId                 an id has data of another owner
├── StorageError              recordings cannot be stored or read for now
│   └── StorageFull           no space left for recordings
├── ProviderError
│   ├── Unauthorized          401, 403
│   ├── RateLimited           429: which bucket, until when
│   ├── Unavailable           5xx, timeouts, connection errors
│   └── UnexpectedResponse    a response that the provider's documentation does not describe
└── OverBudget                our own share of a provider's limit is used up for now
"""

from typing import Literal


class RelayError(Exception):
    """Base of all errors whose message can be shown as it is."""


class SettingsError(RelayError):
    """A setting is missing or invalid; the message lists every problem."""


class StoreError(RelayError):
    """The store cannot be used as it is."""


class StoreInUse(StoreError):
    """Another relay owns this database or data directory."""


class StoreTooNew(StoreError):
    """This database was written by a newer release."""


class ForeignId(RelayError):
    """The id of a new source or subscription has data of another owner."""


class StorageError(RelayError):
    """The storage of recordings failed."""


class StorageFull(StorageError):
    """There is no space left for recordings."""


class ProviderError(RelayError):
    """A request to a provider failed."""


class Unauthorized(ProviderError):
    """The provider rejects the credential."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RateLimited(ProviderError):
    """The provider rejected a request as one too many.

    `bucket` is the limit that was hit; `retry_after_s` is None when the response has no Retry-After.
    """

    def __init__(self, message: str, *, bucket: Literal["key", "ip"], retry_after_s: float | None) -> None:
        super().__init__(message)
        self.bucket = bucket
        self.retry_after_s = retry_after_s


class Unavailable(ProviderError):
    """The provider could not be reached, timed out or answered 5xx."""


class UnexpectedResponse(ProviderError):
    """A response that the provider's documentation does not describe; nothing in it is used."""


class OverBudget(RelayError):
    """Our share of the provider's limit is used up for the next `wait_s` seconds."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"our share of the provider's request limit is used up for another {wait_s:.0f} s")
        self.wait_s = wait_s
