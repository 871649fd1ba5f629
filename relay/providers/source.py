"""A configured account, connected: what every stage needs to ask one provider within its budget."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from relay.domain.source import SourceRules
from relay.providers import PROVIDERS
from relay.providers.base import CredentialStore, Provider, ProviderKind, SourceOptions
from relay.providers.budget import Limit, SourceBudget
from relay.store.budget import BudgetStore

# Options that change the records of rows, and nothing that anybody should receive an update for.
_MAPPED_BY = ("timezone", "region", "list_from", "merge_other_list", "merge_conferences")


@dataclass(frozen=True, slots=True)
class Source:
    """One connected account. `tenant` is None for the operator's; `declared`: created over the API, not configured."""

    id: str
    options: SourceOptions
    kind: ProviderKind
    provider: Provider
    budget: SourceBudget
    rules: SourceRules
    tenant: str | None
    declared: bool

    @property
    def mapping(self) -> int:
        """Number the way in which rows become records: another version, zone or list, another number."""
        options = [getattr(self.options, name, None) for name in _MAPPED_BY]
        digest = hashlib.sha256(repr(options).encode()).digest()
        return self.kind.mapping_version * 10_000 + int.from_bytes(digest[:4], "big") % 10_000

    @property
    def paused(self) -> bool:
        """Whether it is not polled for now; calls ingested before are still published."""
        return not self.options.enabled


def source_budget(options: SourceOptions, store: BudgetStore, *, tenant: str | None = None) -> SourceBudget:
    """Build the budget that requests with these options count towards."""
    kind = PROVIDERS[options.provider]
    limit = None
    if kind.requests_per_window and kind.window_s:
        limit = Limit(kind.requests_per_window, kind.window_s, options.budget_share)
    egress = options.proxy_url or "direct"
    return SourceBudget(store, options.server, lambda: kind.credential(options), egress, limit, owner=tenant or "")


def connect_source(
    sid: str,
    options: SourceOptions,
    http: aiohttp.ClientSession,
    budgets: BudgetStore,
    *,
    public_url: str | None,
    tenant: str | None = None,
    declared: bool = False,
    credentials_of: Callable[[str], CredentialStore] | None = None,
) -> Source:
    kind = PROVIDERS[options.provider]
    budget = source_budget(options, budgets, tenant=tenant)
    provider = kind.connect(options, http, budget, credentials_of(sid) if credentials_of is not None else None)
    rules = SourceRules(
        provider=kind.name,
        timezone=options.timezone,
        contacts=options.contacts and provider.contacts is not None,
        recordings=options.recordings and provider.recordings is not None,
        hold_for_contact_ms=int(options.hold_for_contact_s * 1000),
        hold_for_recording_ms=int(options.hold_for_recording_s * 1000),
        public_url=public_url,
    )
    return Source(sid, options, kind, provider, budget, rules, tenant, declared)
