"""What can go wrong, as one tree. A message is the sentence an operator reads: what happened, to whom, what to do.

RelayError
├── SettingsError             the start stops, exit code 2
├── StoreError
│   ├── StoreInUse            another relay owns this database or directory
│   └── StoreTooNew           the database was written by a newer release
├── StorageError              recordings cannot be kept or read just now
│   └── StorageFull           no room left where recordings are kept
├── ProviderError
│   ├── Unauthorized          401, 403
│   ├── RateLimited           429: which bucket, until when
│   ├── Unavailable           5xx, time-outs, connection trouble
│   └── UnexpectedResponse             an answer that the provider's document does not know
└── OverBudget                our own share of a provider's limit is used up for now
"""

from typing import Literal


class RelayError(Exception):
    """Something the relay can say in a sentence."""


class SettingsError(RelayError):
    """A setting is missing or wrong; the text names every one of them."""


class StoreError(RelayError):
    """The store cannot be used as it is."""


class StoreInUse(StoreError):
    """Another relay owns this database or data directory."""


class StoreTooNew(StoreError):
    """A newer release has written this database."""


class StorageError(RelayError):
    """The storage of recordings did not do what was asked."""


class StorageFull(StorageError):
    """There is no room left where recordings are kept."""


class ProviderError(RelayError):
    """A provider did not do what was asked."""


class Unauthorized(ProviderError):
    """The provider refuses the credential."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RateLimited(ProviderError):
    """The provider says that we asked too often. `bucket` is whose limit it is; `retry_after_s` None when not told."""

    def __init__(self, message: str, *, bucket: Literal["key", "ip"], retry_after_s: float | None) -> None:
        super().__init__(message)
        self.bucket = bucket
        self.retry_after_s = retry_after_s


class Unavailable(ProviderError):
    """The provider could not be reached, took too long, or failed by itself."""


class UnexpectedResponse(ProviderError):
    """The provider's answer is not one that its document knows; nothing in it is believed."""


class OverBudget(RelayError):
    """Our share of the provider's limit is used up; `wait_s` says when there is room again."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"our share of the provider's request limit is used up for another {wait_s:.0f} s")
        self.wait_s = wait_s
