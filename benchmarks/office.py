"""Calls of a simulated office, without HTTP: rows as the provider sends them, records, and the events said of them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import orjson

from relay.domain import ids
from relay.domain.call import Contact, Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.enrichment.contacts import contact_part
from relay.events.decide import EventDraft, Publish, decide
from relay.providers.webfones import wire
from relay.simulator.timeline import Habits, calls, people
from relay.simulator.webfones import FakeWebFones
from relay.store.calls import Row, StoredCall

KEY = "office-key"
RULES = SourceRules("webfones", "UTC", True, True, 0, 0, "https://relay.example.com")


def simulator(count: int, *, seed: int = 1, now: datetime | None = None, lines: int = 600) -> FakeWebFones:
    """An account with `count` calls that all are to be seen by `now`, 30 % unanswered, and an address book."""
    now = now or datetime.now(UTC)
    habits = Habits(calls_per_hour=count * 4, late=0.0, talk_max_s=600, recorded=1.0, people=lines)
    office = FakeWebFones(clock=lambda: now)
    office.add_account(KEY)
    office.put_people(KEY, people(seed, habits=habits))
    endless = calls(now - timedelta(minutes=45), seed=seed, habits=habits)
    office.add_calls(KEY, [next(endless) for _ in range(count)])
    return office


def page(office: FakeWebFones) -> bytes:
    """The answer of the call list with all of its calls."""
    now = office.clock()
    answer = office.records(KEY, (now - timedelta(days=1)).strftime("%Y-%m-%d %H:%M:%S"), now)
    return orjson.dumps(answer.body)


def records(body: bytes) -> list[Record]:
    """The rows of such an answer, normalised."""
    rows = wire.read_call_list(orjson.loads(body))
    zone, now = ZoneInfo("UTC"), datetime.now(UTC)
    parsed = [wire.parse_row(row, zone=zone, region="US", seen_at=now) for row in rows]
    return [row for row in parsed if isinstance(row, Record)]


def rows(body: bytes) -> list[Row]:
    """The same as the ledger takes them."""
    return [Row(record, record.content_hash()) for record in records(body)]


def drafts(count: int, *, sid: str, seed: int = 1) -> Sequence[EventDraft]:
    """The `call.completed` events of `count` calls, as they are published: with a contact, the audio pending."""
    said = []
    for record in records(page(simulator(count, seed=seed))):
        now_ms = int(record.started_at.timestamp() * 1000)
        call = StoredCall(
            ids.call_id(sid, record.key),
            sid,
            record.key,
            1,
            True,
            now_ms,
            now_ms,
            now_ms,
            "poll",
            record.content(),
            contact=someone(),
        )
        verdict = decide(call, now_ms=int(datetime.now(UTC).timestamp() * 1000), rules=RULES)
        assert isinstance(verdict, Publish)
        said.append(verdict.events[0])
    return said


def someone() -> Json:
    """A contact that was found."""
    return contact_part(
        [
            Contact(
                "123e4567-e89b-42d3-a456-426614174000", "CRM-12345", "Ada Byrne", "Acme Corp", "ada.byrne@example.com"
            )
        ]
    )
