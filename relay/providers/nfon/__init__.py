"""NFON Call History. Promise: the stream makes calls fast, polls make them complete."""

from relay.providers.base import ProviderKind
from relay.providers.nfon.client import Nfon
from relay.providers.nfon.options import NfonOptions
from relay.providers.nfon.wire import MAPPING_VERSION

# The document states no limit; a 429 is waited out.
NFON = ProviderKind(
    name="nfon",
    options=NfonOptions,
    connect=Nfon,
    mapping_version=MAPPING_VERSION,
    credential=NfonOptions.credential,
)
