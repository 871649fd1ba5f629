"""Unpod: call logs of platform API v2. Promise: only the last page ends the list."""

from relay.providers.base import ProviderKind
from relay.providers.unpod.client import Unpod
from relay.providers.unpod.options import UnpodOptions
from relay.providers.unpod.wire import MAPPING_VERSION

# There is a limit, but it is not documented; a 429 is waited out.
UNPOD = ProviderKind(
    name="unpod",
    options=UnpodOptions,
    connect=Unpod,
    mapping_version=MAPPING_VERSION,
    credential=UnpodOptions.credential,
    upper_bound=True,
)
