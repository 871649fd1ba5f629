"""Text from outside, made fit for a message."""

from typing import Any


def printable(value: Any, *, quote: str = "'", max_chars: int = 64) -> str:
    """Quote a name in a message, shortened and on one line."""
    text = str(value)
    text = text if len(text) <= max_chars else text[: max_chars - 1] + "…"
    return quote + text.encode("unicode_escape").decode() + quote
