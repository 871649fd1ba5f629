"""Logging: one line per event, without secrets, full phone numbers or more of a URL than its host.

Every line is redacted, including tracebacks and what libraries log through the standard library. Integers, instants
and the relay's own ids are kept. docs/operations.md lists the events.
"""

import logging
import re
import sys
from collections.abc import Mapping, Set
from datetime import date, timedelta
from enum import Enum
from typing import Any, Final, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]

MASK: Final = "•••"
TEXT_MAX_CHARS: Final = 8_192

# Libraries whose informational lines repeat what the relay logs itself.
_CHATTY: Final = ("aiohttp.access", "arq", "asyncio", "uvloop")


def configure(level: LogLevel = "info", format: LogFormat = "console", *, stream: TextIO | None = None) -> None:
    """Set up logging for the process, once, before anything is logged; without a `stream`, lines go to stderr.

    Loggers are cached at their first line, so a second call affects only loggers that have not logged yet.
    """
    output = stream if stream is not None else _Stderr()
    threshold: int = getattr(logging, level.upper())
    preprocessors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    postprocessors: list[Processor] = [
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        redactor,
    ]
    renderer = _renderer(format, colors=_is_terminal(output))

    structlog.configure(
        processors=[*preprocessors, *postprocessors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=output),  # type: ignore[arg-type]  # only write and flush are used
        cache_logger_on_first_use=True,
    )

    handler = _Handler(output)  # type: ignore[arg-type]  # only write and flush are used
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*preprocessors, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *postprocessors, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))


def redactor(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {key: redact(value, key=key, multiline=key in ("exception", "stack")) for key, value in event.items()}


def redact(value: Any, *, key: str = "", multiline: bool = False) -> Any:
    """Convert a value to JSON types without confidential parts; `key` is the name it is logged under."""
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_KEY.search(key):
        return MASK
    match value:
        case Enum():
            return redact(value.value, key=key)
        case int():
            return value if abs(value) < 2**63 else str(value)
        case float():
            return value
        case date():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case str():
            return _visible(redact_text(value), multiline=multiline)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Mapping():
            return {_visible(redact_text(str(name))): redact(inner, key=str(name)) for name, inner in value.items()}
        case list() | tuple() | Set():
            return [redact(inner, key=key) for inner in value]
        case _:
            return _visible(redact_text(str(value)))


def redact_text(text: str) -> str:
    """Mask signing secrets, tokens, URLs beyond the host, and phone numbers but for their last two digits."""
    text = _URL.sub(_host_only, text)
    text = _WHSEC.sub(f"whsec_{MASK}", text)
    text = _TOKEN.sub(f"relay_{MASK}", text)
    text = _NAMED.sub(rf"\1{MASK}", text)
    text = _SCHEME.sub(rf"\1 {MASK}", text)
    return _DIGITS.sub(_last_two, text)


_SECRET_KEY = re.compile(
    r"(?:^|[_\-.\s])(?:api)?(?:key|token|secret|authorization|password|passwd|cookie|credential|signature)s?$", re.I
)
_URL = re.compile(r"\b([a-z][a-z0-9+.\-]*)://([^\s\"'<>]*)", re.I)
_AUTHORITY = re.compile(r"(?:[^@/?#\\]*@)?((?:[\w\-.]+|\[[0-9a-f:.]+\])(?::\d{1,5})?)(?:[/?#][^@]*)?[),.;:\]}]*", re.I)
_WHSEC = re.compile(r"whsec_[\w+/=\-]+")
_TOKEN = re.compile(r"relay_[\w\-]{32,}")
_SCHEME = re.compile(r"\b(bearer)\s+[\w.~+/=\-]+", re.I)
_NAMED = re.compile(
    r"((?:authorization|api[_\-]?key|token|secret|password|passwd|signature|cookie)s?[\"']?\s*[:=]\s*"
    r"(?:(?:bearer|token|basic)\s+)?)(?!•)(?:\"[^\"]*\"|'[^']*'|[^\s\"',&;}]+)",
    re.I,
)
_DIGITS = re.compile(
    r"(?P<keep>"
    r"\b(?:evt|call)_[a-z2-7]{26}\b"  # the relay's own ids
    r"|\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:Z|[+\-]\d\d:?\d\d)?)?(?![\d\-])"  # an instant
    r"|(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?:/\d{1,2}|:\d{1,5})?(?![\d.])"  # an IPv4 address, network or socket
    r"|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"  # a UUID
    r"|\b(?=\d*[a-f])[0-9a-f]{16,64}\b"  # a digest
    r")|\+?\(?\d(?:[\s().\-/]{0,3}\d){6,}",
)


def _host_only(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    authority = _AUTHORITY.fullmatch(rest)
    return f"{scheme}://{authority[1] if authority else MASK}"


def _last_two(match: re.Match[str]) -> str:
    if match["keep"]:
        return match[0]
    digits = [char for char in match[0] if char.isdigit()]
    return MASK + "".join(digits[-2:])


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _visible(text: str, *, multiline: bool = False) -> str:
    """Escape control characters, so that a caller's name cannot forge a log line; tracebacks keep their line breaks."""
    if len(text) > TEXT_MAX_CHARS:
        text = text[:TEXT_MAX_CHARS] + "…"

    def escape(match: re.Match[str]) -> str:
        char = match[0]
        return char if multiline and char in "\n\t" else char.encode("unicode_escape").decode()

    return _CONTROL.sub(escape, text)


def _renderer(format: LogFormat, *, colors: bool) -> Processor:
    if format == "json":
        return _as_json
    return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)


def _as_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    first = {name: event[name] for name in ("timestamp", "level", "event") if name in event}
    return orjson.dumps({**first, **event}).decode()


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


class _Stderr:
    """Writes to whatever `sys.stderr` is at the time, because pytest and others replace it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines of the standard library; one that cannot be formatted is reported without its content."""

    def handleError(self, record: logging.LogRecord) -> None:
        kind = sys.exc_info()[0]
        self.stream.write(f"a log line of {record.name} could not be written: {kind.__name__ if kind else 'unknown'}\n")
