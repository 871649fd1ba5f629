"""Which events are due for a call: tables of what is held, merged, updated and published once, and properties."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.domain import ids
from relay.domain.call import Direction, NumberType, Outcome, Party, Record
from relay.domain.json import Json
from relay.domain.source import SourceRules
from relay.events.decide import EventDraft, Publish, Wait, contact_hold_left_ms, decide, recording_of, wants_contact
from relay.events.payload import API_VERSION, NO_CONTACT, NO_RECORDING
from relay.store.calls import StoredCall

READY_MS = 1_751_403_284_000
RULES = SourceRules("webfones", "UTC", True, True, 5_000, 30_000, "https://relay.example.com")
PLAIN = replace(RULES, contacts=False, recordings=False)
MATCHED: Json = NO_CONTACT | {"lookup_status": "matched", "count": 1, "id": "c1", "name": "Jo"}
NO_MATCH: Json = NO_CONTACT | {"lookup_status": "none"}
AUDIO: Json = NO_RECORDING | {"status": "available", "size_bytes": 320, "path": "2025/07/01/call.wav"}
NO_AUDIO: Json = NO_RECORDING | {"status": "none"}
LOST_AUDIO: Json = NO_RECORDING | {"status": "unavailable"}
LATER_MS = READY_MS + 3_600_000


def record(**fields: Any) -> Json:
    caller = Party("+12125550100", "(212) 555-0100", NumberType.E164)
    defaults: dict[str, Any] = {
        "key": "7",
        "started_at": datetime(2025, 7, 1, 20, 54, tzinfo=UTC),
        "local_date": "2025-07-01",
        "direction": Direction.INBOUND,
        "outcome": Outcome.ANSWERED,
        "caller": caller,
        "external": caller,
        "duration_seconds": 12.5,
    }
    return Record(**defaults | fields).content()


def stored(**parts: Any) -> StoredCall:
    defaults: dict[str, Any] = {
        "id": ids.call_id("main", "7"),
        "source_id": "main",
        "key": "7",
        "version": 1,
        "finished": True,
        "started_ms": READY_MS - 60_000,
        "first_seen_ms": READY_MS,
        "ready_ms": READY_MS,
        "via": "poll",
        "record": record(),
    }
    return StoredCall(**defaults | parts)


def due(call: StoredCall, *, now_ms: int = LATER_MS, rules: SourceRules = RULES) -> Publish:
    decision = decide(call, now_ms=now_ms, rules=rules)
    assert isinstance(decision, Publish), decision
    return decision


def types(decision: Publish) -> list[str]:
    return [draft.type for draft in decision.events]


def after_publishing(call: StoredCall, *, rules: SourceRules = RULES) -> StoredCall:
    """The call after everything due was published, as the store returns it."""
    published = due(call, rules=rules).published
    if published is None:
        return call
    return replace(call, published=orjson.loads(orjson.dumps(published)), version=call.version + 1)


def the(decision: Publish, event_type: str) -> EventDraft:
    [draft] = [draft for draft in decision.events if draft.type == event_type]
    return draft


# Holds


@pytest.mark.parametrize(
    ("parts", "rules", "waits_ms"),
    [
        ({}, RULES, 30_000),
        ({"contact": MATCHED}, RULES, 30_000),
        ({"recording": NO_AUDIO}, RULES, 5_000),
        ({"recording": AUDIO}, RULES, 5_000),
        ({"recording": LOST_AUDIO}, RULES, 5_000),
        ({"record": record(outcome=Outcome.NO_ANSWER)}, RULES, 5_000),
        ({"recording": NO_AUDIO, "contact": NO_CONTACT | {"lookup_status": "unavailable"}}, RULES, 5_000),
        ({"recording": NO_AUDIO, "contact": MATCHED}, RULES, 0),
        ({"recording": NO_AUDIO, "contact": NO_MATCH}, RULES, 0),
        ({"recording": NO_AUDIO, "contact": NO_CONTACT}, RULES, 0),
        ({}, replace(RULES, contacts=False), 30_000),
        ({}, replace(RULES, recordings=False), 5_000),
        ({}, replace(RULES, hold_for_recording_ms=0), 5_000),
        ({}, replace(RULES, hold_for_recording_ms=0, hold_for_contact_ms=0), 0),
        ({}, PLAIN, 0),
    ],
)
def test_an_event_is_held_for_what_may_still_come_and_no_longer(
    parts: dict[str, Any], rules: SourceRules, waits_ms: int
) -> None:
    """The longest hold that still has something to wait for decides; to the millisecond nothing is published before."""
    call = stored(**parts)

    assert types(due(call, now_ms=READY_MS + waits_ms, rules=rules))[0] == "call.completed"
    if waits_ms:
        assert decide(call, now_ms=READY_MS, rules=rules) == Wait(waits_ms)
        assert decide(call, now_ms=READY_MS + waits_ms - 1, rules=rules) == Wait(1)


def test_a_clock_that_was_set_back_makes_no_hold_longer() -> None:
    """The call seems to end an hour from now: it is held for its hold, not for an hour."""
    assert decide(stored(), now_ms=READY_MS - 3_600_000, rules=RULES) == Wait(RULES.hold_for_recording_ms)
    assert contact_hold_left_ms(stored(), now_ms=READY_MS - 3_600_000, rules=RULES) == RULES.hold_for_contact_ms


def test_the_hold_counts_from_the_end_of_the_call_not_from_its_first_sight() -> None:
    """A call that was watched for an hour before it finished still waits for its contact and its recording."""
    watched = stored(first_seen_ms=READY_MS - 3_600_000)

    assert decide(replace(watched, recording=NO_AUDIO), now_ms=READY_MS, rules=RULES) == Wait(5_000)
    assert decide(replace(watched, contact=MATCHED), now_ms=READY_MS, rules=RULES) == Wait(30_000)


def test_a_call_in_progress_is_not_published_however_long_it_lasts() -> None:
    """A row of an unfinished call is stored, nothing more."""
    call = stored(finished=False, contact=MATCHED, recording=AUDIO)

    assert decide(call, now_ms=LATER_MS, rules=RULES) == Publish((), None)


def test_a_published_call_is_never_held_again() -> None:
    """After the first event each difference goes out at once."""
    call = replace(after_publishing(stored()), record=record(status_raw="BUSY"))

    assert types(due(call, now_ms=READY_MS)) == ["call.updated"]


def test_the_contact_may_hold_a_call_until_it_is_settled() -> None:
    """`unavailable` is not final: the hold goes on while the look-up is retried."""
    unavailable = NO_CONTACT | {"lookup_status": "unavailable"}

    assert contact_hold_left_ms(stored(), now_ms=READY_MS + 1, rules=RULES) == 4_999
    assert contact_hold_left_ms(stored(contact=unavailable), now_ms=READY_MS, rules=RULES) == 5_000
    assert contact_hold_left_ms(stored(contact=MATCHED), now_ms=READY_MS, rules=RULES) == 0
    assert contact_hold_left_ms(stored(), now_ms=LATER_MS, rules=RULES) == 0
    assert contact_hold_left_ms(stored(), now_ms=READY_MS, rules=PLAIN) == 0


@pytest.mark.parametrize(
    ("parts", "rules", "wanted"),
    [
        ({}, RULES, True),
        ({"lookup": {"tries": 2}}, RULES, True),
        ({"lookup": {"exhausted_for": "+12125550100"}}, RULES, False),
        ({"lookup": {"exhausted_for": "+15550000000"}}, RULES, True),
        ({"contact": MATCHED}, RULES, False),
        ({"contact": {**MATCHED, "number": "+15550000000"}}, RULES, True),
        ({"finished": False}, RULES, False),
        ({"record": record(external=Party(raw="anonymous"))}, RULES, False),
        ({}, replace(RULES, contacts=False), False),
    ],
)
def test_a_number_is_looked_up_until_it_has_a_contact_or_its_retries_are_exhausted(
    parts: dict[str, Any], rules: SourceRules, wanted: bool
) -> None:
    """A corrected number is another one: it gets tries of its own."""
    assert wants_contact(stored(**parts), rules) is wanted


# The first event


def test_what_changed_while_held_is_merged_into_the_first_event() -> None:
    """A row that is corrected within the hold makes one event with the correction, not two."""
    call = stored()
    assert isinstance(decide(call, now_ms=READY_MS + 1, rules=RULES), Wait)
    corrected = replace(call, record=record(outcome=Outcome.NO_ANSWER), contact=MATCHED, version=3)

    decision = due(corrected)

    assert types(decision) == ["call.completed"]
    about = decision.events[0].document["data"]["call"]
    assert (about["outcome"], about["contact"]["name"], about["revision"]) == ("no_answer", "Jo", 1)
    assert "changes" not in decision.events[0].document["data"]


def test_the_first_event_has_the_whole_document() -> None:
    """Envelope and call object, name by name."""
    [draft] = due(stored(contact=MATCHED, recording=NO_AUDIO)).events

    assert draft.document["id"] == draft.id == ids.event_id("main", "7", "call.completed")
    assert draft.document["timestamp"] == "2025-07-01T21:54:44Z"
    assert draft.document["api_version"] == API_VERSION
    assert draft.document["context"] == {
        "via": "poll",
        "observed_at": "2025-07-01T20:54:44Z",
        "timezone_assumed": "UTC",
    }
    call_id = ids.call_id("main", "7")
    assert draft.document["links"] == {
        "call": f"https://relay.example.com/v1/calls/{call_id}",
        "recording": f"https://relay.example.com/v1/calls/{call_id}/recording",
    }
    assert list(draft.document["data"]["call"]) == [
        *("id", "provider", "provider_call_id", "source_id", "kind", "revision"),
        *("direction", "outcome", "missed", "status_raw", "end_reason", "ended_by", "from", "to"),
        *("external_number", "internal_number", "extension", "started_at", "answered_at", "ended_at"),
        *("duration_seconds", "derived", "recording", "contact"),
        *("transcription", "transfers", "participants", "custom"),
    ]


def test_without_a_public_url_there_are_no_links() -> None:
    """A relay behind NAT has null instead of an address that cannot be opened."""
    [draft] = due(stored(recording=NO_AUDIO), rules=replace(RULES, public_url=None)).events

    assert draft.document["links"] == {"call": None, "recording": None}


@pytest.mark.parametrize(
    ("contact", "rules", "status"),
    [
        (None, RULES, "unavailable"),
        (None, PLAIN, "skipped"),
        (NO_MATCH, RULES, "none"),
        (MATCHED, RULES, "matched"),
        (NO_CONTACT, RULES, "skipped"),
    ],
)
def test_an_event_has_the_result_of_the_contact_look_up(contact: Json | None, rules: SourceRules, status: str) -> None:
    """No match and no look-up are different things to a CRM."""
    [draft] = due(stored(contact=contact, recording=NO_AUDIO), rules=rules).events

    assert draft.document["data"]["call"]["contact"]["lookup_status"] == status


# The recording


@pytest.mark.parametrize(
    ("recording", "outcome", "rules", "status", "also"),
    [
        (AUDIO, Outcome.ANSWERED, RULES, "available", ["call.recording.completed"]),
        (LOST_AUDIO, Outcome.ANSWERED, RULES, "unavailable", ["call.recording.failed"]),
        (NO_AUDIO, Outcome.ANSWERED, RULES, "none", []),
        (None, Outcome.ANSWERED, RULES, "pending", []),
        (None, Outcome.BUSY, RULES, "none", []),
        (None, Outcome.ANSWERED, PLAIN, "unsupported", []),
    ],
)
def test_the_recording_is_published_right_after_the_call(
    recording: Json | None, outcome: Outcome, rules: SourceRules, status: str, also: list[str]
) -> None:
    """The first event has what is known of the recording; one of its own follows when it is stored, or failed."""
    decision = due(stored(record=record(outcome=outcome), recording=recording), rules=rules)

    assert types(decision) == ["call.completed", *also]
    assert [draft.document["data"]["call"]["recording"]["status"] for draft in decision.events] == [status] * len(
        decision.events
    )


def test_the_path_of_a_recording_is_not_published() -> None:
    """The path in our storage is stored with the call, but no field of the payload."""
    part = recording_of(stored(recording=AUDIO), RULES)

    assert "path" not in part
    assert list(part) == list(NO_RECORDING)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([AUDIO], [["call.recording.completed"]]),
        ([AUDIO, AUDIO | {"size_bytes": 999}], [["call.recording.completed"], []]),
        ([LOST_AUDIO, AUDIO], [["call.recording.failed"], ["call.recording.completed"]]),
        ([LOST_AUDIO, AUDIO, LOST_AUDIO], [["call.recording.failed"], ["call.recording.completed"], []]),
        ([NO_AUDIO], [[]]),
        ([NO_AUDIO, AUDIO], [[], ["call.recording.completed"]]),
    ],
)
def test_a_recording_that_comes_late_is_one_later_event(steps: list[Json], expected: list[list[str]]) -> None:
    """`.completed` once; `.failed` once, and `.completed` after it when the recording came after all."""
    call = after_publishing(stored())
    for recording, event_types in zip(steps, expected, strict=True):
        call = replace(call, recording=recording)
        assert types(due(call)) == event_types
        call = after_publishing(call)


# Updates


def test_each_difference_is_named_with_what_it_was_and_what_it_is() -> None:
    """An automation can act on the one field it cares about."""
    call = replace(after_publishing(stored(contact=MATCHED)), record=record(outcome=Outcome.BUSY, status_raw="BUSY"))

    draft = the(due(call), "call.updated")

    assert draft.document["data"]["changes"] == {"outcome": ["answered", "busy"], "status_raw": [None, "BUSY"]} | {
        "missed": [False, True]
    }


def test_a_difference_inside_a_party_is_named_by_its_path() -> None:
    """`from.name`, not the whole of `from`."""
    named = Party("+12125550100", "(212) 555-0100", NumberType.E164, name="B WHITTAKER")
    call = replace(after_publishing(stored()), record=record(caller=named))

    assert the(due(call), "call.updated").document["data"]["changes"] == {"from.name": [None, "B WHITTAKER"]}


def test_a_contact_that_resolves_late_is_an_update() -> None:
    """The address book was down: the call is published without a contact, and updated when there is one."""
    call = replace(after_publishing(stored()), contact=MATCHED)

    changes = the(due(call), "call.updated").document["data"]["changes"]

    assert changes["contact.lookup_status"] == ["unavailable", "matched"]
    assert changes["contact.name"] == [None, "Jo"]


def test_revisions_count_updates() -> None:
    """The first event has 1, every update one more; a recording event has the current one."""
    call = after_publishing(stored())
    revisions = []
    for status in ("A", "B", "C"):
        call = replace(call, record=record(status_raw=status))
        revisions.append(the(due(call), "call.updated").document["data"]["call"]["revision"])
        call = after_publishing(call)
    call = replace(call, recording=AUDIO)

    assert revisions == [2, 3, 4]
    assert the(due(call), "call.recording.completed").document["data"]["call"]["revision"] == 4


def test_a_late_look_up_without_a_match_publishes_nothing() -> None:
    """The address book answered late, without a match: nothing that was published has changed."""
    call = after_publishing(stored(contact=None), rules=RULES)
    later = replace(call, contact=NO_MATCH)

    assert due(later, rules=RULES).events == ()


def test_a_contact_of_a_corrected_number_does_not_count() -> None:
    """The provider corrected the number after the look-up: the contact has another number."""
    call = stored(contact={**MATCHED, "number": "+15550000000"}, recording=NO_AUDIO)

    assert decide(call, now_ms=call.ready_ms, rules=RULES) == Wait(5_000)
    assert the(due(call), "call.completed").document["data"]["call"]["contact"]["name"] is None


def test_a_change_back_and_forth_is_two_updates_with_ids_of_their_own() -> None:
    """The third state equals the first; it is a change all the same."""
    first = after_publishing(stored(contact=MATCHED))
    second = replace(first, record=record(status_raw="X"))
    third = replace(after_publishing(second), record=first.record)

    there, back = the(due(second), "call.updated"), the(due(third), "call.updated")

    assert there.id != back.id
    assert back.document["data"]["changes"] == {"status_raw": ["X", None]}


def test_no_two_updates_of_a_call_have_one_id() -> None:
    """It changes to and fro: each time is another event."""
    call = after_publishing(stored(contact=MATCHED))
    event_ids = []
    for status in ("X", None, "X", None):
        call = replace(call, record=record(status_raw=status))
        event_ids.append(the(due(call), "call.updated").id)
        call = after_publishing(call)

    assert len(set(event_ids)) == 4


def test_the_id_of_an_update_depends_on_its_content() -> None:
    """After a loss of the store the second revision may be another one: it is not the same event."""
    call = after_publishing(stored(contact=MATCHED))

    busy, failed = (
        the(due(replace(call, record=record(status_raw=raw))), "call.updated") for raw in ("BUSY", "FAILED")
    )

    assert busy.id != failed.id


def test_a_published_call_that_reopens_waits_for_its_end() -> None:
    """A row that a provider reopens is published again only once it is finished again."""
    published_call = after_publishing(stored())
    reopened = replace(published_call, finished=False, record=record(status_raw="ONGOING"))

    assert due(reopened) == Publish((), None)
    assert types(due(replace(reopened, finished=True))) == ["call.updated"]


# Transcripts

TRANSCRIPT: Json = {"available": True, "transcript": "hello"}


def test_a_transcript_that_is_there_already_follows_the_call() -> None:
    """After `call.completed`, as an event of its own."""
    decision = due(stored(record=record(transcription=TRANSCRIPT)), rules=PLAIN)

    assert types(decision) == ["call.completed", "call.transcript.completed"]


def test_a_transcript_that_comes_later_is_one_event_and_no_update() -> None:
    """It changes the row, but has an event of its own, once."""
    for before in (None, {"available": False, "text": None}):
        published_call = after_publishing(stored(record=record(transcription=before)), rules=PLAIN)
        call = replace(published_call, record=record(transcription=TRANSCRIPT))

        assert types(due(call, rules=PLAIN)) == ["call.transcript.completed"]
        assert types(due(after_publishing(call, rules=PLAIN), rules=PLAIN)) == []


def test_a_transcript_that_comes_with_another_change_is_two_events() -> None:
    """The update names the change alone."""
    published_call = after_publishing(stored(), rules=PLAIN)
    call = replace(published_call, record=record(transcription=TRANSCRIPT, status_raw="X"))

    decision = due(call, rules=PLAIN)

    assert types(decision) == ["call.updated", "call.transcript.completed"]
    assert decision.events[0].document["data"]["changes"] == {"status_raw": [None, "X"]}


def test_a_transcript_that_goes_and_returns_is_published_as_updates() -> None:
    """`call.transcript.completed` has one id for ever, so its return must be published another way."""
    call = after_publishing(stored(record=record(transcription=TRANSCRIPT)), rules=PLAIN)
    gone = replace(call, record=record(transcription=None))
    assert types(due(gone, rules=PLAIN)) == ["call.updated"]
    back = replace(after_publishing(gone, rules=PLAIN), record=record(transcription=TRANSCRIPT))

    assert types(due(back, rules=PLAIN)) == ["call.updated"]


def test_a_corrected_transcript_is_an_update() -> None:
    """After its own event a transcript is content like any other."""
    call = after_publishing(stored(record=record(transcription=TRANSCRIPT)), rules=PLAIN)
    corrected = replace(call, record=record(transcription=TRANSCRIPT | {"transcript": "hallo"}))

    changes = the(due(corrected, rules=PLAIN), "call.updated").document["data"]["changes"]
    assert changes == {"transcription.transcript": ["hello", "hallo"]}


# Properties

RECORDS = st.builds(
    lambda outcome, status, name, transcription, custom: record(
        outcome=outcome,
        status_raw=status,
        caller=Party("+12125550100", "(212) 555-0100", NumberType.E164, name=name),
        transcription=transcription,
        custom=custom,
    ),
    st.sampled_from(Outcome),
    st.sampled_from([None, "ANSWERED", "BUSY"]),
    st.sampled_from([None, "Jo", "Ärger"]),
    st.sampled_from([None, {"available": False}, TRANSCRIPT]),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 2) | st.none(), max_size=2),
)
CONTACTS = st.sampled_from([None, MATCHED, NO_MATCH, NO_CONTACT, NO_CONTACT | {"lookup_status": "unavailable"}])
RECORDINGS = st.sampled_from([None, AUDIO, NO_AUDIO, LOST_AUDIO])
STATES = st.fixed_dictionaries(
    {"record": RECORDS, "contact": CONTACTS, "recording": RECORDINGS, "finished": st.sampled_from([True, True, False])}
)
ALL_RULES = st.builds(replace, st.just(RULES), contacts=st.booleans(), recordings=st.booleans())


@given(st.lists(STATES, min_size=1, max_size=6), ALL_RULES)
def test_after_publishing_nothing_more_is_due(states: list[dict[str, Any]], rules: SourceRules) -> None:
    """Whatever a call has been through; so a crash before the settlement repeats nothing."""
    call = stored()
    for parts in states:
        call = after_publishing(replace(call, **parts), rules=rules)

        assert due(call, rules=rules) == Publish((), None)


def amended(old: Any, path: list[str], pair: list[Any]) -> Any:
    if not path:
        assert old == pair[0]
        return pair[1]
    for cut in range(len(path), 0, -1):
        field = ".".join(path[:cut])
        if field in old or cut == 1:
            return {**old, field: amended(old.get(field), path[cut:], pair)}
    raise AssertionError


def dropping_none(document: Any) -> Any:
    """A field that is absent and one that is null are one thing to `changes`."""
    if isinstance(document, dict):
        return {name: dropping_none(value) for name, value in document.items() if value is not None}
    return document


def same_to_a_subscriber(status: str) -> str:
    return "none" if status == "unavailable" else status


@given(st.lists(STATES, min_size=1, max_size=8), ALL_RULES)
def test_a_subscriber_that_applies_every_change_knows_the_call(
    states: list[dict[str, Any]], rules: SourceRules
) -> None:
    """One `call.completed`; each update's changes lead from the last published state to the next; ids are unique."""
    call = stored()
    drafts: list[EventDraft] = []
    for parts in states:
        call = replace(call, **parts)
        decision = due(call, rules=rules)
        drafts += decision.events
        call = after_publishing(call, rules=rules)

    before: Json | None = None
    revision = 1
    for draft in drafts:
        about = draft.document["data"]["call"]
        content = {name: about[name] for name in (*record(), "contact") if name != "provider_call_id"}
        # A failed look-up and one without a match are the same to a subscriber: no contact.
        content["contact"] = {
            **content["contact"],
            "lookup_status": same_to_a_subscriber(content["contact"]["lookup_status"]),
        }
        if draft.type == "call.completed":
            assert before is None
        elif draft.type == "call.updated":
            revision += 1
            assert before is not None
            for field, values in draft.document["data"]["changes"].items():
                pair = [same_to_a_subscriber(value) for value in values] if field == "contact.lookup_status" else values
                before = amended(before, field.split("."), pair)
            if about["transcription"] == before["transcription"]:
                assert dropping_none(before) == dropping_none(content)
        assert about["revision"] == revision
        before = content
    assert [draft.type for draft in drafts[:1]] in ([], ["call.completed"])
    assert len({draft.id for draft in drafts}) == len(drafts)
    for once in ("call.completed", "call.recording.completed", "call.recording.failed", "call.transcript.completed"):
        assert [draft.type for draft in drafts].count(once) <= 1
    if before is not None and call.finished:
        assert before["outcome"] == call.record["outcome"]


@given(STATES, STATES, st.integers(0, 10**9), st.sampled_from(["poll", "backfill", "stream"]))
def test_ids_do_not_depend_on_when_or_how_a_call_was_seen(
    first: dict[str, Any], second: dict[str, Any], later_ms: int, via: str
) -> None:
    """The same history, seen by another relay at another time, has the same ids."""
    stories = []
    for at_ms, way in ((LATER_MS, "poll"), (LATER_MS + later_ms, via)):
        call = stored(via=way, first_seen_ms=at_ms - 7_200_000, ready_ms=at_ms - 3_600_000)
        event_ids: list[str] = []
        for parts in (first, second):
            call = replace(call, **parts)
            decision = due(call, now_ms=at_ms)
            event_ids += [draft.id for draft in decision.events]
            call = call if decision.published is None else replace(call, published=decision.published)
        stories.append(event_ids)

    assert stories[0] == stories[1]
