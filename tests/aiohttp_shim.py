"""Lets aioresponses 0.7.9 answer for aiohttp 3.14, whose responses want to know their request's writer.

Bodies beyond 64 kB never end in aioresponses: tests of large answers run a server on 127.0.0.1 instead.
"""

from typing import Any
from unittest.mock import Mock

import aiohttp
import aioresponses.core


class MockedResponse(aiohttp.ClientResponse):
    """A response whose request was never written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, stream_writer=Mock(output_size=0), **kwargs)


def install() -> None:
    """Make aioresponses build responses that this aiohttp accepts; a second call changes nothing."""
    setattr(aioresponses.core, "ClientResponse", MockedResponse)  # noqa: B010 - the module does not export the name
