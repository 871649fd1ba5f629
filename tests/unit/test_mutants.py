"""The list of mutants fits the code; running them takes `make mutants`."""

from tests.mutants.__main__ import load, misfits


def test_every_mutant_fits_the_code_and_names_tests_that_exist() -> None:
    """A change of a line that a mutant replaces adapts tests/mutants/mutants.toml with it."""
    assert list(misfits(load())) == []


def test_there_are_mutants_of_every_rule_that_must_not_break() -> None:
    files = {mutant.file.rpartition("/")[2] for mutant in load()}

    assert len(load()) >= 120
    assert {"exchange.lua", "ingest.lua", "erase.lua", "budget.lua", "window.py", "decide.py", "retry.py"} <= files
