"""Every provider under test. A new one is a module with its subject and an entry here."""

from tests.contract.providers.subject import MakeSubject
from tests.contract.providers.webfones import WebfonesSubject

SUBJECTS: dict[str, MakeSubject] = {
    "webfones": WebfonesSubject,
}
