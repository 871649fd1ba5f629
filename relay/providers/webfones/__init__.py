"""WebFones: call log 3.1 and contacts 3.0. Promise: an invalid row never hides its neighbours."""

from relay.providers.base import ProviderKind
from relay.providers.webfones.client import Webfones
from relay.providers.webfones.options import WebfonesOptions
from relay.providers.webfones.wire import MAPPING_VERSION

# Documented limit: 1,000 requests in 15 minutes, per key (call log) or per IP address (contacts).
WEBFONES = ProviderKind(
    name="webfones",
    options=WebfonesOptions,
    connect=Webfones,
    mapping_version=MAPPING_VERSION,
    credential=WebfonesOptions.credential,
    requests_per_window=1000,
    window_s=15 * 60,
)
