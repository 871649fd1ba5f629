"""CINNOX: the data API's call lists. Promise: a call that two lists have is published once."""

from relay.providers.base import ProviderKind
from relay.providers.cinnox.client import Cinnox
from relay.providers.cinnox.options import CinnoxOptions
from relay.providers.cinnox.wire import MAPPING_VERSION

# There is a limit (error 6451010), but it is not documented; a refusal is waited out.
CINNOX = ProviderKind(
    name="cinnox",
    options=CinnoxOptions,
    connect=Cinnox,
    mapping_version=MAPPING_VERSION,
    credential=CinnoxOptions.credential,
    upper_bound=True,
)
