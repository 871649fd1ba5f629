"""The payload model is the only list of payload fields: what is published has them, and a new one is one line."""

import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relay.domain.call import Contact, Direction, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.enrichment.contacts import contact_part
from relay.events.decide import Publish, decide
from relay.events.fields import fields_of, names_of
from relay.events.payload import (
    CALL_FIELDS,
    CONTACT_FIELDS,
    FLAT_FIELDS,
    NO_RECORDING,
    PartyPayload,
    PersonPayload,
    model_of,
)
from relay.events.render import flatten
from relay.store.calls import StoredCall

ROOT = Path(__file__).parent.parent.parent
AT = datetime(2025, 7, 1, 12, tzinfo=UTC)
PARTY = Party("+12025550123", "(202) 555-0123", NumberType.E164, "101", "Jo", "US", internal=True, user_id="u1")
FROM_ELSEWHERE = {"id", "provider", "source_id", "revision", "recording", "contact"}
"""Fields of a call that are not the record's."""


def full_record() -> Record:
    return Record(
        key="7",
        started_at=AT,
        local_date="2025-07-01",
        direction=Direction.INBOUND,
        outcome=Outcome.ANSWERED,
        status_raw="ANSWERED",
        end_reason="hangup",
        ended_by="caller",
        caller=PARTY,
        callee=PARTY,
        external=PARTY,
        internal=PARTY,
        answered_at=AT,
        ended_at=AT,
        duration_seconds=1.0,
        derived=("ended_at",),
        transcription={"available": True, "summary": "s", "transcript": "t", "truncated": False},
        transfers=({"to": "102"},),
        participants=({"name": "Jo"},),
        custom={"queue": "sales"},
    )


def updated_event() -> Json:
    """A `call.updated` about a call of which everything is known."""
    contacts = [Contact("1", "CRM-1", "Jo", "Sample Ltd", "jo@example.com"), Contact("2")]
    recording = dict.fromkeys(NO_RECORDING, "0") | {"status": "available", "expires_at": "2025-07-08T12:00:00Z"}
    rules = SourceRules("webfones", "UTC", True, True, 0, 0, "https://relay.example.com")
    call = StoredCall("call_" + "a" * 26, "main", "7", 1, True, 0, 0, 0, "poll", full_record().content())
    first = decide(call, now_ms=1, rules=rules)
    assert isinstance(first, Publish)
    known = replace(call, published=first.published, contact=contact_part(contacts), recording=recording)
    second = decide(known, now_ms=1, rules=rules)
    assert isinstance(second, Publish)
    return second.events[0].document


def test_a_record_has_the_fields_of_the_model_in_their_order() -> None:
    """`Record.content()` and `Party.content()` are spelled out for speed; this holds them to the model."""
    content = full_record().content()

    assert list(content) == [name for name in CALL_FIELDS if name not in FROM_ELSEWHERE]
    assert list(content["from"]) == list(names_of(PartyPayload))


def test_a_contact_has_the_fields_of_the_model_in_their_order() -> None:
    """A match, the others beside it, and no match."""
    matched = contact_part([Contact("1"), Contact("2")])

    assert list(matched) == list(contact_part([])) == list(CONTACT_FIELDS)
    assert [list(person) for person in matched["others"]] == [list(names_of(PersonPayload))]


def test_every_field_of_the_model_is_published_with_a_value() -> None:
    """No field is declared that nothing fills: of a call of which everything is known, none is missing or null."""
    document = updated_event()

    optional = {("data", "call", "raw"), ("truncated",)}
    for field in fields_of(model_of("call.updated")):
        assert field.path in optional or value_at(document, field.path) is not None, field.path


def test_what_is_published_validates_against_the_model() -> None:
    """Strictly: an event has no field that the model does not declare."""
    model_of("call.updated").model_validate(updated_event())


def test_the_flat_form_has_each_scalar_of_the_model_under_a_name_of_its_own() -> None:
    """No name stands for two fields of one event, and each has its value."""
    names = [name for field in fields_of(model_of("call.updated")) for name in field.flat]
    flattened = flatten(updated_event())

    assert len(names) == len(set(names))
    assert set(names) <= set(FLAT_FIELDS)
    assert [name for name in names if flattened[name] is None] == []


ADD_A_FIELD = {
    "relay/events/payload.py": (
        "    recording: Annotated[RecordingPayload,",
        '    queue: Annotated[str | None, Info("the queue that took the call", "sales")]\n',
    ),
    "relay/domain/call.py": ('            "transcription": self.transcription,\n', '            "queue": "sales",\n'),
}
LOOK_FOR_IT = """
import runpy
from datetime import UTC, datetime
from relay.api.calls import CallView
from relay.domain.call import Record
from relay.domain.source import SourceRules
from relay.events.decide import decide
from relay.events.payload import model_of, schema_of
from relay.events.render import flatten
from relay.events.samples import sample
from relay.store.calls import StoredCall

now = datetime(2025, 7, 1, tzinfo=UTC)
record = Record(key="7", started_at=now, local_date="2025-07-01").content()
call = StoredCall("call_" + "a" * 26, "main", "7", 1, True, 0, 0, 0, "poll", record)
event = decide(call, now_ms=1, rules=SourceRules("webfones", "UTC", False, False, 0, 0)).events[0].document
model_of("call.completed").model_validate(event)
assert event["data"]["call"]["queue"] == flatten(event)["queue"] == "sales"
assert sample("call.completed", now=now)["data"]["call"]["queue"] == "sales"
assert "queue" in schema_of("call.completed")["$defs"]["CallWithRawPayload"]["properties"]
assert "queue" in CallView.model_fields
assert "| `queue` | string or null | `queue` | the queue that took the call |" in runpy.run_path(
    ".ci/events_reference.py"
)["page"]()
"""


def test_a_new_field_of_a_call_is_one_line_in_the_model_and_its_value(tmp_path: Path) -> None:
    """In a copy of the code, the full event, flat form, sample, schema, API view and docs all gain it, nothing else."""
    for folder in ("relay", ".ci", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, (before, line) in ADD_A_FIELD.items():
        source = (tmp_path / file).read_text()
        assert source.count(before) == 1
        (tmp_path / file).write_text(source.replace(before, line + before))

    checked = subprocess.run(
        [sys.executable, "-c", LOOK_FOR_IT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert checked.returncode == 0, checked.stderr


def value_at(document: Json, path: tuple[str, ...]) -> Any:
    value: Any = document
    for name in path:
        value = value[name]
    return value
