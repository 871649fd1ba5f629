"""Parses phone numbers as providers write them: pure, and never a guess.

A number becomes E.164 only when its length is right for its country. Local numbers without an area code, extensions,
short codes and withheld numbers stay what they are: completed with a default, they would be another person's number.
"""

import re
from functools import lru_cache
from typing import Final

import phonenumbers
from phonenumbers import NumberParseException, PhoneMetadata, PhoneNumber, ValidationResult

from relay.domain.call import NumberType, Party

# Longer text is not a phone number.
MAX_NUMBER_CHARS: Final = 64

# So few digits are an extension or a short code, never a national number.
MAX_EXTENSION_DIGITS: Final = 6

_CACHED_NUMBERS: Final = 16_384

_WITHHELD: Final = frozenset(
    {
        "anonymous",
        "blocked",
        "caller id blocked",
        "id withheld",
        "no caller id",
        "no number",
        "not available",
        "number withheld",
        "out of area",
        "private",
        "private caller",
        "private number",
        "restricted",
        "unavailable",
        "unknown",
        "unknown caller",
        "unknown number",
        "withheld",
        "266696687",  # ANONYMOUS on a keypad: how some switches send it
    }
)
_IN_BRACKETS: Final = re.compile(r"<([^<>]+)>\s*\Z")
_EXTENSION: Final = re.compile(
    r"[\s,;]*(?:;\s*ext\s*=|\b(?:extension|extn|ext|x)(?![a-z])|(?<=[\s\d),;])x|#)[\s.:]*([0-9]{1,10})\s*\Z",
    re.IGNORECASE,
)
_URI: Final = re.compile(r"(sips?|tel):(.*)\Z", re.IGNORECASE | re.DOTALL)
_NOT_WORDS: Final = re.compile(r"[^a-z0-9]+")
_NO_DIGIT: Final = re.compile(r"[^0-9]+")


def load_metadata() -> None:
    """Load the numbering plans of all countries; to be called once at start, takes about 60 ms."""
    # Otherwise phonenumbers reads a country's file on first use, under a lock that it does not release when that
    # fails: one EMFILE there would block every later number of a new country for good.
    PhoneMetadata.load_all()
    for region in phonenumbers.SUPPORTED_SHORT_REGIONS:
        PhoneMetadata.short_metadata_for_region(region)


@lru_cache(maxsize=_CACHED_NUMBERS)
def read_number(raw: str | None, region: str, *, internal: bool = False) -> Party:
    """Parse a number column; `region` is the country whose national format the provider uses.

    `internal`: the column is the account's own side, where few digits are an extension rather than a short code.
    """
    text = (raw or "").strip()
    if not text:
        return Party(internal=internal)
    if len(text) > MAX_NUMBER_CHARS:
        return Party(raw=text, internal=internal)
    uri = _URI.match(bracketed.group(1).strip() if (bracketed := _IN_BRACKETS.search(text)) else text)
    if uri and uri.group(1).lower() != "tel":
        return _read_sip(text, uri.group(2), region, internal=internal)
    body = uri.group(2) if uri else bracketed.group(1) if bracketed else text
    if _NOT_WORDS.sub(" ", body.lower()).strip() in _WITHHELD:
        return Party(raw=text, type=NumberType.ANONYMOUS, internal=internal)
    number, extension = _split_extension(body)
    return _read_plain(text, number, extension, region, internal=internal)


@lru_cache(maxsize=_CACHED_NUMBERS)
def national_digits(e164: str, region: str = "US") -> str:
    """Write an E.164 number as an address book in `region` does: bare digits, the country code only when foreign.

    Empty when `e164` is not an E.164 number: extensions and short codes are never looked up.
    """
    if not e164.startswith("+"):
        return ""
    number = _parse(e164, None)
    if number is None or phonenumbers.is_possible_number_with_reason(number) != ValidationResult.IS_POSSIBLE:
        return ""
    national = phonenumbers.national_significant_number(number)
    if number.country_code == phonenumbers.country_code_for_region(region):
        return national
    return f"{number.country_code}{national}"


def match_key(text: str) -> str:
    """Normalise a number as WebFones does to compare it: digits without a leading 1 (Contact API 3.0, Notes)."""
    return _NO_DIGIT.sub("", text).removeprefix("1")


def _split_extension(text: str) -> tuple[str, str | None]:
    """Split `(111) 111-1111, x3203` into the number and the extension; the number may be empty."""
    match = _EXTENSION.search(text)
    if match is None:
        return text.strip(), None
    return text[: match.start()].strip(), match.group(1)


def _read_plain(text: str, body: str, extension: str | None, region: str, *, internal: bool) -> Party:
    digits = phonenumbers.normalize_digits_only(body)
    if not digits:
        kind = NumberType.UNKNOWN if body else NumberType.EXTENSION
        return Party(raw=text, type=kind, extension=extension, internal=internal)
    if len(digits) <= MAX_EXTENSION_DIGITS and not body.startswith("+"):
        kind = _short_kind(body, digits, region, internal=internal)
        bare_extension = digits if kind is NumberType.EXTENSION else None
        return Party(raw=text, type=kind, extension=extension or bare_extension, internal=internal)
    number, country = _e164(body, region)
    kind = NumberType.E164 if number else NumberType.UNKNOWN
    return Party(number=number, raw=text, type=kind, extension=extension, country=country, internal=internal)


def _short_kind(body: str, digits: str, region: str, *, internal: bool) -> NumberType:
    """Classify few digits: 112 is an extension on the account's own side, and an emergency call on the other."""
    if internal:
        return NumberType.EXTENSION if digits == body else NumberType.UNKNOWN
    if phonenumbers.is_emergency_number(body, region):
        return NumberType.EMERGENCY
    return NumberType.SHORT if _no_letters(body) else NumberType.UNKNOWN


def _read_sip(text: str, rest: str, region: str, *, internal: bool) -> Party:
    user = rest.partition("@")[0].partition(";")[0].strip()
    if _NOT_WORDS.sub(" ", user.lower()).strip() in _WITHHELD:
        return Party(raw=text, type=NumberType.ANONYMOUS, internal=internal)
    if user.isascii() and user.isdigit() and len(user) <= MAX_EXTENSION_DIGITS:
        return Party(raw=text, type=NumberType.SIP, extension=user if internal else None, internal=internal)
    number, country = _e164(user, region) if _no_letters(user) else (None, None)
    return Party(number=number, raw=text, type=NumberType.SIP, country=country, internal=internal)


def _e164(body: str, region: str) -> tuple[str | None, str | None]:
    number = _parse(body, region)
    # By length only: numbers of a new range are valid before the next release of phonenumbers knows them.
    if number is None or phonenumbers.is_possible_number_with_reason(number) != ValidationResult.IS_POSSIBLE:
        return None, None
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164), _country(number, region)


def _country(number: PhoneNumber, region: str) -> str | None:
    """Return the number's country; outside all assigned ranges that is the main country of its code."""
    country = phonenumbers.region_code_for_number(number)
    if country is None and number.country_code == phonenumbers.country_code_for_region(region):
        country = region
    if country is None and number.country_code is not None:
        country = phonenumbers.region_code_for_country_code(number.country_code)
    return country if country and country.isalpha() and country != "ZZ" else None


def _parse(text: str, region: str | None) -> PhoneNumber | None:
    try:
        return phonenumbers.parse(text, region)
    except NumberParseException:
        return None


def _no_letters(text: str) -> bool:
    return not any(char.isalpha() for char in text)
