"""Logs keep what an operator needs and mask secrets and phone numbers."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from relay.delivery.signature import new_secret
from relay.log import configure, redact, redact_text
from relay.secrets import generate_token

CALL = "call_abcdefghijklmnop2345672345"
EVENT = "evt_2345672345672345672345abcd"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:], root.level = before
    for name in ("aiohttp.access", "arq", "asyncio", "uvloop"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://hooks.example.test/catch/1/abc?x=y", "https://hooks.example.test"),
        ("https://user:word@hooks.example.test:8443/a", "https://hooks.example.test:8443"),
        ("(see https://hooks.example.test/a).", "(see https://hooks.example.test"),
        ("https://hooks.example.test", "https://hooks.example.test"),
        ("https://[2001:db8::1]:8443/a", "https://[2001:db8::1]:8443"),
        ("redis://:word@redis:6379/0", "redis://redis:6379"),
        ("redis://:wo/rd@redis:6379/0", "redis://•••"),
        ("redis://user:12/34@redis", "redis://•••"),
        ("unix:///run/redis.sock", "unix://•••"),
        ("https://hooks.example.test/a/@secret", "https://•••"),
        ("signed with whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw now", "signed with whsec_••• now"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer •••"),
        ("bearer abc", "bearer •••"),
        ("Authorization: Token abcdef", "Authorization: Token •••"),
        ("{'x-api-key': 'abc def'}", "{'x-api-key': •••}"),
        ("GET /recordings/x?expires=1&signature=abcdef HTTP/1.1", "GET /recordings/x?expires=1&signature=••• HTTP/1.1"),
        ("password=hunter2; user=me", "password=•••; user=me"),
        ("call from +1 (555) 123-4567 ended", "call from •••67 ended"),
        ("call from 5551234567, x3203", "call from •••67, x3203"),
        ("sip:15551234567@pbx", "sip:•••67@pbx"),
        ("555.123.4567", "•••67"),
        ("0033 1 23 45 67 89", "•••89"),
        ("٠١٢٣٤٥٦٧٨٩", "•••٨٩"),
        (f"{CALL} and {EVENT}", f"{CALL} and {EVENT}"),
        ("since 2025-07-01T20:54:53Z", "since 2025-07-01T20:54:53Z"),
        ("since 2025-07-01T20:54:53.123456+00:00", "since 2025-07-01T20:54:53.123456+00:00"),
        ("on 2025-07-01", "on 2025-07-01"),
        ("refused 192.168.100.200:8080", "refused 192.168.100.200:8080"),
        ("allow 192.168.100.200/32", "allow 192.168.100.200/32"),
        ("123e4567-e89b-12d3-a456-426614174000", "123e4567-e89b-12d3-a456-426614174000"),
        ("hash 0123456789abcdef", "hash 0123456789abcdef"),
        ("214 calls of the last 72 h known", "214 calls of the last 72 h known"),
        ("extension 3203", "extension 3203"),
    ],
)
def test_only_confidential_parts_of_a_text_are_masked(text: str, written: str) -> None:
    assert redact_text(text) == written


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("api_key", "abc", "•••"),
        ("key", 12345, "•••"),
        ("x-api-key", "abc", "•••"),
        ("token", "abc", "•••"),
        ("tokens", ["abc"], "•••"),
        ("secret", SecretStr("abc"), "•••"),
        ("Authorization", "Bearer abc", "•••"),
        ("password", b"abc", "•••"),
        ("secret", None, None),
        ("has_secret", True, True),
        ("monkey", "abc", "abc"),
        ("count", 15551234567, 15551234567),
        ("huge", 2**70, str(2**70)),
        ("took_s", 1234567.25, 1234567.25),
        ("at", datetime(2025, 7, 1, 20, 54, 53, tzinfo=UTC), "2025-07-01T20:54:53+00:00"),
        ("wait", timedelta(seconds=90), 90.0),
        ("colour", Colour.RED, "red"),
        ("body", b"12345678", "<8 bytes>"),
        ("value", SecretStr("abc"), "**********"),
        ("error", ValueError("to https://example.test/a"), "to https://example.test"),
        ("headers", {"token": "abc", "+15551234567": "x"}, {"token": "•••", "•••67": "x"}),
        ("numbers", ("+15551234567", 7), ["•••67", 7]),
        ("name", "A\nlevel=error\x1b[31m\ud800", "A\\nlevel=error\\x1b[31m\\ud800"),
        ("raw", "a" * 9000, "a" * 8192 + "…"),
    ],
)
def test_a_field_is_redacted_by_its_name_and_type(key: str, value: object, written: object) -> None:
    assert redact(value, key=key) == written


@given(digits=st.text("0123456789", min_size=7, max_size=15), gap=st.sampled_from(["", " ", "-", ".", ") ", "/"]))
def test_no_more_than_two_digits_of_a_number_are_written(digits: str, gap: str) -> None:
    """However the number is grouped; an IPv4 address of four groups of three is kept on purpose."""
    grouped = gap.join([digits[:3], digits[3:6], digits[6:]])
    written = redact_text(f"to {grouped} now")

    assert written == f"to •••{digits[-2:]} now"


@given(text=st.text(max_size=40))
def test_generated_secrets_are_never_written(text: str) -> None:
    """Wherever they are in a line."""
    for secret in (new_secret(), generate_token()):
        tail = secret.split("_", 1)[1][:20]

        assert tail not in redact_text(f"{text}{secret}{text}")


def test_json_lines_are_redacted_and_complete(stream: io.StringIO) -> None:
    configure("info", "json", stream=stream)
    structlog.get_logger().info("call_ingested", call=CALL, number="+15551234567", source="main", attempts=2)
    [line] = lines(stream)

    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "event": "call_ingested",
        "call": CALL,
        "number": "•••67",
        "source": "main",
        "attempts": 2,
    }


def test_libraries_go_through_the_same_redaction(stream: io.StringIO) -> None:
    """aiohttp and arq log whole URLs through the standard library."""
    configure("info", "json", stream=stream)
    logging.getLogger("aiohttp.client").warning("cannot reach %s", "https://hooks.example.test/catch/abc")
    [line] = lines(stream)

    assert line["event"] == "cannot reach https://hooks.example.test"
    assert (line["logger"], line["level"]) == ("aiohttp.client", "warning")


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("ours", [True, False])
def test_tracebacks_are_redacted_too(stream: io.StringIO, format: Any, ours: bool) -> None:
    configure("info", format, stream=stream)
    try:
        raise ValueError("no answer from https://hooks.example.test/catch/abc for 5551234567")
    except ValueError:
        (structlog.get_logger() if ours else logging.getLogger("x")).exception("delivery_failed")
    written = stream.getvalue()

    assert "no answer from https://hooks.example.test for •••67" in written
    assert "Traceback" in written
    assert "catch/abc" not in written


def test_lines_below_the_level_are_dropped(stream: io.StringIO) -> None:
    """Our own by the level; informational lines of chatty libraries even at `debug`."""
    configure("warning", "json", stream=stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("x").info("quiet")
    structlog.get_logger().warning("loud")
    configure("debug", "json", stream=stream)
    logging.getLogger("arq.worker").info("quiet")
    logging.getLogger("aiohttp.access").info("quiet")
    logging.getLogger("x").debug("detail")

    assert [line["event"] for line in lines(stream)] == ["loud", "detail"]


def test_a_line_cannot_be_forged(stream: io.StringIO) -> None:
    """A caller's name with a line break stays one line."""
    configure("info", "console", stream=stream)
    structlog.get_logger().info("contact_found", name="Eve\n2025-07-01 [error] all is lost")

    assert len(stream.getvalue().splitlines()) == 1


def test_a_line_that_cannot_be_formatted_is_reported_without_its_content(stream: io.StringIO) -> None:
    configure("info", "json", stream=stream)
    logging.getLogger("arq").warning("%d", "confidential")

    assert stream.getvalue() == "a log line of arq could not be written: TypeError\n"


def test_loggers_are_cached(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger is built once, at its first line (only tests, which reconfigure logging, turn this off)."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(structlog, "configure", lambda **keywords: options.update(keywords))
    configure("info", "json", stream=stream)

    assert options["cache_logger_on_first_use"] is True


def test_without_a_stream_lines_go_to_the_current_stderr(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced stderr is followed, for a cached logger too."""
    first, second = io.StringIO(), io.StringIO()
    configure("info", "json")
    logger = structlog.get_logger()
    for target in (first, second):
        monkeypatch.setattr(sys, "stderr", target)
        logger.info("logged")
        logging.getLogger("x").info("logged")

    assert [len(target.getvalue().splitlines()) for target in (first, second)] == [2, 2]


def test_importing_configures_nothing() -> None:
    """A program that imports the module keeps its own logging."""
    code = (
        "import logging, structlog, relay.log; "
        "assert not logging.getLogger().handlers and not structlog.is_configured()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
