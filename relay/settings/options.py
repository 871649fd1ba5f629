"""Every setting, as frozen options: one field, one default, one description, the unit in the name."""

from collections.abc import Mapping
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from yarl import URL

from relay.domain.call import Direction, Outcome
from relay.domain.json import Json
from relay.providers import PROVIDERS
from relay.providers.base import ProviderKind, SourceOptions
from relay.settings.values import (
    ApiToken,
    DirectoryPath,
    EventPattern,
    Frozen,
    HostName,
    NetworkRange,
    PublicUrl,
    RedisUrl,
    SecretKeys,
    SecretUrl,
    SigningSecret,
    StorageUrl,
    as_tuple,
    check_field_map,
    check_headers,
    lower,
    whole_numbers_as_text,
)

ID_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ApiOptions(_Section):
    """The public port: management API, dashboard and recording links."""

    host: HostName = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(8080, ge=0, le=65_535, description="port of the API; 0 picks a free one")
    max_connections: int = Field(
        1000,
        ge=16,
        le=50_000,
        description="maximum number of open connections; fewer when the process may not open that many files",
    )
    max_connections_per_address: int = Field(
        200,
        ge=8,
        le=50_000,
        description="maximum number of open connections per client address; behind a reverse proxy as many as in all",
    )
    tokens: tuple[ApiToken, ...] = Field(
        (), description="API tokens with operator access; with an embedded store, one is generated if there is none"
    )


class InternalOptions(_Section):
    """The port for probes and metrics that every role opens; not for the public."""

    host: HostName = Field("127.0.0.1", description="address of /livez, /readyz and /metrics")
    port: int = Field(9090, ge=0, le=65_535, description="port of /livez, /readyz and /metrics; 0 picks a free one")


class LogOptions(_Section):
    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = Field(
        "info", description="minimum level of log lines"
    )
    format: Annotated[Literal["console", "json"], BeforeValidator(lower)] = Field(
        "console", description="console for people, json for one JSON object per line"
    )


class NetworkGrant(_Section):
    """A network that a tenant may connect to."""

    network: NetworkRange = Field(description="network, such as 10.1.2.0/24")
    ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = Field(
        (80, 443), min_length=1, description="ports that may be connected to"
    )


class DeliveryOptions(_Section):
    allowed_networks: tuple[NetworkRange, ...] = Field(
        (), description="private networks that the operator's subscribers may be in; plain http is allowed there too"
    )
    tenant_networks: Annotated[
        Mapping[Annotated[str, Field(pattern=ID_PATTERN)], tuple[NetworkGrant, ...]], *Frozen
    ] = Field(
        default_factory=lambda: MappingProxyType({}),
        description="private networks that a tenant's subscribers and sources may be in, by tenant",
    )
    timeout_s: float = Field(15, ge=1, le=120, description="timeout of one delivery attempt, in seconds")


class TierOptions(_Section):
    """One polling tier: how often to look how far back."""

    every_s: float = Field(
        ge=0, le=604_800, description="seconds between requests that look this far back; 0: every poll"
    )
    depth_s: float = Field(ge=60, le=345_600, description="how far back to look, in seconds; at most 96 hours")


class PollOptions(_Section):
    tiers: tuple[TierOptions, ...] = Field(
        (
            TierOptions(every_s=0, depth_s=7_200),
            TierOptions(every_s=900, depth_s=93_600),
            TierOptions(every_s=21_600, depth_s=280_800),
        ),
        min_length=1,
        max_length=8,
        description="how often to look how far back for calls that appear late; shallowest tier first",
    )

    @model_validator(mode="after")
    def _tiers_get_rarer_and_deeper(self) -> Self:
        if self.tiers[0].every_s != 0:
            raise ValueError("the first tier must have every_s: 0, so that every poll uses it")
        for nearer, deeper in pairwise(self.tiers):
            if deeper.every_s <= nearer.every_s or deeper.depth_s <= nearer.depth_s:
                raise ValueError("each tier must have a larger every_s and a larger depth_s than the one before")
        return self


class RetentionOptions(_Section):
    calls_days: int = Field(30, ge=1, le=3_650, description="days a call is kept; at least events_days")
    events_days: int = Field(14, ge=10, le=3_650, description="days an event can be listed and replayed")
    recordings_days: int = Field(30, ge=1, le=3_650, description="days audio is kept; at most calls_days")

    @model_validator(mode="after")
    def _nothing_outlives_its_call(self) -> Self:
        if self.events_days > self.calls_days:
            raise ValueError(f"events_days ({self.events_days}) must not be more than calls_days ({self.calls_days})")
        if self.recordings_days > self.calls_days:
            raise ValueError(
                f"recordings_days ({self.recordings_days}) must not be more than calls_days ({self.calls_days})"
            )
        return self


class FieldMap(_Section):
    """A custom body: output fields computed from the event."""

    map: Annotated[Mapping[str, str], AfterValidator(check_field_map), *Frozen] = Field(
        description="output field: JMESPath expression over the event"
    )


def _known_form(value: Any) -> Any:
    if value not in ("full", "flat"):
        raise ValueError("must be full, flat, or {map: {field: JMESPath}}")
    return value


def _payload_form(value: Any) -> str:
    return "tag:map" if isinstance(value, Mapping | FieldMap) else "tag:name"


Payload = Annotated[
    Annotated[Literal["full", "flat"], BeforeValidator(_known_form), Tag("tag:name")]
    | Annotated[FieldMap, Tag("tag:map")],
    Discriminator(_payload_form),
]


class SubscriptionOptions(_Section):
    """Where a subscriber receives which events; the same names in `relay.yaml` and in the API."""

    url: SecretUrl = Field(description="URL that events are posted to; or url_file")
    secret: SigningSecret = Field(description="signing secret, whsec_…; or secret_file")
    events: Annotated[tuple[EventPattern, ...], BeforeValidator(as_tuple)] = Field(
        ("call.*",), min_length=1, max_length=32, description="event types to deliver; * is a wildcard"
    )
    sources: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="only calls of these sources; default: all"
    )
    direction: Annotated[tuple[Direction, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="only calls in these directions"
    )
    outcome: Annotated[tuple[Outcome, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="only calls with these outcomes"
    )
    extensions: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], BeforeValidator(whole_numbers_as_text)
        ]
        | None
    ) = Field(None, min_length=1, max_length=10_000, description="only calls of these extensions")
    min_duration_s: float | None = Field(
        None, ge=0, le=86_400, description="only calls that lasted at least this long, in seconds"
    )
    include_raw: bool = Field(False, description="add the provider's original row to the payload")
    payload: Payload = Field("full", description="shape of the body: full, flat, or {map: {field: JMESPath}}")
    headers: Annotated[Mapping[str, SecretStr], AfterValidator(check_headers), *Frozen] = Field(
        default_factory=lambda: MappingProxyType({}), description="extra headers sent with every request"
    )
    max_in_flight: int = Field(10, ge=1, le=1_000, description="maximum number of concurrent requests")
    rate_per_s: float | None = Field(
        None, gt=0, le=10_000, description="maximum requests per second; default: no limit"
    )
    delivery: Literal["at_least_once", "at_most_once"] = Field(
        "at_least_once", description="at_most_once: never retry an attempt whose outcome is unknown"
    )
    description: str = Field("", max_length=500, description="free text, shown in lists")
    enabled: bool = Field(True, description="false: nothing is delivered")

    @model_validator(mode="after")
    def _raw_fits_the_payload(self) -> Self:
        if self.include_raw and self.payload == "flat":
            raise ValueError("include_raw needs payload: full or a map; payload: flat cannot hold it")
        return self

    @model_validator(mode="after")
    def _one_set_of_credentials(self) -> Self:
        if URL(self.url.get_secret_value()).user is not None and any(
            n.lower() == "authorization" for n in self.headers
        ):
            raise ValueError("has credentials in its url and an authorization header; keep one of them")
        return self


def any_source(providers: Mapping[str, ProviderKind]) -> Any:
    """Build the type of a source: the options of whichever provider it names."""
    options = tuple(Annotated[kind.options, Tag(f"tag:{kind.name}")] for kind in providers.values())
    return Annotated[Union[options], Discriminator(_provider_tag)]  # noqa: UP007 - a tuple of types


def _provider_tag(value: Any) -> str:
    # A source that is not a map names no provider: any model rejects it with the message for a map.
    name = (
        value.get("provider", "") if isinstance(value, Mapping) else getattr(value, "provider", next(iter(PROVIDERS)))
    )
    return f"tag:{name}"


Id = Annotated[str, Field(pattern=ID_PATTERN)]

if TYPE_CHECKING:
    AnySource = SourceOptions
else:
    AnySource = any_source(PROVIDERS)


class Settings(BaseSettings):
    """All settings. `load` reads the file and the environment; constructing one directly reads neither."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix="RELAY_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    public_url: PublicUrl | None = Field(
        None, description="public URL of the API; without it, recording links in events are null"
    )
    data_dir: DirectoryPath = Field(
        Path("relay-data"), description="directory of the embedded store and the generated secrets"
    )
    storage_url: StorageUrl = Field(
        default_factory=lambda data: str(data["data_dir"] / "recordings"),
        description="where recordings are stored: a path, s3://bucket/prefix, gs://… or az://…",
    )
    recording_links: Literal["relay", "presigned"] = Field(
        "relay", description="who serves recordings: this relay, or the object store through presigned links"
    )
    api: ApiOptions = Field(default_factory=ApiOptions, description="the API and recording links")
    internal: InternalOptions = Field(default_factory=InternalOptions, description="probes and metrics")
    log: LogOptions = Field(default_factory=LogOptions, description="logging")
    delivery: DeliveryOptions = Field(default_factory=DeliveryOptions, description="delivery to subscribers")
    poll: PollOptions = Field(default_factory=PollOptions, description="polling of providers")
    retention: RetentionOptions = Field(default_factory=RetentionOptions, description="how long data is kept")
    sources: Annotated[Mapping[Id, AnySource], *Frozen] = Field(
        default_factory=lambda: MappingProxyType({}), description="accounts at providers, by id"
    )
    subscriptions: Annotated[Mapping[Id, SubscriptionOptions], *Frozen] = Field(
        default_factory=lambda: MappingProxyType({}), description="subscribers, by id"
    )
    drain_s: float = Field(25, ge=1, le=600, description="seconds that work in flight may take to finish after SIGTERM")
    redis_url: RedisUrl | None = Field(
        None, description="Redis or Valkey to use as the store; default: an embedded Valkey in data_dir"
    )
    secret_key: Annotated[SecretKeys, NoDecode] = Field(
        (), description="key that encrypts secrets and signs links; several separated by commas, newest first"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use the values passed in: `load` merges file and environment, and knows where each value came from."""
        return (init_settings,)

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.api.port and (self.api.host, self.api.port) == (self.internal.host, self.internal.port):
            raise ValueError(f"api.port and internal.port are both {self.api.port}; give each its own")
        return self


MAPS: Final = ("sources", "subscriptions")
SUBSCRIPTION_FILES: Final = {
    "url_file": "file with the URL, instead of url",
    "secret_file": "file with the secret, instead of secret",
}


def changed_outside_maps(old: Settings, new: Settings) -> list[str]:
    """List the changed settings that need a restart: all but sources and subscriptions."""
    changed: list[str] = []
    for name in Settings.model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if name in MAPS or before == after:
            continue
        if isinstance(before, BaseModel):
            fields = type(before).model_fields
            changed += [f"{name}.{field}" for field in fields if getattr(before, field) != getattr(after, field)]
        else:
            changed.append(name)
    return changed


def reveal(options: BaseModel) -> Json:
    """Convert options to JSON types with their secrets readable, to be encrypted and stored; validation reverses it."""
    revealed: Json = revealed_value(options)
    return revealed


def revealed_value(value: Any) -> Any:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case BaseModel():
            return {name: revealed_value(getattr(value, name)) for name in type(value).model_fields}
        case Mapping():
            return {name: revealed_value(inner) for name, inner in value.items()}
        case list() | tuple():
            return [revealed_value(inner) for inner in value]
        case Enum():
            return value.value
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
