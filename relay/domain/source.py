"""What a source's options mean for its calls, whatever the provider."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceRules:
    """Which extras the source's calls have, and how long each may hold an event, in ms."""

    provider: str
    timezone: str
    contacts: bool
    recordings: bool
    hold_for_contact_ms: int
    hold_for_recording_ms: int
    public_url: str | None = None
