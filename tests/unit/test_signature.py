"""A receiver's own library accepts what the relay signs; an invalid secret gets a message."""

import base64
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from relay.delivery import signature


def now() -> int:
    """The moment of signing: verifiers refuse what is older than five minutes, and a whole suite takes longer."""
    return int(datetime.now(UTC).timestamp())


keys = st.binary(min_size=24, max_size=64)


def verifier(key: bytes) -> Webhook:
    return Webhook(signature.encode_secret(key))


def test_the_vector_of_the_specification_is_reproduced() -> None:
    """The example that the Standard Webhooks libraries carry in their own tests."""
    key = signature.decode_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")

    headers = signature.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', [key])

    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@given(key=keys, text=st.text(st.characters(exclude_categories=["Cs"])))
def test_an_independent_verifier_accepts_every_body(key: bytes, text: str) -> None:
    body = orjson.dumps({"text": text})

    headers = signature.headers("evt_1", now(), body, [key])

    assert verifier(key).verify(body, headers) == {"text": text}


@given(key=keys, body=st.text(st.characters(codec="ascii"), min_size=1).map(str.encode), place=st.integers(min_value=0))
def test_a_changed_body_is_not_accepted(key: bytes, body: bytes, place: int) -> None:
    place %= len(body)
    changed = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]

    headers = signature.headers("evt_1", now(), body, [key])

    with pytest.raises(WebhookVerificationError):
        verifier(key).verify(changed, headers)


def test_while_rotating_both_secrets_verify_and_the_newest_comes_first() -> None:
    """A subscriber that has the new secret, and one that still has the old one, are both content."""
    new, old = b"n" * 32, b"o" * 32

    headers = signature.headers("evt_1", now(), b"{}", [new, old])

    assert verifier(new).verify(b"{}", headers) == {}
    assert verifier(old).verify(b"{}", headers) == {}
    alone = signature.headers("evt_1", int(headers["webhook-timestamp"]), b"{}", [new])["webhook-signature"]
    assert headers["webhook-signature"].split(" ")[0] == alone
    with pytest.raises(WebhookVerificationError):
        verifier(b"x" * 32).verify(b"{}", headers)


@given(key=keys)
def test_a_secret_is_read_as_it_was_written(key: bytes) -> None:
    assert signature.decode_secret(signature.encode_secret(key)) == key


def test_new_secrets_differ_and_can_be_read() -> None:
    secrets = {signature.new_secret() for _ in range(10)}

    assert len(secrets) == 10
    assert {len(signature.decode_secret(secret)) for secret in secrets} == {32}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin with whsec_"),
        ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "does not begin with whsec_"),
        ("WHSEC_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "does not begin with whsec_"),
        ("whsec_", "has 0"),
        ("whsec_" + base64.b64encode(b"x" * 23).decode(), "has 23"),
        ("whsec_" + base64.b64encode(b"x" * 65).decode(), "has 65"),
        ("whsec_" + base64.b64encode(b"x" * 5000).decode(), "too long"),
        ("whsec_" + base64.urlsafe_b64encode(b"\xff" * 32).decode(), "not base64"),
        ("whsec_" + base64.b64encode(b"x" * 32).decode().rstrip("="), "not base64"),
        ("whsec_" + base64.b64encode(b"x" * 32).decode() + "\n", "not base64"),
        ("whsec_" + "ä" * 40, "not base64"),
        ("whsec_ " + base64.b64encode(b"x" * 32).decode(), "not base64"),
    ],
)
def test_a_wrong_secret_is_refused_in_a_sentence_without_repeating_it(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        signature.decode_secret(text)

    assert "24 to 64 bytes" in str(caught.value)
    assert len(text) < 12 or text[6:].strip() not in str(caught.value)
