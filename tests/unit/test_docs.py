"""Everything the documents name exists, and everything that exists is documented."""

import ast
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from typer.main import get_command

import relay.gauges  # noqa: F401 - registers every metric
from relay.cli.main import app
from relay.domain.call import Direction, LookupStatus, NumberType, Outcome, RecordingStatus
from relay.events.payload import FLAT_FIELDS
from relay.events.types import EVENT_TYPES
from tests.scripts import script

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def section(name: str, title: str) -> str:
    return text(name).split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_settings_page_is_generated_from_the_settings() -> None:
    """docs/settings.md is what .ci/settings_reference.py writes."""
    reference = script("settings_reference")
    page: str = reference.page()

    assert text("docs/settings.md") == page
    assert all(f"`{doc.path}`" in page for doc in reference.describe())


def test_the_tables_of_the_events_page_are_generated_from_the_payload_model() -> None:
    """docs/events.md is what .ci/events_reference.py writes: every event type, field, flat name and value."""
    page: str = script("events_reference").page()

    assert text("docs/events.md") == page
    values = {value.value for enum in (Direction, Outcome, NumberType, RecordingStatus, LookupStatus) for value in enum}
    assert [word for word in {*EVENT_TYPES, *FLAT_FIELDS, *values} if f"`{word}`" not in page] == []


def test_event_types_named_in_the_events_page_exist() -> None:
    """In its prose as well as its tables."""
    named = re.findall(r"`((?:call|source|subscription|webhook)\.[a-z.]+)`", text("docs/events.md"))

    assert set(named) <= set(EVENT_TYPES)


def test_commands_in_the_documents_exist() -> None:
    """`relay something` in a document is a command, and every command is in some document."""
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    pages = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|[`/ ])relay +([a-z]+)\b(?=[ `\n])", pages, re.M))

    assert commands - named == set()
    assert set(re.findall(r"`relay ([a-z]+)\b", pages)) <= commands


def test_exactly_the_existing_metrics_are_documented() -> None:
    """docs/operations.md lists exactly what /metrics has."""
    ours = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("relay_")}
    named = {
        re.sub(r"_(total|bucket|count|sum)$", "", name)
        for name in re.findall(r"`(relay_\w+)", section("docs/operations.md", "Metrics"))
    }

    assert ours - named == set()
    assert named - ours == set()


def test_exactly_the_existing_log_events_are_documented() -> None:
    """docs/operations.md lists the events that the code logs, each with its level."""
    logged: set[tuple[str, str]] = set()
    for path in [*(ROOT / "relay").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(ast.Name("log"), level), args=[ast.Constant(str() as event), *_]):
                    logged.add((event, "error" if level == "exception" else level))
    documented = re.findall(r"^\| `(\w+)` \| (\w+) \|", section("docs/operations.md", "Log events"), re.M)

    assert sorted(documented) == sorted(logged)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", event) for event, _ in documented)


def test_files_named_for_contributors_exist() -> None:
    """docs/contributing.md says where things are."""
    files = re.findall(r"`((?:relay|docs|tests|\.ci)/[\w./]+\.\w+)`", text("docs/contributing.md"))

    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_have_a_target(page: Path) -> None:
    """A relative link names an existing file."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_promise_names_tests_that_exist() -> None:
    """docs/promises.md maps each of the twelve promises to tests."""
    page = text("docs/promises.md")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)

    assert len(re.findall(r"^## \d+\. ", page, re.M)) == 12
    assert len(named) > 20
    for file, name in named:
        assert (ROOT / file).exists(), file
        assert not name or re.search(rf"def {name}\b", (ROOT / file).read_text()), f"{file}::{name}"
