"""What each owner may connect to: the operator's subscriptions and sources to the public Internet and to
`delivery.allowed_networks`, a tenant's to the public Internet and to what `delivery.tenant_networks` grants it."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp

from relay.delivery.guard import Guard
from relay.delivery.send import Sender


class Egress:
    """Senders for deliveries and sessions for sources created over the API, by owner (None: the operator)."""

    def __init__(
        self, senders: Mapping[str | None, Sender], sessions: Mapping[tuple[str | None, bool], aiohttp.ClientSession]
    ) -> None:
        self._senders = senders
        self._sessions = sessions

    def sender(self, tenant: str | None) -> Sender:
        return self._senders[self._owner(tenant)]

    def guard(self, tenant: str | None) -> Guard:
        return self.sender(tenant).guard

    def session(self, tenant: str | None, plain: bool) -> aiohttp.ClientSession:
        """Return the session for a source; `plain`: it connects without TLS."""
        return self._sessions[self._owner(tenant), plain]

    def _owner(self, tenant: str | None) -> str | None:
        return tenant if tenant in self._senders else UNGRANTED


UNGRANTED = ""
"""Stands for every tenant without a grant: they share one sender, which connects to public addresses only."""


@asynccontextmanager
async def open_egress(
    guards: Mapping[str | None, Guard], session: Callable[[Guard, bool], aiohttp.ClientSession]
) -> AsyncIterator[Egress]:
    """Open senders and sessions; `guards` has the operator's, that of UNGRANTED, and one per tenant with grants."""
    async with AsyncExitStack() as stack:
        senders = {
            owner: await stack.enter_async_context(Sender(guard, show_inside=owner is None))
            for owner, guard in guards.items()
        }
        sessions = {
            (owner, plain): await stack.enter_async_context(session(guard, plain))
            for owner, guard in guards.items()
            for plain in (False, True)
        }
        yield Egress(senders, sessions)
