"""Every provider under test. A new one is a module with its provider and an entry here."""

from tests.contract.providers.cinnox import CinnoxUnderTest
from tests.contract.providers.nfon import NfonUnderTest
from tests.contract.providers.under_test import MakeProvider
from tests.contract.providers.unpod import UnpodUnderTest
from tests.contract.providers.webfones import WebFonesUnderTest

UNDER_TEST: dict[str, MakeProvider] = {
    "nfon": NfonUnderTest,
    "cinnox": CinnoxUnderTest,
    "unpod": UnpodUnderTest,
    "webfones": WebFonesUnderTest,
}
