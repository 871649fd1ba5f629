"""The sources and subscriptions in force: those that are configured and those created over the API, as one.

A configured id takes precedence and can only be changed in the configuration. Processes follow changes within a second.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import aiohttp
import orjson
import structlog
from pydantic import TypeAdapter, ValidationError

from relay.delivery import signature
from relay.delivery.subscriptions import Subscription, Subscriptions
from relay.domain.json import Json
from relay.domain.time import from_iso
from relay.errors import RelayError
from relay.providers import PROVIDERS
from relay.providers.base import CredentialStore, SourceOptions
from relay.providers.source import Source, connect_source
from relay.settings import Settings, SubscriptionOptions, reveal
from relay.store.budget import BudgetStore
from relay.store.configurations import Configurations, Kind
from relay.store.connection import STORE_ERRORS
from relay.store.declarations import Declaration, Declarations

log = structlog.get_logger(__name__)

FOLLOW_EVERY_S = 1.0
_RELOAD = "reload or restart this process; until then the newer one decides limits, pauses and credentials"
_OPTIONS = TypeAdapter(SubscriptionOptions)


class Registry:
    """Holds every source and subscription in force, and follows changes. What is configured takes precedence."""

    def __init__(
        self,
        settings: Settings,
        declarations: Declarations,
        configurations: Configurations,
        http: aiohttp.ClientSession,
        budget: BudgetStore,
        *,
        guarded: Callable[[str | None, bool], aiohttp.ClientSession],
        credentials_of: Callable[[str], CredentialStore],
        version_key: bytes,
    ) -> None:
        """`http` is for configured sources; `guarded` (by owner, and whether it connects without TLS) for those created
        over the API, and dials no forbidden address. `version_key` keys the digest of a configuration, which has
        secrets."""
        self.declarations = declarations
        self.sources: dict[str, Source] = {}
        self.subscriptions = Subscriptions({})
        self.declared: dict[Kind, dict[str, Declaration]] = {"source": {}, "subscription": {}}
        self._configurations = configurations
        self._version_key = version_key
        self._outranked: frozenset[tuple[Kind, str]] = frozenset()
        self._settings = settings
        self._configuration_version = self._digest(settings)
        self._announced_version = ""
        self._http = http
        self._guarded = guarded
        self._credentials_of = credentials_of
        self._budget = budget
        self._version = -1
        self._connected: dict[str, tuple[SourceOptions, Source]] = {}
        self._parsed: dict[str, tuple[Declaration, SourceOptions]] = {}
        self._loading = asyncio.Lock()

    def configured(self, kind: Kind, name: str) -> bool:
        """Whether the configuration has this id, so that the API must not change it."""
        return name in (self._settings.sources if kind == "source" else self._settings.subscriptions)

    def reconfigure(self, settings: Settings) -> None:
        """Replace the configuration; `load` then applies its sources and subscriptions."""
        self._settings = settings
        self._configuration_version = self._digest(settings)
        self._version = -1

    async def announce(self) -> None:
        """Announce the configuration, and find out whether processes with a newer one decide for some of its names."""
        names: list[tuple[Kind, str]] = [
            *(("source", name) for name in self._settings.sources),
            *(("subscription", name) for name in self._settings.subscriptions),
        ]
        before, version = self._outranked, self._configuration_version
        former = self._announced_version if self._announced_version != version else ""
        self._outranked = await self._configurations.announce(version, names, former=former)
        self._announced_version = version
        if self._outranked and not before:
            log.warning("configuration_outdated", reason="another process runs with a newer one", action=_RELOAD)
        elif before and not self._outranked:
            log.info("configuration_in_force", reason="no process runs with a newer one any more")

    def decides(self, kind: Kind, name: str) -> bool:
        """Whether this process may write what all processes share of a source or subscription, such as its limits: not
        while another one runs with a newer configuration that declares it too."""
        return (kind, name) not in self._outranked or not self.configured(kind, name)

    def subscriptions_elsewhere(self) -> list[str]:
        """List the subscriptions that only processes with a newer configuration know."""
        return [name for kind, name in self._outranked if kind == "subscription" and name not in self.subscriptions]

    def _digest(self, settings: Settings) -> str:
        declared = {
            kind: {name: _revealed(options) for name, options in options_of.items()}
            for kind, options_of in (("source", settings.sources), ("subscription", settings.subscriptions))
        }
        document = orjson.dumps(declared, option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(document, key=self._version_key, digest_size=12).hexdigest()

    async def load(self) -> bool:
        """Read the declarations and apply them, if anything has changed; whether it had."""
        async with self._loading:
            version = await self.declarations.version()
            if version == self._version:
                return False
            sources = await self._owned("source")
            subscriptions = await self._owned("subscription")
            self.declared = {"source": sources, "subscription": subscriptions}
            self.sources = self._all_sources(sources)
            self.subscriptions.replace(self._all_subscriptions(subscriptions))
            self._version = version
            return True

    async def _owned(self, kind: Kind) -> dict[str, Declaration]:
        """Read the declarations whose id belongs to their tenant: the configuration may have had it meanwhile."""
        declarations, owners = await self.declarations.all(kind), await self.declarations.owners(kind)
        owned = {
            name: declaration
            for name, declaration in declarations.items()
            if owners.get(name, declaration.tenant) == declaration.tenant
        }
        for name in declarations.keys() - owned.keys():
            if not self.configured(kind, name):
                log.error("declaration_not_owned", kind=kind, id=name, action="delete it and use another id")
        return owned

    def may_receive(self, tenant: str | None, document: Json) -> bool | None:
        """Whether a subscription of a tenant may receive an event; None when the event's owner is not known here."""
        if tenant is None:
            return True
        data = document["data"]
        source_id = data["call"]["source_id"] if "call" in data else data.get("source", {}).get("id")
        owner = (
            self.subscriptions.get(data.get("subscription", {}).get("id"))
            if source_id is None
            else self.sources.get(source_id)
        )
        return None if owner is None else owner.tenant == tenant

    async def apply(self, kind: Kind, declaration: Declaration) -> None:
        """Apply a declaration in this process at once; the others follow. Raises ValidationError."""
        name = declaration.id
        async with self._loading:  # a load that began before would undo it
            self.declared[kind][name] = declaration
            if self.configured(kind, name):
                return
            if kind == "source":
                options = self._options_of(declaration)
                self.sources[name] = self._connect(name, options, declaration.tenant, declared=True)
            else:
                self.subscriptions.replace({**self.subscriptions, name: declared_subscription(declaration)})

    async def drop(self, kind: Kind, name: str) -> None:
        """Remove a source or subscription from this process at once; the others follow."""
        async with self._loading:
            self.declared[kind].pop(name, None)
            if self.configured(kind, name):
                return
            if kind == "source":
                self.sources.pop(name, None)
                self._connected.pop(name, None)
                self._parsed.pop(name, None)
            else:
                remaining = {sub: subscription for sub, subscription in self.subscriptions.items() if sub != name}
                self.subscriptions.replace(remaining)

    async def follow(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Follow changes for ever; `on_change` is awaited after each."""
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            with contextlib.suppress(*STORE_ERRORS):  # the runners log that the store is unavailable
                try:
                    await self.announce()
                    if await self.load():
                        await on_change()
                except RelayError as error:
                    log.error("registry_load_failed", error=str(error))

    def _all_sources(self, declarations: Mapping[str, Declaration]) -> dict[str, Source]:
        sources: dict[str, Source] = {}
        for sid, declaration in declarations.items():
            if sid in self._settings.sources:
                continue
            try:
                sources[sid] = self._connect(sid, self._options_of(declaration), declaration.tenant, declared=True)
            except ValidationError as error:
                log.error("source_load_failed", source=sid, errors=error.error_count())
        for sid, options in self._settings.sources.items():
            sources[sid] = self._connect(sid, options, None, declared=False)
        self._connected = {sid: self._connected[sid] for sid in sources}
        self._parsed = {sid: parsed for sid, parsed in self._parsed.items() if sid in declarations}
        return sources

    def _options_of(self, declaration: Declaration) -> SourceOptions:
        parsed = self._parsed.get(declaration.id)
        if parsed is None or parsed[0] is not declaration:
            parsed = (declaration, parse_source(declaration.document))
            self._parsed[declaration.id] = parsed
        return parsed[1]

    def _connect(self, sid: str, options: SourceOptions, tenant: str | None, *, declared: bool) -> Source:
        """Connect a source, or keep the connected one when nothing has changed: it holds connections and tokens."""
        before = self._connected.get(sid)
        if before is not None and before[0] == options and (before[1].tenant, before[1].declared) == (tenant, declared):
            return before[1]
        source = connect_source(
            sid,
            options,
            self._guarded(tenant, connects_without_tls(options)) if declared else self._http,
            self._budget,
            public_url=self._settings.public_url,
            tenant=tenant,
            declared=declared,
            credentials_of=self._credentials_of,
        )
        self._connected[sid] = (options, source)
        return source

    def _all_subscriptions(self, declarations: Mapping[str, Declaration]) -> dict[str, Subscription]:
        subscriptions: dict[str, Subscription] = {}
        for sub, declaration in declarations.items():
            try:
                subscriptions[sub] = declared_subscription(declaration)
            except ValidationError as error:
                log.error("subscription_load_failed", subscription=sub, errors=error.error_count())
        for sub, options in self._settings.subscriptions.items():
            subscriptions[sub] = Subscription.of(sub, options)
        return subscriptions


def _revealed(options: SourceOptions | SubscriptionOptions) -> Json:
    # Without defaults: releases with different options read one file as the same configuration.
    return {name: value for name, value in reveal(options).items() if name in options.model_fields_set}


def connects_without_tls(options: SourceOptions) -> bool:
    """Whether the connection for a source begins without TLS; one to a proxy does, and then tunnels to https."""
    base_url = getattr(options, "base_url", None)
    return options.proxy_url is None and isinstance(base_url, str) and base_url.lower().startswith("http://")


def parse_source(document: Json) -> SourceOptions:
    """Parse a source's options by its provider. Raises ValidationError."""
    kind = PROVIDERS.get(str(document.get("provider")))
    model = kind.options if kind is not None else SourceOptions
    options: SourceOptions = TypeAdapter(model).validate_python(document)
    return options


def declared_subscription(declaration: Declaration) -> Subscription:
    """Build a subscription that was created over the API; former secrets sign too until they expire."""
    document = dict(declaration.document)
    former_secrets = document.pop("former_secrets", [])
    subscription = Subscription.of(declaration.id, _OPTIONS.validate_python(document), tenant=declaration.tenant)
    former_keys = tuple(
        (signature.decode_secret(former["secret"]), from_iso(former["until"]).timestamp()) for former in former_secrets
    )
    return replace(subscription, former_keys=former_keys)
