"""Packing is lossless and small, and documents of older releases can still be read."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.events.payload import API_VERSION
from relay.store.documents import pack, unpack, unpack_bytes

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=5)
    ),
    max_leaves=30,
)


@given(JSON)
def test_a_document_is_unpacked_as_it_was_packed(document: Any) -> None:
    """Whatever a call or an event contains."""
    assert unpack(pack(document)) == document


@given(st.binary(max_size=5000))
def test_bytes_are_unpacked_byte_for_byte(raw: bytes) -> None:
    """A body that was signed once must be the same body when it is sent again."""
    assert unpack_bytes(pack(raw)) == raw


def test_documents_of_the_first_release_can_be_read() -> None:
    """The dictionary is part of the format: changing a word of it would make every stored call unreadable."""
    stored = bytes.fromhex("01432ab70cf1145ce88511d1c504302c00")

    assert unpack(stored) == {
        "id": "evt_1",
        "type": "call.completed",
        "data": {"call": {"direction": "inbound", "outcome": "answered"}},
    }


@pytest.mark.parametrize("stored", [b"", b"\x00", b"\x02abc", b'{"id":1}', b"\x81\xa1a"])
def test_an_unknown_format_is_rejected_with_a_message(stored: bytes) -> None:
    """After a rollback the older release reports it and does not misread it."""
    with pytest.raises(ValueError, match="unknown format"):
        unpack(stored)


def test_a_packed_event_has_a_third_of_its_size() -> None:
    """The dictionary contains typical documents."""
    document = {
        "id": "evt_" + "a" * 26,
        "type": "call.completed",
        "timestamp": "2025-07-01T20:57:10Z",
        "api_version": API_VERSION,
        "data": {
            "call": {
                "id": "call_" + "b" * 26,
                "provider": "webfones",
                "direction": "inbound",
                "outcome": "answered",
                "missed": False,
                "from": {"number": "+12125550100", "raw": "(212) 555-0100", "type": "e164", "extension": None},
                "to": {"number": None, "raw": "3203", "type": "extension", "extension": "3203"},
                "contact": {"lookup_status": "none", "count": 0, "id": None, "name": None, "others": []},
                "recording": {"status": "pending", "url": None, "expires_at": None, "content_type": None},
            }
        },
    }

    assert len(pack(document)) * 3 < len(orjson.dumps(document))
