"""Makes a process an older release, without the provider `webfones`; Python reads this at its start."""

from relay.providers import PROVIDERS

del PROVIDERS["webfones"]
