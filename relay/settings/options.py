"""What can be told, as frozen options: one field, one default, one description, the unit in the name."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

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
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from yarl import URL

from relay.domain.call import Direction, Outcome
from relay.domain.json import Json
from relay.providers.base import SourceOptions
from relay.settings.values import (
    Directory,
    EventPattern,
    Frozen,
    Host,
    Network,
    PublicUrl,
    RedisUrl,
    SecretKeys,
    SecretUrl,
    SigningSecret,
    StorageUrl,
    Token,
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
    """The port that people may expose: management and recording links."""

    host: Host = Field("127.0.0.1", description="address that the API listens on")
    port: int = Field(8080, ge=0, le=65_535, description="port of the API; 0 takes a free one")
    tokens: tuple[Token, ...] = Field(
        (), description="tokens that may use the API; with an embedded store one is made when there is none"
    )


class InternalOptions(_Section):
    """The port of every role for probes and metrics; not for the public."""

    host: Host = Field("127.0.0.1", description="address of /livez, /readyz and /metrics")
    port: int = Field(9090, ge=0, le=65_535, description="port of /livez, /readyz and /metrics; 0 takes a free one")


class LogOptions(_Section):
    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = Field(
        "info", description="least serious lines that are written"
    )
    format: Annotated[Literal["console", "json"], BeforeValidator(lower)] = Field(
        "console", description="for people, or one JSON object a line"
    )


class DeliveryOptions(_Section):
    allowed_networks: tuple[Network, ...] = Field(
        (), description="private networks that subscribers may live in, where http is allowed too"
    )
    timeout_s: float = Field(15, ge=1, le=120, description="longest that one attempt may take, in seconds")


class Tier(_Section):
    """How often to look how far back."""

    every_s: float = Field(ge=0, le=604_800, description="seconds between two looks this far back; 0 is each poll")
    depth_s: float = Field(ge=60, le=345_600, description="how far back to look, in seconds; at most 96 hours")


class PollOptions(_Section):
    tiers: tuple[Tier, ...] = Field(
        (Tier(every_s=0, depth_s=7_200), Tier(every_s=900, depth_s=93_600), Tier(every_s=21_600, depth_s=280_800)),
        min_length=1,
        max_length=8,
        description="how often to look how far back for calls that appear late, shallowest first",
    )

    @model_validator(mode="after")
    def _each_tier_is_rarer_and_deeper(self) -> Self:
        if self.tiers[0].every_s != 0:
            raise ValueError("the first of the tiers must have every_s: 0, so that each poll looks back somewhere")
        for former, latter in zip(self.tiers, self.tiers[1:], strict=False):
            if latter.every_s <= former.every_s or latter.depth_s <= former.depth_s:
                raise ValueError(
                    "each of the tiers must have a larger every_s and a larger depth_s than the one before"
                )
        return self


class RetentionOptions(_Section):
    calls_days: int = Field(30, ge=1, le=3_650, description="days that a call is kept; not shorter than its events")
    events_days: int = Field(14, ge=10, le=3_650, description="days that an event can be listed and replayed")
    recordings_days: int = Field(30, ge=1, le=3_650, description="days that audio is kept; not longer than its call")

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
    """A body of the subscriber's own shape."""

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
    """What a subscriber wants to hear, and where; the same names in `relay.yaml` and in the API."""

    url: SecretUrl = Field(description="where events are posted to, or url_file")
    secret: SigningSecret = Field(description="whsec_…, which signs every event, or secret_file")
    events: Annotated[tuple[EventPattern, ...], BeforeValidator(as_tuple)] = Field(
        ("call.*",), min_length=1, max_length=32, description="event types; * is a wildcard"
    )
    sources: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="only calls of these sources; absent is all"
    )
    direction: Annotated[tuple[Direction, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="only calls in these directions"
    )
    outcome: Annotated[tuple[Outcome, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, min_length=1, description="only calls that ended like this"
    )
    extensions: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], BeforeValidator(whole_numbers_as_text)
        ]
        | None
    ) = Field(None, min_length=1, max_length=10_000, description="only calls of these extensions")
    min_duration_s: float | None = Field(None, ge=0, le=86_400, description="only calls that took at least this long")
    include_raw: bool = Field(False, description="add the provider's own row to the payload")
    payload: Payload = Field("full", description="form of the body: full, flat, or {map: {field: JMESPath}}")
    headers: Annotated[Mapping[str, SecretStr], AfterValidator(check_headers), *Frozen] = Field(
        default_factory=lambda: MappingProxyType({}), description="headers of your own, added to every post"
    )
    max_in_flight: int = Field(10, ge=1, le=1_000, description="most posts at the same time")
    rate_per_s: float | None = Field(None, gt=0, le=10_000, description="most posts a second; absent is no limit")
    delivery: Literal["at_least_once", "at_most_once"] = Field(
        "at_least_once", description="at_most_once rather loses an event than tells it twice"
    )
    description: str = Field("", max_length=500, description="a note for people")
    enabled: bool = Field(True, description="false: nothing is sent")

    @model_validator(mode="after")
    def _raw_has_a_place(self) -> Self:
        if self.include_raw and self.payload == "flat":
            raise ValueError("has include_raw, for which payload: flat has no place; use full or a map")
        return self

    @model_validator(mode="after")
    def _credentials_are_given_once(self) -> Self:
        if URL(self.url.get_secret_value()).user is not None and any(
            n.lower() == "authorization" for n in self.headers
        ):
            raise ValueError("has credentials in its url and an authorization header too; keep one of them")
        return self


class Settings(BaseSettings):
    """All that the relay is told. Made by `load`; making one directly reads neither file nor environment."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    public_url: PublicUrl | None = Field(
        None, description="where the API is reached from outside; without it recording links are null"
    )
    data_dir: Directory = Field(
        Path("relay-data"), description="directory for the embedded store and the relay's own secrets"
    )
    storage_url: StorageUrl = Field(
        default_factory=lambda data: str(data["data_dir"] / "recordings"),
        description="where audio is kept: a path, s3://bucket/prefix, gs://… or az://…",
    )
    recording_links: Literal["relay", "presigned"] = Field(
        "relay", description="who answers recording links: this relay, or the object store by presigned links"
    )
    api: ApiOptions = Field(default_factory=ApiOptions, description="the port of the API and of recording links")
    internal: InternalOptions = Field(default_factory=InternalOptions, description="the port of probes and metrics")
    log: LogOptions = Field(default_factory=LogOptions, description="what is logged, and how")
    delivery: DeliveryOptions = Field(default_factory=DeliveryOptions, description="how subscribers are dialled")
    poll: PollOptions = Field(default_factory=PollOptions, description="how providers are polled")
    retention: RetentionOptions = Field(default_factory=RetentionOptions, description="how long things are kept")
    sources: Annotated[Mapping[str, SourceOptions], *Frozen] = Field(
        default_factory=lambda: MappingProxyType({}), description="accounts at providers, by id"
    )
    subscriptions: Annotated[Mapping[str, SubscriptionOptions], *Frozen] = Field(
        default_factory=lambda: MappingProxyType({}), description="subscribers, by id"
    )
    drain_s: float = Field(
        25, ge=1, le=600, description="when told to stop, seconds that what is in flight may still take"
    )
    redis_url: RedisUrl | None = Field(
        None, description="Redis or Valkey that holds the ledger; absent is an embedded one in data_dir"
    )
    secret_key: SecretKeys = Field(
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
        """Believe only what is handed in: `load` has merged file and environment, and can say where each came from."""
        return (init_settings,)

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.api.port and (self.api.host, self.api.port) == (self.internal.host, self.internal.port):
            raise ValueError(f"api.port and internal.port are both {self.api.port}; give each its own")
        return self


MAPS: Final = ("sources", "subscriptions")
SUBSCRIPTION_FILES: Final = {
    "url_file": "file that holds the url, instead of url",
    "secret_file": "file that holds the secret, instead of secret",
}


def changed_outside_maps(old: Settings, new: Settings) -> list[str]:
    """Name the settings that differ and are read only at the start: all but sources and subscriptions."""
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
    """Write options as JSON types with their secrets readable, to be encrypted and stored; validating undoes it."""
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
