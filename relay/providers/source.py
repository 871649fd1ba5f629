"""The configured accounts, connected: what every stage needs to ask one provider within its budget."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from relay.events.decide import SourceRules
from relay.providers import PROVIDERS
from relay.providers.base import CredentialStore, Provider, ProviderKind, Purpose, SourceOptions
from relay.store.budget import Budget, Limit


@dataclass(frozen=True, slots=True)
class Source:
    """One account: its id, its options, its connected provider, our share of the provider's limit, whose it is
    (`tenant`; None: the operator's), and whether it was `made` at run time."""

    id: str
    options: SourceOptions
    kind: ProviderKind
    provider: Provider
    limit: Limit | None
    rules: SourceRules
    tenant: str | None
    made: bool
    _budget: Budget

    @property
    def paused(self) -> bool:
        """Whether it is not polled for now; what was admitted before is told all the same."""
        return not self.options.enabled

    @property
    def egress(self) -> str:
        """The way out: what a limit by IP address is counted by."""
        return self.options.proxy_url or "direct"

    @asynccontextmanager
    async def asking(self, purpose: Purpose = Purpose.POLL) -> AsyncIterator[Provider]:
        """Ask the provider; a 429 closes the budget it names. Raises SettingsError when its key file holds no key."""
        credential = self.kind.credential(self.options)
        async with self._budget.heeding(self.kind.name, credential, self.egress, self.limit, purpose=purpose):
            yield self.provider

    async def requests_left(self) -> int | None:
        """Count the requests that could go right now; None without a known limit."""
        if self.limit is None:
            return None
        return await self._budget.left(self.kind.name, self.kind.credential(self.options), self.limit)


def connect_source(
    sid: str,
    options: SourceOptions,
    http: aiohttp.ClientSession,
    budget: Budget,
    *,
    public_url: str | None,
    tenant: str | None = None,
    made: bool = False,
    credentials_of: Callable[[str], CredentialStore] | None = None,
) -> Source:
    """Connect an account; asks nothing yet."""
    kind = PROVIDERS[options.provider]
    limit = None
    if kind.requests_per_window and kind.window_s:
        limit = Limit(kind.requests_per_window, kind.window_s, options.budget_share)
    pay = budget.pay_for(kind.name, lambda: kind.credential(options), options.proxy_url or "direct", limit)
    if kind.connect_with_store is not None and credentials_of is not None:
        provider = kind.connect_with_store(options, http, pay, credentials_of(sid))
    else:
        provider = kind.connect(options, http, pay)
    rules = SourceRules(
        provider=kind.name,
        timezone=options.timezone,
        contacts=options.contacts and provider.contacts is not None,
        recordings=options.recordings and provider.recordings is not None,
        hold_for_contact_ms=int(options.hold_for_contact_s * 1000),
        hold_for_recording_ms=int(options.hold_for_recording_s * 1000),
        public_url=public_url,
    )
    return Source(sid, options, kind, provider, limit, rules, tenant, made, budget)
