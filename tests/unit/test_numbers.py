"""Phone numbers: an incomplete number never becomes a complete one."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.domain.call import NumberType, Party
from relay.domain.numbers import MAX_NUMBER_CHARS, match_key, national_digits, read_number

E164, UNKNOWN, SIP = NumberType.E164, NumberType.UNKNOWN, NumberType.SIP
ANONYMOUS, SHORT, EMERGENCY, EXTENSION = (
    NumberType.ANONYMOUS,
    NumberType.SHORT,
    NumberType.EMERGENCY,
    NumberType.EXTENSION,
)


@pytest.mark.parametrize(
    ("raw", "kind", "number", "extension", "country"),
    [
        ("(111) 111-1111", E164, "+11111111111", None, "US"),
        ("2125551234", E164, "+12125551234", None, "US"),
        ("12125551234", E164, "+12125551234", None, "US"),
        ("+1 212 555 1234", E164, "+12125551234", None, "US"),
        ("(416) 555-1234", E164, "+14165551234", None, "CA"),
        ("+44 20 7946 0000", E164, "+442079460000", None, "GB"),
        ("011 44 20 7946 0000", E164, "+442079460000", None, "GB"),
        ("+800 1234 5678", E164, "+80012345678", None, None),
        ("٢١٢٥٥٥١٢٣٤", E164, "+12125551234", None, "US"),
        ('"BOB" <2125551234>', E164, "+12125551234", None, "US"),
        ("tel:+1-212-555-1234;ext=55", E164, "+12125551234", "55", "US"),
        ("(212) 555-1234, x3203", E164, "+12125551234", "3203", "US"),
        ("(212)555-1234x77", E164, "+12125551234", "77", "US"),
        ("212-555-1234 ext. 9", E164, "+12125551234", "9", "US"),
        ("212-555-1234#44", E164, "+12125551234", "44", "US"),
        ("555-1234", UNKNOWN, None, None, None),
        ("555-1234, x12", UNKNOWN, None, "12", None),
        ("0015551234567", UNKNOWN, None, None, None),
        ("5551234567890123", UNKNOWN, None, None, None),
        ("+911", UNKNOWN, None, None, None),
        ("1-800-FLOWERS", UNKNOWN, None, None, None),
        ("B WHITTAKER", UNKNOWN, None, None, None),
        ("3203", SHORT, None, None, None),
        ("*67", SHORT, None, None, None),
        ("911", EMERGENCY, None, None, None),
        ("112", EMERGENCY, None, None, None),
        ("Anonymous", ANONYMOUS, None, None, None),
        (" PRIVATE NUMBER ", ANONYMOUS, None, None, None),
        ("<Restricted>", ANONYMOUS, None, None, None),
        ("unknown", ANONYMOUS, None, None, None),
        ("+266696687", ANONYMOUS, None, None, None),
        ("sip:anonymous@anonymous.invalid", ANONYMOUS, None, None, None),
        ("sip:+12125551234@pbx.example", SIP, "+12125551234", None, "US"),
        ("sips:bob@pbx.example;transport=tls", SIP, None, None, None),
        ("SIP:3203@pbx.example", SIP, None, None, None),
    ],
)
def test_an_external_number_is_classified(
    raw: str, kind: NumberType, number: str | None, extension: str | None, country: str | None
) -> None:
    party = read_number(raw, "US")

    assert party == Party(number, raw.strip(), kind, extension, None, country, internal=False)


@pytest.mark.parametrize(
    ("raw", "kind", "number", "extension"),
    [
        ("3203", EXTENSION, None, "3203"),
        ("112", EXTENSION, None, "112"),
        ("x3203", EXTENSION, None, "3203"),
        ("ext 3203", EXTENSION, None, "3203"),
        ("(111) 111-1111, x3203", E164, "+11111111111", "3203"),
        ("sip:3203@pbx.example", SIP, None, "3203"),
        ("*67", UNKNOWN, None, None),
        ("desk 12", UNKNOWN, None, None),
    ],
)
def test_few_digits_on_the_internal_side_are_an_extension(
    raw: str, kind: NumberType, number: str | None, extension: str | None
) -> None:
    party = read_number(raw, "US", internal=True)

    assert (party.type, party.number, party.extension, party.internal) == (kind, number, extension, True)


@pytest.mark.parametrize("raw", [None, "", "  "])
def test_empty_text_is_an_empty_party(raw: str | None) -> None:
    assert read_number(raw, "US") == Party()


def test_text_that_is_too_long_is_passed_on_and_not_parsed() -> None:
    raw = "+12125551234" + "0" * MAX_NUMBER_CHARS

    assert read_number(raw, "US") == Party(raw=raw)


def test_an_unknown_region_still_reads_international_numbers() -> None:
    assert read_number("+442079460000", "XX").number == "+442079460000"
    assert read_number("2079460000", "XX").number is None


def test_a_german_extension_never_becomes_a_german_number() -> None:
    """Four digits are a possible length for a number in Germany, and still an extension."""
    assert read_number("3203", "DE", internal=True).number is None
    assert read_number("3203", "DE").number is None


@pytest.mark.parametrize(
    ("e164", "region", "digits"),
    [
        ("+12125551234", "US", "2125551234"),
        ("+14165551234", "US", "4165551234"),
        ("+442079460000", "US", "442079460000"),
        ("+442079460000", "GB", "2079460000"),
        ("+390612345678", "IT", "0612345678"),
        ("3203", "US", ""),
        ("x3203", "US", ""),
        ("+12", "US", ""),
        ("+", "US", ""),
        ("+1212555123456789", "US", ""),
        ("", "US", ""),
    ],
)
def test_a_look_up_uses_the_digits_of_the_address_book(e164: str, region: str, digits: str) -> None:
    assert national_digits(e164, region) == digits


@pytest.mark.parametrize("text", ["2125551234", "12125551234", "+1 (212) 555-1234", "1-212-555-1234"])
def test_every_spelling_of_a_number_has_one_match_key(text: str) -> None:
    assert match_key(text) == "2125551234"


@settings(deadline=None)
@given(st.text(max_size=80) | st.from_regex(r"[+(]?[0-9 ().x,#-]{1,40}", fullmatch=True), st.booleans())
def test_any_text_is_parsed_and_only_digits_become_a_number(raw: str, internal: bool) -> None:
    party = read_number(raw, "US", internal=internal)

    assert party.internal is internal
    assert party.raw == (raw.strip() or None)
    if party.number is not None:
        assert party.number[0] == "+"
        assert party.number[1:].isdecimal()
        assert national_digits(party.number)
    else:
        assert party.type is not NumberType.E164


_NUMBERS_OF_MANY_COUNTRIES = """
import sys
from relay.domain.numbers import load_metadata, read_number
load_metadata()
loaded = set(sys.modules)
for raw in ("+12125551234", "+442079460000", "+4989123456", "+85298765432", "+91 98765 43210", "+800 1234 5678", "112"):
    for region in ("US", "GB", "DE", "HK", "IN", "ZA"):
        read_number(raw, region)
print(set(sys.modules) - loaded)
"""


def test_no_number_needs_a_file_after_the_start() -> None:
    """Opening one may fail (EMFILE), and phonenumbers would never recover from that."""
    result = subprocess.run(
        [sys.executable, "-c", _NUMBERS_OF_MANY_COUNTRIES], capture_output=True, text=True, check=True
    )

    assert result.stdout == "set()\n"
