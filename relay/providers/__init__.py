"""1. Where calls come from. Promise: any answer becomes typed records, a named error, or a quarantined row."""

from relay.providers.base import ProviderKind
from relay.providers.cinnox import CINNOX
from relay.providers.nfon import NFON
from relay.providers.unpod import UNPOD
from relay.providers.webfones import WEBFONES

# All providers, by the name that `provider:` takes. A new one is a folder and an entry here.
PROVIDERS: dict[str, ProviderKind] = {kind.name: kind for kind in (CINNOX, NFON, UNPOD, WEBFONES)}
