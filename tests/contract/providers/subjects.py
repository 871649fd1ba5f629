"""Every provider under test. A new one is a module with its subject and an entry here."""

from tests.contract.providers.cinnox import CinnoxSubject
from tests.contract.providers.nfon import NfonSubject
from tests.contract.providers.subject import MakeSubject
from tests.contract.providers.unpod import UnpodSubject
from tests.contract.providers.webfones import WebfonesSubject

SUBJECTS: dict[str, MakeSubject] = {
    "nfon": NfonSubject,
    "cinnox": CinnoxSubject,
    "unpod": UnpodSubject,
    "webfones": WebfonesSubject,
}
