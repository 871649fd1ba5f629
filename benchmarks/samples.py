"""Sample calls without HTTP: rows as the provider sends them, and the events that are published about them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import orjson

from relay.domain import ids
from relay.domain.call import Contact, Record
from relay.domain.source import SourceRules
from relay.enrichment.contacts import contact_part
from relay.events.decide import EventDraft, Publish, decide
from relay.providers.webfones import wire
from relay.simulator.timeline import Habits, calls
from relay.simulator.webfones import TIMESTAMP_FORMAT, FakeWebFones
from relay.store.calls import StoredCall

_KEY = "sample-key"
_RULES = SourceRules("webfones", "UTC", True, True, 0, 0, "https://relay.example.com")
_CONTACT = Contact(
    "123e4567-e89b-42d3-a456-426614174000", "CRM-12345", "Ada Byrne", "Acme Corp", "ada.byrne@example.com"
)


def drafts(count: int, *, sid: str, seed: int = 1) -> Sequence[EventDraft]:
    """The `call.completed` events of `count` calls, as they are published: with a contact, the recording pending."""
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    events: list[EventDraft] = []
    for record in _records(count, seed=seed):
        started_ms = int(record.started_at.timestamp() * 1000)
        call = StoredCall(
            ids.call_id(sid, record.key),
            sid,
            record.key,
            1,
            True,
            started_ms,
            started_ms,
            started_ms,
            "poll",
            record.content(),
            contact=contact_part([_CONTACT]),
        )
        decision = decide(call, now_ms=now_ms, rules=_RULES)
        assert isinstance(decision, Publish)
        events.append(decision.events[0])
    return events


def _records(count: int, *, seed: int) -> list[Record]:
    """Normalised rows of `count` calls, all visible, 30 % of them unanswered."""
    now = datetime.now(UTC)
    habits = Habits(calls_per_hour=count * 4, late=0.0, talk_max_s=600, recorded=1.0, people=600)
    provider = FakeWebFones(clock=lambda: now)
    provider.add_account(_KEY)
    plans = calls(now - timedelta(minutes=45), seed=seed, habits=habits)
    provider.add_calls(_KEY, [next(plans) for _ in range(count)])
    response = provider.records(_KEY, (now - timedelta(days=1)).strftime(TIMESTAMP_FORMAT), now)
    rows = wire.read_call_list(orjson.loads(response.encoded()))
    zone = ZoneInfo("UTC")
    parsed = [wire.parse_row(row, zone=zone, region="US", seen_at=now) for row in rows]
    return [row for row in parsed if isinstance(row, Record)]
