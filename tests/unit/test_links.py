"""A link opens one recording until it expires; no other link can be derived from it."""

from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.recordings.links import BadSignature, Expired, Valid, link, sign, verify

CALL = "call_" + "a2b3c4d5e6f7" + "z" * 14
OTHER = "call_" + "b2b3c4d5e6f7" + "z" * 14
KEY = b"k" * 32
OLD_KEY = b"o" * 32
NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


def parts(url: str) -> tuple[str, str, str]:
    """Take a link apart: path, expires, signature."""
    split = urlsplit(url)
    query = parse_qs(split.query, strict_parsing=True)
    return split.path, query["expires"][0], query["signature"][0]


def test_the_signature_never_changes() -> None:
    """Links that were sent before an upgrade keep working."""
    assert sign(CALL, 1_800_000_000, KEY) == "HDlfoi2-7PiNnGqonTeI-DISYfufjBbVH_9TdEH867w"


def test_a_new_link_is_valid_until_its_expiry() -> None:
    """A link works for seven days by default, and is returned with its expiry."""
    url, expires_at = link("https://relay.example.com", CALL, now=NOW, key=KEY)
    path, expires, signature = parts(url)

    assert path == f"/recordings/{CALL}"
    assert expires_at == NOW + timedelta(days=7)
    assert verify(CALL, expires, signature, keys=[KEY], now=NOW) == Valid(expires_at)
    assert verify(CALL, expires, signature, keys=[KEY], now=expires_at - timedelta(microseconds=1)) == Valid(expires_at)
    assert verify(CALL, expires, signature, keys=[KEY], now=expires_at) == Expired(expires_at)


@pytest.mark.parametrize("public_url", ["https://example.com/phone/relay", "https://example.com/phone/relay/"])
def test_a_path_prefix_is_kept_and_not_signed(public_url: str) -> None:
    """A proxy may serve the relay under any path."""
    url, _ = link(public_url, CALL, now=NOW, key=KEY)
    path, expires, signature = parts(url)

    assert path == f"/phone/relay/recordings/{CALL}"
    assert isinstance(verify(CALL, expires, signature, keys=[KEY], now=NOW), Valid)


def test_fractions_of_a_second_never_extend_a_link() -> None:
    """The expiry that is returned is the one in the link."""
    url, expires_at = link("https://r.example", CALL, now=NOW.replace(microsecond=999_999), key=KEY, ttl_s=60)

    assert expires_at == NOW + timedelta(seconds=60)
    assert parts(url)[1] == str(int(expires_at.timestamp()))


def test_an_older_key_is_still_accepted_and_a_foreign_one_is_not() -> None:
    """After a rotation older links work as long as the older key is configured."""
    _, expires, signature = parts(link("https://r.example", CALL, now=NOW, key=OLD_KEY)[0])

    assert isinstance(verify(CALL, expires, signature, keys=[KEY, OLD_KEY], now=NOW), Valid)
    assert verify(CALL, expires, signature, keys=[KEY], now=NOW) == BadSignature()
    assert verify(CALL, expires, signature, keys=[], now=NOW) == BadSignature()


def test_a_link_to_one_call_opens_no_other() -> None:
    """The call id is signed."""
    _, expires, signature = parts(link("https://r.example", CALL, now=NOW, key=KEY)[0])

    assert verify(OTHER, expires, signature, keys=[KEY], now=NOW) == BadSignature()


def test_a_changed_expiry_is_a_bad_signature_even_of_an_expired_link() -> None:
    """The expiry is signed, and the signature is checked first."""
    _, expires, signature = parts(link("https://r.example", CALL, now=NOW, key=KEY)[0])

    assert verify(CALL, str(int(expires) + 1), signature, keys=[KEY], now=NOW) == BadSignature()
    assert verify(CALL, "1", signature, keys=[KEY], now=NOW) == BadSignature()


@pytest.mark.parametrize(
    "spelling", ["", "0", "-1", "+{}", " {}", "{} ", "0{}", "{}.0", "{}e0", "{}\n", "1_{}", "٣", "9" * 400, "{}\x00"]
)
def test_an_expiry_has_one_spelling(spelling: str) -> None:
    """Other spellings that int() would accept are refused."""
    _, expires, signature = parts(link("https://r.example", CALL, now=NOW, key=KEY)[0])

    assert verify(CALL, spelling.format(expires), signature, keys=[KEY], now=NOW) == BadSignature()


@given(signature=st.text(st.characters(exclude_categories=()), max_size=60))
def test_no_text_is_a_signature(signature: str) -> None:
    """Emoji, lone surrogates, emptiness: refused, never an exception."""
    assert verify(CALL, "1800000000", signature, keys=[KEY, OLD_KEY], now=NOW) == BadSignature()


@given(at=st.integers(0, 42), char=st.sampled_from("AZaz09-_=+/ é"))
def test_every_character_of_the_signature_counts(at: int, char: str) -> None:
    """Changing one character breaks the link, the unused bits of the last one included."""
    signature = sign(CALL, 1_800_000_000, KEY)
    changed = signature[:at] + char + signature[at + 1 :]

    answer = verify(CALL, "1800000000", changed, keys=[KEY], now=NOW)

    assert isinstance(answer, Valid if changed == signature else BadSignature)
