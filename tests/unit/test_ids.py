"""Ids are for ever: these vectors are what subscribers have stored, so they never change."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.domain import ids

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x1f"), max_size=40)
EVENT_TYPES = (
    "call.completed",
    "call.updated",
    "call.recording.completed",
    "call.recording.failed",
    "call.transcript.completed",
)


@pytest.mark.parametrize(
    ("source_id", "record_key", "golden"),
    [
        ("main", "211159", "call_74z667qc53xexjqusiwil6ecwp"),
        ("büro/1", "2025-07-01|+1 (555)", "call_eevfsa6m4x7qdhvnjkb3ylxdtw"),
        ("", "", "call_77thto4ddsk3m7obpam4mpcqsd"),
    ],
)
def test_the_id_of_a_call_never_changes(source_id: str, record_key: str, golden: str) -> None:
    """A call that is found again after years, a restore or an upgrade has the id it had."""
    assert ids.call_id(source_id, record_key) == golden


@pytest.mark.parametrize(
    ("parts", "golden"),
    [
        (("main", "211159", "call.completed"), "evt_ayttoam6ku43aatd2kigzskmxq"),
        (("main", "211159", "call.recording.completed"), "evt_57hmpvhndoshtaywquzdkxfz4e"),
        (("main", "211159", "call.recording.failed"), "evt_666tftm3k32t5qrdpuigtrex7j"),
        (("main", "211159", "call.transcript.completed"), "evt_ed3qyr5gjb2oehpb3k6kdtdd6l"),
        (("main", "211159", "call.updated", "2", "0123456789abcdef"), "evt_7rsyqdlltrx7qo5dimrj26ma2q"),
        (("main", "", "source.error", "1751403284000"), "evt_eskbwxtumuk6l6k7vqda3ed5ch"),
    ],
)
def test_the_id_of_an_event_never_changes(parts: tuple[str, str, str, *tuple[str, ...]], golden: str) -> None:
    """A subscriber that remembers ids recognises an event for ever."""
    assert ids.event_id(*parts) == golden


@given(NAMES, NAMES)
def test_an_id_has_its_prefix_and_26_plain_characters(source_id: str, record_key: str) -> None:
    """Whatever a provider's keys look like, the id fits into a URL, a header and a file name."""
    for prefix, id_text in (
        ("call_", ids.call_id(source_id, record_key)),
        ("evt_", ids.event_id(source_id, record_key, "call.completed")),
    ):
        assert id_text.startswith(prefix)
        assert len(id_text) == len(prefix) + 26
        assert set(id_text[len(prefix) :]) <= set(string.ascii_lowercase + "234567")


@example([("a", "bc", "call.completed"), ("ab", "c", "call.completed")])
@given(st.lists(st.tuples(NAMES, NAMES, st.sampled_from(EVENT_TYPES)), min_size=2, max_size=6, unique=True))
def test_parts_that_differ_have_different_ids(parts: list[tuple[str, str, str]]) -> None:
    """Two accounts, two rows or two event types never share an id; neither do parts that are split differently."""
    assert len({ids.event_id(*each) for each in parts}) == len(parts)
    assert len({ids.call_id(source, key) for source, key, _ in parts}) == len({each[:2] for each in parts})


def test_a_renamed_source_is_a_new_source() -> None:
    """The id of a source is part of every id below it."""
    assert ids.call_id("main", "1") != ids.call_id("mian", "1")
    assert ids.call_id("a", "bc") != ids.call_id("ab", "c")
