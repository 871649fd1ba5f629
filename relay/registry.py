"""Sources and subscriptions, those of the configuration and those made at run time, as one.

What the configuration declares wins an id, and can only be changed there. Processes follow changes within a second.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Literal

import aiohttp
import structlog
from pydantic import TypeAdapter, ValidationError
from redis.exceptions import RedisError

from relay.delivery import signature
from relay.delivery.subscriptions import Subscription, Subscriptions
from relay.domain.json import Json
from relay.domain.time import from_iso
from relay.errors import RelayError
from relay.providers import PROVIDERS
from relay.providers.base import CredentialStore, SourceOptions
from relay.providers.source import Source, connect_source
from relay.settings import Settings, SubscriptionOptions
from relay.store.budget import BudgetStore
from relay.store.declarations import Declaration, Declarations

log = structlog.get_logger(__name__)

FOLLOW_EVERY_S = 1.0
_OPTIONS = TypeAdapter(SubscriptionOptions)

Made = Literal["source", "subscription"]


class Registry:
    """Knows every source and subscription, and keeps knowing."""

    def __init__(
        self,
        settings: Settings,
        declarations: Declarations,
        http: aiohttp.ClientSession,
        budget: BudgetStore,
        *,
        guarded: Mapping[bool, aiohttp.ClientSession],
        credentials_of: Callable[[str], CredentialStore],
    ) -> None:
        """`http` asks what the configuration declares; `guarded` (by whether the connection is without TLS) what was
        made at run time, and dials no forbidden address."""
        self.declarations = declarations
        self.sources: dict[str, Source] = {}
        self.subscriptions = Subscriptions({})
        self.made: dict[Made, dict[str, Declaration]] = {"source": {}, "subscription": {}}
        self._settings = settings
        self._http = http
        self._guarded = guarded
        self._safe_of = credentials_of
        self._budget = budget
        self._version = -1
        self._connected: dict[str, tuple[SourceOptions, Source]] = {}
        self._parsed: dict[str, tuple[Declaration, SourceOptions]] = {}
        self._reading = asyncio.Lock()

    def configured(self, kind: Made, name: str) -> bool:
        """Whether the configuration declares this id, so that the API must leave it alone."""
        declared = self._settings.sources if kind == "source" else self._settings.subscriptions
        return name in declared

    def configured_ids(self, kind: Made) -> list[str]:
        """List the ids that the configuration declares."""
        return sorted(self._settings.sources if kind == "source" else self._settings.subscriptions)

    def reconfigure(self, settings: Settings) -> None:
        """Take the sources and subscriptions of a configuration that was read again; `load` puts them in force."""
        self._settings = settings
        self._version = -1

    async def load(self) -> bool:
        """Read what was made at run time, if anything changed; True when it did."""
        async with self._reading:
            version = await self.declarations.version()
            if version == self._version:
                return False
            sources = await self.declarations.all("source")
            subscriptions = await self.declarations.all("subscription")
            self.made = {"source": sources, "subscription": subscriptions}
            self.sources = self._all_sources(sources)
            self.subscriptions.replace(self._all_subscriptions(subscriptions))
            self._version = version
            return True

    async def take(self, kind: Made, made: Declaration) -> None:
        """Put one thing in force here at once; the others follow. Raises ValidationError."""
        async with self._reading:  # so that a reading which began before cannot undo it
            self.made[kind][made.id] = made
            if self.configured(kind, made.id):
                return
            if kind == "source":
                self.sources[made.id] = self._connect(made.id, self._options_of(made), made.tenant, made=True)
            else:
                self.subscriptions.replace({**self.subscriptions, made.id: made_subscription(made)})

    async def drop(self, kind: Made, name: str) -> None:
        """Put one thing out of force here at once."""
        async with self._reading:
            self.made[kind].pop(name, None)
            if self.configured(kind, name):
                return
            if kind == "source":
                self.sources.pop(name, None)
                self._connected.pop(name, None)
                self._parsed.pop(name, None)
            else:
                self.subscriptions.replace({sid: each for sid, each in self.subscriptions.items() if sid != name})

    async def follow(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Keep reading, for ever; `changed` is awaited after each change."""
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            with contextlib.suppress(RedisError, OSError):  # the runners say that the store is away
                try:
                    if await self.load():
                        await changed()
                except RelayError as error:
                    log.error("registry_load_failed", error=str(error))

    def _all_sources(self, declared: Mapping[str, Declaration]) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for sid, made in declared.items():
            if sid in self._settings.sources:
                continue
            try:
                found[sid] = self._connect(sid, self._options_of(made), made.tenant, made=True)
            except ValidationError as error:
                log.error("source_load_failed", source=sid, errors=error.error_count())
        for sid, options in self._settings.sources.items():
            found[sid] = self._connect(sid, options, None, made=False)
        self._connected = {sid: self._connected[sid] for sid in found}
        self._parsed = {sid: each for sid, each in self._parsed.items() if sid in declared}
        return found

    def _options_of(self, made: Declaration) -> SourceOptions:
        known = self._parsed.get(made.id)
        if known is None or known[0] is not made:
            known = (made, parse_source(made.document))
            self._parsed[made.id] = known
        return known[1]

    def _connect(self, sid: str, options: SourceOptions, tenant: str | None, *, made: bool) -> Source:
        """Connect a source, or keep the connected one where nothing changed."""
        before = self._connected.get(sid)
        if before is not None and before[0] == options and (before[1].tenant, before[1].made) == (tenant, made):
            return before[1]
        source = connect_source(
            sid,
            options,
            self._guarded[dials_plain(options)] if made else self._http,
            self._budget,
            public_url=self._settings.public_url,
            tenant=tenant,
            made=made,
            credentials_of=self._safe_of,
        )
        self._connected[sid] = (options, source)
        return source

    def _all_subscriptions(self, declared: Mapping[str, Declaration]) -> dict[str, Subscription]:
        found: dict[str, Subscription] = {}
        for sid, each in declared.items():
            try:
                found[sid] = made_subscription(each)
            except ValidationError as error:
                log.error("subscription_load_failed", subscription=sid, errors=error.error_count())
        for sid, options in self._settings.subscriptions.items():
            found[sid] = Subscription.of(sid, options)
        return found


def dials_plain(options: SourceOptions) -> bool:
    """Whether a source is asked without TLS; a proxy is always dialled so, and then tunnels to an https address."""
    base_url = getattr(options, "base_url", None)
    return options.proxy_url is None and isinstance(base_url, str) and base_url.lower().startswith("http://")


def parse_source(document: Json) -> SourceOptions:
    """Read a source's options by its provider. Raises ValidationError."""
    kind = PROVIDERS.get(str(document.get("provider")))
    model = kind.options if kind is not None else SourceOptions
    options: SourceOptions = TypeAdapter(model).validate_python(document)
    return options


def made_subscription(declared: Declaration) -> Subscription:
    """Prepare a subscription that was made at run time; former secrets sign too until they end."""
    document = dict(declared.document)
    former = document.pop("former_secrets", [])
    subscription = Subscription.of(declared.id, _OPTIONS.validate_python(document), tenant=declared.tenant)
    keys = [(signature.decode_secret(each["secret"]), from_iso(each["until"]).timestamp()) for each in former]
    return replace(subscription, former_keys=tuple(keys))
