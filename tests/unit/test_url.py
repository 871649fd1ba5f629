"""Base addresses of APIs, ours and the providers': one rule. (Subscribers' URLs: test_guard.py.)"""

import pytest

from relay.domain.url import check_base_url

EXAMPLE = "https://api.example.com"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://api.example.com", "https://api.example.com"),
        ("https://api.example.com/", "https://api.example.com"),
        ("https://api.example.com:2343/v3/", "https://api.example.com:2343/v3"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("https://api.example.com/@v2", "https://api.example.com/@v2"),
    ],
)
def test_a_base_address_is_returned_without_its_last_slash(text: str, address: str) -> None:
    assert check_base_url(text, example=EXAMPLE) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("api.example.com", "must look like https://api.example.com"),
        ("ftp://api.example.com", "must look like https://api.example.com: the scheme"),
        ("https://", "the URL has no host"),
        ("https://api.example.com:0", "the port must be a number"),
        ("https://api.example.com:99999", "the port must be a number"),
        ("https://api..example.com", "is not a valid domain name"),
        ("https://api.example.com/a b", "must not contain spaces"),
        ("https://api.example.com/#top", "must not have a fragment"),
        ("https://api.example.com/?key=secret", "without a query"),
        (
            "https://ann:secret@api.example.com",
            "must not contain a user name or password; the key belongs into api_key",
        ),
        ("https://@api.example.com", "must not contain a user name or password"),
    ],
)
def test_an_invalid_base_address_gets_a_message_that_repeats_no_secret(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_base_url(text, example=EXAMPLE, credentials="the key belongs into api_key")

    assert "secret" not in str(caught.value)
