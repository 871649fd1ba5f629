"""What a provider may do to one port of the relay, without HTTP and without a budget."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from relay.domain.call import Contact
from relay.providers.base import Audio, CallPage, ContactChanges, NoRecordingYet, NoSuchCall, Purpose, Window


class UnresponsiveBook:
    """An address book that accepts every request and never answers."""

    batch = 50

    async def search(self, numbers: Sequence[str]) -> Mapping[str, Sequence[Contact]]:
        await asyncio.Event().wait()
        raise AssertionError

    async def changes_after(self, version: int) -> ContactChanges:
        await asyncio.Event().wait()
        raise AssertionError


class AnsweringBook:
    """An address book that answers at once."""

    batch = 50

    async def search(self, numbers: Sequence[str]) -> Mapping[str, Sequence[Contact]]:
        return {number: [Contact("1", name="Jo Doe")] for number in numbers}

    async def changes_after(self, version: int) -> ContactChanges:
        return ContactChanges(1, changed=False)


class DrippingAudio:
    """Sends a byte now and then, so that the connection never counts as silent."""

    def __init__(self) -> None:
        self.transfers = 0

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncGenerator[Audio | NoRecordingYet | NoSuchCall, None]:
        self.transfers += 1
        yield Audio(self._chunks(), "audio/wav", 1_000_000)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.2)


class PromptAudio:
    """Has every recording at once."""

    @asynccontextmanager
    async def recording(
        self, key: str, *, purpose: Purpose = Purpose.RECORDING
    ) -> AsyncGenerator[Audio | NoRecordingYet | NoSuchCall, None]:
        async def chunks() -> AsyncIterator[bytes]:
            yield bytes(100_000)

        yield Audio(chunks(), "audio/wav", 100_000)


class EmptyList:
    """A call list without calls."""

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        yield CallPage([])


class UnresponsiveList:
    """A call list that accepts every request and never answers."""

    async def pages(self, window: Window) -> AsyncIterator[CallPage]:
        await asyncio.Event().wait()
        yield CallPage([])
