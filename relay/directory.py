"""Sources and subscriptions, those of the configuration and those made at run time, as one.

What the configuration declares wins an id, and can only be changed there. Processes follow changes within a second.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import aiohttp
import structlog
from pydantic import TypeAdapter, ValidationError
from redis.exceptions import RedisError

from relay.delivery import signature
from relay.delivery.subscriptions import Subscription, Subscriptions
from relay.errors import RelayError
from relay.ledger.declared import Declarations, Declared
from relay.model import Json, from_iso
from relay.poll.budget import Budget
from relay.providers import PROVIDERS
from relay.providers.base import SourceOptions
from relay.settings import Settings, SubscriptionOptions
from relay.sources import Source, connect_one

log = structlog.get_logger(__name__)

FOLLOW_EVERY_S = 1.0
_OPTIONS = TypeAdapter(SubscriptionOptions)


class Directory:
    """Knows every source and subscription, and keeps knowing."""

    def __init__(
        self, settings: Settings, declarations: Declarations, http: aiohttp.ClientSession, budget: Budget
    ) -> None:
        self.declarations = declarations
        self.sources: dict[str, Source] = {}
        self.subscriptions = Subscriptions({})
        self._settings = settings
        self._http = http
        self._budget = budget
        self._version = -1
        self._connected: dict[str, tuple[SourceOptions, Source]] = {}

    def configured(self, kind: str, name: str) -> bool:
        """Whether the configuration declares this id, so that the API must leave it alone."""
        declared = self._settings.sources if kind == "source" else self._settings.subscriptions
        return name in declared

    def reconfigure(self, settings: Settings) -> None:
        """Take the sources and subscriptions of a configuration that was read again; `load` puts them in force."""
        self._settings = settings
        self._version = -1

    async def load(self) -> bool:
        """Read what was made at run time, if anything changed; True when it did."""
        version = await self.declarations.version()
        if version == self._version:
            return False
        sources = await self.declarations.all("source")
        subscriptions = await self.declarations.all("subscription")
        self.sources = self._all_sources(sources)
        self.subscriptions.replace(self._all_subscriptions(subscriptions))
        self._version = version
        return True

    async def follow(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Keep reading, for ever; `changed` is awaited after each change."""
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            with contextlib.suppress(RedisError, OSError):  # the runners say that the store is away
                try:
                    if await self.load():
                        await changed()
                except RelayError as error:
                    log.error("directory_unreadable", error=str(error))

    def _all_sources(self, declared: Mapping[str, Declared]) -> dict[str, Source]:
        options: dict[str, tuple[SourceOptions, str | None]] = {}
        for sid, made in declared.items():
            try:
                options[sid] = (parse_source(made.document), made.tenant)
            except ValidationError as error:
                log.error("source_unreadable", source=sid, errors=error.error_count())
        options |= {sid: (each, None) for sid, each in self._settings.sources.items()}
        connected: dict[str, tuple[SourceOptions, Source]] = {}
        for sid, (each, tenant) in options.items():
            if not each.enabled:
                continue
            before = self._connected.get(sid)
            if before is not None and before[0] == each and before[1].tenant == tenant:
                connected[sid] = before
            else:
                source = connect_one(
                    sid, each, self._http, self._budget, public_url=self._settings.public_url, tenant=tenant
                )
                connected[sid] = (each, source)
        self._connected = connected
        return {sid: source for sid, (_, source) in connected.items()}

    def _all_subscriptions(self, declared: Mapping[str, Declared]) -> dict[str, Subscription]:
        found: dict[str, Subscription] = {}
        for sid, each in declared.items():
            try:
                found[sid] = made_subscription(each)
            except ValidationError as error:
                log.error("subscription_unreadable", subscription=sid, errors=error.error_count())
        for sid, options in self._settings.subscriptions.items():
            found[sid] = Subscription.of(sid, options)
        return found


def parse_source(document: Json) -> SourceOptions:
    """Read a source's options by its provider. Raises ValidationError."""
    kind = PROVIDERS.get(str(document.get("provider")))
    model = kind.options if kind is not None else SourceOptions
    options: SourceOptions = TypeAdapter(model).validate_python(document)
    return options


def made_subscription(declared: Declared) -> Subscription:
    """Prepare a subscription that was made at run time; former secrets sign too until they end."""
    document = dict(declared.document)
    former = document.pop("former_secrets", [])
    subscription = Subscription.of(declared.id, _OPTIONS.validate_python(document), tenant=declared.tenant)
    keys = [(signature.decode_secret(each["secret"]), from_iso(each["until"]).timestamp()) for each in former]
    return replace(subscription, former_keys=tuple(keys))
